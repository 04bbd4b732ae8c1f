"""Batches: the right images, mirrored where asked, one ahead in a thread that always ends."""

import itertools
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastdiff.config import DataConfig
from fastdiff.data import Dataset, Preflight, batch_indices, batches

N = 10


@pytest.fixture
def dataset() -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (N, 4, 4, 3), dtype=np.uint8)
    images.flags.writeable = False  # as a memory-mapped file is
    return Dataset(images, np.arange(N) * 7, (), Preflight({"png": N}, (), (4, 4), (4, 4), ()))


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("batches")]


def test_batches_are_gathered_in_order(dataset: Dataset) -> None:
    for step, (images, labels) in enumerate(itertools.islice(batches(dataset, DataConfig(), 4, 3, 0), 8)):
        indices, _ = batch_indices(N, 4, 3, step)
        assert (images.dtype, images.shape) == (torch.uint8, (4, 4, 4, 3))
        np.testing.assert_array_equal(images.numpy(), dataset.images[indices])
        assert labels is not None
        assert labels.dtype == torch.int64
        assert labels.tolist() == (indices * 7).tolist()


def test_a_later_start_gives_the_same_batches(dataset: Dataset) -> None:
    config = DataConfig(flip=True)
    all_of_them = [images for images, _ in itertools.islice(batches(dataset, config, 4, 3, 0), 8)]
    resumed = [images for images, _ in itertools.islice(batches(dataset, config, 4, 3, 5), 3)]
    assert torch.equal(torch.stack(resumed), torch.stack(all_of_them[5:]))


def test_flip_mirrors_left_to_right(dataset: Dataset) -> None:
    images, _ = next(batches(dataset, DataConfig(flip=True), N, 0, 0))
    indices, flips = batch_indices(N, N, 0, 0)
    assert 0 < flips.sum() < N
    for image, index, flip in zip(images.numpy(), indices, flips, strict=True):
        np.testing.assert_array_equal(image, dataset.images[index][:, ::-1] if flip else dataset.images[index])


def test_no_labels(dataset: Dataset) -> None:
    assert next(batches(replace(dataset, labels=None), DataConfig(), 2, 0, 0))[1] is None


def test_processes_share_a_batch(dataset: Dataset) -> None:
    config = DataConfig(flip=True)
    whole, labels = next(batches(dataset, config, 6, 0, 4))
    parts = [next(batches(dataset, config, 6, 0, 4, rows=slice(i, i + 2))) for i in (0, 2, 4)]
    assert labels is not None
    assert torch.equal(torch.cat([images for images, _ in parts]), whole)
    assert torch.cat([part for _, part in parts if part is not None]).tolist() == labels.tolist()


def test_a_batch_larger_than_the_data_warns_and_goes_on(dataset: Dataset) -> None:
    with pytest.warns(UserWarning, match="batch_size 25 is larger than the 10 images"):
        stream = batches(dataset, DataConfig(), 25, 0, 0)
    images, labels = next(stream)
    assert len(images) == 25
    assert labels is not None
    assert np.bincount(labels.numpy() // 7, minlength=N).tolist() == [
        3 if i in labels[20:] // 7 else 2 for i in range(N)
    ]


def test_a_batch_as_large_as_the_data_is_silent(dataset: Dataset) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches(dataset, DataConfig(), N, 0, 0)


def test_closing_ends_the_thread(dataset: Dataset) -> None:
    stream = batches(dataset, DataConfig(), 2, 0, 0)
    next(stream)
    assert len(threads()) == 1
    stream.close()  # type: ignore[attr-defined]
    assert threads() == []


def test_an_error_reaches_the_caller_and_ends_the_thread(dataset: Dataset) -> None:
    stream = batches(replace(dataset, labels=np.arange(2)), DataConfig(), 8, 0, 0)
    with pytest.raises(IndexError):
        next(stream)
    assert threads() == []


def test_the_next_batch_is_made_meanwhile(dataset: Dataset) -> None:
    made = threading.Semaphore(0)

    class Watched(np.ndarray):
        def __getitem__(self, key: object) -> object:
            made.release()
            return super().__getitem__(key)

    stream = batches(replace(dataset, images=dataset.images.view(Watched)), DataConfig(), 2, 0, 0)
    next(stream)
    assert made.acquire(timeout=10)  # the one returned
    assert made.acquire(timeout=10)  # and one more that nobody has asked for


def test_an_open_iterator_does_not_hold_up_the_exit() -> None:
    code = """
import numpy as np
from fastdiff.config import DataConfig
from fastdiff.data import Dataset, Preflight, batches
stream = batches(Dataset(np.zeros((4, 2, 2, 3), np.uint8), None, (), None), DataConfig(), 2, 0, 0)
print(next(stream)[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "torch.Size([2, 2, 2, 3])\n"
    assert done.stderr == ""
