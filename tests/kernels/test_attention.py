"""attention: every implementation against the formula in float64, forward and gradient."""

from functools import partial
from typing import Any

import pytest
import torch

from fastdiff.kernels import attention
from fastdiff.kernels.attention.op import _kernels_win
from fastdiff.kernels.attention.pytorch import CPU_PRODUCTS_UP_TO

from .attention_formula import VIEWS, run
from .attention_formula import hold as hold_backend
from .support import DTYPES, assert_a_few_roundings, random

BACKENDS = ["torch", "reference"]
hold = partial(hold_backend, "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 64])
@pytest.mark.parametrize("tokens", [1, 17, 64, 300])
@pytest.mark.parametrize("batch", [1, 3])
def test_budget(batch: int, tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    hold(random(batch, tokens, 3 * 2 * head_dim, seed=1, dtype=dtype), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 64])
def test_budget_of_long_sequences(head_dim: int, dtype: torch.dtype) -> None:
    tokens = 1057
    assert tokens > CPU_PRODUCTS_UP_TO  # another implementation runs there
    hold(random(1, tokens, 3 * head_dim, seed=1, dtype=dtype), 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [1, 2, 3, 6])
@pytest.mark.parametrize("tokens", [1, 17, CPU_PRODUCTS_UP_TO + 1])
def test_float64_is_the_formula(tokens: int, heads: int, backend: str) -> None:
    qkv, grad = random(2, tokens, 3 * 48, seed=1).double(), random(2, tokens, 48, seed=2).double()
    truth, found = run("truth", qkv, heads, grad), run(backend, qkv, heads, grad)
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_few_roundings_from_the_formula(backend: str, dtype: torch.dtype) -> None:
    """The budget is relative to the reference: here is what the reference itself may cost."""
    qkv, grad = random(2, 64, 3 * 48, seed=1, dtype=dtype), random(2, 64, 48, seed=2, dtype=dtype)
    assert_a_few_roundings(run(backend, qkv, 2, grad), run("truth", qkv, 2, grad), dtype)


@pytest.mark.parametrize("tokens", [19, CPU_PRODUCTS_UP_TO + 1])
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, tokens: int) -> None:
    hold(VIEWS[view](tokens), 3, grad=random(2, 48, tokens, seed=8).transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [19, CPU_PRODUCTS_UP_TO + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_scores_stay_finite(dtype: torch.dtype, tokens: int, backend: str) -> None:
    """q k^T alone would be 64 * 50 * 50 = 160,000, which fp16 does not hold; divided by sqrt(d) it does."""
    qkv = random(1, tokens, 3 * 64, seed=1, dtype=dtype)
    qkv[:, :, :128] = 50
    found = run(backend, qkv, 1, random(1, tokens, 64, seed=2, dtype=dtype))
    assert all(torch.isfinite(value).all() for value in found.values())
    mean = qkv[:, :, 128:].double().mean(1, keepdim=True).expand(-1, tokens, -1)  # all scores are equal
    torch.testing.assert_close(found["y"].double(), mean, rtol=0, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_is_its_own_value(backend: str) -> None:
    qkv = random(2, 1, 3 * 32, seed=1)
    values = torch.cat([qkv[:, :, 32:48], qkv[:, :, 80:96]], dim=2)  # v of head 0 and of head 1
    torch.testing.assert_close(attention(qkv, 2, backend=backend), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sharp_score_chooses_one_value(backend: str) -> None:
    qkv = torch.zeros(1, 5, 3 * 16)
    qkv[0, 2, 0] = 100.0  # the query of token 2 ...
    qkv[0, 4, 16] = 100.0  # ... meets the key of token 4
    qkv[0, :, 32:] = random(5, 16, seed=1)
    y = attention(qkv, 1, backend=backend)
    torch.testing.assert_close(y[0, 2], qkv[0, 4, 32:])
    torch.testing.assert_close(y[0, 1], qkv[0, :, 32:].mean(0))


@pytest.mark.parametrize("tokens", [17, CPU_PRODUCTS_UP_TO + 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_under_autocast(backend: str, tokens: int) -> None:
    """Its products are autocast's business; what comes out is of the low precision and as good."""
    qkv, grad = random(2, tokens, 144, seed=1), random(2, tokens, 48, seed=2)
    truth = run("truth", qkv, 3, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(backend, qkv, 3, grad)
    assert found["y"].dtype == torch.bfloat16
    assert found["dqkv"].dtype == torch.float32
    assert_a_few_roundings(found, truth, torch.bfloat16)


def test_auto_is_torch_on_a_cpu() -> None:
    qkv = random(2, 17, 144, seed=1)
    assert torch.equal(attention(qkv, 3), attention(qkv, 3, backend="torch"))


@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype", "ours"),
    [
        (1024, 64, torch.bfloat16, True),
        (1024, 88, torch.float16, True),
        (1025, 64, torch.bfloat16, False),
        (256, 192, torch.bfloat16, True),
        (511, 96, torch.bfloat16, True),
        (512, 96, torch.bfloat16, False),
        (64, 64, torch.float32, False),
    ],
)
def test_where_the_kernels_are_expected_to_win(tokens: int, head_dim: int, dtype: torch.dtype, ours: bool) -> None:
    assert _kernels_win(tokens, head_dim, dtype) == ours


BAD: list[tuple[tuple[int, ...], Any, str]] = [
    ((17, 144), 3, r"qkv must be \(N, T, 3C\), not \(17, 144\)"),
    ((2, 144, 4, 4), 3, r"qkv must be \(N, T, 3C\), not \(2, 144, 4, 4\)"),
    ((2, 17, 144), 5, r"144 channels of qkv do not divide into 3 \* 5 heads"),
    ((2, 17, 145), 1, r"145 channels of qkv do not divide into 3 \* 1 heads"),
    ((2, 17, 144), 0, r"144 channels of qkv do not divide into 3 \* 0 heads"),
    ((2, 17, 144), -3, r"144 channels of qkv do not divide into 3 \* -3 heads"),
]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("shape", "heads", "message"), BAD, ids=[str(bad[:2]) for bad in BAD])
def test_bad_arguments(shape: tuple[int, ...], heads: int, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match="^attention: " + message):
        attention(torch.zeros(shape), heads, backend=backend)
