"""How many images fit into the memory, and what is said where they do not."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.models import UNet
from fastdiff.runtime.distributed import World
from fastdiff.training.fitting import largest_that_fits, out_of_memory

from ..cli.conftest import Cli, cli, train  # noqa: F401  # fixtures
from ..cli.support import contents, refused, succeeded
from .support import file, same, trainer, weights

Forward = Callable[..., Tensor]
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
    with pytest.raises(ValueError, match=r"one image .*--use-checkpoint.*--parallel fsdp") as error:
        largest_that_fits(5, room_for(0, seen), World())
    assert seen == [5, 3, 2, 1]
    assert "\n" not in str(error.value)


def test_another_error_is_no_lack_of_memory() -> None:
    def broken(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        largest_that_fits(4, broken, World())
    assert not out_of_memory(RuntimeError("mat1"))


class Crowd(World):
    """A process and its neighbour, which has room for two images."""

    said = []

    def gathered(self, value: Any) -> list[Any]:
        self.said.append(value)
        return [value, len(self.said) > 2]


def test_the_process_with_the_least_room_decides() -> None:
    world = Crowd()
    assert largest_that_fits(8, room_for(5), world) == 2
    assert world.said == [False, True, True]  # its own answers, at 8, 4 and 2: every process asks as often


# Through the trainer


def with_room(monkeypatch: pytest.MonkeyPatch, room: int, first: int = 0) -> list[int]:
    """From the call ``first`` on a forward pass has memory for so many images; returns the sizes that were tried."""
    real: Forward = UNet.forward
    sizes: list[int] = []

    def forward(self: UNet, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(x))
        if len(x) > room and len(sizes) > first:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet, "forward", forward)
    return sizes


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


def test_an_update_without_memory_leaves_the_one_before(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the third: with what its first micro-batch has added up to the log, a resumed run would count
    it twice."""
    flags = FLAGS | {"steps": 4, "microbatch": 4, "log_interval": 4}
    trainer(tmp_path / "straight", shapes, **flags).run()
    with monkeypatch.context() as patch:
        with_room(patch, 0, first=5)
        failing = trainer(tmp_path / "run", shapes, **flags)
        with pytest.raises(ValueError, match="--microbatch 2"):
            failing.run()
    again = trainer(tmp_path / "run", shapes, **flags)
    again.resume()
    assert again.state.step == 2
    again.run()
    straight = file(tmp_path / "straight/model000004.safetensors")[0]
    assert same(straight, weights(again))
    (expected,), (row,) = (
        [json.loads(line) for line in (tmp_path / run / "progress.jsonl").read_text().splitlines()]
        for run in ("straight", "run")
    )
    for name in ("loss", "grad_norm", "skipped"):
        assert row[name] == expected[name], name


# Through the command line


def microbatch_in(run_dir: Path) -> object:
    return json.loads((run_dir / "config.json").read_text())["train"]["microbatch"]


def test_the_number_that_was_found_is_the_runs(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with monkeypatch.context() as patch:
        with_room(patch, 3)
        result = succeeded(train("r", "--steps", 1, "--microbatch", "auto"))
    assert "microbatch auto: 2 images in a forward pass\n" in result.out
    assert microbatch_in(tmp_path / "r") == 2
    assert file(tmp_path / "r/opt000001.safetensors")[1]["fastdiff-1"].count('"microbatch": 2') == 1
    sizes = with_room(monkeypatch, 99)
    again = succeeded(train("r", "--steps", 2, "--resume"))
    assert sizes == [2, 2]  # and not as many as would fit now: another number would round otherwise
    assert "auto" not in again.out
    assert microbatch_in(tmp_path / "r") == 2


def test_out_of_memory_is_one_line_and_loses_nothing(
    train: Cli,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    succeeded(train("r", "--steps", 2))
    before = contents(tmp_path / "r")
    with_room(monkeypatch, 0, first=1)
    refused(
        train("r", "--steps", 5, "--resume", "--save-interval", 9),
        "^error: out of memory with 4 images in a forward pass: use --microbatch 2, or auto$",
    )
    after = contents(tmp_path / "r")
    assert {name: after[name] for name in before if re.search(r"00000\d\.", name)} == {
        name: data for name, data in before.items() if re.search(r"00000\d\.", name)
    }
    assert {name for name in after if "000003" in name} == {  # the update that was done
        *("model000003.safetensors", "ema_0.9999_000003.safetensors", "opt000003.safetensors", "manifest000003.json")
    }
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "resumed at step 3\n" in succeeded(train("r", "--steps", 4, "--resume", "--microbatch", 2)).out


def test_no_memory_at_the_start_is_no_run(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with monkeypatch.context() as patch:
        with_room(patch, 0)
        for flags in (("--microbatch", "auto"), ("--microbatch", 3)):
            refused(train("r", "--steps", 1, *flags), "out of memory with")
            assert not list((tmp_path / "r").glob("config.json"))
            assert not list((tmp_path / "r").glob("*.safetensors"))
    succeeded(train("r", "--steps", 1))  # the failed attempts do not stand in the way
