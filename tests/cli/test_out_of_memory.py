"""Too little memory, as the command line tells it."""

import json
import re
from pathlib import Path

import pytest

from ..training.support import file, with_room
from .conftest import Cli
from .support import contents, refused, succeeded


def microbatch_in(run_dir: Path) -> object:
    return json.loads((run_dir / "config.json").read_text())["train"]["microbatch"]


def test_the_number_that_was_found_is_the_runs(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        with_room(patch, 3)
        result = succeeded(train("r", "--steps", 1, "--microbatch", "auto"))
    assert "microbatch auto: 2 images in a forward pass\n" in result.out
    assert microbatch_in(tmp_path / "r") == 2
    assert file(tmp_path / "r/opt000001.safetensors")[1]["fastdiff-2"].count('"microbatch": 2') == 1
    sizes = with_room(monkeypatch, 99)
    again = succeeded(train("r", "--steps", 2, "--resume"))
    assert sizes == [2, 2]  # and not as many as would fit now: another number would round otherwise
    assert "microbatch" not in again.out
    assert microbatch_in(tmp_path / "r") == 2


def test_out_of_memory_is_one_line_and_loses_nothing(
    train: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    succeeded(train("r", "--steps", 2))
    before = contents(tmp_path / "r")
    with monkeypatch.context() as patch:
        with_room(patch, 0, first=1)
        refused(
            train("r", "--steps", 5, "--resume", "--save-interval", 9),
            "^error: out of memory with 4 images in a forward pass: use --microbatch 2, or auto$",
        )
    after = contents(tmp_path / "r")
    checkpoints = {name: data for name, data in before.items() if "000002" in name}
    assert len(checkpoints) == 4
    assert after.items() >= checkpoints.items()
    assert not [name for name in after if name.startswith(".unfinished") or ".tmp" in name]
    result = succeeded(train("r", "--steps", 4, "--resume", "--microbatch", 2))
    assert re.search(r"resumed at step [23]\n", result.out)
    assert "changed: " in result.out
    assert microbatch_in(tmp_path / "r") == 2


def test_no_memory_at_the_start_is_no_run(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        with_room(patch, 0)
        for flags in (("--microbatch", "auto"), ("--microbatch", 3)):
            refused(train("r", "--steps", 1, *flags), "out of memory with")
            assert not list((tmp_path / "r").glob("config.json"))
            assert not list((tmp_path / "r").glob("*.safetensors"))
    succeeded(train("r", "--steps", 1))  # the failed attempts do not stand in the way
