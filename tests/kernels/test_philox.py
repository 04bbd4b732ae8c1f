"""Philox 4x32-10: Random123's known answers, what is counted where, and the distribution."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.kernels import philox_normal, philox_uint32
from fastdiff.kernels.philox import pytorch

from .support import DEVICE, pairwise

WORD = 2**32 - 1

KNOWN_ANSWERS = [  # Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, section 3.2, on whole numbers of any size."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def words(seed: int, sample: int, step: int, elements: int = 4) -> list[int]:
    return philox_uint32(seed, torch.tensor([sample]), step, elements)[0].tolist()


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_the_generator_in_this_file(counter: str, key: str, result: str) -> None:
    assert philox4x32(hexes(counter), hexes(key)) == hexes(result)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block number starts at 0 for users: here it starts where the known answer wants it."""
    c, k = hexes(counter), hexes(key)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, **kwargs: arange(*args, **kwargs) + c[0])
    sample = c[2] | c[3] << 32
    assert words(k[0] | k[1] << 32, sample - (sample >> 63 << 64), c[1]) == hexes(result)


@pytest.mark.parametrize("case", range(50))
def test_counter_and_key(case: int) -> None:
    """Counter (element / 4, step, sample low, sample high), key the 64-bit seed."""
    rng = random.Random(case)
    seed, sample, step = rng.getrandbits(64), rng.getrandbits(64) - 2**63, rng.getrandbits(32)
    elements = rng.randint(1, 40)
    counters = [[block, step, sample & WORD, sample >> 32 & WORD] for block in range(-(-elements // 4))]
    expected = [word for counter in counters for word in philox4x32(counter, [seed & WORD, seed >> 32])]
    assert words(seed, sample, step, elements) == expected[:elements]


DRAWS: dict[str, list[int]] = {
    "seed": [0, 1, 2**31, 2**32 + 7, 2**63 - 1, 2**63 + 5, 2**64 - 1],
    "elements": [1, 3, 4, 5, 192, 1023, 4100],
    "step": [0, 1, 4000, 2**31, 2**32 - 1],
}


@pytest.mark.parametrize("draw", pairwise(DRAWS), ids=lambda draw: "-".join(map(str, draw.values())))
def test_the_kernel_draws_the_twins_words(draw: dict[str, int]) -> None:
    seed, elements, step = draw.values()
    samples = torch.tensor([0, 7, 2**31, 2**40, -1, 2**63 - 1], device=DEVICE)
    twin, kernel = (philox_uint32(seed, samples, step, elements, backend=b) for b in ("torch", "triton"))
    assert kernel.dtype == torch.int64
    assert torch.equal(kernel, twin)
    strided = philox_uint32(seed, samples[::3], step, elements, backend="triton")
    assert torch.equal(strided, kernel[::3])


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 7, 7), (5,), (0,)], ids=str)
def test_the_kernels_normals_are_the_twins_to_a_few_roundings(shape: tuple[int, ...]) -> None:
    samples = torch.tensor([5, 0, 2**40], device=DEVICE)
    twin, kernel = (philox_normal(2**63 + 5, samples, 3, shape, backend=b) for b in ("torch", "triton"))
    assert kernel.shape == twin.shape == (3, *shape)
    assert kernel.dtype == torch.float32
    torch.testing.assert_close(kernel, twin, rtol=1e-6, atol=2e-6)


def test_the_kernels_angles() -> None:
    """cos and sin all around the circle, the logarithm near both ends of (0, 1): from the uniforms in float64."""
    samples = torch.arange(16, device=DEVICE)
    w = philox_uint32(3, samples, 2, 4096, backend="triton")
    u = (torch.where(w > 0x7FFFFFFF, WORD - w, w).float() * 4.6566127342e-10).double()
    radius, angle = (-2 * u[:, ::2].clamp(min=1e-7).log()).sqrt(), 2 * math.pi * u[:, 1::2]
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    found = philox_normal(3, samples, 2, (4096,), backend="triton")
    assert (found.double() - expected).abs().max() < 5e-6
    assert (w < 2**23).any()  # small u1, large radius, is among them
    assert found.abs().max() > 4


@pytest.mark.parametrize("normal", [True, False])
def test_opcheck(normal: bool) -> None:
    samples = torch.arange(3, device=DEVICE)
    torch.library.opcheck(torch.ops.fastdiff.philox_draw.default, (samples, -5, 2**32 - 1, 10, normal))


def test_bad_samples() -> None:
    for draw in (philox_uint32, philox_normal):
        size: Any = 4 if draw is philox_uint32 else (4,)
        for samples in (torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64)):
            with pytest.raises(ValueError, match=rf"^{draw.__name__}: samples must be \(N,\) int64, not "):
                draw(0, samples, 0, size)


@pytest.mark.parametrize("sample", [-1, -(2**63), 2**63 - 1, 2**32, 2**32 - 1, -(2**32)])
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_extreme_seeds_and_samples(seed: int, sample: int) -> None:
    counter = [0, 7, sample & WORD, sample >> 32 & WORD]
    assert words(seed, sample, 7) == philox4x32(counter, [seed & WORD, seed >> 32])


def test_nothing_that_should_differ_is_equal() -> None:
    draws = [
        words(*key) for key in [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 2**32, 0), (0, -1, 0), (0, 0, 1)]
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_words_are_32_bits() -> None:
    found = philox_uint32(3, torch.arange(50), 1, 999)
    assert found.shape == (50, 999)
    assert found.dtype == torch.int64
    assert found.min() >= 0
    assert found.max() <= WORD
    assert found.max() > 0.999 * WORD
    bits = (found[..., None] >> torch.arange(32)) & 1
    n = found.numel()
    assert (bits.double().mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 7), (1,), (3, 28, 28)], ids=str)
def test_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    samples = torch.tensor([5, 0, 17, -3, 2**40])
    together = philox_normal(11, samples, 4, shape)
    assert together.shape == (5, *shape)
    assert together.dtype == torch.float32
    for i in range(5):
        assert torch.equal(philox_normal(11, samples[i : i + 1], 4, shape), together[i : i + 1])
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(philox_normal(11, samples[order], 4, shape), together[order])


def test_more_elements_begin_with_the_same_ones() -> None:
    samples = torch.tensor([0, 9])
    few, many = philox_normal(1, samples, 2, (13,)), philox_normal(1, samples, 2, (500,))
    torch.testing.assert_close(few, many[:, :13], rtol=1e-6, atol=1e-7)


def test_no_samples() -> None:
    assert philox_normal(1, torch.zeros(0, dtype=torch.int64), 2, (3, 4)).shape == (0, 3, 4)


def test_normals_follow_from_the_words() -> None:
    """Triton's mapping: a word folded to 31 bits, times 4.6566127342e-10; two words to a pair of normals."""
    w = np.array(words(7, 3, 2, 40), dtype=np.uint32).view(np.int32).astype(np.int64)
    u = np.where(w < 0, -w - 1, w) * 4.6566127342e-10
    radius, angle = np.sqrt(-2 * np.log(np.maximum(u[::2], 1e-7))), 2 * np.pi * u[1::2]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    found = philox_normal(7, torch.tensor([3]), 2, (40,))[0]
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5, atol=2e-6)


def test_extreme_words_give_finite_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    pairs = torch.tensor([[a, b] for a in ends for b in ends]).flatten()[None]
    monkeypatch.setattr(pytorch, "philox_uint32", lambda *_: pairs)
    normals = philox_normal(0, torch.tensor([0]), 0, (pairs.numel(),))
    assert torch.isfinite(normals).all()
    assert normals.abs().max() <= math.sqrt(-2 * math.log(1e-7)) + 1e-5


def test_moments_of_the_normals() -> None:
    z = philox_normal(2024, torch.arange(100), 3, (4000,)).double()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 5 * math.sqrt(variance / n), power
    cdf = 0.5 * (1 + torch.erf(z.flatten().sort().values / math.sqrt(2)))
    assert (cdf - (torch.arange(n) + 0.5) / n).abs().max() < 2.5 / math.sqrt(n)  # Kolmogorov & Smirnov


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_neighbours_are_independent(lag: int) -> None:
    z = philox_normal(2024, torch.arange(100), 3, (4000,)).double()
    bound = 5 / math.sqrt(z.numel())
    assert abs(float((z[:, lag:] * z[:, :-lag]).mean())) < bound
    assert abs(float(((z[:, lag:] ** 2 - 1) * (z[:, :-lag] ** 2 - 1)).mean())) < 2 * bound
    assert abs(float((z[lag:] * z[:-lag]).mean())) < 2 * bound  # samples next to each other


def test_steps_and_seeds_are_independent() -> None:
    samples = torch.arange(100)
    base = philox_normal(5, samples, 1, (1000,)).double()
    for seed, step in ((5, 2), (6, 1), (5 + 2**32, 1)):
        other = philox_normal(seed, samples, step, (1000,)).double()
        assert abs(float((base * other).mean())) < 5 / math.sqrt(base.numel())
