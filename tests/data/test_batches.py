"""Batches: the right images, mirrored where asked, made ahead in a thread that always ends."""

import itertools
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.config import DataConfig
from fastdiff.data import Dataset, Preflight, batch_indices, batches
from fastdiff.data.batches import AHEAD

N = 10


@pytest.fixture
def dataset() -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (N, 4, 4, 3), dtype=np.uint8)
    images.flags.writeable = False  # as a memory-mapped file is
    names = tuple(f"{i}.png" for i in range(N))
    return Dataset(images, np.arange(N) * 7, (), Preflight({"png": N}, (), (4, 4), (4, 4), ()), names, "")


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


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_batch(dataset: Dataset, processes: int) -> None:
    config, each = DataConfig(flip=True), 6 // processes

    def first(rows: slice) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        return list(itertools.islice(batches(dataset, config, 6, 0, 4, rows=rows), 5))  # into the next epochs

    parts = [first(slice(rank * each, (rank + 1) * each)) for rank in range(processes)]
    for (whole, labels), *shares in zip(first(slice(None)), *parts, strict=True):
        assert [len(images) for images, _ in shares] == [each] * processes
        assert torch.equal(torch.cat([images for images, _ in shares]), whole)
        assert labels is not None
        assert torch.cat([part for _, part in shares if part is not None]).tolist() == labels.tolist()


@pytest.mark.parametrize("pin", [False, True])
def test_pinned_memory_where_asked(dataset: Dataset, pin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pin and not torch.cuda.is_available():
        asked = []
        empty = torch.empty

        def pageable(*size: object, pin_memory: bool, **kwargs: object) -> torch.Tensor:
            asked.append(pin_memory)
            return empty(*size, **kwargs)

        monkeypatch.setattr(torch, "empty", pageable)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    stream = batches(dataset, DataConfig(flip=True), 4, 3, 0, pin=pin)
    images, labels = next(stream)
    stream.close()
    assert labels is not None
    if pin and not torch.cuda.is_available():
        assert asked
        assert asked.pop(0) == 0  # the thread's device, which the pinned memory belongs to
        assert all(asked)
    else:
        assert images.is_pinned() == labels.is_pinned() == pin
    expected, same_labels = next(batches(dataset, DataConfig(flip=True), 4, 3, 0))
    assert torch.equal(images, expected)
    assert same_labels is not None
    assert torch.equal(labels, same_labels)


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
    stream.close()
    assert threads() == []


def test_an_error_reaches_the_caller_and_ends_the_thread(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Dataset) -> None:
        raise OSError("cache.npy: input/output error")

    monkeypatch.setattr(Dataset, "check", failing)
    stream = batches(dataset, DataConfig(), 8, 0, 0)
    with pytest.raises(OSError, match=r"cache\.npy: input/output error"):
        next(stream)
    assert threads() == []


def test_a_file_that_is_cut_while_it_is_read_is_told_not_a_crash(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "images.npy"
    np.save(file, np.repeat(dataset.images, 4096, axis=0))
    mapped = replace(dataset, images=np.load(file, mmap_mode="r"), labels=None)
    real, calls = Dataset.check, itertools.count(1)

    def check(self: Dataset) -> None:
        if next(calls) == 4:  # between two reads: one that it interrupts ends the process
            os.truncate(file, 4096)
        real(self)

    monkeypatch.setattr(Dataset, "check", check)
    stream = batches(mapped, DataConfig(), 4, 0, 0)
    next(stream)
    with pytest.raises(
        OSError, match=r"images\.npy, the decoded images, has lost [\d,]+ bytes while in use; .*--resume"
    ):
        list(stream)
    assert threads() == []


def test_a_file_that_is_deleted_while_it_is_read_does_no_harm(dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "images.npy"
    np.save(file, dataset.images)
    stream = batches(replace(dataset, images=np.load(file, mmap_mode="r")), DataConfig(), 4, 0, 0)
    file.unlink()
    expected = batches(dataset, DataConfig(), 4, 0, 0)
    for _ in range(4):
        assert torch.equal(next(stream)[0], next(expected)[0])


def test_the_next_batches_are_made_meanwhile(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Semaphore(0)
    monkeypatch.setattr(Dataset, "check", lambda self: made.release())
    stream = batches(dataset, DataConfig(), 2, 0, 0)
    next(stream)
    for _ in range(1 + AHEAD):  # the one returned, and more that nobody has asked for
        assert made.acquire(timeout=10)
    assert not made.acquire(timeout=0.2)


def test_an_open_iterator_does_not_hold_up_the_exit() -> None:
    code = """
import numpy as np
from fastdiff.config import DataConfig
from fastdiff.data import Dataset, Preflight, batches
stream = batches(Dataset(np.zeros((4, 2, 2, 3), np.uint8), None, (), None, (), ""), DataConfig(), 2, 0, 0)
print(next(stream)[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "torch.Size([2, 2, 2, 3])\n"
    assert done.stderr == ""
