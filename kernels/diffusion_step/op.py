"""The public operation: checks the arguments and chooses the implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.backend import HAS_TRITON, Backend, choose, require, require_one_device
from fastdiff.kernels.diffusion_step import reference
from fastdiff.kernels.gaussian import ModelMeanType, ModelVarType, Sampler
from fastdiff.kernels.gaussian.arguments import refusal, require_process

IMPLEMENTATIONS = {Backend.TORCH: reference.diffusion_step, Backend.REFERENCE: reference.diffusion_step}
if HAS_TRITON:
    from fastdiff.kernels.diffusion_step import kernel

    IMPLEMENTATIONS[Backend.TRITON] = kernel.step


class Step(NamedTuple):
    """x_{t-1} and, if requested, the predicted x_0."""

    sample: Tensor
    pred_xstart: Tensor | None


def diffusion_step(
    x: Tensor,
    model_output: Tensor,
    t: Tensor,
    tables: Tensor,
    *,
    mean_type: ModelMeanType | str = ModelMeanType.EPSILON,
    var_type: ModelVarType | str = ModelVarType.LEARNED_RANGE,
    sampler: Sampler | str = Sampler.DDPM,
    eta: float = 0.0,
    clip: bool = True,
    noise: Tensor | None = None,
    seed: int | None = None,
    samples: Tensor | None = None,
    pred_xstart: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> Step:
    """x_{t-1} from x_t and the model output: ancestral (DDPM algorithm 2) or DDIM (Song et al. 2021, equation 12).

    x: (N, C, *spatial). model_output: the same shape, or (N, 2C, *spatial) if the variance is learned. Both may have
    any strides. t: (N,) int64 in 0..T-1 on the device; its values are not checked. tables: (T, len(TABLES)), see
    fastdiff.kernels.gaussian.TABLES, float64 if x is float64, otherwise fp32. ``clip`` clamps the predicted x_0 to [-1,
    1]. ``eta`` is DDIM's: 0 is deterministic, 1 has the ancestral noise.

    The noise is ``noise``, of x's shape, or Philox noise (fastdiff.kernels.philox) for ``seed`` in 0..2^64-1, the image
    numbers ``samples`` (N,) int64 (default 0..N-1), step T - t and the elements in NCHW order. Philox noise depends on
    neither batch nor layout. At t = 0 no noise is added.

    Returns sample and, if requested, pred_xstart, with x's shape and the tables' dtype. There is no host sync.
    ValueError if shapes or devices do not match, the noise is missing, or the backend cannot run: the kernel has no
    gradient.
    """
    op = "diffusion_step"
    mean_type, var_type, sampler = ModelMeanType(mean_type), ModelVarType(var_type), Sampler(sampler)
    require_process(op, x, model_output, t, tables, var_type)
    require(eta >= 0, op, "eta must be at least 0, not {}", eta)
    if sampler is Sampler.DDPM or eta:
        require((noise is None) != (seed is None), op, "give either noise or a seed{}", "")
    if noise is not None:
        require(noise.shape == x.shape, op, "noise must be {}, not {}", tuple(x.shape), tuple(noise.shape))
    if seed is not None:
        require(0 <= seed < 2**64, op, "seed must be in 0..2^64-1, not {}", seed)
    if samples is not None:
        fits = samples.shape == t.shape and samples.dtype is torch.int64
        require(fits, op, "samples must be ({},) int64, not {} {}", len(x), tuple(samples.shape), samples.dtype)
    require_one_device(op, x, model_output=model_output, t=t, tables=tables, noise=noise, samples=samples)
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (x, model_output, noise))
    differentiable = wanted and torch.is_grad_enabled()
    unfit = "has no gradient: call it under torch.no_grad()" if differentiable else refusal(model_output, noise)
    run = choose(op, backend, IMPLEMENTATIONS, x, unfit)
    return Step(
        *run(
            x,
            model_output,
            t,
            tables,
            noise,
            seed or 0,
            samples,
            mean_type,
            var_type,
            sampler,
            eta if sampler is Sampler.DDIM else 0.0,
            clip,
            pred_xstart,
        )
    )
