"""Flags come from the configurations, in the original's spelling too."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import fastdiff
from fastdiff.cli.app import app
from fastdiff.cli.help import OF_STATE_DICTS
from fastdiff.cli.options import SWITCHES, with_old_spelling
from fastdiff.config import (
    ClassifierConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    RuntimeConfig,
    SampleConfig,
    StartConfig,
    TrainConfig,
)
from fastdiff.presets import CLASSIFIER_PRESETS

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
    ("command", "configs", "of_state_dicts"),
    [
        ("train", (DataConfig, StartConfig, TrainConfig, ModelConfig, DiffusionConfig, RuntimeConfig), ()),
        ("sample", (SampleConfig, RuntimeConfig), (ModelConfig, DiffusionConfig, ClassifierConfig)),
        ("benchmark", (ModelConfig, DiffusionConfig, RuntimeConfig), ()),
    ],
)
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_every_field_is_a_flag_in_the_panel_of_its_configuration(
    cli: Cli,
    command: str,
    configs: tuple[type[Config], ...],
    of_state_dicts: tuple[type[Config], ...],
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    short = succeeded(cli(command, "-h")).out
    assert short == succeeded(cli(command, "--help")).out
    whole = succeeded(cli(command, "--help-all")).out if of_state_dicts else short
    assert set(short.splitlines()) <= set(whole.splitlines())
    # only a long name and the usage are wider
    wide = [line for line in whole.splitlines()[1:] if len(line) > columns and len(line.split()) > 2]
    assert not [line for line in wide if "--" not in line]
    if columns == 200:
        assert max(map(len, whole.splitlines())) > 120
    seen: set[str] = set()
    for config in (*configs, *of_state_dicts):
        panel = config.panel + (OF_STATE_DICTS if config in of_state_dicts else "")
        for f in fields(config):  # type: ignore[arg-type]
            flag, name = f"--{f.name.replace('_', '-')}", f.metadata["panel"] or panel
            if f.name not in seen:
                seen.add(f.name)
                assert f"  {flag}" in whole.partition(f"\n{name}:\n")[2].partition("\n\n")[0], (name, flag)
    for config in of_state_dicts:
        assert config.panel + OF_STATE_DICTS in whole
        assert config.panel + OF_STATE_DICTS not in short


def test_the_first_option_of_train_is_the_one_it_needs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = succeeded(cli("train", "-h")).out
    assert "For example: fastdiff train --data-dir photos" in text
    first = text.partition("\nData:\n")[2].splitlines()[0]
    assert first.split()[0] == "--data-dir"
    assert "Required" in first


def test_shell_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is offered, and completes commands and flags."""
    monkeypatch.setenv("_FASTDIFF_COMPLETE", "complete_bash")
    for words, expected in (("fastdiff sam", "sample"), ("fastdiff train --noise-", "--noise-schedule")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        with pytest.raises(SystemExit):
            app([], prog_name="fastdiff")
        assert expected in capsys.readouterr().out.split()


def test_presets_are_listed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = succeeded(cli("presets")).out
    assert max(map(len, text.splitlines())) <= 80
    for name, preset in {**fastdiff.PRESETS, **CLASSIFIER_PRESETS}.items():
        assert f"\n{name}  {preset.about}\n    --" in text
    assert "--attention-resolutions 32,16,8 --resblock-updown --image-size 128" in " ".join(text.split())
    assert "--noise-schedule cosine --lr 0.0006 --batch-size 1024 --weight-decay 0.2" in " ".join(text.split())


def test_the_version(cli: Cli) -> None:
    assert succeeded(cli("--version")).out == f"fastdiff {fastdiff.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help"], ["train-classifier", "--help"], ["sample", "--help"], ["presets"]],
    ids=" ".join,
)
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
