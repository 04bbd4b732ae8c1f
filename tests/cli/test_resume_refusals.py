"""What a run is not begun or gone on with: one line, exit status 2, and everything on the disk as it was."""

import errno
import json
import os
import re
import shutil
import signal
import socket
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from fastdiff.checkpoint import verify_step
from fastdiff.checkpoint.steps import write_manifest

from ..processes import Job
from .conftest import Cli
from .support import PLAIN, SHORT, TINY, Result, contents, refused, succeeded

NEWER = "was made by a newer fastdiff: upgrade"


@contextmanager
def untouched(run_dir: Path) -> Iterator[None]:
    before = contents(run_dir)
    yield
    assert contents(run_dir) == before


def config_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "config.json").read_text())


def change_config(run_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = config_of(run_dir)
    change(config)
    (run_dir / "config.json").write_text(json.dumps(config))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture
def resume(cli: Cli) -> Cli:
    """``resume("runs/a", ...)`` goes on with a run with no flags but these."""

    def run(run_dir: str, *args: object) -> Result:
        return cli("train", "--run-dir", run_dir, "--resume", *args)

    return run


# Two at once


@pytest.fixture
def another(shapes: Path, tmp_path: Path) -> Iterator[Job]:
    """Another process, which trains in the folder ``busy``."""
    flags = ["--data-dir", shapes, "--run-dir", "busy", *TINY, "--class-cond", *SHORT, "--steps", 1000000]
    job = Job(None, ["train", *flags, "--log-interval", 5], cwd=tmp_path)
    try:
        job.wait_for(lambda: "\nstep " in job.out)
        yield job
    finally:
        job.kill()


def test_two_runs_on_one_folder(train: Cli, another: Job, tmp_path: Path) -> None:
    refused(
        train("busy", "--resume"),
        rf"^error: busy is in use by process {another.pid} on {socket.gethostname()} since .*: stop it, or .*--run-dir",
    )
    refused(train("busy", "--steps", 1), "busy already holds a run")
    assert json.loads((tmp_path / "busy/.lease.json").read_text())["pid"] == another.pid
    another.send_signal(signal.SIGTERM)
    result = another.finish()
    assert result.status == 143, result  # it has noticed nothing
    step = int(re.findall(r"stopped by SIGTERM at step (\d+), which is saved", result.out)[0])
    verify_step(tmp_path / "busy", step)
    assert f"resumed at step {step}\n" in succeeded(train("busy", "--resume", "--steps", step + 1)).out


def test_a_run_that_was_killed_holds_nobody_up(train: Cli, another: Job, tmp_path: Path) -> None:
    another.kill()
    assert (tmp_path / "busy/.lease.json").exists()
    assert "starting from scratch" in succeeded(train("busy", "--resume", "--steps", 1)).out
    assert not (tmp_path / "busy/.lease.json").exists()


# Another model, another process


def test_another_architecture_in_config_json(resume: Cli, run_dir: Path) -> None:
    change_config(run_dir, lambda config: config["model"].update(num_channels=64))
    with untouched(run_dir):
        refused(
            resume("runs/a", "--steps", 3),
            r"model000002\.safetensors has another architecture: time_embed\.0\.weight is \(128, 32\) in the file "
            r"and \(256, 64\) in the model \(\d+ tensors differ\)",
        )


def test_a_field_that_this_version_does_not_know(resume: Cli, run_dir: Path) -> None:
    for part in ("model", "diffusion", "data", "train", "runtime"):
        before = config_of(run_dir)
        change_config(run_dir, lambda config, part=part: config[part].update(flux_capacitor=1.21))
        with untouched(run_dir):
            refused(resume("runs/a", "--steps", 3), r"config\.json", "has no field flux_capacitor")
        (run_dir / "config.json").write_text(json.dumps(before))


@pytest.mark.parametrize(
    ("flags", "said", "after"),
    [
        (
            ["--noise-schedule", "linear", "--diffusion-steps", 30],
            'diffusion_steps 20 becomes 30, noise_schedule "cosine" becomes "linear"',
            {"noise_schedule": "linear", "diffusion_steps": 30},
        ),
        (
            ["--predict-xstart"],
            'prediction "epsilon" becomes "x_start", predict_xstart false becomes true',
            {"prediction": "x_start", "predict_xstart": True},
        ),
        (["--timestep-respacing", "10"], 'timestep_respacing "" becomes "10"', {"timestep_respacing": "10"}),
    ],
)
def test_another_process_wants_a_word(
    resume: Cli, run_dir: Path, flags: list[object], said: str, after: dict[str, object]
) -> None:
    before = config_of(run_dir)["diffusion"]
    with untouched(run_dir):
        refused(resume("runs/a", "--steps", 3, *flags), rf"^error: runs/a has .*\({said}\).*or use --allow-changes$")
    result = succeeded(resume("runs/a", "--steps", 3, "--allow-changes", *flags))
    assert re.search(f"^warning: the diffusion process changes: {said}", result.out)
    assert "resumed at step 2\n" in result.out
    with safe_open(run_dir / "model000003.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["fastdiff-2"])["diffusion_config"]
    assert described == config_of(run_dir)["diffusion"] == before | after
    succeeded(resume("runs/a", "--steps", 4))  # from now on that is the run


def test_the_model_never_changes(resume: Cli, run_dir: Path) -> None:
    """learn_sigma belongs to both."""
    for flags in (["--learn-sigma"], ["--num-res-blocks", 2], ["--augment", 0.1]):
        with untouched(run_dir):
            refused(resume("runs/a", "--steps", 3, "--allow-changes", *flags), "runs/a", "leave (the flag|it) out")


def test_the_loss_history_is_of_one_process(train: Cli, resume: Cli, tmp_path: Path) -> None:
    """It begins afresh for another number of timesteps, and stays for another schedule."""
    learning = ("--schedule-sampler", "loss-second-moment", "--diffusion-steps", 4)
    succeeded(train("r", *learning, "--steps", 4))
    counts = tensors(tmp_path / "r/opt000004.safetensors")["sampler.counts"]
    assert int(counts.sum()) == 16
    shutil.copytree("r", "s")
    succeeded(resume("r", "--allow-changes", "--diffusion-steps", 6, "--steps", 5))
    afresh = tensors(tmp_path / "r/opt000005.safetensors")["sampler.counts"]
    assert (len(afresh), int(afresh.sum())) == (6, 4)
    succeeded(resume("s", "--allow-changes", "--predict-xstart", "--steps", 5))
    kept = tensors(tmp_path / "s/opt000005.safetensors")["sampler.counts"]
    assert int(kept.sum()) == 20


# Other images


@pytest.fixture
def own_data(shapes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "data"))


def add(data: Path) -> None:
    shutil.copy(min(data.glob("circle_*")), data / "circle_999.png")


def remove(data: Path) -> None:
    max(data.glob("circle_*")).unlink()


def replace(data: Path) -> None:
    Image.radial_gradient("L").resize((8, 8)).save(min(data.glob("circle_*")), compress_level=0)


def rename(data: Path) -> None:
    path = min(data.glob("circle_*"))
    path.rename(path.with_name("circle_zzz.png"))


@pytest.mark.parametrize("change", [add, remove, replace, rename])
def test_other_images(train: Cli, run_dir: Path, own_data: Path, change: Callable[[Path], None]) -> None:
    before = config_of(run_dir)["data_fingerprint"]
    assert re.fullmatch("[0-9a-f]{64}", before)
    change(own_data)
    said = f"the images in {own_data} are not the ones this run was trained on"
    again = ("--data-dir", own_data, "--resume")
    with untouched(run_dir):
        refused(train("runs/a", *again, "--steps", 3), rf"^error: {said}: .*--allow-changes")
    assert f"warning: {said}\n" in succeeded(train("runs/a", *again, "--steps", 3, "--allow-changes")).out
    assert config_of(run_dir)["data_fingerprint"] != before
    assert "warning" not in succeeded(train("runs/a", *again, "--steps", 4)).out  # those are its images now


def test_a_copy_of_the_images_is_as_good(train: Cli, own_data: Path, tmp_path: Path) -> None:
    succeeded(train("r", "--data-dir", own_data, "--steps", 2))
    shutil.copytree(own_data, tmp_path / "elsewhere")
    shutil.rmtree(own_data)
    with untouched(tmp_path / "r"):
        refused(train("r", "--data-dir", own_data, "--steps", 3, "--resume"), "data does not exist")
    result = succeeded(train("r", "--data-dir", tmp_path / "elsewhere", "--steps", 3, "--resume"))
    assert "resumed at step 2\n" in result.out
    assert config_of(tmp_path / "r")["data"]["data_dir"] == str(tmp_path / "elsewhere")


def test_another_place_of_the_images_is_known_from_everywhere(
    train: Cli, run_dir: Path, own_data: Path, tmp_path: Path
) -> None:
    own_data.rename(tmp_path / "moved")
    succeeded(train("runs/a", "--data-dir", "moved", "--steps", 3, "--resume"))
    assert config_of(run_dir)["data"]["data_dir"] == str(tmp_path / "moved")


# A newer version


def newer_tensors(run_dir: Path, name: str, step: int) -> None:
    """The file as a later version might have written it, and the manifest to it."""
    path = run_dir / name
    save_file(tensors(path), path, metadata={"fastdiff-3": "{}"})
    write_manifest(run_dir, step, list(run_dir.glob(f"*{step:06d}.safetensors")))
    verify_step(run_dir, step)


@pytest.mark.parametrize("name", ["model000002", "ema_0.9999_000002", "opt000002"])
def test_tensors_of_a_newer_version(train: Cli, run_dir: Path, name: str) -> None:
    newer_tensors(run_dir, f"{name}.safetensors", 2)
    with untouched(run_dir):
        refused(train("runs/a", "--steps", 3, "--resume"), rf"{re.escape(name)}\.safetensors {NEWER}")


def newer_manifest(run_dir: Path, step: int) -> None:
    path = run_dir / f"manifest{step:06d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "fastdiff-3", "files": []}))


def test_a_manifest_of_a_newer_version(train: Cli, run_dir: Path) -> None:
    newer_manifest(run_dir, 2)
    with untouched(run_dir):
        refused(train("runs/a", "--steps", 3, "--resume"), rf"manifest000002\.json {NEWER}")


def test_a_newer_versions_steps_are_not_trained_again(train: Cli, tmp_path: Path) -> None:
    """It is whole and newer: to go on from the one before, and write over it, would lose work."""
    succeeded(train("r", "--steps", 4, "--save-interval", 2))
    newer_manifest(tmp_path / "r", 4)
    with untouched(tmp_path / "r"):
        refused(train("r", "--steps", 6, "--resume"), rf"manifest000004\.json {NEWER}")


# A disk that does not take it


Usage = namedtuple("Usage", "total used free")


def without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for the run: the decoded images lie in memory."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9, 10**5))


def test_no_room_for_a_checkpoint(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        without_room(patch)
        refused(train("r", "--steps", 1), r"^error: r has no room for a checkpoint: it needs \d+ MB, 0 MB are free; ")
    left = {path.name for path in (tmp_path / "r").iterdir()}
    assert left <= {".lease", "log.txt"}
    succeeded(train("r", "--steps", 1))  # the failed attempt does not stand in the way


def test_no_room_to_go_on(train: Cli, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_room(monkeypatch)
    with untouched(run_dir):
        refused(train("runs/a", "--resume"), "has no room for a checkpoint")


def test_no_room_to_go_on_otherwise(train: Cli, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_room(monkeypatch)
    with untouched(run_dir):
        refused(train("runs/a", "--resume", "--steps", 9, "--lr", 0.5), "has no room for a checkpoint")


def test_a_run_without_a_checkpoint_stays_one(train: Cli, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was killed before its first."""
    for path in run_dir.glob("*000002*"):
        path.unlink()
    with monkeypatch.context() as patch, untouched(run_dir):
        without_room(patch)
        refused(train("runs/a", "--resume"), "has no room for a checkpoint")


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """For root, too, whom permissions do not hold."""
    real_open, real_mkdir = os.open, os.mkdir

    def refuse(path: Any) -> None:
        if isinstance(path, (str, os.PathLike)) and Path(path).absolute().is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return real_open(path, flags, *args, **kwargs)

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if not Path(path).exists():
            refuse(path)
        real_mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "mkdir", mkdir)


def test_a_read_only_folder(train: Cli, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_only(monkeypatch, tmp_path / "runs")
    said = r"cannot be written to \(Read-only file system\): name another folder with --run-dir$"
    with untouched(tmp_path / "runs"):
        refused(train("runs/a", "--steps", 3, "--resume"), rf"^error: runs/a {said}")
        refused(train("runs/new", "--steps", 3), rf"^error: runs/new {said}")
    assert not (tmp_path / "runs/new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(train: Cli, run_dir: Path, tmp_path: Path) -> None:
    run_dir.parent.chmod(0o500)
    try:
        refused(train("runs/new", "--steps", 3), r"runs/new cannot be written to \(Permission denied\)")
    finally:
        run_dir.parent.chmod(0o700)


# Flags that do not go together


def test_two_batch_sizes(train: Cli, run_dir: Path, tmp_path: Path) -> None:
    both = ("--batch-size", 4, "--batch-size-per-process", 4)
    said = "batch_size and batch_size_per_process both set the size of a batch: give one of them"
    refused(train("new", "--steps", 1, *both), said)
    with untouched(run_dir):
        refused(train("runs/a", "--steps", 3, "--resume", *both), said)
    assert not (tmp_path / "new").exists()
    refused(
        train("new", "--steps", 1, "--batch-size-per-process", 0),
        "^error: batch_size_per_process must be positive, not 0$",
    )


def test_the_batch_of_one_process_is_the_batch(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--preview-interval", 0, *PLAIN)
    succeeded(cli("train", "--data-dir", shapes, "--run-dir", "r", *flags, "--steps", 2, "--batch-size-per-process", 3))
    assert config_of(tmp_path / "r")["train"]["batch_size"] == 3
    row = json.loads((tmp_path / "r/progress.jsonl").read_text().splitlines()[-1])
    assert (row["step"], row["samples"]) == (2, 6)
    result = succeeded(cli("train", "--run-dir", "r", "--resume", "--steps", 3, "--batch-size-per-process", 5))
    assert "batch_size 3 becomes 5" in result.out


def test_a_run_goes_on_with_its_own_weights(train: Cli, run_dir: Path, tmp_path: Path) -> None:
    """--init-from is what a run begins with, so the command that began it may be given again with --resume."""
    source = run_dir / "model000002.safetensors"
    flags = ("--init-from", source, "--steps")
    assert f"weights from {source}" in succeeded(train("r", *flags, 1, "--resume")).out
    succeeded(train("s", *flags, 2))
    result = succeeded(train("r", *flags, 2, "--resume"))
    assert f"the weights of {source} are not used: the run continues with its own\n" in result.out
    one, other = (tensors(tmp_path / run / "model000002.safetensors") for run in ("r", "s"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_fewer_steps_than_were_done(train: Cli, run_dir: Path) -> None:
    with untouched(run_dir):
        refused(train("runs/a", "--resume", "--steps", 1), "steps", "1", "2")
