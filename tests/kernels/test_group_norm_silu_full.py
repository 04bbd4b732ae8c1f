"""group_norm_silu in Triton: every plan and shape, large offsets, repeatability, and how it sits in PyTorch."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff.kernels import group_norm_silu
from fastdiff.kernels.launch import recording

from .support import DEVICE, TRITON_DTYPES, error, pairwise, random
from .test_group_norm_silu import CHANNELS, LAYOUTS, SPATIAL, Case, hold

plans = pytest.importorskip("fastdiff.kernels.group_norm_silu.plan")
kernel = pytest.importorskip("fastdiff.kernels.group_norm_silu.kernel")


def change_plan(monkeypatch: pytest.MonkeyPatch, kind: str, groups: int = 32) -> None:
    """Every plan from now on is of this kind, as the heuristic would choose for larger images."""

    def plan(samples: int, channels: int, pixels: int, of: int, *rest: Any) -> Any:
        k = min(groups, of)
        width, whole = plans.next_power(k * channels // of), plans.next_power(pixels)
        height = whole if kind == "on chip" else max(whole // 4, 1)
        span = 2 * height if kind == "split" else pixels
        return plans.Plan(k, width, height, -(-pixels // span), span, warps=4)

    monkeypatch.setattr(plans, "plan", plan)


KINDS = ["on chip", "walk", "split"]
FORCED = pairwise(
    {
        "kind": KINDS,
        "channels": [96, 192, 224],
        "spatial": [(3, 5), (7, 7), (8, 8), (11,)],
        "groups": [8, 12, 32],  # 12: the last block is not full
        "layout": list(LAYOUTS),
        "dtype": TRITON_DTYPES,
        "scale": [True, False],
        "shift": [True, False],
        "input_bias": [True, False],
        "with_input": [True, False],
        "second": [0, 40, 64],  # 40: a group has channels of both
    }
)


@pytest.mark.parametrize("chosen", FORCED, ids=lambda chosen: "-".join(map(str, chosen.values())))
def test_budget_of_every_plan(chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    change_plan(monkeypatch, chosen["kind"], chosen["groups"])
    flags = {name: chosen[name] for name in ("scale", "shift", "input_bias", "with_input", "second")}
    hold(Case((2, chosen["channels"], *chosen["spatial"]), chosen["dtype"], chosen["layout"], **flags), "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("offset", "spread"), [(10_000.0, 0.1), (-2.3, 0.5), (0.0, 1e4)])
def test_every_plan_is_steady(
    offset: float, spread: float, layout: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_plan(monkeypatch, kind)
    hold(Case((2, 96, 8, 8), layout=layout, offset=offset, spread=spread), "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_budget_far_from_zero_in_16_bits(
    dtype: torch.dtype, offset: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk multiplies x itself, without its mean subtracted: the rounding errors of that are below those of x."""
    change_plan(monkeypatch, kind)
    hold(Case((2, 96, 8, 8), dtype, offset=offset, input_bias=True), "triton")


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_channel_in_16_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far below 0 the slope of SiLU is exact in relation to its size."""
    change_plan(monkeypatch, kind)
    case = Case((2, 64, 8, 8), torch.bfloat16, scale=False, shift=False)
    case.weight, case.bias = torch.full((64,), 0.5), torch.full((64,), -20.0)
    truth, found = case.run("truth"), case.run("triton")
    for name in ("dweight", "dbias", "dx"):
        assert error(found[name], truth[name]) <= 0.02 * float(truth[name].abs().max()), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_comes_first(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What x is taken less of may be far from all the rest: the mean is corrected for what that costs."""
    change_plan(monkeypatch, kind)
    case = Case((2, 64, 8, 8))
    case.x[:, ::2, 0, 0] = 1000.0
    hold(case, "triton")


def test_silu_at_its_ends() -> None:
    """Where exp(-z) leaves the range of fp32."""
    z = torch.tensor([-1e30, -1000, -105, -90, -88.5, -87, -80, -1, 0, 1, 80, 1e30, torch.nan])
    x, dy = (random(1, 13, 4, 4, seed=seed).to(DEVICE) for seed in (0, 1))
    bias = z.to(DEVICE).requires_grad_()
    y = group_norm_silu(x, torch.zeros_like(bias), bias, groups=1, backend="triton")
    (slope,) = torch.autograd.grad(y, bias, dy)
    wide = z.double().requires_grad_()
    expected = nn.functional.silu(wide)
    (slope_expected,) = torch.autograd.grad(expected.nan_to_num().sum(), wide)
    torch.testing.assert_close(y[0, :, 1, 2].double().cpu(), expected.detach(), equal_nan=True, rtol=3e-7, atol=1e-6)
    finite = z.isfinite()
    slope_expected *= dy.double().sum((0, 2, 3)).cpu()
    torch.testing.assert_close(slope.double().cpu()[finite], slope_expected[finite], rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_silu_at_its_ends_in_16_bits(dtype: torch.dtype) -> None:
    z = torch.tensor([-1e30, -1000, -105, -80, -20, -10, -1, 0, 1, 10, 20, 105, 1000, torch.nan])
    x, dy = torch.zeros(1, 14, 4, 4, dtype=dtype, device=DEVICE), random(1, 14, 4, 4, seed=1, dtype=dtype).to(DEVICE)
    bias = z.to(DEVICE).requires_grad_()
    y = group_norm_silu(x, torch.ones_like(bias), bias, groups=1, backend="triton")
    (slope,) = torch.autograd.grad(y, bias, dy)
    wide = z.double().requires_grad_()
    expected = nn.functional.silu(wide)
    (slope_expected,) = torch.autograd.grad(expected.nan_to_num().sum(), wide)
    near = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(y[0, :, 1, 2].double().cpu(), expected.detach(), **near)
    finite = z.isfinite()
    slope_expected *= dy.double().sum((0, 2, 3)).cpu()
    # relatively exact down to the smallest normal numbers; at the upper end an error of rsqrt is multiplied by z
    torch.testing.assert_close(slope.double().cpu()[finite], slope_expected[finite], rtol=1e-3, atol=1e-36)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(parameters: torch.dtype, dtype: torch.dtype) -> None:
    case = Case((2, 96, 5, 3), dtype)
    case.weight, case.bias = case.weight.to(parameters), case.bias.to(parameters)
    hold(case, "triton")


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3, 12, 96])
def test_other_numbers_of_groups(groups: int, dtype: torch.dtype) -> None:
    hold(Case((2, 96, 5, 3), dtype), "triton", groups=groups)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_equal_bits(layout: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change_plan(monkeypatch, kind)
    case = Case((1, 96, 7, 7), layout=layout)
    first, second = case.run("triton"), case.run("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_budget_of_every_shape(
    channels: int, spatial: tuple[int, int], batch: int, layout: str, dtype: torch.dtype
) -> None:
    if channels == 32 and spatial == (1, 1):
        pytest.skip("one value a group has a test of its own")
    hold(Case((batch, channels, *spatial), dtype, layout), "triton")


# The plan


def plan_of(shape: tuple[int, ...], layout: str, tensors: int, processors: int = 132) -> Any:
    n, channels, pixels = shape[0], shape[1], shape[2] * shape[3]
    return plans.plan(n, channels, pixels, 32, layout == "channels_last", 2, tensors, processors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensors", [1, 2])
def test_plans_cover_every_value_once(layout: str, tensors: int) -> None:
    for n, channels, side in itertools.product([1, 3, 32], CHANNELS, [1, 7, 8, 16, 32, 64, 256]):
        plan = plan_of((n, channels, side, side), layout, tensors)
        assert plan.groups * channels // 32 <= plan.block_channels
        assert (plan.splits - 1) * plan.pixels_per_split < side * side <= plan.splits * plan.pixels_per_split
        assert plan.splits == 1 or plan.pixels_per_split % plan.block_pixels == 0
        assert plan.block_channels * plan.block_pixels <= plans.ON_CHIP[tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensors", [1, 2])
def test_small_images_take_one_launch(layout: str, tensors: int) -> None:
    for n, channels, side in itertools.product([1, 2, 32, 128], [128, 192, 384, 512, 768, 1152, 1536], [8, 16]):
        assert plan_of((n, channels, side, side), layout, tensors).splits == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_large_image_keeps_the_processors_busy(layout: str) -> None:
    plan = plan_of((1, 128, 256, 256), layout, 1)
    assert plan.splits * plan.blocks(32) >= 132


@pytest.mark.parametrize(
    ("channels", "size", "layout", "dtype", "most"),
    [
        (128, 64, "channels_last", torch.bfloat16, (96, 128)),
        (256, 64, "contiguous", torch.float16, (80, 96)),
        (512, 8, "channels_last", torch.bfloat16, (None, 128)),  # largest tiles of x and dy in registers
        (32, 4, "channels_last", torch.bfloat16, (None, None)),
        (128, 64, "channels_last", torch.float32, (None, None)),
    ],
)
def test_registers_of_a_thread(
    channels: int, size: int, layout: str, dtype: torch.dtype, most: tuple[int | None, ...]
) -> None:
    assert registers(2048, channels, size, layout, dtype) == [*most, None]  # the last one sums over the batch
    assert set(registers(4, channels, size, layout, dtype)) == {None}, "split, or fewer programs than processors"


@pytest.mark.parametrize(("n", "most"), [(64, (None, None)), (128, (None, 128)), (1024, (96, 128))])
def test_registers_are_limited_where_all_programs_would_not_fit(n: int, most: tuple[int | None, ...]) -> None:
    """Of 256, 512 and 1,024 programs on 132 processors, on each of which four forward and three backward fit anyway."""
    assert registers(n, 128, 64, "channels_last", torch.bfloat16) == [*most, None]


def registers(n: int, channels: int, size: int, layout: str, dtype: torch.dtype) -> list[int | None]:
    x = torch.empty(n, channels, size, size, dtype=dtype, device="meta").contiguous(memory_format=LAYOUTS[layout])
    weight, mean = torch.empty(channels, device="meta"), torch.empty(n, 32, device="meta")
    layer = weight, weight, None, None, None
    with recording() as launches:
        kernel.group_norm_silu(x, None, *layer, 32, 1e-5, True)
        kernel.group_norm_silu_backward(x, x, None, *layer, mean, mean, None, None, True, True)
    return [one.maxnreg for one in launches]


def test_launches() -> None:
    """One forward; backward one more, which only the parameters need."""
    x, weight, mean = torch.empty(2, 64, 8, 8), torch.empty(64), torch.empty(2, 32)
    with recording() as launches:
        kernel.group_norm_silu(x, None, weight, weight, None, None, None, 32, 1e-5, True)
        assert len(launches) == 1
        for parameters in (False, True):
            launches.clear()
            kernel.group_norm_silu_backward(
                x, x, None, weight, weight, None, None, None, mean, mean, None, None, True, parameters
            )
            assert len(launches) == 1 + parameters


# Offsets


def test_a_sample_of_more_than_two_to_the_31_values_is_refused() -> None:
    x = torch.empty(1, 64, 2**13, 2**12 + 1, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(64, device="meta")
    with pytest.raises(ValueError, match=r"triton takes at most 2\^31 values a sample, not 2,148,007,936; use auto"):
        group_norm_silu(x, weight, weight, backend="triton")
    with pytest.raises(ValueError, match=r"^group_norm_silu: a sample of more than 2\^31 values"):
        kernel.group_norm_silu(x, None, weight, weight, None, None, None, 32, 1e-5, True)


FAR_APART = {
    "samples": ((2, 32, 5), (2**31 + 16, 5, 1)),
    "channels": ((1, 64, 5), (64 * 2**26, 2**26, 1)),
    "channels within 32 bits": ((2, 64, 5), (64 * 2**25, 2**25, 1)),
    "pixels": ((2, 32, 5), (32, 1, 2**30)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apart", FAR_APART)
def test_offsets_past_two_to_the_31(apart: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Views of a file that has only the few pages in it that are written; a GPU needs the memory itself."""
    shape, strides = FAR_APART[apart]
    size = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    assert size > 2**31
    change_plan(monkeypatch, kind)
    case = Case(shape, torch.float16)
    near = case.run("triton")
    if DEVICE.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 2.5 * 2 * size:
            pytest.skip("needs more memory than this GPU has free")
        memory = torch.empty(size, dtype=torch.float16, device=DEVICE)
    else:
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)

    def far(tensor: Tensor) -> Tensor:
        return memory.as_strided(shape, strides).copy_(tensor)

    layer = [t.to(DEVICE) for t in (case.weight, case.bias, case.scale, case.shift) if t is not None]
    y, mean, rstd = kernel.group_norm_silu(far(case.x), None, *layer, None, 32, 1e-5, True)
    close = {"rtol": 2**-9, "atol": 1e-3}  # a strange layout is read in tiles of another shape, summed in another order
    torch.testing.assert_close(y.cpu(), near["y"], **close)
    for far_x, far_dy in ((True, False), (False, True)):  # one at a time: they share the memory
        x, dy = far(case.x) if far_x else case.x.to(DEVICE), far(case.grad) if far_dy else case.grad.to(DEVICE)
        dx, *_ = kernel.group_norm_silu_backward(dy, x, None, *layer, None, mean, rstd, None, None, True, True)
        torch.testing.assert_close(dx.cpu(), near["dx"], **close)


# Inside PyTorch


@pytest.mark.parametrize("shape", [(0, 64, 8, 8), (2, 64, 0, 8)], ids=str)
def test_nothing_to_norm(shape: tuple[int, ...]) -> None:
    case = Case(shape, input_bias=True)
    found = case.run("triton")
    assert found["y"].shape == found["dx"].shape == shape
    for name in ("dweight", "dbias", "dscale", "dshift", "dinput_bias"):
        assert not found[name].any(), name


@pytest.mark.parametrize(
    ("layout", "conditioned", "silu", "parameters", "two"),
    [
        ("contiguous", True, True, False, False),
        ("channels_last", True, True, True, True),
        ("channels_last", False, False, True, False),
    ],
)
def test_opcheck(layout: str, conditioned: bool, silu: bool, parameters: bool, two: bool) -> None:
    """Of few values: opcheck calls an operator a dozen times."""
    flags = {"scale": conditioned, "shift": conditioned, "input_bias": silu}
    case = Case((2, 32, 2, 3), layout=layout, second=20 * two, **flags)
    layer = [t if t is None else t.to(DEVICE) for t in case.tensors()[1:]]
    x, second = (*(t.to(DEVICE) for t in case.parts(case.x)), None)[:2]
    forward, backward = torch.ops.fastdiff.group_norm_silu, torch.ops.fastdiff.group_norm_silu_backward
    arguments = (x, second, *layer, 32, 1e-5, silu)
    torch.library.opcheck(forward.default, arguments)
    _, mean, rstd = forward(*arguments)
    gradient = case.grad.to(DEVICE).mT.contiguous().mT
    added = [*case.parts(gradient), None][:2] if parameters else (None, None)
    torch.library.opcheck(backward.default, (gradient, x, second, *layer, mean, rstd, *added, silu, parameters))


class Layer(nn.Module):
    """Two norms with a product between them, the second without condition and of two inputs, plus the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(32, 64), nn.GroupNorm(32, 128)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = condition.chunk(2, dim=1)
        first, second = self.first, self.second
        y, x = group_norm_silu(x, first.weight, first.bias, scale=scale, shift=shift, with_input=True, backend="triton")
        y, _, x = group_norm_silu(2 * y + 1, second.weight, second.bias, second=x, with_input=True, backend="triton")
        return x + y[:, :64] * y[:, 64:]


def gradients(run: Callable[..., Tensor], layer: Layer, layout: str) -> list[Tensor]:
    x = random(2, 64, 4, 4, seed=1).contiguous(memory_format=LAYOUTS[layout]).to(DEVICE).requires_grad_()
    condition = random(2, 128, seed=2).to(DEVICE).requires_grad_()
    y = run(x, condition)
    y.backward(random(2, 64, 4, 4, seed=3).to(DEVICE))
    leaves = [x, condition, *layer.parameters()]
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(found) == len(leaves)
    for leaf in leaves:
        leaf.grad = None
    return [y.detach(), *found]


# torch 2.13: Dynamo itself makes an instance of each autograd.Function that it traces, which it has deprecated
@pytest.mark.parametrize(
    ("compiler", "layout"),
    [
        ("aot_eager", "contiguous"),
        pytest.param("inductor", "channels_last", marks=pytest.mark.slow),  # whose strides a compiler might change
        pytest.param("aot_eager", "channels_last", marks=pytest.mark.slow),
        pytest.param("inductor", "contiguous", marks=pytest.mark.slow),
    ],
)
def test_compiled_whole(compiler: str, layout: str) -> None:
    torch.compiler.reset()
    layer = Layer().to(DEVICE)
    eager = gradients(layer, layer, layout)
    compiled = gradients(torch.compile(layer, backend=compiler, fullgraph=True), layer, layout)
    for found, expected in zip(compiled, eager, strict=True):
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_checkpointed() -> None:
    layer = Layer().to(DEVICE)
    plain = gradients(layer, layer, "contiguous")
    again = gradients(lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False), layer, "contiguous")
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_without_gradients() -> None:
    layer = Layer().to(DEVICE)
    x, condition = random(2, 64, 4, 4, seed=1).to(DEVICE), random(2, 128, seed=2).to(DEVICE)
    with torch.no_grad():
        y = layer(x, condition)
    assert not y.requires_grad
    assert torch.equal(y, layer(x, condition))


def test_only_the_wanted_gradients() -> None:
    case = Case((2, 64, 4, 4))
    whole = case.run("triton")
    x, weight, bias, scale, shift = (t.to(DEVICE) for t in case.tensors() if t is not None)
    y = group_norm_silu(x, weight, bias, scale=scale.requires_grad_(), shift=shift, backend="triton")
    y.backward(case.grad.to(DEVICE))
    assert scale.grad is not None
    assert torch.equal(scale.grad.cpu(), whole["dscale"])
    assert weight.grad is None


def test_a_float64_weight_is_refused() -> None:
    case = Case((2, 64, 4, 4))
    x, weight, bias = (t.to(DEVICE) for t in (case.x, case.weight, case.bias))
    with pytest.raises(ValueError, match=r"^group_norm_silu: backend triton takes weight, biases, scale and shift in"):
        group_norm_silu(x, weight.double(), bias, backend="triton")


def test_no_second_derivative() -> None:
    case = Case((2, 64, 4, 4))
    x = case.x.to(DEVICE).requires_grad_()
    y = group_norm_silu(x, case.weight.to(DEVICE), case.bias.to(DEVICE), backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
