"""The order of images: a function of seed and update alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.data import batch_indices, epoch_order

sizes = st.integers(1, 50)
seeds = st.integers(0, 2**40)


@given(n=sizes, seed=seeds, epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(n))


@given(n=sizes, batch=sizes, seed=seeds, steps=st.integers(1, 12))
def test_batches_follow_the_epochs(n: int, batch: int, seed: int, steps: int) -> None:
    drawn = np.concatenate([batch_indices(n, batch, seed, step)[0] for step in range(steps)])
    epochs = np.concatenate([epoch_order(n, seed, e) for e in range(-(-steps * batch // n))])
    np.testing.assert_array_equal(drawn, epochs[: steps * batch])


@given(n=sizes, batch=sizes, seed=seeds, steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_any_batch_can_be_asked_for_at_any_time(n: int, batch: int, seed: int, steps: list[int]) -> None:
    first = {step: batch_indices(n, batch, seed, step) for step in steps}
    for step in reversed(steps):
        for a, b in zip(batch_indices(n, batch, seed, step), first[step], strict=True):
            np.testing.assert_array_equal(a, b)


@given(n=sizes, seed=seeds, step=st.integers(0, 100), factor=st.integers(2, 5))
def test_a_batch_larger_than_the_data_is_balanced(n: int, seed: int, step: int, factor: int) -> None:
    indices, _ = batch_indices(n, factor * n, seed, step)
    assert np.bincount(indices, minlength=n).tolist() == [factor] * n


@given(n=sizes, seed=seeds, epoch=st.integers(0, 20), batch=sizes)
def test_flips_belong_to_places_not_to_batches(n: int, seed: int, epoch: int, batch: int) -> None:
    _, whole = batch_indices(n, n, seed, epoch)
    first, last = epoch * n // batch, ((epoch + 1) * n - 1) // batch
    flips = np.concatenate([batch_indices(n, batch, seed, step)[1] for step in range(first, last + 1)])
    start = epoch * n - first * batch
    assert flips.dtype == np.bool_
    np.testing.assert_array_equal(flips[start : start + n], whole)


def test_seeds_and_epochs_differ() -> None:
    orders = [tuple(epoch_order(100, seed, epoch)) for seed in range(3) for epoch in range(3)]
    flips = [tuple(batch_indices(100, 100, seed, epoch)[1]) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(set(flips)) == 9


def test_half_of_the_flips() -> None:
    assert 4700 < batch_indices(10_000, 10_000, 0, 0)[1].sum() < 5300


def test_order_stays_as_it_is() -> None:
    """A resumed run must go on with the order that it began with, also after an upgrade."""
    assert epoch_order(8, 1, 2).tolist() == [6, 0, 7, 5, 1, 4, 3, 2]
    assert batch_indices(8, 8, 1, 2)[1].astype(int).tolist() == [0, 1, 0, 1, 1, 1, 0, 0]
