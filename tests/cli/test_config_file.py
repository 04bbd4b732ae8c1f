"""``--config FILE``: flags from a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastdiff.cli.config_file import with_config_file

from .conftest import Cli
from .support import refused, succeeded

TOML = """
image_size = 16
"lr" = 0.001
flip = true
ema-rate = [0.99, 0.9]
resume = false
[model]
channel_mult = "1,2"
dropout = 0
"""
YAML = "image_size: 16\nlr: 0.001\nflip: true\nema-rate: [0.99, 0.9]\nresume: no\nmodel:\n" \
    "  channel_mult: '1,2'\n  dropout: 0\n"  # fmt: skip
WORDS = ["--image-size=16", "--lr=0.001", "--flip", "--ema-rate=0.99,0.9", "--no-resume", "--channel-mult=1,2"]
WORDS += ["--dropout=0"]


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
@pytest.mark.parametrize("equals", [False, True])
def test_the_files_flags_come_before_the_given_ones(tmp_path: Path, name: str, text: str, equals: bool) -> None:
    path = tmp_path / name
    path.write_text(text)
    given = [f"--config={path}"] if equals else ["--config", str(path)]
    assert with_config_file(["sample", "runs/a", "--lr", "1", *given, "--seed", "3"]) == (
        ["sample", "runs/a", *WORDS, "--lr", "1", "--seed", "3"]
    )
    assert with_config_file(["train", "--", *given]) == ["train", "--", *given]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "image_size = ", "config .*a.toml is damaged: Invalid value"),
        ("a.yaml", "a: [1", "config .*a.yaml is damaged: while parsing"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "config .*a.yaml is damaged: could not determine"),
        ("a.json", "[1, 2]", "config .*a.json must map flags to values"),
        ("a.json", "[" * 100_000, "config .*a.json is damaged"),
        ("a.ini", "x=1", r"config .*a.ini: its name must end in \.toml, \.yaml or \.json"),
        ("a.toml", "ema_warmpu = false", "(?i)no such option: --no-ema-warmpu"),
        ("a.toml", "class_connd = ''", "class_connd has no value"),
        ("a.yaml", "lr:", "lr has no value"),
        ("a.toml", "config = 'other.toml'", "names another file of flags"),
        ("a.toml", "when = 2020-01-01", "a.toml: when must be text, a number, true, false or a list"),
        ("a.toml", "lr = 1\n[more]\nlr = 2", "a.toml sets --lr twice"),
        ("a.toml", b"\xff\xfe\x00", "config .*a.toml is not a text file"),
        ("a.toml", None, "config .*a.toml cannot be read"),
        ("a.toml", "no_such_flag = 1", "(?i)no such option: --no-such-flag"),
        ("a.toml", "learning_rate = 1", r"(?i)no such option: --learning-rate.*--lr"),
        ("a.toml", "image_size = 'big'", "'--image-size'.* valid integer"),
    ],
)
def test_bad_files(cli: Cli, tmp_path: Path, name: str, text: Any, said: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(cli("train", "--config", path, "--data-dir", "x"), said)


def test_a_file_is_given_once(cli: Cli) -> None:
    refused(cli("train", "--config"), "--config needs a value")
    Path("a.toml").write_text("lr = 1")
    refused(cli("train", "--config", "a.toml", "--config", "a.toml"), "--config is given twice")


def test_the_config_of_a_run_describes_another(run_dir: Path, cli: Cli) -> None:
    file = run_dir / "config.json"
    result = succeeded(cli("train", "--config", file, "--run-dir", "runs/b", "--steps", 1))
    assert "step 0 of 1" in result.out
    before, after = (json.loads((path / "config.json").read_text()) for path in (run_dir, Path("runs/b")))
    del before["environment"], after["environment"]
    assert after["train"].pop("steps") == 1
    assert before["train"].pop("steps") == 2
    assert after == before


def test_the_config_of_the_other_kind_of_run_names_its_command(run_dir: Path, cli: Cli) -> None:
    said = "config .*json is of a run that trained a diffusion model: give it to fastdiff train, or name another"
    for command in ("train-classifier", "classifier_train"):
        refused(cli(command, "--config", run_dir / "config.json"), said)
    values = json.loads((run_dir / "config.json").read_text())
    Path("classifier.json").write_text(json.dumps(values | {"model": {"classifier_width": 64, "image_size": 8}}))
    said = "config classifier.json is of a run that trained a classifier: give it to fastdiff train-classifier, or"
    for command in ("train", "image_train", "super-res-train"):
        refused(cli(command, "--config", "classifier.json"), said)
    refused(cli("sample", run_dir, "--config", "classifier.json"), "(?i)no such option")
