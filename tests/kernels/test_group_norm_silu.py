"""group_norm_silu: every implementation against the formula in float64, forward and all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.kernels import group_norm_silu

from .support import (
    DEVICE,
    DTYPES,
    TRITON_DTYPES,
    assert_a_few_roundings,
    assert_all_within_budget,
    error,
    pairwise,
    random,
    rounding,
)

PYTORCH = ["torch", "reference"]
BACKENDS = [*PYTORCH, "triton"]
IN_DTYPES = [(b, d) for b in BACKENDS for d in (TRITON_DTYPES if b == "triton" else DTYPES)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NAMES = ["y", "dx", "dweight", "dbias", "dscale", "dshift", "dinput_bias"]


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    input_bias: Tensor | None,
    silu: bool,
    groups: int = 32,
) -> Tensor:
    """The definition written out, with nothing of PyTorch's own norm in it."""
    per_channel = (*x.shape[:2], *[1] * (x.ndim - 2))
    if input_bias is not None:
        x = x + input_bias.view(1, *per_channel[1:])
    g = x.reshape(x.shape[0], groups, -1)
    centred = g - g.mean(-1, keepdim=True)
    normal = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    y = normal.reshape(x.shape) * weight.view(1, *per_channel[1:]) + bias.view(1, *per_channel[1:])
    if scale is not None:
        y = y * (1 + scale.view(per_channel))
    if shift is not None:
        y = y + shift.view(per_channel)
    return y / (1 + torch.exp(-y)) if silu else y


def leaf_on_device(tensor: Tensor) -> Tensor:
    """The same view of the same memory on the device of the kernels."""
    memory = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage()).to(DEVICE)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Case:
    """Inputs and an upstream gradient, all exact in ``dtype``; weights and conditions in their own dtype.

    All are on the CPU, where truth and references are computed; kernels get them where they run.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        *,
        scale: bool = True,
        shift: bool = True,
        silu: bool = True,
        offset: float = 0.0,
        spread: float = 1.0,
        input_bias: bool = False,
        with_input: bool = False,
        second: int = 0,
    ) -> None:
        n, c = shape[:2]
        self.second = second
        """Of x's channels, how many an implementation gets as those of a second input."""
        memory_format = LAYOUTS[layout] if len(shape) == 4 else torch.contiguous_format
        self.x = (offset + spread * random(*shape, seed=1)).to(dtype).contiguous(memory_format=memory_format)
        self.grad = random(*shape, seed=2, dtype=dtype).contiguous(memory_format=memory_format)
        self.weight, self.bias = 1 + 0.2 * random(c, seed=3), 0.3 * random(c, seed=4)
        self.scale = 0.5 * random(n, c, seed=5, dtype=dtype) if scale else None
        self.shift = 0.5 * random(n, c, seed=6, dtype=dtype) if shift else None
        self.silu = silu
        self.input_bias = (0.5 * random(c, seed=8)).to(dtype) if input_bias else None
        self.of_input = None  # the gradient of x as an output
        if with_input:
            self.of_input = random(*shape, seed=7, dtype=dtype).contiguous(memory_format=memory_format)

    def parts(self, x: Tensor) -> list[Tensor]:
        """x, or the two inputs that it stands for, each dense in x's layout."""
        if not self.second:
            return [x]
        memory_format = torch.channels_last if x.ndim == 4 and x.stride(1) == 1 else torch.contiguous_format
        both = x.split([x.shape[1] - self.second, self.second], dim=1)
        return [each.contiguous(memory_format=memory_format) for each in both]

    def tensors(self) -> list[Tensor | None]:
        return [self.x, self.weight, self.bias, self.scale, self.shift, self.input_bias]

    def run(self, backend: str, **kwargs: Any) -> dict[str, Tensor]:
        """y and every gradient from one implementation; "truth" is the formula in float64."""
        if backend == "truth":
            leaves = [t if t is None else t.double().requires_grad_() for t in self.tensors()]
            y = formula(*leaves, self.silu, **kwargs)  # type: ignore[arg-type]
            outputs = [y, leaves[0]]
        else:
            there = leaf_on_device if backend == "triton" else Tensor.detach
            tensors = [*self.parts(self.x), *self.tensors()[1:]]
            leaves = [t if t is None else there(t.detach()).requires_grad_() for t in tensors]
            *sources, weight, bias, scale, shift, input_bias = leaves
            x, second = (*sources, None)[:2]
            assert x is not None
            assert weight is not None
            assert bias is not None
            kwargs |= {"scale": scale, "shift": shift, "silu": self.silu, "input_bias": input_bias, "backend": backend}
            kwargs["second"] = second
            if self.of_input is None:
                outputs = [group_norm_silu(x, weight, bias, **kwargs)]
            else:
                outputs = [*group_norm_silu(x, weight, bias, with_input=True, **kwargs)]
                assert all(torch.equal(found, given) for found, given in zip(outputs[1:], sources, strict=True))
            y = outputs[0]
        names = NAMES[1:] if len(leaves) == len(NAMES) - 1 else ["dx", "dsecond", *NAMES[2:]]
        wanted = {name: leaf for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
        of_inputs = (
            [] if self.of_input is None else [self.of_input] if backend == "truth" else self.parts(self.of_input)
        )
        grads = [self.grad, *of_inputs]
        grads = [leaf_on_device(t) if backend == "triton" else t.to(y.dtype) for t in grads]
        gradients = torch.autograd.grad(outputs[: len(grads)], list(wanted.values()), grads)
        found = {name: g.cpu() for name, g in zip(wanted, gradients, strict=True)}
        if "dsecond" in found:
            if backend == "triton":
                assert all(found[name].stride() == wanted[name].stride() for name in ("dx", "dsecond"))
            found["dx"] = torch.cat([found["dx"], found.pop("dsecond")], dim=1)
        return {"y": y.detach().cpu()} | found


def hold(case: Case, backend: str = "torch", **kwargs: Any) -> None:
    assert_all_within_budget(*(case.run(name, **kwargs) for name in (backend, "reference", "truth")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("channels", "spatial"),
    [
        (c, s) for c in (32, 96, 192, 576) for s in ((1, 1), (3, 5), (8, 8)) if (c, s) != (32, (1, 1))
    ],  # one value a group
    ids=str,
)
def test_budget(channels: int, spatial: tuple[int, int], batch: int, dtype: torch.dtype, layout: str) -> None:
    hold(Case((batch, channels, *spatial), dtype, layout))


CHANNELS = [32, 96, 160, 192, 224, 384, 576, 1152]
SPATIAL = [(1, 1), (3, 5), (7, 7), (8, 8), (32, 32)]
QUICK = SPATIAL if DEVICE.type == "cuda" else [*SPATIAL[:-1], (12, 12)]  # interpreted, the largest takes half a minute
SELECTED = pairwise(
    {"channels": CHANNELS, "spatial": QUICK, "batch": [1, 3], "layout": list(LAYOUTS), "dtype": TRITON_DTYPES}
)


@pytest.mark.parametrize("chosen", SELECTED, ids=lambda chosen: "-".join(map(str, chosen.values())))
def test_budget_of_triton(chosen: dict[str, Any]) -> None:
    if chosen["channels"] == 32 and chosen["spatial"] == (1, 1):
        pytest.skip("one value a group has a test of its own")
    hold(Case((chosen["batch"], chosen["channels"], *chosen["spatial"]), chosen["dtype"], chosen["layout"]), "triton")


@pytest.mark.parametrize(("backend", "dtype"), IN_DTYPES, ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("scale", "shift"), [(False, False), (True, False), (False, True), (True, True)])
def test_budget_of_every_variant(scale: bool, shift: bool, silu: bool, dtype: torch.dtype, backend: str) -> None:
    hold(Case((2, 96, 5, 3), dtype, scale=scale, shift=shift, silu=silu), backend)


@pytest.mark.parametrize(("backend", "dtype"), IN_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(5, 3), (4, 4)], ids=str)
def test_budget_with_an_input_bias(spatial: tuple[int, int], layout: str, dtype: torch.dtype, backend: str) -> None:
    hold(Case((2, 96, *spatial), dtype, layout, input_bias=True), backend)


@pytest.mark.parametrize(("backend", "dtype"), IN_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_the_input_as_an_output_is_added(layout: str, dtype: torch.dtype, backend: str) -> None:
    case = Case((2, 96, 5, 3), dtype, layout, with_input=True)
    hold(case, backend)
    other = "contiguous" if layout == "channels_last" else "channels_last"
    assert case.of_input is not None
    case.of_input = case.of_input.contiguous(memory_format=LAYOUTS[other])
    hold(case, backend)


@pytest.mark.parametrize(("backend", "dtype"), IN_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("second", "with_input"), [(32, True), (40, True), (93, False)])
def test_two_inputs_are_their_concatenation(
    second: int, with_input: bool, layout: str, dtype: torch.dtype, backend: str
) -> None:
    """Whether or not a group has channels of both."""
    hold(Case((2, 96, 5, 3), dtype, layout, with_input=with_input, second=second), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_inputs_in_different_layouts(layout: str, backend: str) -> None:
    """y has x's, and every gradient its input's."""
    case = Case((2, 96, 5, 4), layout=layout, second=40, with_input=True)
    there = leaf_on_device if backend == "triton" else Tensor.detach
    other = torch.contiguous_format if layout == "channels_last" else torch.channels_last
    x, second = (there(each) for each in case.parts(case.x))
    inputs = [x.requires_grad_(), second.contiguous(memory_format=other).requires_grad_()]
    weight, bias = there(case.weight), there(case.bias)
    y, *same = group_norm_silu(inputs[0], weight, bias, second=inputs[1], with_input=True, backend=backend)
    assert case.of_input is not None
    upstream = [there(each) for each in (case.grad, *case.parts(case.of_input))]
    gradients = torch.autograd.grad([y, *same], inputs, upstream)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    if backend == "triton":
        assert [gradient.stride() for gradient in gradients] == [each.stride() for each in inputs]

    whole = there(case.x).requires_grad_()
    expected = group_norm_silu(whole, weight, bias, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (of_whole,) = torch.autograd.grad(expected, whole, there(case.grad))
    wanted = of_whole + there(case.of_input)
    torch.testing.assert_close(torch.cat(gradients, dim=1), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", PYTORCH)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 96, 3, 5), (1, 32, 8, 8), (2, 64, 7), (2, 32, 2, 3, 4)], ids=str)
def test_float64_is_the_formula(shape: tuple[int, ...], layout: str, backend: str) -> None:
    case = Case(shape, torch.float64, layout)
    case.weight, case.bias = case.weight.double(), case.bias.double()
    torch.testing.assert_close(case.run(backend), case.run("truth"), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("backend", "dtype"), IN_DTYPES, ids=str)
def test_a_few_roundings_from_the_formula(backend: str, dtype: torch.dtype) -> None:
    """The budget is relative to the reference: here is what the reference itself may cost."""
    case = Case((3, 96, 8, 8), dtype)
    assert_a_few_roundings(case.run(backend), case.run("truth"), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "dtype"), [*IN_DTYPES, *((b, torch.float64) for b in PYTORCH)], ids=str)
@pytest.mark.parametrize("shape", [(3, 96, 3, 5), (1, 64, 1, 7), (2, 32, 8, 8)], ids=str)
def test_dtype_and_memory_format_stay(shape: tuple[int, ...], dtype: torch.dtype, layout: str, backend: str) -> None:
    case = Case(shape, dtype, layout)
    assert case.scale is not None
    # conditions of another dtype must not widen the result
    there = leaf_on_device if backend == "triton" else Tensor.detach
    for scale in (case.scale, case.scale.float(), case.scale.double()):
        if backend == "triton" and scale.dtype == torch.float64:
            continue
        x, weight, bias, condition = map(there, (case.x, case.weight, case.bias, scale))
        y = group_norm_silu(x, weight, bias, scale=condition, shift=condition, backend=backend)
        assert y.dtype == dtype
        assert y.shape == shape
        assert y.is_contiguous(memory_format=LAYOUTS[layout])


VIEWS = {
    "channel slice": lambda: random(2, 160, 6, 5, seed=7)[:, 32:128],
    "channel slice, channels_last": lambda: random(2, 160, 6, 5, seed=7).to(memory_format=torch.channels_last)[
        :, 32:128
    ],
    "every second row": lambda: random(2, 96, 12, 5, seed=7)[:, :, ::2],
    "width slice": lambda: random(2, 96, 6, 11, seed=7)[..., 3:8],
    "rows and columns swapped": lambda: random(2, 96, 5, 6, seed=7).transpose(2, 3),
    "batch inside": lambda: random(96, 6, 5, 2, seed=7).permute(3, 0, 1, 2),
    "channels inside, slice": lambda: random(2, 6, 7, 100, seed=7)[:, :, 1:6, 2:98].permute(0, 3, 1, 2),
    "one image for all": lambda: random(1, 96, 6, 5, seed=7).expand(2, -1, -1, -1),
    "flipped batch order": lambda: random(4, 96, 6, 5, seed=7)[1::2],
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, backend: str) -> None:
    case = Case((2, 96, 6, 5))
    case.x = VIEWS[view]()
    case.grad = random(2, 6, 96, 5, seed=8).transpose(1, 2)
    both = random(2, 192, seed=9)
    case.scale, case.shift = both.chunk(2, dim=1)
    hold(case, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_the_other_layout(layout: str, backend: str) -> None:
    case = Case((2, 96, 6, 5), layout=layout)
    other = "contiguous" if layout == "channels_last" else "channels_last"
    case.grad = case.grad.contiguous(memory_format=LAYOUTS[other])
    hold(case, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("expanded", [(1, 1, 1, 1), (1, 96, 1, 1), (2, 96, 6, 1), (2, 1, 6, 5)], ids=str)
def test_expanded_gradient(expanded: tuple[int, ...], backend: str) -> None:
    case = Case((2, 96, 6, 5))
    case.grad = random(*expanded, seed=8).expand(2, 96, 6, 5)
    hold(case, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(2, 96, 7), (1, 64, 1), (2, 64, 3, 2, 5)], ids=str)
def test_other_numbers_of_spatial_dimensions(shape: tuple[int, ...], backend: str) -> None:
    hold(Case(shape), backend)


FAR = [(10_000.0, 0.1), (100.0, 0.1), (-2.3, 0.5), (0.0, 1e-4), (0.0, 1e4)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("offset", "spread"), FAR)
@pytest.mark.parametrize("channels", [64, 96])  # PyTorch's path has another one for two channels a group
def test_steady_far_from_zero(channels: int, offset: float, spread: float, layout: str, backend: str) -> None:
    """E[x^2] - E[x]^2 in fp32 would be off by more than the variance itself, and so would be a reference to hold to."""
    case = Case((2, channels, 8, 8), layout=layout, offset=offset, spread=spread)
    truth, found = case.run("truth"), case.run(backend)
    of_the_mean = torch.finfo(torch.float32).eps * abs(offset) / spread  # what centring in fp32 may cost
    for name, value in truth.items():
        assert error(found[name], value) <= (1e-5 + 4 * of_the_mean) * float(value.abs().max()), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("offset", "spread"), FAR)
def test_budget_far_from_zero(offset: float, spread: float, layout: str, backend: str) -> None:
    hold(Case((2, 96, 8, 8), layout=layout, offset=offset, spread=spread), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_image(backend: str) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    weight, bias = torch.ones(64, device=device), torch.linspace(-1, 1, 64, device=device)
    y = group_norm_silu(torch.full((2, 64, 4, 4), 3.0, device=device), weight, bias, silu=False, backend=backend)
    torch.testing.assert_close(y, bias.view(1, -1, 1, 1).expand_as(y), rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "dtype"), IN_DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_value_a_group(batch: int, dtype: torch.dtype, layout: str, backend: str) -> None:
    """The value is its own mean: y = act(bias * (1 + scale) + shift), and x has no gradient."""
    case = Case((batch, 32, 1, 1), dtype, layout)
    truth, found = case.run("truth"), case.run(backend)
    assert case.scale is not None
    assert case.shift is not None
    inner = case.bias.double() * (1 + case.scale.double()) + case.shift.double()
    expected = (inner * torch.sigmoid(inner))[..., None, None]
    torch.testing.assert_close(truth["y"], expected)
    assert not truth["dx"].any()
    assert not truth["dweight"].any()
    for name, value in truth.items():
        # x - mean may leave one rounding of x in fp32, which 1 / sqrt(eps) = 316 enlarges, twice on the way to dx
        noise = {"dx": 0.05, "dweight": 1e-3}.get(name, 1e-4)
        assert found[name].dtype in (dtype, torch.float32)
        assert error(found[name], value) <= noise + 8 * rounding(value, dtype), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_and_groups(backend: str) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    x, weight, bias = (random(*size, seed=1).to(device) for size in ((2, 12, 5), (12,), (12,)))
    y = group_norm_silu(x, weight, bias, groups=3, eps=0.5, silu=False, backend=backend)
    g = x.double().view(2, 3, -1)
    normal = (g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + 0.5).sqrt()
    expected = normal.view(2, 12, 5) * weight.double()[:, None] + bias.double()[:, None]
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_do_not_see_each_other(backend: str) -> None:
    case = Case((3, 96, 4, 4))
    whole = case.run(backend)["y"]
    assert case.scale is not None
    for i in range(3):
        rows = slice(i, i + 1)
        one = Case((1, 96, 4, 4))
        assert case.shift is not None
        one.x, one.scale, one.shift = case.x[rows], case.scale[rows], case.shift[rows]
        torch.testing.assert_close(one.run(backend)["y"], whole[rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("backend", "dtype"), IN_DTYPES, ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, backend: str) -> None:
    case = Case((2, 96, 4, 4), dtype)
    plain = case.run(backend)
    with torch.autocast(DEVICE.type if backend == "triton" else "cpu", dtype=torch.bfloat16):
        cast = case.run(backend)
    for name, value in plain.items():
        assert cast[name].dtype == value.dtype
        assert torch.equal(cast[name], value), name


def test_auto_is_torch_on_a_cpu() -> None:
    case = Case((2, 96, 4, 4))
    auto, explicit = case.run("auto"), case.run("torch")
    assert all(torch.equal(auto[name], explicit[name]) for name in explicit)
    assert torch.equal(group_norm_silu(case.x, case.weight, case.bias, scale=case.scale, shift=case.shift), auto["y"])


def test_the_inputs_are_left_alone() -> None:
    for backend in BACKENDS:
        case = Case((2, 96, 4, 4))
        before = [t.clone() for t in case.tensors() if t is not None]
        case.run(backend)
        after = [t for t in case.tensors() if t is not None]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 64)}, r"x must be \(N, C, \*spatial\), not \(2, 64\)"),
    ({"x": torch.zeros(2, 60, 4)}, "60 channels are not a multiple of 32 groups"),
    ({"groups": 48}, "64 channels are not a multiple of 48 groups"),
    ({"weight": torch.zeros(32)}, r"weight must be \(64,\), not \(32,\)"),
    ({"weight": torch.zeros(1, 64)}, r"weight must be \(64,\), not \(1, 64\)"),
    ({"bias": torch.zeros(65)}, r"bias must be \(64,\), not \(65,\)"),
    ({"scale": torch.zeros(64)}, r"scale must be \(N, C\) = \(2, 64\), not \(64,\)"),
    ({"scale": torch.zeros(1, 64)}, r"scale must be \(N, C\) = \(2, 64\), not \(1, 64\)"),
    ({"shift": torch.zeros(2, 64, 1, 1)}, r"shift must be \(N, C\) = \(2, 64\), not \(2, 64, 1, 1\)"),
]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_bad_arguments(wrong: dict[str, Any], message: str, backend: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 64, 4, 4), "weight": torch.ones(64), "bias": torch.zeros(64)}
    with pytest.raises(ValueError, match="^group_norm_silu: " + message):
        group_norm_silu(**{**arguments, **wrong}, backend=backend)


@pytest.mark.parametrize(
    "wrong", [{"groups": 0}, {"groups": -32}, {"x": torch.zeros(2, 64, 4, dtype=torch.int64)}], ids=str
)
def test_more_bad_arguments(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 64, 4), "weight": torch.ones(64), "bias": torch.zeros(64)}
    with pytest.raises(ValueError, match=r"^group_norm_silu: "):
        group_norm_silu(**{**arguments, **wrong})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_the_input_bias_alone(backend: str) -> None:
    """And none of it, nor of the parameters, where they are frozen."""
    case = Case((2, 96, 6, 5), input_bias=True)
    tensors = case.tensors()
    x, weight, bias, scale, shift, input_bias = map(leaf_on_device, tensors) if backend == "triton" else tensors
    expected = case.run("truth")
    options: dict[str, Any] = {"scale": scale, "shift": shift, "input_bias": input_bias, "backend": backend}

    def close(name: str, of: Tensor) -> bool:
        y = group_norm_silu(x, weight, bias, **options)
        (found,) = torch.autograd.grad(y, of, case.grad.to(y.device))
        return error(found.cpu(), expected[name]) <= 1e-4 * float(expected[name].abs().max())

    assert close("dinput_bias", input_bias.requires_grad_())
    input_bias.requires_grad_(False)
    assert close("dx", x.requires_grad_())


def test_an_output_without_use_has_no_gradient() -> None:
    case = Case((2, 64, 4, 4))
    x, weight, bias = (leaf_on_device(t) for t in (case.x, case.weight, case.bias))
    x.requires_grad_()
    gradient = case.grad.to(DEVICE)
    y, same = group_norm_silu(x, weight, bias, with_input=True, backend="triton")
    (alone,) = torch.autograd.grad(group_norm_silu(x, weight, bias, backend="triton"), x, gradient)
    assert torch.equal(torch.autograd.grad(y, x, gradient, retain_graph=True)[0], alone)
    assert torch.equal(torch.autograd.grad(same, x, gradient)[0], gradient)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_outputs_without_use_has_no_gradient(used: int) -> None:
    case = Case((2, 96, 4, 4), second=40)
    weight, bias = (leaf_on_device(t) for t in (case.weight, case.bias))
    inputs = [leaf_on_device(each).requires_grad_() for each in case.parts(case.x)]
    y, *same = group_norm_silu(inputs[0], weight, bias, second=inputs[1], with_input=True, backend="triton")
    gradient, of_used = case.grad.to(DEVICE), torch.ones_like(inputs[used])
    alone = torch.autograd.grad(y, inputs, gradient, retain_graph=True)
    found = torch.autograd.grad([y, same[used]], inputs, [gradient, of_used])
    torch.testing.assert_close(found[used], alone[used] + 1, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1 - used], alone[1 - used])
