"""attention in Triton, forward and backward: the operators and their launches.

A short sequence is one tile per head: plain softmax, and one backward launch that recomputes the scores and needs only
qkv and dy. A long sequence streams over blocks (Dao 2023, FlashAttention-2), saves the log-sum-exp, and takes two
backward launches, one for dq and one for dk and dv. Nothing is summed across programs.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.kernels.attention import plan
from fastdiff.kernels.attention.backward import (
    attention_backward_at_once,
    attention_backward_keys,
    attention_backward_queries,
)
from fastdiff.kernels.attention.forward import attention_forward
from fastdiff.kernels.launch import launch, register, temporary


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip("ntc", x.stride(), strict=True)}


def _head_dim(qkv: Tensor, heads: int) -> int:
    return qkv.shape[2] // (3 * heads)


def _backward_at_once(qkv: Tensor, heads: int) -> plan.Tiles | None:
    return plan.backward_at_once(qkv.shape[1], _head_dim(qkv, heads), qkv.dtype, plan.has_warpgroups(qkv.device))


def _shared(qkv: Tensor, heads: int, tiles: plan.Tiles) -> dict[str, Any]:
    """Arguments that all kernels share."""
    t, d = qkv.shape[1], _head_dim(qkv, heads)
    first, second = plan.parts(d, qkv.dtype)
    return {
        "qkv": qkv,
        **_strides("qkv", qkv),
        "T": t,
        "heads": heads,
        "scale_log2": d**-0.5 * math.log2(math.e),
        "D": d,
        "D1": first,
        "D2": second,
        "EVEN": t % tiles.queries == 0 and t % tiles.keys == 0,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _blocks(tiles: plan.Tiles) -> dict[str, int]:
    return {"QUERIES": tiles.queries, "KEYS": tiles.keys}


def _outputs(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Uninitialised y, and lse, which is empty if the backward pass does not need it."""
    n, t, width = qkv.shape
    rows: tuple[int, ...] = (n, heads, 2, t) if qkv.dtype is torch.float32 else (n, heads, t)
    if _backward_at_once(qkv, heads) is not None:
        rows = (0,)
    y = torch.empty((n, t, width // 3), dtype=qkv.dtype, device=qkv.device)
    return y, torch.empty(rows, dtype=torch.float32, device=qkv.device)


def attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """y (N, T, C), and lse fp32 (N, heads, T), the log2 of each query's sum of exponentials; (0,) if not needed.

    For fp32 inputs lse is (N, heads, 2, T), see tiles.store_lse.
    """
    y, lse = _outputs(qkv, heads)
    n, t, _ = qkv.shape
    tiles = plan.forward(t, _head_dim(qkv, heads), qkv.dtype, plan.has_warpgroups(qkv.device))
    launch(
        attention_forward,
        (n * heads * triton.cdiv(t, tiles.queries),),
        qkv.device,
        **_shared(qkv, heads, tiles),
        **_blocks(tiles),
        y=y,
        lse=lse,
        AT_ONCE=t <= tiles.keys,
        SAVE_LSE=lse.ndim > 1,
    )
    return y, lse


def attention_backward(dy: Tensor, qkv: Tensor, y: Tensor | None, lse: Tensor | None, heads: int) -> Tensor:
    """dqkv, contiguous, for dy (N, T, C) with any strides; y and lse are needed if the forward pass saved an lse."""
    dqkv = _gradient(dy, qkv)
    n, t, _ = qkv.shape
    if not t:  # EVEN holds for T = 0, so that a grid over the heads would load without masks
        return dqkv
    gradients: dict[str, Any] = {"dy": dy, **_strides("dy", dy), "dqkv": dqkv, "scale": _head_dim(qkv, heads) ** -0.5}
    tiles = _backward_at_once(qkv, heads)
    if tiles is not None:
        known = _shared(qkv, heads, tiles) | gradients
        launch(attention_backward_at_once, (n * heads,), qkv.device, **known, TOKENS=tiles.keys)
        return dqkv
    d, warpgroups = _head_dim(qkv, heads), plan.has_warpgroups(qkv.device)
    delta = temporary((n, heads, t), qkv.device)
    tiles = plan.backward_queries(d, qkv.dtype, warpgroups)
    launch(
        attention_backward_queries,
        (n * heads * triton.cdiv(t, tiles.queries),),
        qkv.device,
        **_shared(qkv, heads, tiles),
        **_blocks(tiles),
        **gradients,
        y=y,
        lse=lse,
        delta=delta,
    )
    tiles = plan.backward_keys(d, qkv.dtype, warpgroups)
    launch(
        attention_backward_keys,
        (n * heads * triton.cdiv(t, tiles.keys),),
        qkv.device,
        **_shared(qkv, heads, tiles),
        **_blocks(tiles),
        **gradients,
        lse=lse,
        delta=delta,
    )
    return dqkv


def _gradient(dy: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    """Uninitialised dqkv, contiguous as the preceding linear layer needs it."""
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


_forward = register(attention, _outputs, repeats=True)
_backward = register(attention_backward, _gradient, repeats=True)


class Attention(torch.autograd.Function):
    """The two operators as a function and its gradient. It saves qkv, and for long sequences y and lse as well."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        """See op.py."""
        y, lse = _forward(qkv, heads)
        ctx.heads = heads
        ctx.save_for_backward(qkv, *((y, lse) if lse.ndim > 1 else (None, None)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """dqkv."""
        qkv, y, lse = ctx.saved_tensors
        return _backward(dy, qkv, y, lse, ctx.heads), None
