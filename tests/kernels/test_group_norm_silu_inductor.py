"""What torch.compile is given on a CPU, run by itself: against float64 like every other implementation."""

import uuid
from importlib import import_module

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.utils import counters

from fastdiff.kernels import group_norm_silu
from fastdiff.kernels.graph_cache import let_cache

from .support import DTYPES, pairwise
from .test_group_norm_silu import CHANNELS, FAR, LAYOUTS, Case, hold


@pytest.fixture(autouse=True)
def _as_if_compiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "compiled" not in request.function.__name__:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


SELECTED = pairwise(
    {
        "channels": CHANNELS,
        "spatial": [(3, 5), (8, 8), (32, 32), (7,), (2, 3, 4)],
        "batch": [1, 3],
        "layout": list(LAYOUTS),
        "dtype": DTYPES,
        "scale": [True, False],
        "shift": [True, False],
        "silu": [True, False],
    }
)


@pytest.mark.parametrize("chosen", SELECTED, ids=lambda chosen: "-".join(map(str, chosen.values())))
def test_budget(chosen: dict[str, object]) -> None:
    variant = {name: bool(chosen[name]) for name in ("scale", "shift", "silu")}
    shape = (chosen["batch"], chosen["channels"], *chosen["spatial"])  # type: ignore[misc]
    hold(Case(shape, chosen["dtype"], str(chosen["layout"]), **variant))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("offset", "spread"), FAR)
def test_budget_far_from_zero(offset: float, spread: float, layout: str) -> None:
    hold(Case((2, 96, 8, 8), layout=layout, offset=offset, spread=spread))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_is_the_formula(layout: str) -> None:
    case = Case((2, 96, 3, 5), torch.float64, layout)
    case.weight, case.bias = case.weight.double(), case.bias.double()
    torch.testing.assert_close(case.run("torch"), case.run("truth"), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_value_a_group_is_its_bias(layout: str) -> None:
    case = Case((3, 32, 1, 1), layout=layout)
    truth, found = case.run("truth"), case.run("torch")
    torch.testing.assert_close(found["y"].double(), truth["y"], rtol=1e-5, atol=1e-5)
    assert float(found["dx"].abs().max()) < 1e-3  # of 1 / sqrt(eps) = 316 times dy


@pytest.mark.parametrize("value", [-1e4, -90.0, 90.0, 1e4])
def test_far_ends_of_the_sigmoid(value: float) -> None:
    """Where exp2 overflows, and where it is zero."""
    x = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = group_norm_silu(x, torch.ones(32), torch.full((32,), value), backend="torch")
    (dx,) = torch.autograd.grad(y.sum(), x)
    y = y.detach()
    assert torch.isfinite(y).all()
    assert torch.isfinite(dx).all()
    assert float(y.min()) >= -0.28
    assert (y > 0).all() if value > 0 else (y <= 0).all()


def test_compiled_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, the same numbers, and results in the layout of what they are for."""
    case = Case((2, 96, 8, 8), torch.bfloat16, "channels_last")
    leaves = [t.detach().requires_grad_() for t in case.tensors() if t is not None]

    def op(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, s: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(x, w, b, scale=s, shift=h, backend="torch")

    found = torch.compile(op, fullgraph=True)(*leaves)
    gradients = torch.autograd.grad(found, leaves, case.grad)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    truth, reference = case.run("truth"), case.run("reference")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    alone = case.run("torch")
    for tensor, name in zip((found.detach(), *gradients), truth, strict=True):
        limit = 2 * float((reference[name].double() - truth[name]).abs().max()) + 0.01 * float(truth[name].abs().max())
        assert float((tensor.double() - truth[name]).abs().max()) <= limit, name
        torch.testing.assert_close(tensor, alone[name], rtol=1e-2, atol=1e-2, msg=name)


def compiled_anew() -> str:
    """Whether PyTorch finds the traced graph in its cache, "hit" or "miss", when a process compiles a norm."""
    counters.clear()
    torch._dynamo.reset()
    weight, bias = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
    compiled = torch.compile(lambda x: group_norm_silu(x, weight, bias, backend="torch"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(torch.randn(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)).sum().backward()
    (found,) = (name for name in counters["aot_autograd"] if name in ("autograd_cache_hit", "autograd_cache_miss"))
    return found.removeprefix("autograd_cache_")


@pytest.mark.skipif(torch.__version__ < "2.13", reason="PyTorch's key does not have autocast's dtype")
@pytest.mark.slow
def test_the_compiled_graph_is_kept_for_the_next_start_until_the_norm_is_another() -> None:
    norm = "fastdiff.kernels.group_norm_silu.inductor.group_norm_silu"
    import_module(norm.rpartition(".")[0])  # as the first graph does
    marked = torch._inductor.config.unsafe_marked_cacheable_functions
    assert norm in marked
    # PyTorch's own patch: pytest's removes a setting when it undoes, and every later compilation fails
    with (
        torch._functorch.config.patch(enable_autograd_cache=True),
        torch._inductor.config.patch(unsafe_marked_cacheable_functions=dict(marked)),
    ):
        # versions that no cache knows, in the place of an empty cache: in one, g++ would begin with PyTorch's headers
        let_cache(norm, version=f"one {uuid.uuid4()}")
        assert [compiled_anew(), compiled_anew()] == ["miss", "hit"]
        let_cache(norm, version=f"another {uuid.uuid4()}")
        assert compiled_anew() == "miss"
