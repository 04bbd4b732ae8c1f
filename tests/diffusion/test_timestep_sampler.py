"""How training draws timesteps: weights, memory, and unbiased losses."""

import numpy as np
import pytest

from fastdiff.diffusion.timestep_sampler import LossSecondMomentSampler, UniformSampler, draw


def warm(num_timesteps: int = 6, history: int = 4, seed: int = 0) -> LossSecondMomentSampler:
    sampler = LossSecondMomentSampler(num_timesteps, history_per_term=history)
    rng = np.random.default_rng(seed)
    for _ in range(history):
        sampler.update(np.arange(num_timesteps), rng.uniform(0.1, 2, num_timesteps) * (1 + np.arange(num_timesteps)))
    return sampler


def test_uniform() -> None:
    sampler = UniformSampler(7)
    sampler.update(np.array([1, 1]), np.array([5.0, 9.0]))
    np.testing.assert_array_equal(sampler.weights(), np.ones(7))


def test_uniform_until_every_timestep_is_warm() -> None:
    sampler = LossSecondMomentSampler(3, history_per_term=2)
    for timestep in (0, 0, 0, 1, 1, 2):
        np.testing.assert_array_equal(sampler.weights(), np.ones(3))
        sampler.update(np.array([timestep]), np.array([1.0 + timestep]))
    np.testing.assert_array_equal(sampler.weights(), np.ones(3))
    sampler.update(np.array([2]), np.array([3.0]))
    assert np.ptp(sampler.weights()) > 0.1


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


def test_timesteps_and_losses_go_together() -> None:
    with pytest.raises(ValueError, match="zip"):
        LossSecondMomentSampler(4).update(np.array([0, 1]), np.array([1.0]))


def test_state_dict_round_trip() -> None:
    sampler, other = warm(), LossSecondMomentSampler(6, history_per_term=4)
    other.load_state_dict(sampler.state_dict())
    np.testing.assert_array_equal(other.weights(), sampler.weights())
    for s in (sampler, other):
        s.update(np.array([2, 2, 0]), np.array([9.0, 8.0, 7.0]))
    np.testing.assert_array_equal(other.weights(), sampler.weights())
    np.testing.assert_array_equal(other.history, sampler.history)


def test_a_half_warm_state_goes_on_where_it_was() -> None:
    sampler, other = (LossSecondMomentSampler(2, history_per_term=2) for _ in range(2))
    sampler.update(np.array([0, 0, 1]), np.array([1.0, 2.0, 3.0]))
    other.load_state_dict(sampler.state_dict())
    np.testing.assert_array_equal(other.weights(), np.ones(2))
    other.update(np.array([1]), np.array([3.0]))
    np.testing.assert_array_equal(other.history, [[1, 2], [3, 3]])


def test_a_loaded_state_is_a_copy() -> None:
    sampler, other = warm(), LossSecondMomentSampler(6, history_per_term=4)
    other.load_state_dict(sampler.state_dict())
    before = sampler.weights()
    other.update(np.arange(6), np.full(6, 50.0))
    np.testing.assert_array_equal(sampler.weights(), before)


@pytest.mark.parametrize(("timesteps", "history"), [(5, 4), (7, 4), (6, 3)])
def test_a_state_of_another_size_is_refused(timesteps: int, history: int) -> None:
    sampler = LossSecondMomentSampler(timesteps, history_per_term=history)
    with pytest.raises(ValueError, match="loss history"):
        sampler.load_state_dict(warm().state_dict())


@pytest.mark.parametrize("sampler", [UniformSampler(6), warm()], ids=["uniform", "loss-second-moment"])
def test_weighted_losses_are_unbiased(sampler: UniformSampler | LossSecondMomentSampler) -> None:
    f = np.array([1.0, -4.0, 9.0, 0.5, 100.0, -2.0])
    timesteps, weights = draw(sampler, 200_000, np.random.default_rng(1))
    assert timesteps.shape == weights.shape == (200_000,)
    assert np.issubdtype(timesteps.dtype, np.integer)
    assert weights.dtype == np.float32
    weighted = weights.astype(np.float64) * f[timesteps]
    assert abs(weighted.mean() - f.mean()) < 5 * weighted.std() / np.sqrt(len(weighted))
    p = sampler.weights() / sampler.weights().sum()
    np.testing.assert_allclose(weights, 1 / (6 * p[timesteps]), rtol=1e-6)
    counts = np.bincount(timesteps, minlength=6)
    assert (np.abs(counts - 200_000 * p) < 5 * np.sqrt(200_000 * p * (1 - p))).all()


def test_draw_follows_its_generator() -> None:
    a, b, c = (draw(warm(), 50, np.random.default_rng(seed))[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
