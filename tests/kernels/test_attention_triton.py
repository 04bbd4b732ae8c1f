"""attention in Triton: interpreted where there is no GPU, compiled where there is one."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff.kernels import attention
from fastdiff.kernels.attention import kernel, op, plan
from fastdiff.kernels.launch import recording

from ..numerics import relative
from .attention_formula import VIEWS, run
from .attention_formula import hold as hold_backend
from .support import DEVICE, TRITON_DTYPES, assert_a_few_roundings, pairwise, random

HALF = torch.float16
LOW = [dtype for dtype in TRITON_DTYPES if dtype is not torch.float32]
hold = partial(hold_backend, "triton")
STRIDED = ("time outermost", "every second channel")


AXES: dict[str, list[Any]] = {
    "tokens": [1, 16, 17, 64, 100, 256, 300],
    "head_dim": [16, 24, 32, 64, 96, 128, 144, 192, 256],
    "heads": [1, 2, 4],
    "batch": [1, 3],
    "dtype": TRITON_DTYPES,
}
PRODUCT = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def blocks(case: dict[str, Any]) -> int:
    """How long interpreting takes, roughly: fp32 goes in small blocks."""
    size = 24 if case["dtype"] is torch.float32 else 96
    return (-(-case["tokens"] // size)) ** 2 * case["heads"] * case["batch"]


def name(case: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def hold_case(tokens: int, head_dim: int, heads: int, batch: int, dtype: torch.dtype) -> None:
    hold(random(batch, tokens, 3 * heads * head_dim, seed=1, dtype=dtype), heads)


@pytest.mark.parametrize("case", [case for case in pairwise(AXES) if blocks(case) <= 24], ids=name)
def test_budget(case: dict[str, Any]) -> None:
    hold_case(**case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in PRODUCT if blocks(case) <= 300], ids=name)
def test_budget_of_the_product(case: dict[str, Any]) -> None:
    hold_case(**case)


ALL = range(16, 257, 8)
PADDED = {(plan.parts(d, HALF), sum(plan.parts(d, HALF)) == d): d for d in ALL}
"""Of every division into parts, with and without padding, one head dimension: the others are compiled alike."""


@pytest.mark.parametrize(
    "head_dim", [pytest.param(d, marks=[] if d in PADDED.values() else pytest.mark.slow) for d in ALL]
)
def test_every_head_dimension(head_dim: int) -> None:
    hold(random(1, 33, 3 * head_dim, seed=1, dtype=HALF), 1)


@pytest.mark.parametrize("warpgroups", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_parts_hold_the_head_dimension_and_tiles_are_powers_of_two(dtype: torch.dtype, warpgroups: bool) -> None:
    for d, tokens in itertools.product(range(16, 257, 8), [1, 16, 17, 64, 128, 129, 256, 257, 1024, 4096]):
        first, second = plan.parts(d, dtype)
        assert first >= 16
        assert d <= first + second <= plan.next_power(d)
        at_once = plan.backward_at_once(tokens, d, dtype, warpgroups)
        tiles = [
            plan.forward(tokens, d, dtype, warpgroups),
            plan.backward_queries(d, dtype, warpgroups),
            plan.backward_keys(d, dtype, warpgroups),
            *([at_once] if at_once else []),
        ]
        for width in [first, *([second] if second else []), *(w for t in tiles for w in (t.queries, t.keys, t.warps))]:
            assert width == plan.next_power(width)
        assert all(t.queries >= 16 and t.keys >= 16 for t in tiles)
        assert at_once is None or at_once.keys >= tokens


def test_head_dimensions_of_the_models_are_not_padded() -> None:
    assert [plan.parts(d, HALF) for d in (64, 96, 128, 144, 192)] == [(64, 0), (64, 32), (128, 0), (128, 16), (128, 64)]


def plan_for(warpgroups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans of another kind of GPU; Hopper's want more shared memory than others have."""
    if DEVICE.type == "cuda" and warpgroups and not plan.has_warpgroups(DEVICE):
        pytest.skip("tiles for Hopper's shared memory")
    monkeypatch.setattr(plan, "has_warpgroups", lambda device: warpgroups)


LONG = 70
"""Tokens that take few programs and blocks, and yet more than one block of the kernels of long sequences."""


def take_for_long(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If streamed, sequences take the kernels of long ones, which the interpreter would take seconds for."""
    if kind == "streamed":
        monkeypatch.setattr(plan, "AT_ONCE_UP_TO", 0)


BACKWARD = {
    "at once": ["attention_backward_at_once"],
    "streamed": ["attention_backward_queries", "attention_backward_keys"],
}


@pytest.mark.parametrize("kind", BACKWARD)
def test_long_sequences_have_kernels_of_their_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the limit above chooses are those that the length chooses."""
    monkeypatch.setattr(plan, "has_warpgroups", lambda device: True)

    def launched(tokens: int) -> list[str]:
        qkv = torch.zeros(1, tokens, 48, dtype=HALF, device=DEVICE, requires_grad=True)
        with recording() as launches:
            torch.autograd.grad(attention(qkv, 1, backend="triton"), qkv, torch.zeros_like(qkv[:, :, :16]))
        return [launch.kernel.fn.__name__ for launch in launches]

    names = ["attention_forward", *BACKWARD[kind]]
    assert launched({"at once": 128, "streamed": 129}[kind]) == names
    take_for_long(kind, monkeypatch)
    assert launched(LONG) == names


@pytest.mark.parametrize(
    ("warpgroups", "tokens", "head_dim", "dtype"),
    [
        *[(True, *rest) for rest in itertools.product([64, 100], [24, 64, 144], LOW)],
        *[(False, 64, head_dim, dtype) for head_dim in (24, 96) for dtype in LOW],
        (True, 16, 144, torch.float32),
    ],
    ids=str,
)
def test_both_plans_at_the_same_size(
    warpgroups: bool, tokens: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is within the budget."""
    plan_for(warpgroups, monkeypatch)
    qkv = random(1, tokens, 3 * head_dim, seed=1, dtype=dtype)
    grad = random(1, tokens, head_dim, seed=2, dtype=dtype)
    assert plan.backward_at_once(tokens, head_dim, dtype, warpgroups) is not None
    hold(qkv, 1, grad)
    monkeypatch.setattr(plan, "AT_ONCE_UP_TO", 0)
    assert plan.backward_at_once(tokens, head_dim, dtype, warpgroups) is None
    hold(qkv, 1, grad)


@pytest.mark.parametrize("warpgroups", [True, False])
@pytest.mark.parametrize("head_dim", [64, 144, *(pytest.param(d, marks=pytest.mark.slow) for d in (192, 256))])
def test_blocks_of_every_kind_of_gpu(head_dim: int, warpgroups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_for(warpgroups, monkeypatch)
    hold(random(1, 140, 3 * head_dim, seed=1, dtype=HALF), 1)


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, HALF), (144, HALF), (24, torch.float32)], ids=str)
def test_budget_of_long_sequences(head_dim: int, dtype: torch.dtype) -> None:
    hold(random(1, 1057, 3 * head_dim, seed=1, dtype=dtype), 1)


@pytest.mark.slow
def test_budget_of_the_longest_sequence() -> None:
    hold(random(1, op.MOST_TOKENS, 3 * 32, seed=1, dtype=HALF), 1)


@pytest.mark.parametrize(
    ("view", "tokens", "dtype"),
    [
        *((view, 19, dtype) for view in VIEWS for dtype in (torch.float32, HALF)),
        # the kernels of longer sequences address as those of the short ones do: a stride of each kind
        *((view, "streamed", HALF) for view in STRIDED),
        *(pytest.param(view, tokens, HALF, marks=pytest.mark.slow) for view in VIEWS for tokens in (256, 270)),
    ],
    ids=str,
)
def test_any_strides(view: str, tokens: int | str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(tokens, str):
        take_for_long(tokens, monkeypatch)
        tokens = LONG
    hold(VIEWS[view](tokens).to(dtype), 3, grad=random(2, 48, tokens, seed=8, dtype=dtype).transpose(1, 2))


@pytest.mark.parametrize("kind", BACKWARD)
def test_gradients_with_any_strides(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_for_long(kind, monkeypatch)
    tokens = LONG if kind == "streamed" else 19
    qkv = random(2, tokens, 48, seed=1, dtype=HALF)
    hold(qkv, 1, grad=torch.ones((), dtype=HALF).expand(2, tokens, 16))  # that of a sum
    hold(qkv, 1, grad=random(1, tokens, 16, seed=2, dtype=HALF).expand(2, -1, -1))
    hold(qkv, 1, grad=random(2, tokens, 36, seed=2, dtype=HALF)[:, :, 3:35:2])


@pytest.mark.parametrize("kind", BACKWARD)
def test_the_same_bits_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_for_long(kind, monkeypatch)
    qkv, grad = (random(1, LONG, c, seed=1, dtype=HALF).to(DEVICE) for c in (192, 64))
    first, second = run("triton", qkv, 1, grad), run("triton", qkv, 1, grad)
    for key in first:
        assert torch.equal(first[key], second[key])


@pytest.mark.parametrize("kind", BACKWARD)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_large_scores_stay_finite(dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """q k^T alone would be 64 * 50 * 50 = 160,000, which fp16 does not hold."""
    take_for_long(kind, monkeypatch)
    tokens = LONG if kind == "streamed" else 19
    qkv = random(1, tokens, 3 * 64, seed=1, dtype=dtype)
    qkv[:, :, :128] = 50
    found = run("triton", qkv.to(DEVICE), 1, random(1, tokens, 64, seed=2, dtype=dtype).to(DEVICE))
    assert all(torch.isfinite(value).all() for value in found.values())
    mean = qkv[:, :, 128:].double().mean(1, keepdim=True).expand(-1, tokens, -1)  # all scores are equal
    torch.testing.assert_close(found["y"].double().cpu(), mean, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(5, torch.float32), (50, torch.float32), *itertools.product([17, 250, 300], LOW)], ids=str
)
def test_scores_far_below_zero(tokens: int, dtype: torch.dtype) -> None:
    """Keys behind the last, whose scores are zero, must not outweigh them."""
    hold(far_below_zero(tokens, dtype), 1)


def far_below_zero(tokens: int, dtype: torch.dtype) -> Tensor:
    """One head of 32 channels whose scores are about -360."""
    qkv = random(1, tokens, 3 * 32, seed=1, dtype=dtype)
    qkv[:, :, :32], qkv[:, :, 32:64] = 8 + qkv[:, :, :32] / 8, -8 + qkv[:, :, 32:64] / 8
    return qkv


@pytest.mark.parametrize(
    ("qkv", "largest", "norm"),
    [(far_below_zero(5, torch.float32), None, 1.36e-4), (random(1, 64, 3 * 256, seed=1), 1.37e-6, None)],
    ids=["far below zero", "256 channels"],
)
def test_budgets_of_a_gpu(qkv: Tensor, largest: float | None, norm: float | None) -> None:
    """An H200's, where the reference sums in blocks; on a CPU it sums in chains, with errors twice to five times as
    large. Of each score summed as one chain, y was over both.
    """
    qkv, grad = qkv.to(DEVICE), torch.zeros_like(qkv[:, :, ::3]).to(DEVICE)
    off = (run("triton", qkv, 1, grad)["y"].double() - run("truth", qkv, 1, grad)["y"]).abs()
    assert largest is None or off.max() <= largest
    assert norm is None or off.norm() <= norm


@pytest.mark.parametrize("tokens", [5, 200, 300])
def test_a_sharp_score_chooses_one_value(tokens: int) -> None:
    qkv = torch.zeros(1, tokens, 3 * 16, dtype=HALF)
    qkv[0, 2, 0] = 100.0  # the query of token 2 ...
    qkv[0, 4, 16] = 100.0  # ... meets the key of token 4
    qkv[0, :, 32:] = random(tokens, 16, seed=1, dtype=HALF)
    y = attention(qkv.to(DEVICE), 1, backend="triton").cpu()
    torch.testing.assert_close(y[0, 2], qkv[0, 4, 32:])
    torch.testing.assert_close(y[0, 1], qkv[0, :, 32:].float().mean(0).half(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tokens", [17, 300])
def test_no_samples(tokens: int) -> None:
    qkv = torch.zeros(0, tokens, 144, device=DEVICE, requires_grad=True)
    y = attention(qkv, 3, backend="triton")
    y.sum().backward()
    assert y.shape == (0, tokens, 48)
    assert qkv.grad is not None
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", ["at once", "streamed"])
def test_runs_under_autocast(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    take_for_long(kind, monkeypatch)
    tokens = LONG if kind == "streamed" else 17
    qkv, grad = random(2, tokens, 144, seed=1).to(DEVICE), random(2, tokens, 48, seed=2).to(DEVICE)
    truth = run("truth", qkv, 3, grad)
    with torch.autocast(DEVICE.type, dtype=dtype):
        found = run("triton", qkv, 3, grad)
    assert found["y"].dtype == dtype
    assert found["dqkv"].dtype == torch.float32
    assert_a_few_roundings(found, truth, dtype)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Sample 1 lies 2^31 elements behind sample 0, in a file of which only the pages written to exist."""
    tokens, channels, stride = 20, 48, 2**31 + 64
    if DEVICE.type == "cuda":
        far = torch.empty(stride + tokens * channels, dtype=HALF, device=DEVICE)
    else:
        far = torch.from_numpy(np.memmap(tmp_path / "far", np.float16, "w+", shape=stride + tokens * channels))
    qkv = far.as_strided((2, tokens, channels), (stride, channels, 1))
    qkv.copy_(random(2, tokens, channels, seed=1, dtype=HALF))
    grad = random(2, tokens, channels // 3, seed=2, dtype=HALF).to(DEVICE)
    near = run("triton", qkv.clone(), 1, grad)
    for key, value in run("triton", qkv, 1, grad).items():
        assert torch.equal(value, near[key])
    by_token = far.as_strided((1, 2, channels), (0, stride, 1))  # the same for tokens
    near = run("triton", by_token.clone(), 1, grad[:1, :2])
    for key, value in run("triton", by_token, 1, grad[:1, :2]).items():
        assert torch.equal(value, near[key])


@pytest.mark.parametrize("kind", ["at once", "streamed"])
def test_the_operators_are_what_they_say(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest ones: opcheck calls an operator a dozen times."""
    take_for_long(kind, monkeypatch)
    qkv, dy = random(1, 3, 48, seed=1, dtype=HALF).to(DEVICE), random(1, 3, 16, seed=2, dtype=HALF).to(DEVICE)
    y, lse = torch.ops.fastdiff.attention(qkv, 1)
    assert lse.shape == ((1, 1, 3) if kind == "streamed" else (0,))
    saved = (y, lse) if kind == "streamed" else (None, None)
    for packed in (qkv, qkv.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.library.opcheck(torch.ops.fastdiff.attention.default, (packed, 1))
        torch.library.opcheck(torch.ops.fastdiff.attention_backward.default, (dy, packed, *saved, 1))


def test_short_sequences_save_only_their_input() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        for tokens, tensors in ((64, 1), (300, 3)):
            saved.clear()
            qkv = random(1, tokens, 48, seed=1, dtype=HALF).to(DEVICE).requires_grad_()
            attention(qkv, 1, backend="triton")
            assert len(saved) == tensors


class Attending(nn.Module):
    def __init__(self, backend: str = "triton") -> None:
        super().__init__()
        self.qkv, self.out, self.backend = nn.Linear(32, 96), nn.Linear(32, 32), backend

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attention(self.qkv(x), 2, backend=self.backend))


def gradients(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    leaf = x.detach().requires_grad_()
    y = call(leaf)
    y.square().sum().backward()
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


# Dynamo makes such an object itself, and catches the warning only where warnings are no errors
@pytest.mark.parametrize(
    ("compiler", "tokens", "autocast"),
    [
        ("aot_eager", 16, False),
        ("aot_eager", LONG, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *(("aot_eager", *rest) for rest in ((40, False), (17, True), (300, True))),
                *(("inductor", *rest) for rest in ((16, False), (40, False), (17, True), (300, True))),
            ]
        ),
    ],
)
def test_compiles_as_one_graph(compiler: str, tokens: int, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    take_for_long("streamed" if tokens == LONG else "", monkeypatch)
    module, x = Attending().to(DEVICE), random(1, tokens, 32, seed=1).to(DEVICE)
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    tolerance = 1e-2 if autocast else 1e-5
    with torch.autocast(DEVICE.type, dtype=HALF, enabled=autocast):
        eager, found = gradients(module, module, x), gradients(compiled, module, x)
        for mine, theirs in zip(found, eager, strict=True):
            assert mine.stride() == theirs.stride()
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), eager[0], rtol=tolerance, atol=tolerance)


def test_compiles_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiled model: what it makes of a length, it must not have learnt from another."""
    torch.compiler.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(plan, "AT_ONCE_UP_TO", 64)
    module = Attending().to(DEVICE, HALF)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (17, 40, LONG):
        x = random(1, tokens, 32, seed=1, dtype=HALF).to(DEVICE)
        found, eager = gradients(compiled, module, x), gradients(module, module, x)
        for mine, theirs in zip(found, eager, strict=True):
            assert relative(mine, theirs) < 2 * torch.finfo(HALF).eps


@pytest.mark.parametrize("kind", BACKWARD)
def test_checkpointing_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    take_for_long(kind, monkeypatch)
    module, x = Attending().to(DEVICE, HALF), random(1, LONG, 32, seed=1, dtype=HALF).to(DEVICE)
    plain = gradients(module, module, x)
    checkpointed = gradients(lambda leaf: checkpoint(module, leaf, use_reentrant=False), module, x)
    for mine, theirs in zip(checkpointed, plain, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("head_dim", [8, 20, 264, 512])
def test_head_dimensions_it_does_not_take(head_dim: int) -> None:
    qkv = torch.zeros(1, 4, 3 * head_dim, device=DEVICE)
    message = f"^attention: backend triton takes head dimensions from 16 to 256 in steps of 8, not {head_dim}; use auto"
    with pytest.raises(ValueError, match=message):
        attention(qkv, 1, backend="triton")
    assert attention(qkv, 1).shape == (1, 4, head_dim)


def test_sequences_it_does_not_take() -> None:
    qkv = torch.zeros(1, 4097, 48, device=DEVICE)
    with pytest.raises(ValueError, match=r"^attention: backend triton takes up to 4096 tokens, not 4097; use auto"):
        attention(qkv, 1, backend="triton")
    assert attention(qkv, 1).shape == (1, 4097, 16)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="elsewhere auto is torch")
def test_auto_takes_the_kernels_where_they_win(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def count(qkv: Tensor, heads: int) -> Tensor:
        calls.append(qkv.shape[1])
        return kernel.Attention.apply(qkv, heads)

    monkeypatch.setitem(op.IMPLEMENTATIONS, op.Backend.TRITON, count)
    for tokens, dtype in ((64, HALF), (1024, HALF), (1025, HALF), (64, torch.float32)):
        attention(torch.zeros(1, tokens, 96, device=DEVICE, dtype=dtype), 1)
    assert calls == [64, 1024]
