"""Fused AdamW, also for channels_last weights on a CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW (Loshchilov & Hutter 2019), with weights passed in their memory order.

    On a CPU PyTorch 2.13 copies channels_last tensors at every update, which takes as long as the update itself.
    """

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update. Meanwhile channels_last weights (O, I, H, W), gradients and moments are viewed as (O, H, W, I)."""
        weights = [p for group in self.param_groups for p in group["params"] if self._is_turned(p)]
        gradients = [p.grad for p in weights]
        self._permute(weights, (0, 2, 3, 1))
        try:
            return super().step(closure)
        finally:
            self._permute(weights, (0, 3, 1, 2))
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient  # the same tensor object: DDP checks its address

    def _is_turned(self, weight: Tensor) -> bool:
        if weight.device.type != "cpu" or weight.grad is None or weight.is_contiguous():
            return False
        held = [weight, weight.grad, *(moment for name, moment in self.state[weight].items() if name in _MOMENTS)]
        return weight.ndim == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in held)

    def _permute(self, weights: list[Tensor], order: tuple[int, ...]) -> None:
        for weight in weights:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            weight.data, moments = weight.data.permute(order), self.state[weight]
            weight.grad = gradient.permute(order)
            moments.update({name: moments[name].permute(order) for name in _MOMENTS if name in moments})
