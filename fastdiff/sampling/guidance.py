"""Classifier-free guidance (Ho & Salimans 2022): away from the unconditional prediction."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.models import NULL_CLASS


def guided(model: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    """Wrap a class-conditional model to predict u + ``scale`` (c - u), c with the class and u without it.

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
