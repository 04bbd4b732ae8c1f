"""``fastdiff ema`` and ``--ema-length``."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fastdiff.checkpoint import add_metadata, read_metadata, sha256
from fastdiff.evaluation.records import read_records
from fastdiff.evaluation.report import write_report
from fastdiff.sampling import job

from ..evaluation.colours import program
from ..sampling.support import command
from .conftest import Cli
from .support import PLAIN, SHORT, TINY, Result, refused, succeeded


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A run of 40 updates with two averages, and an extractor beside it. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--steps", 40, "--save-interval", 20, "--ema-lengths", "0.05,0.10", "--ema-rate", "0.9", "--lr", "1e-3")
    command("train", "--data-dir", shapes, "--run-dir", folder / "a", *TINY, *SHORT, *flags)
    program(folder / "colours.pt")
    return folder


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "a", tmp_path / "a"))


def drawn(cli: Cli, trained: Path, tmp_path: Path, *args: object) -> Result:
    extractor = ("--extractor", trained / "colours.pt", "--trust", "--extractor-size", 8)
    few = ("--num-samples", 8, "--batch-size", 8, "--steps", 2, "--cache-dir", tmp_path / "cache")
    return cli(*args, *extractor, *few, *PLAIN)


def test_the_metric_over_the_length(
    cli: Cli, trained: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("ema", run_dir, "--lengths", "0.05,0.07,0.06", "--plot", "curve.png")
    first = succeeded(drawn(cli, trained, tmp_path, *ask))
    folder = run_dir / "evaluation" / "lengths"
    records = read_records(folder)
    assert [(record["step"], record["ema_length"]) for record in records] == [(40, 0.05), (40, 0.06), (40, 0.07)]
    best = min(records, key=lambda record: record["figures"]["fd"])
    with (folder / "lengths.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ema_length"]) for row in rows] == [0.05, 0.06, 0.07]
    assert [float(row["fd"]) for row in rows] == [record["figures"]["fd"] for record in records]
    (marked,) = [line for line in first.out.splitlines() if line.endswith(" best")]
    assert f"length {best['ema_length']:g} " in marked
    assert first.out.splitlines()[-1].endswith(f"the best: --ema-length {best['ema_length']:g}")
    with Image.open("curve.png") as picture:
        assert picture.width > 400
    made = {path.name for path in run_dir.glob("average_*_000040.safetensors")}
    assert made == {f"average_{length}_000040.safetensors" for length in {0.05, 0.1, best["ema_length"]}}

    def fails(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(job.Job, "run", fails)  # nothing is drawn again
    second = succeeded(drawn(cli, trained, tmp_path, *ask[:-1], "curve.svg"))
    assert second.out.splitlines()[-5:-1] == first.out.splitlines()[-5:-1]
    assert "<svg" in Path("curve.svg").read_text()
    assert len(read_records(folder)) == 3
    write_report([run_dir], tmp_path / "report.html")
    assert "average_" not in (tmp_path / "report.html").read_text()


def test_averages_that_were_there_before_stay(cli: Cli, trained: Path, run_dir: Path, tmp_path: Path) -> None:
    few = ("--num-samples", 1, "--steps", 1, "--batch-size", 1, *PLAIN)
    succeeded(cli("sample", run_dir, "--ema-length", "0.06", "--out", "one.npz", *few))
    path = run_dir / "average_0.06_000040.safetensors"
    before = add_metadata(path, time_grids={"unipc": {}}) or path.read_bytes()
    succeeded(drawn(cli, trained, tmp_path, "ema", run_dir, "--lengths", "0.05,0.06,0.07,0.1"))
    records = read_records(run_dir / "evaluation" / "lengths")
    assert min(records, key=lambda record: record["figures"]["fd"])["ema_length"] != 0.06
    assert path.read_bytes() == before


def test_a_length_in_every_command(cli: Cli, trained: Path, run_dir: Path, shapes: Path, tmp_path: Path) -> None:
    few = ("--num-samples", 1, "--steps", 1, "--batch-size", 1, *PLAIN)
    result = succeeded(cli("sample", run_dir, "--ema-length", "0.06", "--out", "one.npz", *few))
    path = run_dir / "average_0.06_000040.safetensors"
    assert str(path) in result.out
    again = sha256(path)
    path.unlink()
    add_metadata(run_dir / "average_0.05_000040.safetensors", time_grids={"ddim": {}})  # found for that one
    succeeded(cli("convert", run_dir, "average.safetensors", "--ema-length", "0.06"))
    assert sha256(path) == again  # the same bits
    assert read_metadata(Path("average.safetensors"))["ema_length"] == 0.06
    result = succeeded(cli("evaluate", "nll", run_dir, "--ema-length", 0.1, "--data-dir", shapes, *few))
    assert "average of length 0.1," in result.out
    assert json.loads(Path("nll/nll.json").read_text())["ema_length"] == 0.1
    succeeded(drawn(cli, trained, tmp_path, "evaluate", "fid", f"{run_dir}@20", "--ema-length", "0.05"))
    (record,) = read_records(run_dir / "evaluation")
    assert (record["step"], record["ema_rate"], record["ema_length"]) == (20, None, 0.05)


def test_bad_input(cli: Cli, trained: Path, run_dir: Path, tmp_path: Path) -> None:
    refused(cli("sample", run_dir, "--ema-length", "0.28"), "ema_length 0.28 cannot be reconstructed at step 40 of ")
    refused(cli("sample", run_dir, "--ema-length", "0.06", "--ema-rate", "raw"), "ema_rate and ema_length both choose")
    refused(cli("convert", run_dir / "model000040.safetensors", "x.pt", "--ema-length", "0.1"), "is not a folder")
    refused(cli("evaluate", "nll", run_dir, "--data-dir", run_dir, "--ema-length", "0.3"), r"below 0\.2887")
    ema = ("ema", run_dir)
    refused(drawn(cli, trained, tmp_path, *ema, "--lengths", "0.05,0.28"), r"lengths 0\.28: step 40 of .* has 0\.")
    refused(drawn(cli, trained, tmp_path, *ema, "--lengths", "long"), "lengths must be numbers separated by commas")
    refused(drawn(cli, trained, tmp_path, *ema, "--plot", "x.jpg"), r"plot x\.jpg must end in \.png or \.svg")
    refused(drawn(cli, trained, tmp_path, "ema", run_dir / "config.json"), "is not a folder: name the folder of a run")
    for path in run_dir.glob("average_*"):
        path.unlink()
    refused(drawn(cli, trained, tmp_path, *ema), r"has no averages at step 40 .*: train with --ema-lengths 0\.05,0\.1")
