"""The cases on which the fused operations are timed: shapes of the released models, and the alternatives."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.config import DiffusionConfig
from fastdiff.diffusion import build_diffusion
from fastdiff.kernels import attention, diffusion_loss, diffusion_step, group_norm_silu

Forward = Callable[..., Tensor]
Inputs = dict[str, Tensor]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True, eq=False)
class Case:
    """One operation at one shape, with the candidates to compare."""

    op: str
    shape: str
    dtype: torch.dtype
    layout: str
    costs: Mapping[str, tuple[int, int]]
    """By direction, "forward" and, if the operation has it, "backward": the fewest bytes to move, and the
    floating-point operations of matrix products."""
    inputs: Callable[[int, torch.device], Inputs]  # by seed; "gradient" is that of the output
    reference: Forward
    candidates: Mapping[str, Forward]

    @property
    def directions(self) -> tuple[str, ...]:
        """Forward, and backward if the operation has it."""
        return tuple(self.costs)


def cases(device: torch.device) -> Iterator[Case]:
    """The published comparisons in bf16: at training sizes on a GPU, at small sizes on a CPU."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16
    for layout in LAYOUTS:
        for n, channels, size in GPU_NORMS if on_gpu else [(4, 64, 32), (4, 192, 16)]:
            yield norm_case(n, channels, size, dtype, layout, on_gpu)
    yield norm_case(*GPU_DECODER if on_gpu else (4, 128, 16), dtype, "channels_last", on_gpu, two=True)
    for n, tokens, heads, d in GPU_ATTENTIONS if on_gpu else [(4, 64, 4, 64), (4, 256, 4, 32)]:
        yield attention_case(n, tokens, heads, d, dtype, on_gpu)
    for n, size in GPU_IMAGES if on_gpu else [(16, 32)]:
        for layout in LAYOUTS:
            yield step_case(n, size, layout, on_gpu, philox=True)
            yield step_case(n, size, layout, on_gpu, philox=False)
            yield loss_case(n, size, layout, on_gpu)


GPU_NORMS = [
    *((64, 128, 64), (64, 192, 64), (96, 384, 32), (128, 256, 32), (128, 576, 32)),  # over 64 MB in bf16
    *((128, 576, 16), (128, 1152, 16), (128, 512, 8), (128, 768, 8)),
]
"""Batch, channels, height and width."""

GPU_DECODER = 64, 576, 64
"""The same of a norm of two inputs, the first with two thirds of the channels."""

GPU_ATTENTIONS = [
    *((128, tokens, 4, d) for tokens in (64, 256) for d in (32, 64, 96, 128, 144, 192)),
    *((64, 512, 4, d) for d in (64, 128)),
    *((32, 1024, 4, d) for d in (64, 96, 128)),
    *((16, 2048, 4, 64), (8, 4096, 4, 64)),
]
"""Batch, tokens, heads, channels of a head."""

GPU_IMAGES = [(1024, 64), (64, 256)]
"""Batch, height and width of the images of a step or a loss."""


def norm_case(
    n: int, channels: int, size: int, dtype: torch.dtype, layout: str, on_gpu: bool, two: bool = False
) -> Case:
    """group_norm_silu with scale and shift; if ``two``, x is in two parts, which the alternatives concatenate."""

    first = 2 * channels // 3

    def inputs(seed: int, device: torch.device) -> Inputs:
        torch.manual_seed(seed)
        images = (torch.randn(n, channels, size, size, device=device, dtype=dtype) for _ in range(2))
        x, gradient = (image.contiguous(memory_format=LAYOUTS[layout]) for image in images)
        scale, shift = (0.5 * torch.randn(n, 2 * channels, device=device, dtype=dtype)).chunk(2, dim=1)
        weight, bias = (torch.randn(channels, device=device) for _ in range(2))
        learned = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift}
        if two:
            parts = (
                part.contiguous(memory_format=LAYOUTS[layout]) for part in x.split([first, channels - first], dim=1)
            )
            learned["x"], learned["second"] = parts
        return {name: tensor.requires_grad_() for name, tensor in learned.items()} | {"gradient": gradient}

    aten = _of_two(_aten_norm) if two else _aten_norm
    candidates = _ours(group_norm_silu, on_gpu, "reference", "torch") | {"eager ATen": aten}
    if on_gpu:
        candidates["compile"] = torch.compile(aten, dynamic=False, fullgraph=True)
        if find_spec("liger_kernel"):
            candidates["Liger norm, then eager"] = _of_two(_liger_norm) if two else _liger_norm
    wide = f"{first}+{channels - first}" if two else channels
    shape, n_bytes = f"N{n} C{wide} {size}x{size}", n * channels * size**2 * dtype.itemsize
    costs = {"forward": (2 * n_bytes, 0), "backward": (3 * n_bytes, 0)}
    return Case("group_norm_silu", shape, dtype, layout, costs, inputs, candidates["reference"], candidates)


def _ours(run: Forward, on_gpu: bool, *backends: str) -> dict[str, Forward]:
    """The candidates that are backends of an operation: on a GPU Triton, too."""
    return {name: partial(run, backend=name) for name in (*["triton"] * on_gpu, *backends)}


def _of_two(norm: Forward) -> Forward:
    """The norm of two inputs that are concatenated first."""
    return lambda x, second, **layer: norm(torch.cat([x, second], dim=1), **layer)


def _aten_norm(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """In x's precision throughout, as it is usually written."""
    y = F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype))
    return F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def _liger_norm(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    y = LigerGroupNormFunction.apply(x, weight.to(x.dtype), bias.to(x.dtype), x.shape[1], 32, 1e-5)
    return F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def attention_case(n: int, tokens: int, heads: int, d: int, dtype: torch.dtype, on_gpu: bool) -> Case:
    """Attention on packed qkv; the baselines split it and, in the backward pass, concatenate its gradient."""

    def inputs(seed: int, device: torch.device) -> Inputs:
        torch.manual_seed(seed)
        qkv = torch.randn(n, tokens, 3 * heads * d, device=device, dtype=dtype)
        gradient = torch.randn(n, tokens, heads * d, device=device, dtype=dtype)
        return {"qkv": qkv.requires_grad_(), "gradient": gradient}

    candidates = _ours(partial(attention, heads=heads), on_gpu, "reference", *["torch"] * (not on_gpu))
    if on_gpu:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            name = f"SDPA, {backend.name.lower().removesuffix('_attention')}"
            candidates[name] = partial(_sdpa, heads=heads, backend=backend)
    n_bytes, products = n * tokens * heads * d * dtype.itemsize, 2 * n * heads * tokens**2 * d
    costs = {"forward": (4 * n_bytes, 2 * products), "backward": (7 * n_bytes, 5 * products)}
    shape = f"N{n} T{tokens} H{heads} d{d}"
    return Case("attention", shape, dtype, "packed", costs, inputs, candidates["reference"], candidates)


def _sdpa(qkv: Tensor, heads: int, backend: SDPBackend) -> Tensor:
    n, t, width = qkv.shape
    q, k, v = qkv.view(n, t, heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width // 3)


def step_case(n: int, size: int, layout: str, on_gpu: bool, philox: bool) -> Case:
    """An ancestral step with a learned range of variances, in fp32; ``layout`` is that of the model's output."""

    def inputs(seed: int, device: torch.device) -> Inputs:
        (x, _, noise), common = _process_inputs(n, size, layout, seed, device)
        return common | {"x": x} | ({} if philox else {"noise": noise})

    costs = {"forward": (n * 3 * size**2 * (16 if philox else 20), 0)}
    shape = f"N{n} {size}x{size} noise {'drawn inside' if philox else 'given'}"
    candidates = _ours(_step, on_gpu, "reference")
    if on_gpu and not philox:
        candidates["compile"] = torch.compile(candidates["reference"], dynamic=False, fullgraph=True)
    return Case("diffusion_step", shape, torch.float32, layout, costs, inputs, candidates["reference"], candidates)


def loss_case(n: int, size: int, layout: str, on_gpu: bool) -> Case:
    """The hybrid objective in fp32; ``layout`` is that of the model's output."""

    def inputs(seed: int, device: torch.device) -> Inputs:
        (x_t, x_start, noise), common = _process_inputs(n, size, layout, seed, device)
        common["model_output"].requires_grad_()
        gradient = torch.ones(n, device=device)
        return common | {"x_t": x_t, "x_start": x_start.clamp(-1, 1), "noise": noise, "gradient": gradient}

    elements = n * 3 * size**2
    costs = {"forward": (elements * 20, 0), "backward": (elements * 28, 0)}
    candidates = _ours(_loss, on_gpu, "reference")
    if on_gpu:
        candidates["compile"] = torch.compile(candidates["reference"], dynamic=False, fullgraph=True)
    shape = f"N{n} {size}x{size}"
    return Case("diffusion_loss", shape, torch.float32, layout, costs, inputs, candidates["reference"], candidates)


def _process_inputs(n: int, size: int, layout: str, seed: int, device: torch.device) -> tuple[Tensor, Inputs]:
    """Three batches of images (3, n, 3, size, size), and the arguments that a step and a loss share."""
    torch.manual_seed(seed)
    diffusion = build_diffusion(DiffusionConfig(learn_sigma=True))
    images = torch.randn(3, n, 3, size, size, device=device)
    output = torch.randn(n, 6, size, size, device=device).contiguous(memory_format=LAYOUTS[layout])
    t = torch.randint(diffusion.num_timesteps, (n,), device=device)
    return images, {"model_output": output, "t": t, "tables": diffusion.step_tables(device, torch.float32)}


def _step(
    x: Tensor, model_output: Tensor, t: Tensor, tables: Tensor, noise: Tensor | None = None, *, backend: str
) -> Tensor:
    seed = 1 if noise is None else None
    return diffusion_step(x, model_output, t, tables, noise=noise, seed=seed, backend=backend).sample


def _loss(
    model_output: Tensor, x_start: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, tables: Tensor, backend: str
) -> Tensor:
    return diffusion_loss(model_output, x_start, x_t, noise, t, tables, backend=backend).loss
