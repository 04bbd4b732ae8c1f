"""A training run from Python."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff

from ..cli.support import SHORT, TINY
from ..sampling.support import command
from . import support

SETTINGS: dict[str, Any] = {**support.TINY, "device": "cpu", "compile": "off", "precision": "fp32", "save_interval": 2}
SETTINGS["recipe"] = "improved"


def test_it_trains_as_the_command_does(tmp_path: Path, shapes: Path) -> None:
    lines: list[str] = []
    run_dir = tmp_path / "python"
    found = fastdiff.train(shapes, run_dir, class_cond=True, steps=3, lr=1e-3, show=lines.append, **SETTINGS)
    command(
        "train",
        "--data-dir",
        shapes,
        "--run-dir",
        tmp_path / "command",
        "--class-cond",
        "--steps",
        3,
        "--lr",
        1e-3,
        *TINY,
        *SHORT,
        "--log-interval",
        1,
    )
    expected = fastdiff.load_checkpoint(tmp_path / "command/ema_0.9999_000003.safetensors")
    assert (found.step, found.class_names) == (3, ("circle", "cross", "square", "triangle"))
    for name, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name
    assert lines[0].startswith("data: 12 images")
    assert any(line.startswith("step 3/3  loss ") for line in lines)


def test_it_goes_on(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """By default the run folder is runs/NAME of the data; a run that goes on needs no other setting."""
    monkeypatch.chdir(tmp_path)
    assert fastdiff.train(shapes, steps=2, show=None, **SETTINGS).step == 2
    assert fastdiff.train(run_dir="runs/shapes", resume=True, steps=4, show=None).step == 4
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_saves(tmp_path: Path, shapes: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fastdiff.train(shapes, tmp_path / "run", steps=1000, show=stop, **SETTINGS)
    saved = [int(path.stem.removeprefix("model")) for path in (tmp_path / "run").glob("model*.safetensors")]
    assert 3 <= max(saved) < 1000


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"stepz": 3}, "^train has no setting stepz$"),
        ({"lr": -1.0}, "^lr must be positive, not -1.0$"),
        ({"timeout": 0}, "^timeout must be positive, not 0$"),
        ({"preset": "none"}, "^preset must be one of "),
        ({"init_from": "a.pt", "resume_checkpoint": "model1.pt"}, "^init_from and resume_checkpoint both"),
        ({"batch_size_per_process": 2}, "^batch_size and batch_size_per_process both"),
        ({"batch_size_per_process": 2.0}, "^batch_size_per_process must be a whole number, not 2.0$"),
        ({"lr_anneal_steps": "5"}, "^lr_anneal_steps must be a whole number"),
    ],
)
def test_refusals(tmp_path: Path, shapes: Path, settings: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        fastdiff.train(shapes, tmp_path / "run", **{**SETTINGS, "steps": 1, **settings})
    assert not (tmp_path / "run").exists()


def test_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^no data: name a folder of images with --data-dir$"):
        fastdiff.train()
    with pytest.raises(ValueError, match=r"holds no run to resume"):
        fastdiff.train(run_dir="runs/a", resume=True)


def test_paths_of_any_kind(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in settings, and "~" is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    fastdiff.train(shapes, "~/first", steps=1, show=None, **SETTINGS)
    found = fastdiff.train(shapes, tmp_path / "second", init_from=tmp_path / "first", steps=1, show=None, **SETTINGS)
    assert found.step == 1
    assert (tmp_path / "first/model000001.safetensors").exists()


def test_an_environment_for_the_command_does_not_count(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", "s3://bucket/runs")
    command("train", "--data-dir", shapes, "--run-dir", tmp_path / "run", "--steps", 1, *TINY, *SHORT)
    assert (tmp_path / "run/model000001.safetensors").exists()
