"""``fastdiff runs``: what is below a folder, whatever lies there."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

import fastdiff
from fastdiff.checkpoint import Lease
from fastdiff.cli.runs import COLUMNS, MORE_COLUMNS, _age, _size, table
from fastdiff.evaluation.runs import DEPTH, ListedRun, find_runs

from .conftest import Cli
from .support import contents, refused, succeeded

NOW = 1_800_000_000.0


def aged(folder: Path, seconds: float) -> Path:
    """The run, as if it had last written so many seconds ago."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)
    return folder


def copied(run_dir: Path, name: str, seconds: float = 0.0) -> Path:
    return aged(Path(shutil.copytree(run_dir, run_dir.with_name(name))), seconds)


def with_config(run_dir: Path, **train: Any) -> None:
    path = run_dir / "config.json"
    config = json.loads(path.read_text())
    config["train"] |= train
    path.write_text(json.dumps(config))


def objects(cli: Cli, *args: object) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)  # NaN is not JSON

    lines = succeeded(cli("runs", "--json", *args)).out.splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_the_table(cli: Cli, run_dir: Path) -> None:
    """The run that wrote last comes first; running, if a process holds the lease."""
    copied(run_dir, "b", 200)
    with_config(run_dir.with_name("b"), steps=5)
    aged(run_dir.with_name("b"), 200)
    copied(run_dir, "c", 3 * 86400 + 5)
    aged(run_dir, 2 * 3600 + 100)
    row = json.loads((run_dir / "progress.jsonl").read_text().splitlines()[-1])
    with Lease(run_dir.with_name("c")):
        result = succeeded(cli("runs"))
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0][:7] == ["name", "kind", "step", "state", "loss", "age", "size"]
    assert [line[:3] for line in lines[1:]] == [["b", "model", "2/5"], ["a", "model", "2/2"], ["c", "model", "2/2"]]
    assert [line[3] for line in lines[1:]] == ["stopped", "finished", "running"]
    assert [" ".join(line[5:7]) for line in lines[1:]] == ["3 min", "2 h", "3 d"]
    assert {line[4] for line in lines[1:]} == {f"{row['loss']:.4g}"}
    total = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
    assert " ".join(lines[2][7:9]) == _size(total)
    assert max(map(len, result.out.splitlines())) <= 80
    assert succeeded(cli("runs")).out.splitlines()[3].split()[3] == "finished"  # c, when its process has ended


def test_looking_changes_nothing(cli: Cli, run_dir: Path) -> None:
    copied(run_dir, "b")
    (run_dir.with_name("b") / ".lease").unlink()
    before = contents(Path("runs"))
    succeeded(cli("runs"))
    assert contents(Path("runs")) == before


def test_a_folder_a_run_and_a_classifier_are_named(cli: Cli, run_dir: Path) -> None:
    path = copied(run_dir, "c") / "config.json"
    config = json.loads(path.read_text())
    config["model"] = {"classifier_width": 64}
    path.write_text(json.dumps(config))
    assert [(run["name"], run["kind"]) for run in objects(cli, "runs/c")] == [("c", "classifier")]
    Path("else").mkdir()
    run_dir.rename("else/a")
    assert {run["name"] for run in objects(cli, "else")} == {"a"}
    assert {run["name"] for run in objects(cli, ".")} == {"runs/c", "else/a"}


def test_folders_in_folders(cli: Cli, run_dir: Path) -> None:
    """A run's own folders are not searched, nor hidden ones, nor without end."""
    for name in ("runs/x/y/z", "runs/x/y/z/deeper", "runs/a/inside", "runs/.hidden"):
        shutil.copytree(run_dir, name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("inside"))
    assert {run.name for run in find_runs(Path("runs"))} == {"a", "x/y/z"}
    shutil.rmtree("runs/x")
    deep = "/".join("x" * DEPTH)
    shutil.copytree(run_dir, f"runs/{deep}/x")
    assert {run.name for run in find_runs(Path("runs"))} == {"a"}
    shutil.move(f"runs/{deep}/x", "runs/b")
    shutil.copytree("runs/b", f"runs/{deep}", dirs_exist_ok=True)
    assert {run.name for run in find_runs(Path("runs"))} == {"a", "b", deep}


def test_no_run(cli: Cli, tmp_path: Path) -> None:
    said = "no run in runs: train one with fastdiff train --data-dir DIR, or name another folder\n"
    assert succeeded(cli("runs")).out == said
    (tmp_path / "runs").mkdir()
    assert succeeded(cli("runs")).out == said
    assert objects(cli) == []
    refused(cli("runs", "nowhere"), "nowhere does not exist: name a folder with runs in it")
    (tmp_path / "file").touch()
    refused(cli("runs", "file"), "file is a file: name a folder with runs in it")


def test_what_is_no_run_is_not_listed(cli: Cli, run_dir: Path) -> None:
    """Another program's config.json, and the folder of a run that never began."""
    for name, text in (("unet", '{"_class_name": "UNet2DModel"}'), ("log.txt", None)):
        folder = Path("runs") / f"of {name}"
        folder.mkdir()
        (folder / ("config.json" if text else name)).write_text(text or "an error\n")
    assert [run["name"] for run in objects(cli)] == ["a"]


DAMAGED = {
    "{": r"config\.json is damaged \(Expecting property name",
    "": r"config\.json is damaged \(Expecting value",
    "[]": r"config\.json is damaged \(not an object\)",
    "[" * 100_000: r"config\.json is damaged \(",
    "\xff": r"config\.json is damaged \(",
    "{}": r"config\.json is not a run's",
    '{"train": 5, "model": {"image_size": 8}}': r"config\.json is not a run's",
    '{"train": {"steps": true}, "model": {"image_size": 8}}': r"config\.json is not a run's",
    '{"train": {"steps": 1e5}, "model": {"image_size": 8}}': r"config\.json is not a run's",
    '{"train": {"steps": 1}, "model": []}': r"config\.json is not a run's",
    f'{{"train": {{"steps": 1{"0" * 400}}}, "model": {{"image_size": 8}}}}': r"config\.json is not a run's",
}


@pytest.mark.parametrize(("text", "reason"), DAMAGED.items(), ids=[text[:20] for text in DAMAGED])
def test_a_damaged_run_is_listed_with_the_reason(
    cli: Cli, run_dir: Path, text: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (copied(run_dir, "b") / "config.json").write_bytes(text.encode("latin-1"))
    lines = succeeded(cli("runs")).out.splitlines()
    assert len(lines) == 3
    (line,) = (line for line in lines if line.startswith("b "))
    assert re.match(rf"b +damaged: {reason}", line), line
    (values,) = (run for run in objects(cli) if run["name"] == "b")
    assert (values["state"], bool(re.match(reason, values["reason"]))) == ("damaged", True)


def test_a_missing_or_unreadable_file(cli: Cli, run_dir: Path) -> None:
    (run_dir / "config.json").unlink()
    assert "damaged: config.json is missing" in succeeded(cli("runs")).out
    (run_dir / "config.json").mkdir()
    assert "damaged: config.json cannot be read (Is a directory)" in succeeded(cli("runs")).out
    shutil.copytree(run_dir, "runs/b")
    (Path("runs/b/config.json")).rmdir()
    shutil.rmtree(run_dir)
    (Path("runs/b/config.json")).write_text('{"train": {"steps": 2}, "model": {"image_size": 8}}')
    (Path("runs/b/progress.jsonl")).unlink()
    (Path("runs/b/progress.jsonl")).mkdir()
    assert "damaged: progress.jsonl cannot be read (Is a directory)" in succeeded(cli("runs")).out


@pytest.mark.parametrize(
    ("end", "step", "loss"),
    [
        ('{"step": 7, "loss": 0.25, "images_per_s": 3}\n{"step": 8, "lo', 7, 0.25),  # a killed process
        ('{"step": 9, "loss": null}\n', 9, None),
        ('{"step": 9, "loss": NaN, "images_per_s": Infinity}\n', 9, None),
        (f'{{"step": 9, "loss": 1{"0" * 400}}}\n', 9, None),
        ('{"step": 9, "loss": "low"}\n[1]\n5\n\xff\n{"step": true}\n{"step": -1}\n', 9, None),
        ("[" * 60_000, 2, None),
        ("x" * 100_000, 2, None),  # further back is not looked
        ("", 2, None),
    ],
)
def test_the_last_row_that_is_whole(cli: Cli, run_dir: Path, end: str, step: int, loss: float | None) -> None:
    (run_dir / "progress.jsonl").write_bytes(b'{"step": 1}\n' + end.encode("latin-1"))
    with_config(run_dir, steps=100)
    (found,) = objects(cli)
    assert (found["step"], found["steps"], found["state"], found["loss"]) == (step, 100, "stopped", loss)
    assert found["images_per_s"] == (3 if step == 7 else None)
    assert succeeded(cli("runs")).out.count("\n") == 2


def test_a_run_whose_last_step_is_not_saved_is_not_finished(cli: Cli, run_dir: Path) -> None:
    (run_dir / "progress.jsonl").write_text('{"step": 9, "loss": 1}\n')
    with_config(run_dir, steps=9)
    assert [(run["step"], run["state"]) for run in objects(cli)] == [(9, "stopped")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            '{"step": 2, "ema_rate": 0.9, "metric": "fd", "value": 12.3456, "more": [1]}',
            {"step": 2, "ema_rate": 0.9, "metric": "fd", "value": 12.3456},
        ),
        ('{"step": 2, "metric": "fd", "value": NaN}', None),
        ('{"step": "2", "metric": "fd", "value": 1}', None),
        ("[" * 500 + "]" * 500, None),
        ('{"step": 2, "value": 1, "name": ' + "[" * 500 + "]" * 500 + "}", {"step": 2, "value": 1}),
        ("{", None),
    ],
)
def test_the_best_checkpoint(
    cli: Cli, run_dir: Path, text: str, shown: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "best.json").write_text(text)
    monkeypatch.setenv("COLUMNS", "120")
    out = succeeded(cli("runs")).out
    assert ("fd 12.35 @2" in out) == (isinstance(shown, dict) and "metric" in shown)
    assert [run["best"] for run in objects(cli)] == [shown]


def test_times_beyond_any_calendar(cli: Cli, run_dir: Path) -> None:
    for seconds in (-1e11, 1e10):
        aged(run_dir, seconds)
        (found,) = objects(cli)
        assert found["updated"][:4].isdecimal()
        assert succeeded(cli("runs")).out.count("\n") == 2


def listed(name: str, **more: Any) -> ListedRun:
    values: dict[str, Any] = {"state": "running", "kind": "classifier", "step": 123456, "steps": 200_000}
    values |= {"loss": 0.012345, "images_per_s": 1234.5, "best": {"metric": "fd", "value": 12.3, "step": 120_000}}
    return ListedRun(
        **{"folder": Path(name), "name": name, "updated": NOW - 200, "size": 1_234_567_890} | values | more
    )


LONG = "an-experiment-of-many-words-with-lr-1e-4"


@pytest.mark.parametrize("name", ["photos", LONG, "\N{CJK UNIFIED IDEOGRAPH-732B}" * 30])
def test_it_fits_any_terminal(name: str) -> None:
    """Columns are dropped on the right; a wide terminal has whole names and more columns."""
    found = [listed(name), listed("b"), listed("c", state="damaged", reason="config.json is damaged " * 9)]
    seen = []
    for width in range(1, 200):
        lines = table(found, width, NOW)
        assert len(lines) == 4
        assert max(map(cell_len, lines)) <= width
        heads = [column for column in (*COLUMNS, *MORE_COLUMNS) if column in lines[0].split()]
        assert heads == [*COLUMNS, *MORE_COLUMNS][: len(heads)]
        seen.append(len(heads))
        if set(heads) & set(MORE_COLUMNS):
            assert name in lines[1]
    assert seen == sorted(seen)
    assert seen[79] >= len(COLUMNS)  # 80 columns
    assert seen[-1] == len(COLUMNS) + len(MORE_COLUMNS)


def test_names_that_differ_in_their_ends() -> None:
    shown = [line.split()[0] for line in table([listed(LONG), listed(LONG[:-1] + "5")], 80, NOW)[1:]]
    assert shown[0] != shown[1]
    assert all("..." in name for name in shown)


def test_columns_without_a_value_are_left_out_or_empty() -> None:
    assert "best" not in table([listed("a", best={})], 200, NOW)[0]
    lines = table([listed("a", best={}, loss=None), listed("b", images_per_s=None)], 200, NOW)
    assert lines[1].split() == ["a", "classifier", "123456/200000", "running", "3", "min", "1.2", "GB", "1234.5"]
    assert lines[2].endswith("fd 12.3 @120000")
    assert table([], 80, NOW) == []


def test_unprintable_names(cli: Cli, run_dir: Path) -> None:
    run_dir.rename(run_dir.with_name("a\x1b[2J\nb"))
    assert "\x1b" not in succeeded(cli("runs")).out
    assert len(succeeded(cli("runs")).out.splitlines()) == 2


def test_ages_and_sizes() -> None:
    assert [_age(s) for s in (-5, 0, 59.9, 60, 3599, 3600, 86400 * 400)] == (
        ["0 s", "0 s", "59 s", "1 min", "59 min", "1 h", "400 d"]
    )
    assert [_size(n) for n in (0, 999, 1000, 9949, 10_400, 999_600, 12_345_678, 5 * 10**15)] == (
        ["0 B", "999 B", "1.0 kB", "9.9 kB", "10 kB", "1.0 MB", "12 MB", "5000 TB"]
    )


def test_pytorch_is_not_imported(run_dir: Path) -> None:
    code = (
        "import sys\nfrom fastdiff.cli.app import main\nsys.argv = ['fastdiff', 'runs']\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    root = Path(fastdiff.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "False"
    assert "finished" in done.stdout


def test_a_pipe_does_not_block(cli: Cli, run_dir: Path) -> None:
    (run_dir / "progress.jsonl").unlink()
    os.mkfifo(run_dir / "progress.jsonl")
    assert "damaged: progress.jsonl cannot be read (not a regular file)" in succeeded(cli("runs")).out
    assert (
        "cannot be read (not a regular file)" in succeeded(cli("report", run_dir)).out + Path("report.html").read_text()
    )
