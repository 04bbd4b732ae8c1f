"""diffusion_loss in Triton: both passes as registered operators, and the gradient."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.kernels.diffusion_loss import backward, forward
from fastdiff.kernels.gaussian import LossType, ModelMeanType, ModelVarType
from fastdiff.kernels.gaussian.kernel import dense_like, strides
from fastdiff.kernels.launch import launch, processors, register

FORWARD_TILE = 2048
"""Elements per tile: four per thread in 16 warps, enough for one program to keep a multiprocessor's memory busy."""

BACKWARD_TILE = 512

ELEMENTS_A_WARP = 128

LEAST_TILES = 8
"""Fewest tiles per program for which a sample is split, because a split costs a second launch."""

MOST_CHANNELS = 16


@dataclass(frozen=True)
class Tiles:
    """How a sample is divided into tiles of P pixels by C channels."""

    pixels: int
    channels: int
    count: int
    warps: int

    @classmethod
    def of(cls, channels: int, pixels: int, most: int) -> "Tiles":
        """Tiles of up to ``most`` elements. A tile has all channels of a pixel, adjacent in channels-last outputs."""
        c = min(triton.next_power_of_2(channels), MOST_CHANNELS)
        p = min(most // c, max(32, triton.next_power_of_2(pixels)))
        return cls(p, c, triton.cdiv(pixels, p) * triton.cdiv(channels, c), max(1, p * c // ELEMENTS_A_WARP))


def splits_of(samples: int, tiles: int, device: torch.device) -> int:
    """Programs per sample: one, without a second launch, unless that leaves processors idle with much to read."""
    return max(1, min(4 * processors(device) // max(1, samples), tiles // LEAST_TILES))


def _scales(loss_type: str, var_type: str, steps: int, elements: int) -> dict[str, Any]:
    """Divisors of the sums over a sample's elements, the weight of vb in the loss, and the parts that the loss has."""
    kind = LossType(loss_type)
    weight = steps / 1000 if kind is LossType.RESCALED_MSE else 1.0
    return {
        "per_mse": float(elements),
        "per_vb": math.log(2) * elements / weight,
        "loss_of_vb": float(steps) if kind is LossType.RESCALED_KL else 1.0,
        "MSE": not kind.is_vb,
        "VB": kind.is_vb or ModelVarType(var_type).learned,
    }


def _inputs(
    model_output: Tensor, x_start: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, tables: Tensor
) -> dict[str, Any]:
    tensors = {"output": model_output, "x_start": x_start, "x_t": x_t, "noise": noise}
    flat = {name: tensor.flatten(2) for name, tensor in tensors.items()}
    arguments: dict[str, Any] = {**flat, "t": t, "t_n": t.stride(0), "tables": tables.contiguous()}
    for name, tensor in flat.items():
        arguments |= strides(name, tensor)
    return arguments


def diffusion_loss_forward(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    tables: Tensor,
    mean_type: str,
    var_type: str,
    loss_type: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, mse and vb, (N,) each; mse or vb is (0,) if it is not part of the loss."""
    loss, mse, vb = _losses(model_output, x_start, x_t, var_type, loss_type)
    inputs = _inputs(model_output, x_start, x_t, noise, t, tables)
    n, channels, pixels = inputs["x_t"].shape
    tiles = Tiles.of(channels, pixels, FORWARD_TILE)
    splits = splits_of(n, tiles.count, x_t.device)
    partial = torch.empty((2, n, splits), dtype=torch.float32, device=x_t.device) if splits > 1 else None
    shared: dict[str, Any] = {"mse": mse, "vb": vb, "loss": loss, "partial": partial, "SPLITS": splits}
    shared |= _scales(loss_type, var_type, tables.shape[0], channels * pixels)
    launch(
        forward.diffusion_loss_forward,
        (n * splits,),
        x_t.device,
        num_warps=tiles.warps,
        num_stages=1,
        **inputs,
        **shared,
        pixels=pixels,
        tiles=tiles.count,
        per_split=triton.cdiv(tiles.count, splits),
        CHANNELS=channels,
        MEAN_TYPE=mean_type,
        VAR_TYPE=var_type,
        P=tiles.pixels,
        C=tiles.channels,
    )
    if partial is not None:
        at = {name: inputs[name] for name in ("t", "tables", "t_n")}
        width = triton.next_power_of_2(splits)
        launch(forward.diffusion_loss_finish, (n,), x_t.device, num_warps=1, num_stages=1, **shared, **at, S=width)
    return loss, mse, vb


def _losses(model_output: Tensor, x_start: Tensor, x_t: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, var_type, loss_type = rest
    scales = _scales(loss_type, var_type, 1, 1)
    n = x_t.shape[0]
    sizes = n, n if scales["MSE"] else 0, n if scales["VB"] else 0
    loss, mse, vb = (torch.empty(size, dtype=torch.float32, device=x_t.device) for size in sizes)
    return loss, mse, vb


def diffusion_loss_backward(
    grad_loss: Tensor | None,
    grad_mse: Tensor | None,
    grad_vb: Tensor | None,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    tables: Tensor,
    mean_type: str,
    var_type: str,
    loss_type: str,
) -> Tensor:
    """The gradient with respect to model_output, in its dtype."""
    grad_output = dense_like(model_output, model_output.dtype)
    flat = grad_output.flatten(2)
    inputs = _inputs(model_output, x_start, x_t, noise, t, tables)
    n, channels, pixels = inputs["x_t"].shape
    tiles = Tiles.of(channels, pixels, BACKWARD_TILE)
    scales = _scales(loss_type, var_type, tables.shape[0], channels * pixels)
    grads: dict[str, Any] = {
        "grad_loss": grad_loss,
        "grad_mse": grad_mse if scales["MSE"] else None,
        "grad_vb": grad_vb if scales["VB"] else None,
    }
    launch(
        backward.diffusion_loss_backward,
        (n * tiles.count,),
        x_t.device,
        num_warps=tiles.warps,
        num_stages=1,
        grad_output=flat,
        **strides("grad_output", flat),
        **grads,
        **{f"{name}_n": 0 if grad is None else grad.stride(0) for name, grad in grads.items()},
        **inputs,
        **scales,
        pixels=pixels,
        tiles=tiles.count,
        CHANNELS=channels,
        MEAN_TYPE=mean_type,
        VAR_TYPE=var_type,
        P=tiles.pixels,
        C=tiles.channels,
    )
    return grad_output


def _gradient(grad_loss: Any, grad_mse: Any, grad_vb: Any, model_output: Tensor, *rest: Any) -> Tensor:
    return dense_like(model_output, model_output.dtype)


_forward = register(diffusion_loss_forward, _losses)
_backward = register(diffusion_loss_backward, _gradient)


class _DiffusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(*arguments[:6])
        ctx.choices = arguments[6:]
        ctx.set_materialize_grads(False)
        return _forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = _backward(*grads, *ctx.saved_tensors, *ctx.choices)
        return gradient, *[None] * 8


def diffusion_loss(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    tables: Tensor,
    mean_type: ModelMeanType,
    var_type: ModelVarType,
    loss_type: LossType,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See op.py."""
    choices = mean_type.value, var_type.value, loss_type.value
    loss, mse, vb = _DiffusionLoss.apply(model_output, x_start, x_t, noise, t, tables, *choices)
    has_mse, has_vb = not loss_type.is_vb, loss_type.is_vb or var_type.learned
    return loss, mse if has_mse else None, vb if has_vb else None
