"""The public operation: checks the arguments and chooses the implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.backend import HAS_TRITON, Backend, choose, require, require_one_device
from fastdiff.kernels.diffusion_loss import reference
from fastdiff.kernels.gaussian import LossType, ModelMeanType, ModelVarType
from fastdiff.kernels.gaussian.arguments import refusal, require_process

IMPLEMENTATIONS = {Backend.TORCH: reference.diffusion_loss, Backend.REFERENCE: reference.diffusion_loss}
if HAS_TRITON:
    from fastdiff.kernels.diffusion_loss import kernel

    IMPLEMENTATIONS[Backend.TRITON] = kernel.diffusion_loss


class Losses(NamedTuple):
    """The loss and its parts, each (N,); None for a part that the objective does not have."""

    loss: Tensor
    mse: Tensor | None
    vb: Tensor | None


def diffusion_loss(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    tables: Tensor,
    *,
    mean_type: ModelMeanType | str = ModelMeanType.EPSILON,
    var_type: ModelVarType | str = ModelVarType.LEARNED_RANGE,
    loss_type: LossType | str = LossType.RESCALED_MSE,
    backend: Backend | str = Backend.AUTO,
) -> Losses:
    """The objectives of Nichol & Dhariwal 2021, section 3, per sample.

    mse is the mean squared error of the model's prediction; vb is the variational bound's term at t in bits per
    dimension (DDPM equation 5: the discretised likelihood at t = 0, else a KL divergence). MSE and RESCALED_MSE:
    loss = w mse for the tables' loss_weight w at t, plus vb if the variance is learned; vb then trains only the
    variance. RESCALED_MSE weights vb by T / 1000. KL: loss = vb. RESCALED_KL: loss = T vb.

    model_output: (N, C, *spatial), or (N, 2C, *spatial) if the variance is learned. x_start, x_t, noise: (N, C,
    *spatial). All may have any strides. t: (N,) int64 in 0..T-1 on the device; its values are not checked. tables: (T,
    len(TABLES)), see fastdiff.kernels.gaussian.TABLES, float64 if x_t is float64, otherwise fp32. ValueError if shapes
    or devices do not match or the backend cannot run: the kernels have a gradient only for model_output.

    The Triton kernels add in an order that depends on the number of multiprocessors: bits are equal on the same kind of
    GPU at the same batch size.
    """
    op = "diffusion_loss"
    mean_type, var_type, loss_type = ModelMeanType(mean_type), ModelVarType(var_type), LossType(loss_type)
    require_process(op, x_t, model_output, t, tables, var_type)
    for name, tensor in (("x_start", x_start), ("noise", noise)):
        require(tensor.shape == x_t.shape, op, "{} must be {}, not {}", name, tuple(x_t.shape), tuple(tensor.shape))
    require_one_device(op, x_t, model_output=model_output, x_start=x_start, noise=noise, t=t, tables=tables)
    others = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_start, x_t, noise))
    unfit = "has a gradient for model_output alone" if others else refusal(model_output, x_start, noise)
    run = choose(op, backend, IMPLEMENTATIONS, x_t, unfit)
    return Losses(*run(model_output, x_start, x_t, noise, t, tables, mean_type, var_type, loss_type))
