"""Every launch in use: the kernel launches of the presets' models, forward and backward, recorded without a GPU."""

import itertools
from collections.abc import Callable, Collection, Iterator
from functools import partial
from unittest.mock import patch

import torch
import triton

from fastdiff.benchmarks.cases import LAYOUTS
from fastdiff.kernels.attention import op as attention_op
from fastdiff.kernels.attention import plan as attention_plan
from fastdiff.kernels.backend import Backend
from fastdiff.kernels.diffusion_loss import op as loss_op
from fastdiff.kernels.diffusion_step import op as step_op
from fastdiff.kernels.gaussian import TABLES, LossType, ModelMeanType, ModelVarType, Sampler
from fastdiff.kernels.group_norm_silu import op as norm_op
from fastdiff.kernels.group_norm_silu import plan as norm_plan
from fastdiff.kernels.launch import recording
from fastdiff.kernels.philox import op as philox_op

from .program import TARGETS, TYPES, Program
from .shapes import AttentionShape, NormShape, preset_shapes
from .table import Key

BATCHES = [1, 2, 4, 8, 16, 64]  # from sampling one image to training


def programs_in_use(thorough: bool, targets: Collection[str]) -> dict[Key, Program]:
    """The programs of the four operations and the generator on ``targets``: in bf16 and channels_last or, if
    ``thorough``, in every dtype and layout.
    """
    found: dict[Key, Program] = {}
    for workload, run, dispatched in _workloads(thorough):
        with recording() as launches:
            run()
        for program in (Program.of(launch, workload) for launch in launches):
            fingerprint = program.fingerprint
            for target in targets:
                if target in dispatched:
                    found.setdefault(Key(fingerprint, target, triton.__version__), program)
    return found


Workload = tuple[str, Callable[[], object], tuple[str, ...]]
"""A label, what launches the kernels, and the targets for which dispatch chooses it."""


def _workloads(thorough: bool) -> Iterator[Workload]:
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if thorough else [torch.bfloat16]
    layouts = list(LAYOUTS) if thorough else ["channels_last"]
    norms, attentions = preset_shapes()
    for dtype, n, layout, shape in itertools.product(dtypes, BATCHES, layouts, norms):
        channels = f"{shape.channels - shape.second}+{shape.second}" if shape.second else shape.channels
        label = f"C{channels} {shape.size}x{shape.size} N{n} {TYPES[dtype]} {layout}"
        for pipelined, targets in ((True, ("sm_80", "sm_90", "sm_100")), (False, ("gfx942",))):
            yield f"norm {label}", partial(_norm, shape, n, dtype, LAYOUTS[layout], pipelined), targets
    for dtype, n, attended in itertools.product(dtypes, BATCHES, attentions):
        d = attended.channels // attended.heads
        if d <= 256 and dtype is not torch.float32:  # dispatch chooses SDPA for the others
            label = f"T{attended.tokens} H{attended.heads} d{d} N{n} {TYPES[dtype]}"
            for warpgroups, targets in ((True, ("sm_90", "sm_100")), (False, ("sm_80", "gfx942"))):
                yield f"attention {label}", partial(_attention, attended, n, dtype, warpgroups), targets
    for n, size, layout in itertools.product(BATCHES, (32, 64, 128, 256, 512), layouts):
        label = f"{size}x{size} N{n} {layout}"
        for sampler, inside in itertools.product(("ddpm", "ddim"), (True, False)):
            yield f"{sampler} {label}", partial(_step, n, size, layout, sampler, inside), tuple(TARGETS)
        for loss_type in ("rescaled_mse", "rescaled_kl"):
            yield f"{loss_type} {label}", partial(_loss, n, size, layout, loss_type), tuple(TARGETS)
    for mean_type in (ModelMeanType.START_X, ModelMeanType.V, ModelMeanType.FLOW):
        label, choices = f"64x64 N16 channels_last {mean_type}", (mean_type, ModelVarType.FIXED_LARGE)
        yield f"ddim {label}", partial(_step, 16, 64, "channels_last", "ddim", True, *choices), tuple(TARGETS)
        yield f"mse {label}", partial(_loss, 16, 64, "channels_last", "mse", *choices), tuple(TARGETS)
    for n in BATCHES:
        samples = torch.zeros(n, dtype=torch.int64)
        for elements in (3 * 32**2, 3 * 512**2):  # noise of an image
            draw = partial(philox_op.NORMALS[Backend.TRITON], 1, samples, 1, elements)
            yield f"normals {elements} N{n}", draw, tuple(TARGETS)
        for elements in (1, 2):  # labels and noise levels; timesteps
            yield (
                f"words {elements} N{n}",
                partial(philox_op.WORDS[Backend.TRITON], 1, samples, 1, elements),
                tuple(TARGETS),
            )


def _norm(shape: NormShape, n: int, dtype: torch.dtype, memory_format: torch.memory_format, pipelined: bool) -> None:
    x, second = (
        torch.empty((n, channels, shape.size, shape.size), dtype=dtype, memory_format=memory_format).requires_grad_()
        if channels
        else None
        for channels in (shape.channels - shape.second, shape.second)
    )
    weight, bias = torch.empty(2, shape.channels).requires_grad_().unbind(0)
    scale, shift = None, None
    if shape.conditioned:
        scale, shift = torch.empty(n, 2 * shape.channels, dtype=dtype).requires_grad_().chunk(2, dim=1)
    input_bias = torch.empty(shape.channels).requires_grad_() if shape.input_bias else None
    leaves = [t for t in (x, second, weight, bias, scale, shift, input_bias) if t is not None]
    with patch.object(norm_plan, "PIPELINES_WITHOUT_A_GPU", pipelined):
        run = norm_op.IMPLEMENTATIONS[Backend.TRITON]
        found = run(x, weight, bias, 32, 1e-5, scale, shift, shape.silu, input_bias, shape.with_input, second)
        outputs = found if shape.with_input else [found]
        torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])


def _attention(shape: AttentionShape, n: int, dtype: torch.dtype, warpgroups: bool) -> None:
    qkv = torch.empty(n, shape.tokens, 3 * shape.channels, dtype=dtype).requires_grad_()
    with patch.object(attention_plan, "WARPGROUPS_WITHOUT_A_GPU", warpgroups):
        y = attention_op.IMPLEMENTATIONS[Backend.TRITON](qkv, shape.heads)
        torch.autograd.grad(y, qkv, torch.empty_like(y))


def _step(
    n: int,
    size: int,
    layout: str,
    sampler: str,
    inside: bool,
    mean_type: ModelMeanType = ModelMeanType.EPSILON,
    var_type: ModelVarType = ModelVarType.LEARNED_RANGE,
) -> None:
    x, output, t, tables, noise = _process(n, size, layout, var_type)
    choices = mean_type, var_type, Sampler(sampler)
    given = None if inside else noise
    step_op.IMPLEMENTATIONS[Backend.TRITON](
        x, output, t, tables, given, 1, None, *choices, float(sampler == "ddim"), True, False
    )


def _loss(
    n: int,
    size: int,
    layout: str,
    loss_type: str,
    mean_type: ModelMeanType = ModelMeanType.EPSILON,
    var_type: ModelVarType = ModelVarType.LEARNED_RANGE,
) -> None:
    x, output, t, tables, noise = _process(n, size, layout, var_type)
    output.requires_grad_()
    choices = mean_type, var_type, LossType(loss_type)
    loss, *_ = loss_op.IMPLEMENTATIONS[Backend.TRITON](output, x, x, noise, t, tables, *choices)
    torch.autograd.grad(loss, output, torch.empty_like(loss))


def _process(n: int, size: int, layout: str, var_type: ModelVarType) -> tuple[torch.Tensor, ...]:
    x, noise = (torch.empty(n, 3, size, size) for _ in range(2))
    output = torch.empty(n, 6 if var_type.learned else 3, size, size, memory_format=LAYOUTS[layout])
    return x, output, torch.zeros(n, dtype=torch.int64), torch.empty(1000, len(TABLES)), noise
