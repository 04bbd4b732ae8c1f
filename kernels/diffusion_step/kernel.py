"""diffusion_step in Triton: the registered operator and its plan."""

from typing import Any

import torch
import triton
from torch import Tensor

from fastdiff.kernels.diffusion_step import update
from fastdiff.kernels.gaussian import ModelMeanType, ModelVarType, Sampler
from fastdiff.kernels.gaussian.kernel import dense_like, strides
from fastdiff.kernels.launch import launch, register
from fastdiff.kernels.philox.kernel import signed

BLOCK = 512
WARPS = 4


def diffusion_step(
    x: Tensor,
    model_output: Tensor,
    t: Tensor,
    tables: Tensor,
    noise: Tensor | None,
    seed: int,
    samples: Tensor | None,
    mean_type: str,
    var_type: str,
    sampler: str,
    eta: float,
    clip: bool,
    pred_xstart: bool,
) -> tuple[Tensor, Tensor]:
    """x_{t-1} and the predicted x_0, which is empty unless requested."""
    sample, pred = _outputs(x, pred_xstart)
    x, model_output, flat = x.flatten(2), model_output.flatten(2), sample.flatten(2)
    noise = None if noise is None else noise.flatten(2)
    n, channels, pixels = x.shape
    by_channel = pixels % 4 == 0
    elements = pixels if by_channel else channels * pixels
    block, warps = plan(elements)
    blocks = triton.cdiv(elements, block)
    launch(
        update.diffusion_step,
        (n * blocks,),
        x.device,
        num_warps=warps,
        num_stages=1,
        sample=flat,
        pred=pred.flatten(2) if pred_xstart else None,
        x=x,
        output=model_output,
        noise=noise,
        t=t,
        samples=samples,
        tables=tables.contiguous(),
        seed=seed,
        steps=tables.shape[0],
        eta=eta,
        pixels=pixels,
        blocks=blocks,
        **strides("sample", flat),
        **strides("x", x),
        **strides("output", model_output),
        **strides("noise", x if noise is None else noise),
        t_n=t.stride(0),
        samples_n=0 if samples is None else samples.stride(0),
        CHANNELS=channels,
        BY_CHANNEL=by_channel,
        MEAN_TYPE=mean_type,
        VAR_TYPE=var_type,
        SAMPLER=sampler,
        NOISY=sampler == "ddpm" or eta > 0,
        CLIP=clip,
        B=block,
    )
    return sample, pred


def plan(elements: int) -> tuple[int, int]:
    """Elements and warps per program: four elements, 16 bytes of x, per thread, and no larger than needed."""
    block = min(BLOCK, max(128, triton.next_power_of_2(elements)))
    return block, WARPS * block // BLOCK


def _outputs(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Memory for x_{t-1} and, if the last argument says so, for the predicted x_0."""
    sample = dense_like(x, torch.float32)
    pred = dense_like(x, torch.float32) if rest[-1] else torch.empty(0, dtype=torch.float32, device=x.device)
    return sample, pred


_step = register(diffusion_step, _outputs)


def step(
    x: Tensor,
    model_output: Tensor,
    t: Tensor,
    tables: Tensor,
    noise: Tensor | None,
    seed: int,
    samples: Tensor | None,
    mean_type: ModelMeanType,
    var_type: ModelVarType,
    sampler: Sampler,
    eta: float,
    clip: bool,
    pred_xstart: bool,
) -> tuple[Tensor, Tensor | None]:
    """See op.py."""
    choices = mean_type.value, var_type.value, sampler.value
    sample, pred = _step(x, model_output, t, tables, noise, signed(seed), samples, *choices, eta, clip, pred_xstart)
    return sample, pred if pred_xstart else None
