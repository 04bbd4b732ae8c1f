"""Flags come from the configurations, in the original's spelling too."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import fastdiff
from fastdiff.cli.options import SWITCHES, with_old_spelling
from fastdiff.config import DataConfig, DiffusionConfig, ModelConfig, RuntimeConfig, SampleConfig, TrainConfig

from .conftest import Cli
from .support import succeeded


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--learn_sigma True", "--learn-sigma"),
        ("--learn_sigma False", "--no-learn-sigma"),
        ("--learn_sigma=1", "--learn-sigma"),
        ("--class-cond no", "--no-class-cond"),
        ("--learn_sigma", "--learn-sigma"),
        ("--learn_sigma --class_cond False", "--learn-sigma --no-class-cond"),
        ("--image_size 16", "--image-size 16"),
        ("--image_size=16", "--image-size=16"),
        ("--microbatch -1", "--microbatch -1"),
        ("train_it --data_dir my_data", "train_it --data-dir my_data"),
        ("--clip_denoised False out_put", "--no-clip-denoised out_put"),
        ("--no-flip", "--no-flip"),
        ("-- --learn_sigma", "-- --learn_sigma"),
    ],
)
def test_old_spelling(old: str, new: str) -> None:
    assert with_old_spelling(old.split(), SWITCHES) == new.split()


def test_old_spelling_refuses_what_is_neither() -> None:
    with pytest.raises(ValueError, match=r"--learn-sigma must be true or false, not 'maybe'"):
        with_old_spelling(["--learn_sigma=maybe"], SWITCHES)


@pytest.mark.parametrize(
    ("command", "configs"),
    [
        ("train", (DataConfig, TrainConfig, ModelConfig, DiffusionConfig, RuntimeConfig)),
        ("sample", (SampleConfig, RuntimeConfig, ModelConfig, DiffusionConfig)),
    ],
)
def test_every_field_is_a_flag(
    cli: Cli, command: str, configs: tuple[type, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = succeeded(cli(command, "--help")).out
    for config in configs:
        for f in fields(config):
            assert f"--{f.name.replace('_', '-')}" in text, f.name


def test_presets_are_listed(cli: Cli) -> None:
    text = succeeded(cli("presets")).out
    for name in fastdiff.PRESETS:
        assert name in text


def test_the_version(cli: Cli) -> None:
    assert succeeded(cli("--version")).out == f"fastdiff {fastdiff.__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["sample", "--help"], ["presets"]], ids=" ".join)
def test_help_does_not_wait_for_torch(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from fastdiff.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'PIL', 'triton', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = str(Path(fastdiff.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", code, root, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout) > 100
