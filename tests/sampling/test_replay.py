"""The same seed gives the same images: in any batch, on any number of processes, after any death."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.checkpoint import save_classifier
from fastdiff.kernels import philox_uint32
from fastdiff.sampling import Loop
from fastdiff.sampling.shards import Shards, parts_of

from ..processes import Result, launch
from .support import CLASSES, PROCESS, UPPER, classifier_of, command, saved

WORKER = Path(__file__).with_name("worker.py")
STEPS = 4
COUNT = 16
HOW = ["--steps", str(STEPS), "--seed", "11", "--precision", "fp32", "--compile", "off", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, model.safetensors, and its first images as one batch draws them, whole.npz."""
    folder = tmp_path_factory.mktemp("replay")
    saved(folder / "model.safetensors", **CLASSES, learn_sigma=True)
    command("sample", folder / "model.safetensors", *HOW, "--num-samples", COUNT, "--out", folder / "whole.npz")
    return folder


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def same(path: Path, whole: Path, numbers: list[int] | None = None) -> None:
    """A finished file holds the images of those numbers as the whole one has them, with all that belongs to them."""
    numbers = list(range(COUNT)) if numbers is None else numbers
    ours, theirs = load(path), load(whole)
    assert ours.keys() == theirs.keys()
    assert ours["indices"].tolist() == numbers
    assert ours["arr_1"].tolist() == theirs["arr_1"][numbers].tolist()
    assert ours["seed"] == theirs["seed"] == 11
    levels = np.abs(ours["arr_0"].astype(int) - theirs["arr_0"][numbers])
    assert levels.max() <= 2
    assert np.mean(levels > 0) < 0.01
    assert len({image.tobytes() for image in ours["arr_0"]}) == len(numbers)
    said = [json.loads(str(file["settings"])) for file in (ours, theirs)]
    which = {"indices": "", "num_samples": 0}
    assert said[0] | which == said[1] | which
    assert path.with_suffix(".png").is_file()
    assert not parts_of(path).exists()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_whatever_the_batch(folder: Path, tmp_path: Path, batch_size: int) -> None:
    out = tmp_path / "a.npz"
    command(
        *("sample", folder / "model.safetensors", *HOW, "--num-samples", COUNT, "--out", out),
        *("--batch-size", batch_size),
    )
    same(out, folder / "whole.npz")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("7", [7]), ("0-15", list(range(16))), ("15,2,9", [15, 2, 9]), ("3-5, 11,0-1", [3, 4, 5, 11, 0, 1])],
)
def test_a_part_is_what_the_whole_holds(folder: Path, tmp_path: Path, text: str, numbers: list[int]) -> None:
    out = tmp_path / "a.npz"
    flags = ("--indices", text, "--batch-size", 2, "--png-dir", tmp_path / "pngs", "--out", out)
    command("sample", folder / "model.safetensors", *HOW, *flags)
    same(out, folder / "whole.npz", numbers)
    names = sorted(path.name for path in (tmp_path / "pngs").iterdir())
    assert names == sorted(f"{CLASSES['class_names'][i % 3]}_{i:06d}.png" for i in numbers)


def test_the_words_are_the_same_bit_for_bit() -> None:
    numbers = torch.tensor([0, 1, 15, 2**32 + 1, 2**60])
    whole = philox_uint32(2**64 - 1, numbers, 3, 50)
    alone = torch.cat([philox_uint32(2**64 - 1, number[None], 3, 50) for number in numbers])
    assert torch.equal(whole, alone)
    assert torch.equal(philox_uint32(2**64 - 1, numbers.flip(0), 3, 50).flip(0), whole)


def sample(
    processes: int,
    folder: Path,
    out: Path,
    *args: object,
    torchrun: tuple[str, ...] | None = None,
    **environment: object,
) -> Result:
    """``fastdiff sample`` alone or as several processes, through a worker that can be told to come to harm."""
    flags = [*HOW, *(() if "--indices" in args else ("--num-samples", COUNT)), "--out", out, *args]
    words = ("sample", folder / "model.safetensors", *flags)
    return launch(WORKER, words, out.parent, environment, processes, torchrun)


def finished(out: Path) -> dict[str, int]:
    """The shards of an unfinished job with the times at which they were written."""
    shards = Shards(parts_of(out))
    assert shards.spans()
    return {f"{span.start}-{span.stop}": shards._path(span).stat().st_mtime_ns for span in shards.spans()}


def images_in(names: dict[str, int]) -> int:
    return sum(int(stop) - int(start) for start, stop in (name.split("-") for name in names))


def test_two_processes_draw_what_one_does(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    result = sample(2, folder, out, "--batch-size", 3, COUNT_FILE=tmp_path / "count")
    assert result.status == 0, result
    same(out, folder / "whole.npz")
    assert [(tmp_path / f"count{rank}").read_text() for rank in (0, 1)] == [str(3 * STEPS)] * 2  # 8 as 3, 3, 2
    assert result.out.count("drawing: 16 images") == result.out.count("wrote ") == 1
    assert "2 processes" in result.out


@pytest.mark.parametrize(
    ("before", "after", "batch_size", "then"),
    [(1, 1, 5, 5), (1, 2, 3, 3), (2, 1, 3, 4)],
    ids=["one and one", "one and two", "two and one, in other batches"],
)
def test_killed_and_started_again(
    folder: Path, tmp_path: Path, before: int, after: int, batch_size: int, then: int
) -> None:
    """kill -9 in the middle, and the same command once more: what was finished is not drawn again."""
    out = tmp_path / "a.npz"
    # in the third batch, when the first is on the disk
    harm = {"KILL_AFTER_STEPS": 2 * STEPS + 2, "KILL_RANK": before - 1}
    result = sample(before, folder, out, "--batch-size", batch_size, **harm)
    assert result.status == (1 if before > 1 else -9), result
    assert not out.exists()
    there = finished(out)
    assert 0 < images_in(there) < COUNT
    result = sample(after, folder, out, "--batch-size", then, COUNT_FILE=tmp_path / "count")
    assert result.status == 0, result
    assert f"resuming: {images_in(there)} of 16 images are finished\n" in result.out
    same(out, folder / "whole.npz")
    missing = COUNT - images_in(there)
    shares = [len(part) for part in np.array_split(np.arange(missing), after)]
    counts = [int((tmp_path / f"count{rank}").read_text()) for rank in range(after)]
    assert counts == [-(-share // then) * STEPS for share in shares]


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional model and a classifier that guides it, and the first images."""
    folder = tmp_path_factory.mktemp("guided")
    saved(folder / "model.safetensors", learn_sigma=True)
    classifier = classifier_of(len(CLASSES["class_names"]))
    about = {"config": classifier.config, "class_names": CLASSES["class_names"], "diffusion_config": PROCESS}
    save_classifier(folder / "classifier.safetensors", classifier, **about)
    command(
        "sample", folder / "model.safetensors", *HOW, *guide(folder), "--num-samples", COUNT, "--out", whole(folder)
    )
    return folder


def guide(folder: Path) -> tuple[object, ...]:
    return "--classifier", folder / "classifier.safetensors", "--classifier-scale", 3


def whole(folder: Path) -> Path:
    return folder / "whole.npz"


def test_a_guided_job_killed_on_two_processes_and_resumed_on_one(guided: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    harm = {"KILL_AFTER_STEPS": 2 * STEPS + 2, "KILL_RANK": 1}
    result = sample(2, guided, out, *guide(guided), "--batch-size", 3, **harm)
    assert result.status == 1, result
    there = finished(out)
    result = sample(1, guided, out, "--batch-size", 3)
    assert result.status == 2
    assert "unfinished job with another classifier" in result.err
    assert finished(out) == there
    result = sample(1, guided, out, *guide(guided), "--batch-size", 3)
    assert result.status == 0, result
    assert f"resuming: {images_in(there)} of 16 images are finished\n" in result.out
    assert "guided by: " in result.out
    same(out, whole(guided))
    assert load(out)["class_names"].tolist() == list(CLASSES["class_names"])


@pytest.mark.parametrize(("flag", "text", "said"), [("--class", "eel", "class 'eel'"), ("--indices", "a", "indices")])
def test_bad_input_is_told_once(folder: Path, tmp_path: Path, flag: str, text: str, said: str) -> None:
    """However many processes there are."""
    result = sample(2, folder, tmp_path / "a.npz", flag, text)
    (line,) = (line for line in result.err.splitlines() if "error:" in line)
    assert line.startswith(f"error: {said}")
    assert result.status == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_death_of_one_process_is_mended_by_torchrun(folder: Path, tmp_path: Path) -> None:
    """One of two dies, torchrun starts both again; nothing that either had finished is lost, nor overwritten again."""
    out = tmp_path / "a.npz"
    out.touch()
    harm = {"KILL_AFTER_STEPS": 5 * STEPS + 2, "KILL_RANK": 1, "COUNT_FILE": tmp_path / "count"}
    result = sample(
        2,
        folder,
        out,
        "--batch-size",
        1,
        "--overwrite",
        torchrun=("--max-restarts=1", "--monitor-interval=0.2"),
        **harm,
    )
    assert result.status == 0, result
    assert "resuming: " in result.out
    same(out, folder / "whole.npz")
    counts = [int((tmp_path / f"count{rank}").read_text()) for rank in (0, 1)]
    assert max(counts) < 8 * STEPS  # each was to draw 8


class Died(BaseException):
    """What no program reckons with."""


@pytest.mark.parametrize("what", ["base", "cascade"])
def test_enlarged_images_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Killed and gone on with, in other batches; the noise of both models is that of the image's number."""
    model = saved(tmp_path / "upper.safetensors", **CLASSES, **UPPER)
    flags: dict[str, list[Any]] = {
        "base": [model, "--base-samples", folder / "whole.npz"],
        "cascade": [folder / "model.safetensors", "--super-res", model, "--num-samples", COUNT],
    }
    whole, out = tmp_path / "whole.npz", tmp_path / "a.npz"
    command("sample", *flags[what], *HOW, "--out", whole)

    real, taken = Loop.step, 0

    def step(self: Loop) -> None:
        nonlocal taken
        real(self)
        taken += 1
        if taken == 3 * STEPS + 1:
            raise Died

    monkeypatch.setattr(Loop, "step", step)
    with pytest.raises(Died):
        command("sample", *flags[what], *HOW, "--out", out, "--batch-size", 3)
    there = images_in(finished(out))
    assert 0 < there < COUNT
    command("sample", *flags[what], *HOW, "--out", out, "--batch-size", 4)
    same(out, whole)


@pytest.mark.slow
def test_a_signal_to_all_while_one_is_done(folder: Path, tmp_path: Path) -> None:
    """The second process has nothing to draw and waits; it must not die of the signal before the first has stopped."""
    out = tmp_path / "a.npz"
    harm = {"SIGNAL": "SIGTERM", "SIGNAL_AFTER_STEPS": 2, "SIGNAL_TORCHRUN": "yes"}
    result = sample(2, folder, out, "--indices", "0", torchrun=(), **harm)
    assert "stopped by SIGTERM: 0 of 1 images are finished" in result.out, result
    assert "lost the others" not in result.err
    assert sample(2, folder, out, "--indices", "0").status == 0
    same(out, folder / "whole.npz", [0])
