"""Guidance: the functions that make a model's samples match their class more."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def guided(model: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    """Classifier-free guidance (Ho & Salimans 2022): u + ``scale`` (c - u), c predicted with the class, u without it.

    Scale 1 is the model itself, scale 0 the unconditional model. One call on twice the batch computes both predictions;
    a learned variance is taken from the one with the class. This is equation 6 of the paper with w = scale - 1. It also
    holds for a prediction of x_0 or of the mean, since each is a linear function of the noise at a given x_t.
    """

    def predict(x: Tensor, timesteps: Tensor, y: Tensor, **conditions: Any) -> Tensor:
        doubled = {name: torch.cat([value, value]) for name, value in conditions.items()}
        classes = torch.cat([y, torch.full_like(y, NULL_CLASS)])
        output = model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), y=classes, **doubled)
        with_class, without = output.chunk(2)
        channels = x.shape[1]
        mean = torch.lerp(without[:, :channels], with_class[:, :channels], scale)
        return torch.cat([mean, with_class[:, channels:]], dim=1)

    return predict


def without_class(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An unconditional model as one that takes, and ignores, the class for which a classifier guides it."""

    def predict(x: Tensor, timesteps: Tensor, y: Tensor, **conditions: Any) -> Tensor:
        return model(x, timesteps, **conditions)

    return predict
