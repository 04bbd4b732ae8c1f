"""The command line in this process, and models for it to draw from."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiff import DiffusionConfig, ModelConfig, build_model, save_checkpoint
from fastdiff.cli.app import main

from ..sampling.support import command
from ..support import randomise
from .support import PLAIN, SHORT, TINY, Result

Cli = Callable[..., Result]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli("train", ...)`` runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Result:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["fastdiff", *map(str, args)])
            try:
                main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            else:
                status = 0
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture
def train(cli: Cli, shapes: Path) -> Cli:
    """``train("runs/a", ...)`` trains a tiny model by class."""

    def run(run_dir: str, *args: object) -> Result:
        return cli("train", "--data-dir", shapes, "--run-dir", run_dir, *TINY, "--class-cond", *SHORT, *args)

    return run


@pytest.fixture
def sample(cli: Cli) -> Cli:
    """``sample(...)`` draws from a model in plain arithmetic."""

    def run(*args: object) -> Result:
        return cli("sample", *args, *PLAIN)

    return run


@pytest.fixture(scope="session")
def two_updates(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """What ``train("runs/a", "--steps", 2)`` leaves behind. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command("train", "--data-dir", shapes, "--run-dir", "runs/a", *TINY, "--class-cond", *SHORT, "--steps", 2)
    return folder / "runs" / "a"


@pytest.fixture
def run_dir(cli: Cli, two_updates: Path, tmp_path: Path) -> Path:
    """A run of two updates, runs/a in the current folder: trained once and copied."""
    return Path(shutil.copytree(two_updates, tmp_path / "runs" / "a"))


MODEL = ModelConfig(
    image_size=8,
    num_channels=32,
    num_res_blocks=1,
    channel_mult=(1,),
    attention_resolutions=(),
    class_cond=True,
    num_classes=3,
)
DIFFUSION = DiffusionConfig(diffusion_steps=20, noise_schedule="cosine")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights everywhere, so that every input has its effect. Not to be written to."""
    model = randomise(build_model(MODEL), seed=0)
    path = tmp_path_factory.mktemp("checkpoint") / "cats.safetensors"
    names = ("cat", "dog", "zebra")
    return save_checkpoint(path, model, model_config=MODEL, diffusion_config=DIFFUSION, step=7, class_names=names)
