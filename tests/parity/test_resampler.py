"""The loss-second-moment resampler over 400 updates."""

import numpy as np

from fastdiff import LossSecondMomentSampler

from .support import assert_close, load


def test_weights_after_each_update() -> None:
    data = load("second_moment.npz")
    assert set(data) == {"num_timesteps", "timesteps", "losses", "weights"}
    sampler = LossSecondMomentSampler(data["num_timesteps"])
    found = []
    for timesteps, losses in zip(data["timesteps"], data["losses"], strict=True):
        sampler.update(timesteps, losses)
        weights = np.asarray(sampler.weights(), np.float64)
        found.append(weights / weights.sum())
    assert_close(np.stack(found), data["weights"], 1e-5, "weights")
