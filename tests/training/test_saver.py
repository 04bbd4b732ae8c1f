"""Checkpoints are written beside the training, whole or not at all, and a failure is not missed."""

import errno
import math
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import TrainConfig, checkpoint
from fastdiff.checkpoint import read_tensors, saved_steps, verify_step
from fastdiff.training import saver
from fastdiff.training.saver import CheckpointFile, Saver, free_space_check

from ..processes import script


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "RETRY_DELAYS", (0.0, 0.0))


def files(run_dir: Path, step: int, **more: Tensor) -> list[CheckpointFile]:
    weights = {"w": torch.full((3,), float(step)), "n": torch.tensor([step]), "none": torch.zeros(0), **more}
    described = {"kind": "model", "model_config": {}, "diffusion_config": {}}
    return [
        CheckpointFile(checkpoint.model_path(run_dir, step), weights, described),
        CheckpointFile(checkpoint.optimizer_path(run_dir, step), {"m": weights["w"] / 2}, {"kind": "optimizer"}),
    ]


def begin(run_dir: Path, **flags: Any) -> tuple[Saver, list[str]]:
    log: list[str] = []
    return Saver(run_dir, TrainConfig(**flags), log.append), log


def save(subject: Saver, *steps: int) -> None:
    for step in steps:
        subject.save(step, files(subject.run_dir, step))
    subject.wait()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def test_a_step_is_saved_whole(tmp_path: Path) -> None:
    run_dir = tmp_path / "new"
    subject, log = begin(run_dir)
    assert not subject.saved_step
    subject.wait()
    subject.check()
    save(subject, 4)
    assert subject.saved_step == 4
    assert saved_steps(run_dir) == [4]
    verify_step(run_dir, 4)
    assert names(run_dir) == ["manifest000004.json", "model000004.safetensors", "opt000004.safetensors"]
    assert read_tensors(run_dir / "model000004.safetensors", "model")[0]["w"].tolist() == [4, 4, 4]
    assert log == [f"saved step 4 in {run_dir.resolve()}"]


def test_saving_waits_for_the_copies_and_nobody_for_the_saving(tmp_path: Path) -> None:
    subject, log = begin(tmp_path)
    copied = threading.Event()
    weights = torch.full((3,), math.nan)
    threads = []

    def ready() -> None:
        threads.append(threading.current_thread())
        copied.wait(60)
        weights.fill_(7)

    subject.save(1, files(tmp_path, 1, v=weights), ready)
    assert not subject.failed
    subject.check()
    assert saved_steps(tmp_path) == log == []
    copied.set()
    subject.save(2, files(tmp_path, 2))  # waits for the one before
    assert saved_steps(tmp_path)[0] == 1
    subject.wait()
    assert saved_steps(tmp_path) == [1, 2]
    assert threads[0] is not threading.main_thread()
    assert read_tensors(tmp_path / "model000001.safetensors", "model")[0]["v"].tolist() == [7, 7, 7]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_checkpoint_holds_a_number_that_is_not_finite(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    subject, _ = begin(tmp_path)
    save(subject, 2)
    before = names(tmp_path)
    tensor = torch.zeros(5, 1001, dtype=dtype)
    tensor[3, 997] = bad
    subject.save(4, files(tmp_path, 4, bad=tensor))
    with pytest.raises(
        ValueError,
        match=r"weights of step 4 are not finite and were not saved \(bad\): lower --lr; .*: .*model000002\.safe",
    ):
        subject.wait()
    assert names(tmp_path) == before
    assert subject.saved_step == 2


def test_the_optimizers_numbers_are_looked_at_too(tmp_path: Path) -> None:
    subject, _ = begin(tmp_path)
    model, _ = files(tmp_path, 1)
    opt = CheckpointFile(tmp_path / "opt000001.safetensors", {"m": torch.tensor(math.nan)}, {"kind": "optimizer"})
    subject.save(1, [model, opt])
    with pytest.raises(ValueError, match=r"the optimizer's state of step 1 .*good checkpoint: none was saved yet"):
        subject.wait()
    assert names(tmp_path) == []


def test_the_last_good_checkpoint_is_a_whole_one(tmp_path: Path) -> None:
    subject, _ = begin(tmp_path)
    save(subject, 2, 4)
    (tmp_path / "opt000004.safetensors").write_bytes(b"")
    subject.save(6, files(tmp_path, 6, bad=torch.tensor([math.nan])))
    with pytest.raises(ValueError, match=r"last good checkpoint: .*model000002\.safetensors"):
        subject.wait()


class Disk:
    """Fails so many of the calls of safetensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
        self.failures = failures
        self.real = checkpoint.files.save_file
        monkeypatch.setattr("fastdiff.checkpoint.files.save_file", self)

    def __call__(self, tensors: Any, path: Path, metadata: Any) -> None:
        if self.failures and path.name.startswith("opt"):
            self.failures -= 1
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        self.real(tensors, path, metadata=metadata)


def test_a_save_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, log = begin(tmp_path)
    Disk(monkeypatch, failures=2)
    save(subject, 4)
    verify_step(tmp_path, 4)
    assert names(tmp_path) == ["manifest000004.json", "model000004.safetensors", "opt000004.safetensors"]
    assert len(log) == 3
    for line in log[:2]:
        assert line.startswith("warning: step 4 could not be saved: ")
        assert "No space left on device" in line
        assert line.endswith("; trying again in 0 s")


def test_a_save_that_fails_for_good_is_loud_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, log = begin(tmp_path, keep_last=1)
    save(subject, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    Disk(monkeypatch, failures=3)
    subject.save(4, files(tmp_path, 4))
    says = (
        rf"step 4 could not be saved in {tmp_path.resolve()}: .*No space left on device.*; "
        r"the last good checkpoint: .*model000002\.safetensors$"
    )
    for ask in (subject.wait, subject.check, lambda: subject.save(6, files(tmp_path, 6))):
        with pytest.raises(OSError, match=says):
            ask()
        assert subject.failed
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert subject.saved_step == 2
    assert [line for line in log if "saved step 4" in line] == []


def test_a_bug_is_no_reason_to_try_again(tmp_path: Path) -> None:
    subject, log = begin(tmp_path)
    subject.save(1, [], ready=lambda: [].pop())
    with pytest.raises(IndexError):
        subject.wait()
    assert log == []


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7]),
        ({"keep_last": 1}, [7]),
        ({"keep_last": 2}, [6, 7]),
        ({"keep_last": 2, "keep_every": 3}, [3, 5, 6, 7]),
        ({"keep_last": 1, "keep_every": 7}, [6, 7]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5, 6, 7]),
        ({"keep_every": 3}, [1, 2, 3, 4, 5, 6, 7]),
        ({"keep_last": 1, "keep_every": 1}, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_what_is_kept(tmp_path: Path, flags: dict[str, int], kept: list[int]) -> None:
    subject, _ = begin(tmp_path, **flags)
    save(subject, *range(1, 8))
    assert saved_steps(tmp_path) == kept
    assert len(names(tmp_path)) == 3 * len(kept)


def test_later_steps_count_for_nothing(tmp_path: Path) -> None:
    """They are damaged ones that the run fell back from: what is newly saved must not go while they stay."""
    save(begin(tmp_path)[0], 2, 8, 9)
    subject, _ = begin(tmp_path, keep_last=1)
    subject.saved_step = 2
    save(subject, 3)
    assert saved_steps(tmp_path) == [3, 8, 9]
    save(subject, 8)
    assert saved_steps(tmp_path) == [8, 9]


def test_what_is_whole_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, _ = begin(tmp_path, keep_last=1)
    save(subject, 2)
    Disk(monkeypatch, failures=9)
    save(subject, 2)
    verify_step(tmp_path, 2)


def test_old_files_that_stay_are_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, log = begin(tmp_path, keep_last=1)
    save(subject, 2)
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("model"):
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        save(subject, 4)
    assert any("old files could not be deleted: " in line and "Permission denied" in line for line in log)
    assert saved_steps(tmp_path) == [4]
    save(subject, 6)
    assert len(names(tmp_path)) == 3


Usage = namedtuple("Usage", ["total", "used", "free"])


def test_a_disk_that_is_too_full_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_space_check(tmp_path / "not/yet/there", 10**6)
    assert names(tmp_path) == []
    subject, _ = begin(tmp_path)
    save(subject, 2)
    before = names(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**9))
    free_space_check(tmp_path, 9 * 10**8)
    says = rf"{tmp_path}.* has no room for a checkpoint: it needs 1,004 MB, 1,000 MB are free"
    for run_dir in (tmp_path, tmp_path / "not/yet/there"):
        with pytest.raises(OSError, match=says):
            free_space_check(run_dir, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 100))
    subject.save(4, files(tmp_path, 4))
    with pytest.raises(OSError, match=r"step 4 could not be saved in .*needs 4 MB, 0 MB are free"):
        subject.wait()
    assert names(tmp_path) == before


ENDING = """
import sys, time
from pathlib import Path
import torch
from fastdiff import TrainConfig, checkpoint
from fastdiff.training.saver import CheckpointFile, Saver

run_dir = Path(run_dir)
subject = Saver(run_dir, TrainConfig(), channel.send)
file = CheckpointFile(checkpoint.model_path(run_dir, 1), {"w": torch.zeros(3)}, {"kind": "model"})
subject.save(1, [file], lambda: time.sleep(0.5))
if how == "exception":
    raise RuntimeError("something else")
sys.exit(int(how))
"""


@pytest.mark.parametrize(("how", "status"), [("0", 0), ("143", 143), ("exception", 1)])
def test_the_process_ends_when_the_save_has(tmp_path: Path, how: str, status: int) -> None:
    process, channel = script(ENDING, run_dir=str(tmp_path), how=how)
    process.join()
    assert process.exitcode == status
    verify_step(tmp_path, 1)
    assert "saved step 1" in channel.recv()
