"""Guidance: the functions that make a model's samples match their class more."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion import GaussianDiffusion
from fastdiff.models import NULL_CLASS

_LOSS_SCALE = 2.0**8
"""In fp16 the gradient of a confident classifier underflows; a power of two changes nothing in bf16 and fp32."""


def class_gradient(classifier: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    """The cond_fn of classifier guidance: ``scale`` times the gradient on x_t of log p(y | x_t).

    ``classifier(x, timesteps)`` returns logits (N, K) of noisy images x (N, C, H, W). The result takes x, timesteps
    (N,) and the classes y (N,) int64, and returns the gradient (N, C, H, W). Dhariwal & Nichol 2021, section 4; with a
    scale above 1 the classifier's distribution is sharpened.
    """

    def cond_fn(x: Tensor, timesteps: Tensor, y: Tensor, **_: Any) -> Tensor:
        with torch.enable_grad():
            noisy = x.detach().requires_grad_()
            log_probability = F.log_softmax(classifier(noisy, timesteps).float(), dim=1)  # (N, K)
            chosen = log_probability.gather(1, y[:, None]).sum()
            return torch.autograd.grad(chosen * _LOSS_SCALE, noisy)[0] * (scale / _LOSS_SCALE)

    return cond_fn


def guided(
    model: Callable[..., Tensor], scale: float, guide: Callable[..., Tensor] | None = None
) -> Callable[..., Tensor]:
    """The model's prediction, away from a worse one: worse + ``scale`` (model - worse).

    The worse prediction is the ``guide``'s (autoguidance: Karras et al. 2024, "Guiding a diffusion model with a bad
    version of itself"). Without a guide it is the model's own without the class (classifier-free guidance:
    Ho & Salimans 2022, equation 6 with w = scale - 1), computed in one call on twice the batch.

    Scale 1 is the model itself, scale 0 the worse prediction. A learned variance is the model's. This holds for every
    prediction that is a linear function of the noise at a given x_t, such as x_0 or the mean.
    """

    def with_and_without(x: Tensor, timesteps: Tensor, y: Tensor, **conditions: Any) -> Iterable[Tensor]:
        doubled = {name: torch.cat([value, value]) for name, value in conditions.items()}
        classes = torch.cat([y, torch.full_like(y, NULL_CLASS)])
        return model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), y=classes, **doubled).chunk(2)

    def predict(x: Tensor, timesteps: Tensor, **conditions: Any) -> Tensor:
        if guide is None:
            better, worse = with_and_without(x, timesteps, **conditions)
        else:
            better, worse = model(x, timesteps, **conditions), guide(x, timesteps, **conditions)
        channels = x.shape[1]
        mean = torch.lerp(worse[:, :channels], better[:, :channels], scale)
        return torch.cat([mean, better[:, channels:]], dim=1)

    return predict


def guided_steps(diffusion: GaussianDiffusion, interval: tuple[float, float] | None) -> list[bool]:
    """Whether the step at each t, 0 first, is guided: where sqrt(1 - alpha_bar) / sqrt(alpha_bar) is in the interval.

    This is Karras' noise level sigma. The interval is open below and closed above, as in Kynkäänniemi et al. 2024
    ("Applying guidance in a limited interval"); None guides every step. ValueError if it guides none.
    """
    sigma = diffusion.sqrt_recipm1_alphas_cumprod
    low, high = interval or (0.0, float("inf"))
    inside = (sigma > low) & (sigma <= high)
    if not inside.any():
        raise ValueError(
            f"guidance_interval {low:g},{high:g}: no step is within; the noise levels of these {len(sigma)} steps run "
            f"from {sigma[0]:.3g} to {sigma[-1]:.3g}"
        )
    return inside.tolist()


def in_turn(functions: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """A function whose first call is the first one's, the second call the second one's, and so on."""
    left = iter(functions)
    return lambda *args, **kwargs: next(left)(*args, **kwargs)


def no_gradient(x: Tensor, timesteps: Tensor, **_: Any) -> Tensor:
    """The cond_fn that guides nowhere."""
    return torch.zeros_like(x)


def without_class(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An unconditional model as one that takes, and ignores, the class for which a classifier guides it."""

    def predict(x: Tensor, timesteps: Tensor, y: Tensor, **conditions: Any) -> Tensor:
        return model(x, timesteps, **conditions)

    return predict
