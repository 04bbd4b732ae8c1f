"""Copies to the device: what arrives, in which order things are asked of CUDA, and that closing reaches the source."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastdiff.data import prefetch_to_device
from fastdiff.data.batches import Batch

closed = []


def source(n: int, labelled: bool = True, pin: bool = False) -> Generator[Batch, None, None]:
    """n batches whose pixels and labels are their number."""
    closed.clear()
    try:
        for i in range(n):
            labels = torch.full((2,), i)
            images = torch.full((2, 64, 64, 3), i, dtype=torch.uint8)
            if pin:
                images, labels = images.pin_memory(), labels.pin_memory()
            yield images, labels if labelled else None
    finally:
        closed.append(True)


@pytest.mark.parametrize("labelled", [True, False])
def test_on_the_cpu_batches_pass_through(labelled: bool) -> None:
    expected = list(source(3, labelled))
    arrived = prefetch_to_device(iter_of(expected), torch.device("cpu"))
    for (images, labels), (given, given_labels) in zip(arrived, expected, strict=True):
        assert images is given
        assert labels is given_labels


def iter_of(batches: list[Batch]) -> Generator[Batch, None, None]:
    yield from batches


def test_elsewhere_they_are_moved() -> None:
    images, labels = next(prefetch_to_device(source(1), torch.device("meta")))
    assert labels is not None
    assert images.device.type == labels.device.type == "meta"


def test_closing_closes_the_source() -> None:
    stream = prefetch_to_device(source(3), torch.device("cpu"))
    next(stream)
    assert not closed
    stream.close()
    assert closed


class Tensor:
    """A tensor as far as copying goes, which writes down what happens to it."""

    def __init__(self, name: str, calls: list[str], stream: list[str]) -> None:
        self.name, self.calls, self.stream = name, calls, stream

    def to(self, device: torch.device, non_blocking: bool) -> "Tensor":
        assert device.type == "cuda"
        assert non_blocking
        self.calls.append(f"copy {self.name} on {self.stream[-1]}")
        return self

    def record_stream(self, stream: "Stream") -> None:
        self.calls.append(f"{self.name} is used on {stream.name}")


class Stream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls, self.events = name, calls, 0

    def record_event(self) -> str:
        self.events += 1
        self.calls.append(f"event {self.events}")
        return f"event {self.events}"

    def wait_event(self, event: str) -> None:
        self.calls.append(f"{self.name} waits for {event}")


def test_the_next_copy_begins_before_the_present_batch_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    current = ["compute"]

    @contextmanager
    def on(stream: Stream) -> Generator[None, None, None]:
        current.append(stream.name)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", calls))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(current[-1], calls))
    pairs: list[Any] = [
        (Tensor(f"x{i}", calls, current), Tensor("y0", calls, current) if i == 0 else None) for i in (0, 1)
    ]
    for images, _ in prefetch_to_device(iter_of(pairs), torch.device("cuda")):
        calls.append(f"train on {images.name}")  # type: ignore[attr-defined]
        assert current == ["compute"]
    assert calls == [
        "copy x0 on side",
        "copy y0 on side",
        "event 1",
        "copy x1 on side",
        "event 2",
        "compute waits for event 1",
        "x0 is used on compute",
        "y0 is used on compute",
        "train on x0",
        "compute waits for event 2",
        "x1 is used on compute",
        "train on x1",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_no_batch_is_overwritten_and_nothing_waits() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    weight = torch.randn(4096, 4096, device=device)
    sums = []
    pinned = source(50, pin=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in prefetch_to_device(pinned, device):
            assert labels is not None
            for _ in range(20):  # the host runs ahead of the device, and so do the copies
                weight @ weight
            sums.append(torch.stack([images.float().mean(), labels.float().mean()]))
            del images, labels
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(sums).cpu().tolist() == [[i, i] for i in range(50)]
