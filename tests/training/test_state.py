"""What a checkpoint holds besides weights, averages and moments: the sums of the log and what the guard knows."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.checkpoint import FORMAT, optimizer_path, write_tensors
from fastdiff.training.metrics import LossSums
from fastdiff.training.resuming import resume

from .support import each_step, file, same, trainer, weights

MEASURED = ("images_per_s", "mfu", "data_wait", "memory_gib")
FLAGS: dict[str, Any] = {
    "log_interval": 3,
    "save_interval": 4,
    "steps": 8,
    "lr": 1e-3,
    "learn_sigma": True,
    "spike_guard": 9.0,
}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "progress.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """Eight updates. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("state") / "straight"
    trainer(run_dir, shapes, **FLAGS).run()
    return run_dir


@pytest.fixture
def run(tmp_path: Path, straight: Path) -> Path:
    """``straight``, and returned a copy that was killed after the fourth was saved and the sixth logged."""
    for name in ("straight", "killed"):
        shutil.copytree(straight, tmp_path / name)
    for path in (tmp_path / "killed").glob("*000008*"):
        path.unlink()
    return tmp_path / "killed"


def test_a_line_of_the_log_is_whole_across_a_resume(run: Path, shapes: Path) -> None:
    """That of step 6 is the mean of the updates 4, before, and 5 and 6, after."""
    subject = trainer(run, shapes, **FLAGS)
    resume(subject)
    assert subject.state.step == 4
    at: list[int] = []
    subject.run(each_step(at.append))
    assert at == [5, 6, 7, 8]
    expected = rows(run.parent / "straight")
    assert [row["step"] for row in expected] == [3, 6, 8]
    assert rows(run) == expected
    assert expected[1]["loss"] > 0
    for kind in ("model", "ema_0.9999_", "opt"):
        one, other = (file(folder / f"{kind}000008.safetensors")[0] for folder in (run, run.parent / "straight"))
        assert same(one, other), kind


def test_what_is_kept_is_what_the_line_needs(run: Path, shapes: Path) -> None:
    """Without it the line is another one."""
    subject = trainer(run, shapes, **FLAGS)
    resume(subject)
    sums = file(optimizer_path(run, 4))[0]["log_sums"]
    assert sums.shape == (1, len(subject.state.sums.state()))
    assert sums.dtype is torch.float64
    assert torch.equal(subject.state.sums.state(), sums[0])
    subject.state.sums.read()
    subject.run()
    assert rows(run)[1]["loss"] != rows(run.parent / "straight")[1]["loss"]


def test_one_process_takes_in_the_sums_of_two(run: Path, shapes: Path) -> None:
    path = optimizer_path(run, 4)
    saved, metadata = file(path)
    both = [LossSums(torch.device("cpu")) for _ in range(2)]
    for rank, sums in enumerate(both):
        sums.add({"loss": torch.tensor([1.0 + rank, 3.0])}, torch.tensor([0, 19]), 20)
        sums.add_grad_norm(torch.tensor(5.0), torch.tensor(0.0))
        sums.add_grad_norm(torch.tensor(7.0), torch.tensor(1.0))
    described = json.loads(metadata[FORMAT])
    write_tensors(path, saved | {"log_sums": torch.stack([sums.state() for sums in both])}, described)
    subject = trainer(run, shapes, **FLAGS)
    subject.state.load(run, 4)
    read = subject.state.sums.read()
    assert read["loss"] == pytest.approx((1 + 3 + 2 + 3) / 4)
    assert read["loss_q0"] == pytest.approx(1.5)
    assert (read["grad_norm"], read["skipped"]) == (5, 1)  # of the updates, which are the same on both
    assert same(weights(subject), file(run / "model000004.safetensors")[0])


def test_the_guard_goes_on_where_it_was(run: Path, shapes: Path) -> None:
    saved = file(optimizer_path(run, 4))[0]["guard"]
    in_a_row, mean, seen = saved.tolist()[:3]
    assert (in_a_row, seen) == (0, 4)
    assert mean > 0
    subject = trainer(run, shapes, **FLAGS)
    resume(subject)
    assert torch.equal(subject.state.guard.state(), saved)
    subject.run()
    one, other = (file(optimizer_path(folder, 8))[0]["guard"] for folder in (run, run.parent / "straight"))
    assert torch.equal(one, other)
    assert float(one[2]) == 8


def test_what_is_saved_does_not_change_any_more(tmp_path: Path, shapes: Path) -> None:
    """It is written while the training goes on."""
    subject = trainer(tmp_path, shapes, steps=2, lr=1e-2, schedule_sampler="loss-second-moment", diffusion_steps=2)
    subject.run()
    files = subject.state.snapshot(tmp_path)
    before = [{name: tensor.clone() for name, tensor in file.tensors.items()} for file in files]
    for state in subject.state.optimizer.state.values():
        for tensor in state.values():
            tensor.add_(1)
    with torch.no_grad():
        for tensor in (*subject.state.parameters, *subject.state.emas[0].tensors()):
            tensor.add_(1)
    subject.state.sampler.history.add_(1)
    subject.state.sampler.counts.add_(1)
    subject.state.sums.add({"loss": torch.ones(1)}, torch.zeros(1, dtype=torch.int64), 2)
    subject.state.guard.in_a_row += 1
    for file_, expected in zip(files, before, strict=True):
        assert same(dict(file_.tensors), expected), file_.path.name
