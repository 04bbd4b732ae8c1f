"""The fp32 functions of kernels/arithmetic.py against float64, and the errors of the instructions that they avoid."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastdiff.kernels import arithmetic

from .support import DEVICE

BLOCK = 4096
COUNT = 16 * BLOCK


@triton.jit
def apply(out, x, y, FUNCTION: tl.constexpr, BINARY: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i)
    value = FUNCTION(a, tl.load(y + i)) if BINARY else FUNCTION(a)
    tl.store(out + i, value)


def run(function: Any, *operands: np.ndarray) -> np.ndarray:
    """``function`` of fp32 numbers in a kernel."""
    size = len(operands[0])
    x, *rest = (torch.from_numpy(np.resize(a, COUNT).astype(np.float32)).to(DEVICE) for a in operands)
    out = torch.empty_like(x)
    apply[(COUNT // BLOCK,)](out, x, *(rest or [x]), FUNCTION=function, BINARY=bool(rest), BLOCK=BLOCK)
    return out.cpu().numpy()[:size]


def between(low: float, high: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, COUNT).astype(np.float32)


def of_sizes(low: float, high: float, seed: int = 0) -> np.ndarray:
    """From 2^low to 2^high, evenly by their logarithms."""
    return np.exp2(np.random.default_rng(seed).uniform(low, high, COUNT)).astype(np.float32)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a / b


def inverse(x: np.ndarray) -> np.ndarray:
    return 1 / x


def ulps(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The distances from the float64 truth, in units in the last place of fp32."""
    _, exponent = np.frexp(truth)
    return np.abs(found - truth) / np.ldexp(1.0, exponent - 24)


def steps(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How many fp32 numbers the results are away from the correctly rounded ones."""
    rounded = truth.astype(np.float32)
    return np.abs(found.view(np.int32).astype(np.int64) - rounded.view(np.int32))


Truth = Callable[..., np.ndarray]

BOUNDS: dict[str, tuple[Any, Truth, list[np.ndarray], float]] = {
    "exp": (arithmetic.exp, np.exp, [between(-87, 88)], 1.02),
    "exp near 0": (arithmetic.exp, np.exp, [between(-1, 1)], 1.02),
    "exp2": (arithmetic.exp2, np.exp2, [between(-126, 127.4)], 1.02),
    "exp2 near 0": (arithmetic.exp2, np.exp2, [between(-1, 1)], 1.02),
    "log": (arithmetic.log, np.log, [of_sizes(-125.9, 127.9)], 0.84),
    "log near 1": (arithmetic.log, np.log, [of_sizes(-1, 1)], 0.84),
    "reciprocal": (arithmetic.reciprocal, inverse, [of_sizes(-100, 100)], 0.51),
    "reciprocal by root": (arithmetic.reciprocal_by_root, inverse, [of_sizes(-100, 100)], 0.51),
    "reciprocal of a negative": (arithmetic.reciprocal, inverse, [-of_sizes(0, 1)], 0.51),
    "divide": (arithmetic.divide, quotient, [between(-9, 9), of_sizes(-60, 60, seed=1)], 0.51),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_within_the_documented_error(name: str) -> None:
    function, truth, operands, bound = BOUNDS[name]
    found = run(function, *operands)
    assert ulps(found, truth(*(x.astype(np.float64) for x in operands))).max() <= bound


def test_powers_of_the_infinite_and_of_no_number() -> None:
    ends = np.array([-np.inf, np.inf, np.nan, -1e30, 1e30, 0])
    for function in (arithmetic.exp, arithmetic.exp2):
        np.testing.assert_array_equal(run(function, ends), [0, np.inf, np.nan, 0, np.inf, 1])


def test_exact_results() -> None:
    integers = np.arange(-126, 128)
    np.testing.assert_array_equal(run(arithmetic.exp2, integers), np.ldexp(1.0, integers))
    np.testing.assert_array_equal(run(arithmetic.log, np.array([1, np.nan])), [0, np.nan])
    np.testing.assert_array_equal(
        run(arithmetic.reciprocal, np.ldexp(1.0, integers[30:-30])), np.ldexp(1.0, -integers[30:-30])
    )


# What the functions are there for: on a GPU as documented, in the interpreter by tests/interpreter.py


@triton.jit
def fast_divide(a, b):
    return a / b


@triton.jit
def fast_exp(x):
    return tl.exp(x)


@triton.jit
def fast_exp2(x):
    return tl.exp2(x)


@triton.jit
def fast_log(x):
    return tl.log(x)


@triton.jit
def fast_rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def fast_sqrt(x):
    return tl.sqrt(x)


@triton.jit
def rounded_quotient(a, b):
    return tl.div_rn(a, b)


@triton.jit
def rounded_root(x):
    return tl.sqrt_rn(x)


@triton.jit
def rest_of_square(x):
    return tl.fma(x, x, -(x * x))


OFF: dict[str, tuple[Any, Truth, list[np.ndarray], int]] = {
    "/": (fast_divide, quotient, [between(-9, 9), of_sizes(-60, 60, seed=1)], 2),
    "exp2": (fast_exp2, np.exp2, [between(-126, 127.4)], 2),
    "rsqrt": (fast_rsqrt, lambda x: 1 / np.sqrt(x), [of_sizes(-100, 100)], 2),
    "sqrt": (fast_sqrt, np.sqrt, [of_sizes(-100, 100)], 1),
    "div_rn": (rounded_quotient, quotient, [between(-9, 9), of_sizes(-60, 60, seed=1)], 0),
    "sqrt_rn": (rounded_root, np.sqrt, [of_sizes(-100, 100)], 0),
}


@pytest.mark.parametrize("name", OFF)
def test_the_interpreter_errs_as_a_gpu_may(name: str) -> None:
    function, truth, operands, limit = OFF[name]
    found = run(function, *operands)
    np.testing.assert_array_equal(run(function, *operands), found)
    off = steps(found, truth(*(x.astype(np.float64) for x in operands)))
    assert off.max() <= limit
    if DEVICE.type == "cpu":
        assert off.max() == limit


def test_the_exponential_and_the_logarithm_err_more() -> None:
    x, near_one = between(-87, 88), between(0.5, 2)
    relative = np.abs(run(fast_exp, x) / np.exp(x.astype(np.float64)) - 1).max()
    absolute = np.abs(run(fast_log, near_one) - np.log(near_one.astype(np.float64))).max()
    assert relative < 2.0**-17  # a rounding of x log2 e is 2^-18 near 128
    assert absolute < 2.0**-22
    if DEVICE.type == "cpu":
        assert relative > 2.0**-20
        assert absolute > 2.0**-23


def test_powers_of_integers_are_exact() -> None:
    integers = np.arange(-126, 128)
    np.testing.assert_array_equal(run(fast_exp2, integers), np.ldexp(1.0, integers))


def test_fma_rounds_once() -> None:
    x = between(1, 2)
    exact = x.astype(np.float64) ** 2 - (x * x)
    np.testing.assert_array_equal(run(rest_of_square, x), exact)
    assert exact.any()


@triton.jit
def product_of_halves(out, a, b, APART: tl.constexpr):
    """a b^T of (16, 32) matrices as the sum of two products."""
    row, channel = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    at = row * 32 + channel
    first = tl.dot(tl.load(a + at), tl.trans(tl.load(b + at)), input_precision="ieee")
    second = tl.dot(tl.load(a + at + 16), tl.trans(tl.load(b + at + 16)), input_precision="ieee")
    tl.store(out + row * 16 + channel, tl.fma(second, 1.0, first) if APART else first + second)


def chain(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    for x, y in zip(a.astype(np.float64).T, b.astype(np.float64).T, strict=True):
        total = (total + np.outer(x, y)).astype(np.float32)
    return total


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD's matrix units take fp32")
def test_products_are_chains_and_their_sum_a_longer_one() -> None:
    a, b = (np.random.default_rng(seed).normal(size=(16, 32)).astype(np.float32) for seed in (1, 2))
    zero = np.zeros((16, 16), np.float32)
    first = chain(a[:, :16], b[:, :16], zero)
    for apart, truth in (
        (False, chain(a[:, 16:], b[:, 16:], first)),
        (True, first + chain(a[:, 16:], b[:, 16:], zero)),
    ):
        out = torch.empty(16, 16, device=DEVICE)
        product_of_halves[(1,)](out, *(torch.from_numpy(x).to(DEVICE) for x in (a, b)), apart)
        np.testing.assert_array_equal(out.cpu().numpy(), truth)
