"""Which images an update sees: a pure function of seed and update number, so that a resumed run skips nothing."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of n images in one epoch (0-based): a read-only int64 (n,) permutation."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order


@lru_cache(maxsize=2)
def _epoch_flips(n: int, seed: int, epoch: int) -> NDArray[np.bool_]:
    # The third number makes the stream differ from the order's; it must not be 0, because seeds are padded with 0.
    return np.random.default_rng([seed, epoch, 1]).random(n) < 0.5


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Indices of the images (out of n) in update ``step`` (0-based), and which to mirror: int64 (B,), bool (B,).

    Updates take consecutive positions in an endless sequence of epochs, each of which contains every image once. A
    batch larger than n continues into the next epochs, so that over a run all images are drawn equally often, to
    within one.
    """
    assert min(n, batch_size, step + 1) > 0, (n, batch_size, step)
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    indices = np.empty(batch_size, np.int64)
    flips = np.empty(batch_size, np.bool_)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        indices[here] = epoch_order(n, seed, epoch)[places[here]]
        flips[here] = _epoch_flips(n, seed, epoch)[places[here]]
    return indices, flips
