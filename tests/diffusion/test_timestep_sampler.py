"""How training draws timesteps: weights, memory, and unbiased losses."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fastdiff.diffusion.timestep_sampler import LossSecondMomentSampler, TimestepSampler, UniformSampler, draw
from fastdiff.kernels import philox_uint32

Losses = list[tuple[int, float]]


def words(n: int, seed: int = 0) -> Tensor:
    return philox_uint32(seed, torch.arange(n), 0, 2)


def warm(num_timesteps: int = 6, history: int = 4, seed: int = 0) -> LossSecondMomentSampler:
    sampler = LossSecondMomentSampler(num_timesteps, history_per_term=history)
    rng = np.random.default_rng(seed)
    for _ in range(history):
        sampler.update(np.arange(num_timesteps), rng.uniform(0.1, 2, num_timesteps) * (1 + np.arange(num_timesteps)))
    return sampler


class Weighted(UniformSampler):
    """Whatever weights a test wants."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__(len(weights))
        self._weights = torch.tensor(weights, dtype=torch.float64)


class Plain:
    """The original's loop, one loss at a time."""

    def __init__(self, num_timesteps: int, history: int) -> None:
        self.losses: list[list[float]] = [[] for _ in range(num_timesteps)]
        self.history = history

    def update(self, batch: Losses) -> None:
        for t, loss in batch:
            if math.isfinite(loss):
                self.losses[t] = [*self.losses[t], loss][-self.history :]

    def weights(self) -> list[float]:
        size = len(self.losses)
        if any(len(row) < self.history for row in self.losses):
            return [1.0] * size
        roots = [math.sqrt(sum(loss**2 for loss in row) / self.history) for row in self.losses]
        total = sum(roots)
        return [root / total * 0.999 + 0.001 / size for root in roots] if total else [1.0] * size


LOSS = st.floats(width=32) | st.floats(0, 4, width=32)


@settings(deadline=None)
@given(
    history=st.integers(1, 4),
    batches=st.lists(st.lists(st.tuples(st.integers(0, 3), LOSS), max_size=14), max_size=8),
)
def test_as_the_original_one_loss_at_a_time(history: int, batches: list[Losses]) -> None:
    sampler, plain = LossSecondMomentSampler(4, history_per_term=history), Plain(4, history)
    for batch in batches:
        sampler.update([t for t, _ in batch], [loss for _, loss in batch])
        plain.update(batch)
        rows = [row + [0.0] * (history - len(row)) for row in plain.losses]
        assert sampler.history.tolist() == rows
        assert sampler.counts.tolist() == [len(row) for row in plain.losses]
        assert_close(sampler.weights(), torch.tensor(plain.weights(), dtype=torch.float64))


def test_uniform() -> None:
    sampler = UniformSampler(7)
    sampler.update(np.array([1, 1]), np.array([5.0, 9.0]))
    assert_close(sampler.weights(), torch.ones(7, dtype=torch.float64))


def test_uniform_until_every_timestep_is_warm() -> None:
    sampler = LossSecondMomentSampler(3, history_per_term=2)
    for timestep in (0, 0, 0, 1, 1, 2):
        assert sampler.weights().tolist() == [1, 1, 1]
        sampler.update(np.array([timestep]), np.array([1.0 + timestep]))
    assert sampler.weights().tolist() == [1, 1, 1]
    sampler.update(np.array([2]), np.array([3.0]))
    assert np.ptp(sampler.weights().numpy()) > 0.1


def test_proportional_to_the_root_of_the_second_moment() -> None:
    sampler = LossSecondMomentSampler(3, history_per_term=2, uniform_prob=0.01)
    sampler.update(np.array([0, 0, 1, 1, 2, 2]), np.array([3.0, 4.0, 1.0, 1.0, 0.0, 2.0]))
    roots = np.sqrt([12.5, 1.0, 2.0])
    np.testing.assert_allclose(sampler.weights(), 0.99 * roots / roots.sum() + 0.01 / 3)
    assert sampler.weights().sum() == pytest.approx(1)


def test_the_oldest_loss_drops_out() -> None:
    sampler = LossSecondMomentSampler(2, history_per_term=2, uniform_prob=0)
    sampler.update(np.array([0, 0, 1, 1]), np.array([100.0, 1.0, 1.0, 1.0]))
    sampler.update(np.array([0]), np.array([1.0]))
    np.testing.assert_allclose(sampler.weights(), [0.5, 0.5])
    sampler.update(np.array([0, 0, 0]), np.array([100.0, 3.0, 3.0]))  # one batch, in order
    np.testing.assert_allclose(sampler.weights(), [0.75, 0.25])


def test_no_timestep_dies_out() -> None:
    sampler = LossSecondMomentSampler(4, history_per_term=1)
    sampler.update(np.arange(4), np.array([0.0, 0.0, 0.0, 1.0]))
    np.testing.assert_allclose(sampler.weights()[:3], 0.001 / 4)


def test_losses_that_are_all_zero_leave_it_uniform() -> None:
    sampler = LossSecondMomentSampler(3, history_per_term=1)
    sampler.update(np.arange(3), np.zeros(3))
    assert sampler.weights().tolist() == [1, 1, 1]


def test_timesteps_and_losses_go_together() -> None:
    with pytest.raises(ValueError, match=r"timesteps have shape \(2,\), but losses \(1,\)"):
        LossSecondMomentSampler(4).update(np.array([0, 1]), np.array([1.0]))


def test_state_dict_round_trip() -> None:
    sampler, other = warm(), LossSecondMomentSampler(6, history_per_term=4)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.weights(), sampler.weights())
    for s in (sampler, other):
        s.update(np.array([2, 2, 0]), np.array([9.0, 8.0, 7.0]))
    assert torch.equal(other.weights(), sampler.weights())
    assert torch.equal(other.history, sampler.history)
    assert {key: value.dtype for key, value in other.state_dict().items()} == {
        "history": torch.float64,
        "counts": torch.int64,
    }


def test_a_half_warm_state_goes_on_where_it_was() -> None:
    sampler, other = (LossSecondMomentSampler(2, history_per_term=2) for _ in range(2))
    sampler.update(np.array([0, 0, 1]), np.array([1.0, 2.0, 3.0]))
    other.load_state_dict(sampler.state_dict())
    assert other.weights().tolist() == [1, 1]
    other.update(np.array([1]), np.array([3.0]))
    assert other.history.tolist() == [[1, 2], [3, 3]]


def test_a_state_is_a_copy() -> None:
    sampler, other = warm(), LossSecondMomentSampler(6, history_per_term=4)
    state = sampler.state_dict()
    other.load_state_dict(state)
    before = sampler.weights()
    other.update(np.arange(6), np.full(6, 50.0))
    assert torch.equal(sampler.weights(), before)
    kept = state["history"].clone()
    sampler.update(np.arange(6), np.full(6, 50.0))  # while the state is still on its way to the disk
    assert torch.equal(state["history"], kept)


@pytest.mark.parametrize(("timesteps", "history"), [(5, 4), (7, 4), (6, 3)])
def test_a_state_of_another_size_is_refused(timesteps: int, history: int) -> None:
    sampler = LossSecondMomentSampler(timesteps, history_per_term=history)
    with pytest.raises(ValueError, match="loss history"):
        sampler.load_state_dict(warm().state_dict())


@pytest.mark.parametrize("sampler", [UniformSampler(6), warm()], ids=["uniform", "loss-second-moment"])
def test_weighted_losses_are_unbiased(sampler: UniformSampler | LossSecondMomentSampler) -> None:
    f = np.array([1.0, -4.0, 9.0, 0.5, 100.0, -2.0])
    timesteps, weights = (drawn.numpy() for drawn in draw(sampler, words(200_000)))
    assert timesteps.shape == weights.shape == (200_000,)
    assert timesteps.dtype == np.int64
    assert weights.dtype == np.float32
    weighted = weights.astype(np.float64) * f[timesteps]
    assert abs(weighted.mean() - f.mean()) < 5 * weighted.std() / np.sqrt(len(weighted))
    p = (sampler.weights() / sampler.weights().sum()).numpy()
    np.testing.assert_allclose(weights, 1 / (6 * p[timesteps]), rtol=1e-6)
    counts = np.bincount(timesteps, minlength=6)
    assert (np.abs(counts - 200_000 * p) < 5 * np.sqrt(200_000 * p * (1 - p))).all()


WORD = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(0, 1e6) | st.floats(1e-12, 1e-9), min_size=1, max_size=9).filter(lambda w: sum(w) > 0),
    drawn=st.lists(st.tuples(WORD | st.sampled_from([0, 2**32 - 1]), WORD), min_size=1, max_size=5),
)
def test_draws_are_the_inverse_of_the_cumulative_distribution(
    weights: list[float], drawn: list[tuple[int, int]]
) -> None:
    sampler = Weighted(weights)
    p = sampler.weights() / sampler.weights().sum()
    shares = [math.ceil(float(x) * 2**30) for x in p]
    assert all((share > 0) == (float(x) > 0) for share, x in zip(shares, p, strict=True))
    total = sum(shares)
    timesteps, importance = draw(sampler, torch.tensor(drawn))
    for t, weight, (high, low) in zip(timesteps.tolist(), importance.tolist(), drawn, strict=True):
        fraction = Fraction(2**32 * high + low, 2**64)
        assert sum(shares[:t]) <= int(fraction * total) < sum(shares[: t + 1])
        assert weight == pytest.approx(total / (len(shares) * shares[t]), rel=1e-6)


def test_every_timestep_of_positive_weight_can_be_drawn_and_no_other() -> None:
    weights = [1e-300, 1.0, 0.0, 1e-300, 0.0]  # shares 1, 2^30, 0, 1, 0
    total = 2**30 + 2
    edges = [0, 1, 2**30, 2**30 + 1]
    first_fractions = [-(-(edge << 64) // total) for edge in edges]  # ceil: the first words that reach the edge
    pairs = torch.tensor([[value >> 32, value & 0xFFFFFFFF] for value in [*first_fractions, 2**64 - 1]])
    assert draw(Weighted(weights), pairs)[0].tolist() == [0, 1, 1, 3, 3]


@pytest.mark.parametrize("num_timesteps", [1, 7, 1000, 4000])
def test_uniform_losses_count_exactly_once(num_timesteps: int) -> None:
    _, weights = draw(UniformSampler(num_timesteps), words(100))
    assert (weights == 1).all()


def test_draws_follow_their_words() -> None:
    a, b, c = (draw(warm(), words(50, seed))[0] for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    halves = torch.cat([draw(warm(), part)[0] for part in words(50, 3).split(25)])
    assert torch.equal(a, halves)  # a sample's timestep does not depend on the batch that it is drawn in


def step(sampler: TimestepSampler, words: Tensor) -> None:
    timesteps, weights = draw(sampler, words)
    sampler.update(timesteps, weights)


@pytest.mark.parametrize("kind", [UniformSampler, LossSecondMomentSampler])
def test_nothing_asks_for_a_value(kind: type[UniformSampler | LossSecondMomentSampler]) -> None:
    """On the device that has none: asking for one, or a shape that depends on one, is an error there."""
    sampler = kind(8, device="meta")
    step(sampler, torch.empty(16, 2, dtype=torch.int64, device="meta"))
    assert sampler.weights().is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_and_every_bit_is_the_same() -> None:
    samplers = [LossSecondMomentSampler(50, 2, device="cuda") for _ in range(3)]
    drawn = [words(64, seed).cuda() for seed in range(20)]
    step(samplers[0], drawn[0])  # compiled and loaded
    samplers[0] = LossSecondMomentSampler(50, 2, device="cuda")
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in drawn:
            for sampler in samplers:
                step(sampler, part)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert samplers[0].counts.bool().any()
    assert all(torch.equal(sampler.history, samplers[0].history) for sampler in samplers)
