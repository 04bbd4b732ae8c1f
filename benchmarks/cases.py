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
Inputs = dict[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class Case:
    """One operation at one shape, with the candidates to compare."""

    op: str
    shape: str
    dtype: torch.dtype
    layout: str
    forward_cost: tuple[int, int]  # the fewest bytes to move, and the floating-point operations of matrix products
    backward_cost: tuple[int, int] | None
    inputs: Callable[[int, torch.device], Inputs]  # by seed; "gradient" is that of the output
    reference: Forward
    candidates: Mapping[str, Forward]

    @property
    def directions(self) -> tuple[str, ...]:
        """Forward, and backward if the operation has it."""
        return ("forward", "backward") if self.backward_cost else ("forward",)

    def cost(self, direction: str) -> tuple[int, int]:
        """Bytes and floating-point operations."""
        cost = self.forward_cost if direction == "forward" else self.backward_cost
        assert cost is not None
        return cost

    @staticmethod
    def widened(inputs: Inputs) -> Inputs:
        """The same numbers in float64, for the true results."""

        def wide(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or not tensor.is_floating_point():
                return tensor
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        return {name: wide(tensor) for name, tensor in inputs.items()}


def cases(device: torch.device, autotune: bool = False) -> Iterator[Case]:
    """The published comparisons in bf16: at training sizes on a GPU, at small sizes on a CPU.

    ``autotune`` adds torch.compile's max-autotune, which takes minutes.
    """
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16
    norms = GPU_NORMS if on_gpu else [(4, 64, 32), (4, 192, 16)]
    for layout in ("contiguous", "channels_last"):
        for n, channels, size in norms:
            yield norm_case(n, channels, size, dtype, layout, on_gpu, autotune)
    for n, tokens, heads, d in GPU_ATTENTIONS if on_gpu else [(4, 64, 4, 64), (4, 256, 4, 32)]:
        yield attention_case(n, tokens, heads, d, dtype, on_gpu)
    for n, size in [(1024, 64), (64, 256)] if on_gpu else [(16, 32)]:
        for layout in ("contiguous", "channels_last"):
            yield step_case(n, size, layout, on_gpu, philox=True)
            yield step_case(n, size, layout, on_gpu, philox=False)
            yield loss_case(n, size, layout, on_gpu)


GPU_NORMS = [
    (64, 128, 64),
    (64, 192, 64),
    (96, 384, 32),
    (128, 256, 32),
    (128, 576, 32),
    (128, 576, 16),
    (128, 1152, 16),
    (128, 512, 8),
    (128, 768, 8),
]
"""Batch, channels, height and width; the first five are over 64 MB in bf16."""

GPU_ATTENTIONS = [
    *((128, tokens, 4, d) for tokens in (64, 256) for d in (32, 64, 96, 128, 144, 192)),
    *((64, 512, 4, d) for d in (64, 128)),
    *((32, 1024, 4, d) for d in (64, 96, 128)),
    (16, 2048, 4, 64),
    (8, 4096, 4, 64),
]
"""Batch, tokens, heads, channels of a head."""


def norm_case(
    n: int, channels: int, size: int, dtype: torch.dtype, layout: str, on_gpu: bool, autotune: bool = False
) -> Case:
    """group_norm_silu with scale and shift."""

    def inputs(seed: int, device: torch.device) -> Inputs:
        torch.manual_seed(seed)
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        x, gradient = (
            torch.randn(n, channels, size, size, device=device, dtype=dtype).contiguous(memory_format=memory_format)
            for _ in range(2)
        )
        scale, shift = (0.5 * torch.randn(n, 2 * channels, device=device, dtype=dtype)).chunk(2, dim=1)
        return {
            "x": x.requires_grad_(),
            "weight": torch.randn(channels, device=device).requires_grad_(),
            "bias": torch.randn(channels, device=device).requires_grad_(),
            "scale": scale.requires_grad_(),
            "shift": shift.requires_grad_(),
            "gradient": gradient,
        }

    elements, bytes_each = n * channels * size**2, dtype.itemsize
    candidates: dict[str, Forward] = {}
    if on_gpu:
        candidates["triton"] = partial(group_norm_silu, backend="triton")
    candidates |= {
        "reference": partial(group_norm_silu, backend="reference"),
        "torch": partial(group_norm_silu, backend="torch"),
        "eager ATen": _aten_norm,
    }
    if on_gpu:
        candidates["compile"] = torch.compile(_aten_norm, dynamic=False, fullgraph=True)
        if autotune:
            candidates["compile, max-autotune"] = torch.compile(
                _aten_norm, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs"
            )
        if find_spec("liger_kernel"):
            candidates["Liger norm, then eager"] = _liger_norm
    return Case(
        "group_norm_silu",
        f"N{n} C{channels} {size}x{size}",
        dtype,
        layout,
        (2 * elements * bytes_each, 0),
        (3 * elements * bytes_each, 0),
        inputs,
        partial(group_norm_silu, backend="reference"),
        candidates,
    )


def _aten_norm(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """In x's precision throughout, as it is usually written."""
    y = F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype))
    return F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def _liger_norm(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    y = LigerGroupNormFunction.apply(x, x.shape[1], 32, weight.to(x.dtype), bias.to(x.dtype), 1e-5)
    return F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def attention_case(n: int, tokens: int, heads: int, d: int, dtype: torch.dtype, on_gpu: bool) -> Case:
    """Attention on packed qkv; the baselines split it and, in the backward pass, concatenate its gradient."""

    def inputs(seed: int, device: torch.device) -> Inputs:
        torch.manual_seed(seed)
        qkv = torch.randn(n, tokens, 3 * heads * d, device=device, dtype=dtype)
        gradient = torch.randn(n, tokens, heads * d, device=device, dtype=dtype)
        return {"qkv": qkv.requires_grad_(), "gradient": gradient}

    elements, products = n * tokens * heads * d, 2 * n * heads * tokens**2 * d
    names = (
        {"reference": "reference", "torch": "torch"} if not on_gpu else {"triton": "triton", "reference": "reference"}
    )
    candidates: dict[str, Forward] = {
        name: partial(attention, heads=heads, backend=backend) for name, backend in names.items()
    }
    if on_gpu:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            candidates[f"SDPA, {backend.name.lower().removesuffix('_attention')}"] = partial(
                _sdpa, heads=heads, backend=backend
            )
    return Case(
        "attention",
        f"N{n} T{tokens} H{heads} d{d}",
        dtype,
        "packed",
        (4 * elements * dtype.itemsize, 2 * products),
        (7 * elements * dtype.itemsize, 5 * products),
        inputs,
        partial(attention, heads=heads, backend="reference"),
        candidates,
    )


def _sdpa(qkv: Tensor, heads: int, backend: SDPBackend) -> Tensor:
    n, t, width = qkv.shape
    q, k, v = qkv.view(n, t, heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width // 3)


def step_case(n: int, size: int, layout: str, on_gpu: bool, philox: bool) -> Case:
    """An ancestral step with a learned range of variances, in fp32; ``layout`` is that of the model's output."""
    inputs = partial(_process_inputs, n, size, layout, loss=False, noise=not philox)
    candidates = _process_candidates(_step, on_gpu, compiled=not philox)
    elements, given = n * 3 * size**2, "drawn inside" if philox else "given"
    cost = (elements * (16 if philox else 20), 0)
    return Case(
        "diffusion_step",
        f"N{n} {size}x{size} noise {given}",
        torch.float32,
        layout,
        cost,
        None,
        inputs,
        partial(_step, backend="reference"),
        candidates,
    )


def loss_case(n: int, size: int, layout: str, on_gpu: bool) -> Case:
    """The hybrid objective in fp32; ``layout`` is that of the model's output."""
    elements = n * 3 * size**2
    return Case(
        "diffusion_loss",
        f"N{n} {size}x{size}",
        torch.float32,
        layout,
        (elements * 20, 0),
        (elements * 28, 0),
        partial(_process_inputs, n, size, layout, loss=True, noise=True),
        partial(_loss, backend="reference"),
        _process_candidates(_loss, on_gpu, compiled=True),
    )


def _process_candidates(run: Forward, on_gpu: bool, compiled: bool) -> dict[str, Forward]:
    candidates: dict[str, Forward] = {"reference": partial(run, backend="reference")}
    if on_gpu:
        candidates = {"triton": partial(run, backend="triton"), **candidates}
        if compiled:
            candidates["compile"] = torch.compile(partial(run, backend="reference"), dynamic=False, fullgraph=True)
    return candidates


def _process_inputs(
    n: int, size: int, layout: str, seed: int, device: torch.device, *, loss: bool, noise: bool
) -> Inputs:
    torch.manual_seed(seed)
    diffusion = build_diffusion(DiffusionConfig(learn_sigma=True))
    x, x_start, given = torch.randn(3, n, 3, size, size, device=device).unbind(0)
    output = torch.randn(n, 6, size, size, device=device)
    if layout == "channels_last":
        output = output.contiguous(memory_format=torch.channels_last)
    found: Inputs = {
        "model_output": output.requires_grad_(loss),
        "t": torch.randint(diffusion.num_timesteps, (n,), device=device),
        "tables": diffusion.step_tables(device, torch.float32),
        "noise": given if noise else None,
    }
    if loss:
        return found | {"x_start": x_start.clamp(-1, 1), "x_t": x, "gradient": torch.ones(n, device=device)}
    return found | {"x": x}


def _step(x: Tensor, model_output: Tensor, t: Tensor, tables: Tensor, noise: Tensor | None, backend: str) -> Tensor:
    seed = 1 if noise is None else None
    return diffusion_step(x, model_output, t, tables, noise=noise, seed=seed, backend=backend).sample


def _loss(
    model_output: Tensor, x_start: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, tables: Tensor, backend: str
) -> Tensor:
    return diffusion_loss(model_output, x_start, x_t, noise, t, tables, backend=backend).loss
