"""Classifier-free guidance (Ho & Salimans 2022): away from what the model draws without a class."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.models import NULL_CLASS


def guided(model: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    """A class-conditional model that predicts ``scale`` times the way from without a class to with it.

    1 is the model itself, 0 the model without classes. Both are predicted in one call on twice the batch; a learned
    variance is the one with the class. Equation 6 of the paper, with w = scale - 1; it holds for a prediction of x_0 or
    of the mean as it does for the noise, since each is a linear function of it at a given x_t.
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
