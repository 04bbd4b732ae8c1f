"""How many images fit into the memory, and what is said where they do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.runtime.distributed import World
from fastdiff.runtime.memory import out_of_memory
from fastdiff.training import Trainer
from fastdiff.training.fitting import largest_that_fits
from fastdiff.training.resuming import resume

from ..support import refusal
from .support import file, same, trainer, weights, with_room

HOST = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


def room_for(images: int, tried: list[int] | None = None, error: type[RuntimeError] = torch.OutOfMemoryError) -> Any:
    def attempt(size: int) -> None:
        if tried is not None:
            tried.append(size)
        if size > images:
            raise error("CUDA out of memory." if error is torch.OutOfMemoryError else HOST)

    return attempt


@pytest.mark.parametrize(
    ("room", "found", "tried"), [(99, 13, [13]), (13, 13, [13]), (12, 7, [13, 7]), (3, 2, [13, 7, 4, 2])]
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_it_is_halved_until_it_fits(room: int, found: int, tried: list[int], error: type[RuntimeError]) -> None:
    seen: list[int] = []
    assert largest_that_fits(13, room_for(room, seen, error), World()) == found
    assert seen == tried


@given(most=st.integers(1, 300), room=st.integers(1, 300))
def test_what_is_found_fits_and_is_no_less_than_half_of_what_would(most: int, room: int) -> None:
    found = largest_that_fits(most, room_for(room), World())
    assert found <= min(most, room) <= 2 * found


def test_where_not_even_one_fits_it_says_what_helps() -> None:
    seen: list[int] = []
    refusal(lambda: largest_that_fits(5, room_for(0, seen), World()), r"one image .*--use-checkpoint.*--parallel fsdp")
    assert seen == [5, 3, 2, 1]


def test_another_error_is_no_lack_of_memory() -> None:
    def broken(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        largest_that_fits(4, broken, World())
    assert not out_of_memory(RuntimeError("mat1"))


class Crowd(World):
    """A process and its neighbour, which has room for two images."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "said", [])

    def all_gather_object(self, value: Any) -> list[Any]:
        self.said.append(value)
        return [value, len(self.said) > 2]


def test_the_process_with_the_least_room_decides() -> None:
    world = Crowd()
    assert largest_that_fits(8, room_for(5), world) == 2
    assert world.said == [False, True, True]  # its own answers, at 8, 4 and 2: every process asks as often


# Through the trainer


FLAGS: dict[str, Any] = {"steps": 2, "batch_size": 8, "lr": 1e-3, "class_cond": True, "dropout": 0.1}


@pytest.mark.parametrize(("room", "found"), [(8, 8), (7, 4), (3, 2), (1, 1)])
def test_auto_finds_the_microbatch(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, room: int, found: int
) -> None:
    sizes = with_room(monkeypatch, room)
    subject = trainer(tmp_path, shapes, microbatch="auto", **FLAGS)
    assert subject.config.train.microbatch == found
    assert subject.state.config is subject.config  # which checkpoints hold
    assert subject.model_calls == 2 * 8 // found
    assert f"microbatch auto: {found} images in a forward pass" in subject.log
    assert all(p.grad is None for p in subject.model.parameters())
    sizes.clear()
    assert subject.run() == 0
    assert sizes == [found] * (2 * 8 // found)


def test_auto_trains_as_the_number_does(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial leaves no trace: neither gradients nor draws of random numbers."""
    with_room(monkeypatch, 5)
    trainer(tmp_path / "auto", shapes, microbatch="auto", **FLAGS).run()
    trainer(tmp_path / "4", shapes, microbatch=4, **FLAGS).run()
    for name in ("model000002", "ema_0.9999_000002", "opt000002"):
        (one, said), (other, said_other) = (file(tmp_path / run / f"{name}.safetensors") for run in ("auto", "4"))
        assert same(one, other), name
        assert said == said_other  # and with it the configuration


def test_auto_where_not_even_one_image_fits(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = with_room(monkeypatch, 0)
    with pytest.raises(ValueError, match="out of memory with one image"):
        trainer(tmp_path, shapes, microbatch="auto", **FLAGS)
    assert sizes == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ({}, "with 8 images in a forward pass: use --microbatch 4, or auto"),
        ({"microbatch": 5}, "with 5 images in a forward pass: use --microbatch 2, or auto"),
        ({"microbatch": 1}, "with 1 images? in a forward pass: use --use-checkpoint"),
    ],
)
def test_out_of_memory_says_what_to_try(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], advice: str
) -> None:
    with_room(monkeypatch, 0)
    with pytest.raises(ValueError, match=f"^out of memory {advice}$"):
        trainer(tmp_path, shapes, **FLAGS, **flags).run()


SPLIT = FLAGS | {"steps": 4, "microbatch": 4, "log_interval": 4}


def failing_in_the_third(run_dir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A run that has no memory for the second micro-batch of its third update, resumed."""
    with monkeypatch.context() as patch:
        with_room(patch, 0, first=5)
        failing = trainer(run_dir, shapes, **SPLIT)
        with pytest.raises(ValueError, match="--microbatch 2"):
            failing.run()
    again = trainer(run_dir, shapes, **SPLIT)
    resume(again)
    return again


def test_the_updates_before_one_without_memory_are_kept(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failing_in_the_third(tmp_path, shapes, monkeypatch).state.step == 2


def test_half_an_update_is_nowhere(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what its first micro-batch has added to the sums of the log, a resumed run would count it twice."""
    trainer(tmp_path / "straight", shapes, **SPLIT).run()
    again = failing_in_the_third(tmp_path / "run", shapes, monkeypatch)
    again.run()
    straight = file(tmp_path / "straight/model000004.safetensors")[0]
    assert same(straight, weights(again))
    (expected,), (row,) = (
        [json.loads(line) for line in (tmp_path / run / "progress.jsonl").read_text().splitlines()]
        for run in ("straight", "run")
    )
    for name in ("loss", "grad_norm", "skipped"):
        assert row[name] == expected[name], name
