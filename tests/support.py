"""What the tests of several folders share: random weights, a model's inputs and gradients, and refusals."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from fastdiff import ModelConfig
from fastdiff.models import Classifier, UNet

Model = TypeVar("Model", bound=nn.Module)


def randomise(model: Model, seed: int | None = None, *, std: float | None = 0.05, only_zeros: bool = False) -> Model:
    """Random weights, so that every input has its effect: a fresh model's last layers are zero.

    Normal numbers times ``std`` are added, to what is zero throughout or to every weight. Without ``std`` numbers in
    the scale of the fan-in, for vectors around 1, take the weights' place. PyTorch's own generator draws them unless
    there is a ``seed``.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if only_zeros and p.any():
                continue
            z = torch.randn(p.shape, generator=generator)
            if std is not None:
                p.add_(std * z)
            else:
                p.copy_(1 + 0.1 * z if p.ndim == 1 else z / p[0].numel() ** 0.5)
    return model


def conditions(config: ModelConfig, batch: int = 2, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Classes and images of low resolution, as far as a model of ``config`` takes them."""
    found = {}
    if config.class_cond:
        found["y"] = torch.arange(batch) % config.num_classes
    if config.small_size:
        found["low_res"] = torch.randn(batch, 3, config.small_size, config.small_size, generator=generator)
    return found


def inputs(model: UNet | Classifier, batch: int = 2) -> dict[str, Tensor]:
    """All arguments of the model."""
    generator = torch.Generator().manual_seed(1)
    side = model.config.image_size
    return {
        "x": torch.randn(batch, 3, side, side, generator=generator),
        "timesteps": torch.linspace(3.25, 990, batch),
        **(conditions(model.config, batch, generator) if isinstance(model, UNet) else {}),
    }


def gradients(
    model: nn.Module, given: dict[str, Tensor], call: Callable[..., Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of its mean square in every parameter; ``call`` is the model in another form."""
    model.zero_grad()
    out = (model if call is None else call)(**given)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def refusal(call: Callable[[], object], match: str | None = None) -> str:
    """The one line of the ValueError with which a call refuses bad input."""
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert str(caught.value).isprintable()
    return str(caught.value)
