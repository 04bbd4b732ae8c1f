"""``fastdiff report``: what it writes, prints and refuses."""

import re
import shutil
from pathlib import Path

import pytest

from ..evaluation.report_support import check
from .conftest import Cli
from .support import contents, refused, succeeded


@pytest.fixture
def page(cli: Cli, run_dir: Path, tmp_path: Path) -> Path:
    """The report of a run of two updates."""
    succeeded(cli("report", "runs/a"))
    return tmp_path / "report.html"


def test_a_report_of_a_run(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    before = contents(run_dir)
    line = succeeded(cli("report", "runs/a")).out
    assert re.fullmatch(r"wrote report\.html \(\d+ kB, 1 run, 0 previews\)\n", line)
    page = check((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "12 images of 4 classes: 2 updates of 4 images" in page.text
    assert "step 2 of 2" in page.text
    assert "finished" in page.text
    assert re.search(r"8×8 images \(([\d.]+ million|[\d,]+) parameters\)", page.text)
    assert contents(run_dir) == before


def test_several_runs_and_another_file(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "runs" / "b")
    line = succeeded(cli("report", "runs/a", "runs/b", "--out", "pages/both.html")).out
    assert re.fullmatch(r"wrote pages/both\.html \(\d+ kB, 2 runs, 0 previews\)\n", line)
    assert "2 runs compared" in check((tmp_path / "pages" / "both.html").read_text(encoding="utf-8")).text


def test_a_report_that_exists_stays_unless_it_is_to_be_replaced(cli: Cli, page: Path, run_dir: Path) -> None:
    before = page.read_bytes()
    refused(cli("report", "runs/a"), r"report\.html exists: name another file with --out, or use --overwrite$")
    assert page.read_bytes() == before
    (run_dir / "progress.jsonl").unlink()
    succeeded(cli("report", "runs/a", "--overwrite"))
    assert page.read_bytes() != before


def test_where_no_report_can_be_written(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    refused(cli("report", "runs/a", "--out", "page.txt"), "out page.txt must end in .html")
    (tmp_path / "folder.html").mkdir()
    refused(cli("report", "runs/a", "--out", "folder.html"), "out folder.html is a folder: name a file")
    (tmp_path / "file").touch()
    refused(cli("report", "runs/a", "--out", "file/page.html"), "file/page.html|file cannot be written")
    refused(cli("report", "runs/a", "--out", ""), "a path must not be empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html", "runs"]


def test_what_is_no_run(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, says in {
        "runs/a@2": r"runs/a@2 names a step, and a report shows all of them: name the run folder runs/a$",
        "runs/a@best": r"runs/a@best names a step",
        "nowhere": r"nowhere does not exist: name a run folder$",
        "runs/a/config.json": r"config\.json is a file: name a run folder$",
        "empty": r"empty holds no run: name a folder that fastdiff train wrote$",
        "runs": r"runs holds no run",
    }.items():
        refused(cli("report", "runs/a", place), says)
    refused(cli("report", "runs/a", "runs/a"), "run runs/a is named twice: name each run once")
    refused(cli("report"), "RUN")
    assert not (tmp_path / "report.html").exists()


def test_settings_come_from_a_checkpoint_if_the_file_is_lost(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "config.json").unlink()
    succeeded(cli("report", "runs/a"))
    page = check((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "config.json is missing: the settings are those of model000002.safetensors" in page.text
    assert "num_channels" in page.text
    for path in run_dir.glob("*.safetensors"):
        path.write_bytes(b"damaged")
    succeeded(cli("report", "runs/a", "--overwrite"))
    page = check((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "config.json is missing: the settings are unknown" in page.text
    assert "step 2" in page.text or "2 updates" in page.text
