"""What a run remembers about the process that trained it."""

import json
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.checkpoint import read_metadata
from fastdiff.config import RuntimeConfig
from fastdiff.runtime import environment as module
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.environment import environment

from ..training.support import file as tensors_of
from ..training.support import same
from ..training.test_classifier_run import TINY as TINY_CLASSIFIER
from .conftest import Cli
from .support import SHORT, TINY, refused, succeeded

KEYS = ["fastdiff", "torch", "triton", "python", "commit", "command", "device", "processes", "precision", "kernels"]
KEYS += ["compile", "host", "started"]
FILES = ("model000002", "ema_0.9999_000002", "opt000002")


def remembered(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "config.json").read_text())["environment"]


def test_every_file_of_a_run_remembers_it(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    """As decided, and the words as they were given, whatever is in them."""
    words = [
        "--data-dir",
        shapes,
        "--run-dir",
        "it's a run",
        *TINY,
        *SHORT[:4],
        "--device",
        "cpu",
        "--steps",
        2,
        "--ema-rate",
        0.9999,
    ]
    succeeded(cli("train", *words))
    found = remembered(tmp_path / "it's a run")
    assert list(found) == KEYS
    assert found["command"].startswith(
        f"fastdiff train --data-dir {shapes} --run-dir 'it'\"'\"'s a run' --image-size 8"
    )
    assert (found["fastdiff"], found["torch"]) == (fastdiff.__version__, torch.__version__)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (found["processes"], found["kernels"], found["compile"]) == (1, "torch", False)
    assert found["precision"] in ("fp32", "bf16")
    assert found["device"].startswith("cpu (")
    assert found["host"] == socket.gethostname()
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(found["started"]) < timedelta(hours=1)
    for name in FILES:
        assert read_metadata(tmp_path / "it's a run" / f"{name}.safetensors")["environment"] == found, name


def test_a_resumed_run_remembers_the_process_that_resumed_it(cli: Cli, run_dir: Path, shapes: Path) -> None:
    before = remembered(run_dir)
    result = succeeded(cli("train", "--run-dir", run_dir, "--resume", "--steps", 3))
    assert "changed in config.json" not in result.out
    after = remembered(run_dir)
    assert after["command"] == f"fastdiff train --run-dir {run_dir} --resume --steps 3"
    assert read_metadata(run_dir / "model000003.safetensors")["environment"] == after
    assert read_metadata(run_dir / "model000002.safetensors")["environment"] == before
    fastdiff.train(shapes, run_dir, resume=True, steps=4, show=None)
    assert remembered(run_dir)["command"] == "fastdiff.train(...)"


def test_a_classifier_remembers_it_too(tmp_path: Path, shapes: Path) -> None:
    fastdiff.train_classifier(shapes, tmp_path / "run", steps=1, show=None, **TINY_CLASSIFIER)
    found = remembered(tmp_path / "run")
    assert found["command"] == "fastdiff.train_classifier(...)"
    assert read_metadata(tmp_path / "run/model000001.safetensors")["environment"] == found


@pytest.mark.parametrize(
    "value", [None, 5, "text", [[1]], {"command": {"lr": 1}, "started": [None], "lr": 9}, "absent"]
)
def test_it_is_never_trusted(cli: Cli, run_dir: Path, value: object) -> None:
    """Nothing depends on it: a run resumes, and describes another, with whatever stands there."""
    straight = Path(shutil.copytree(run_dir, "straight"))
    succeeded(cli("train", "--run-dir", straight, "--resume", "--steps", 3))
    path = run_dir / "config.json"
    config = json.loads(path.read_text()) | {"environment": value}
    if value == "absent":  # as in a run of an earlier version
        del config["environment"]
    path.write_text(json.dumps(config))
    result = succeeded(cli("train", "--config", path, "--run-dir", "b", "--steps", 1))
    assert "step 0 of 1" in result.out
    assert json.loads(Path("b/config.json").read_text())["train"]["lr"] == 1e-4
    result = succeeded(cli("train", "--run-dir", run_dir, "--resume", "--steps", 3))
    assert "changed in config.json" not in result.out
    assert list(remembered(run_dir)) == KEYS
    ours, theirs = (tensors_of(folder / "model000003.safetensors")[0] for folder in (run_dir, straight))
    assert same(ours, theirs)


def test_one_too_deep_is_damage(cli: Cli, run_dir: Path) -> None:
    path = run_dir / "config.json"
    path.write_text(
        path.read_text().replace('"environment": {', '"environment": {"x": ' + "[" * 100_000 + ', "y": {', 1)
    )
    refused(cli("train", "--run-dir", run_dir, "--resume", "--steps", 3), "config.json is damaged")


def test_checkpoints_with_it_are_converted_and_started_from(cli: Cli, run_dir: Path, shapes: Path) -> None:
    succeeded(cli("convert", run_dir, "a.safetensors"))
    assert read_metadata(Path("a.safetensors"))["environment"] == remembered(run_dir)
    succeeded(cli("convert", run_dir, "a.pt"))
    flags = ("--data-dir", shapes, "--run-dir", "b", *SHORT, "--class-cond", "--steps", 1)
    succeeded(cli("train", "--init-from", "a.safetensors", *flags))
    assert "--init-from a.safetensors" in remembered(Path("b"))["command"]


# How it is found


def test_every_value_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    runtime = Runtime.resolve(RuntimeConfig(device="cpu", compile="on", precision="fp32"))
    found = environment(runtime, 8, 10, "fastdiff train \ud800\n")
    assert found["compile"] is True
    assert found["command"] == "fastdiff train \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    gpu = Runtime(torch.device("cuda", 1), runtime.precision, runtime.compile, runtime.kernels, runtime.memory_format)
    found = environment(gpu, 8, 10, "")
    assert (found["device"], found["processes"]) == ("NVIDIA H200", 8)
    assert (found["kernels"], found["triton"]) == ("triton", version("triton"))
    monkeypatch.setattr(module, "version_of", lambda package: None)
    found = environment(gpu, 8, 10, "")
    assert (found["kernels"], found["triton"]) == ("torch", None)


def test_the_commit_is_that_of_fastdiffs_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a project in which it is installed."""
    project, package = tmp_path / "project", tmp_path / "project/.venv/site-packages"
    package.mkdir(parents=True)
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    for folder, commit in ((project, head), (package, None), (tmp_path / "gone", None)):
        assert module.git(folder, "rev-parse", "HEAD") == commit
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.git(project, "rev-parse", "HEAD") is None


@pytest.mark.parametrize(
    ("text", "name"), [("processor: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name : A\n", "A CPU @ 2 GHz"), (None, "arm")]
)
def test_the_processors_name(text: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert module.device_name(torch.device("cpu")) == f"cpu ({name})"
