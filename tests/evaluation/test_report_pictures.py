"""Pictures in a report: evenly chosen, faithful where they fit, and smaller or fewer where they do not."""

import re
import struct
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fastdiff.evaluation.report import gallery, pictures, write_report
from fastdiff.evaluation.report.pictures import find_previews, read_set, read_strip
from fastdiff.sampling import save_grid
from fastdiff.sampling.output import save_npz

from .report_support import CLASSES, check, config, images, report, write_run


def write_previews(folder: Path, steps: range, size: int = 8, flat: bool = False) -> Path:
    (folder / "previews").mkdir(parents=True, exist_ok=True)
    for step in steps:
        shown = np.full((16, size, size, 3), step % 256, np.uint8) if flat else images(16, size, step)
        save_grid(folder / "previews" / f"{step:06d}_raw.png", shown)
    return folder


def test_previews_are_spread_evenly_over_the_steps(tmp_path: Path) -> None:
    write_previews(tmp_path, range(10, 1001, 10), flat=True)
    ((rate, paths),) = find_previews(tmp_path).items()
    strip = read_strip(rate, paths, 10**7)
    steps = list(strip.shown)
    assert (rate, strip.found, strip.unreadable) == (0.0, 100, 0)
    assert len(steps) == pictures.PREVIEWS
    assert (steps[0], steps[-1]) == (10, 1000)
    assert {later - earlier for earlier, later in pairwise(steps)} <= {40, 50}
    assert not any(picture.lossy for picture in strip.shown.values())


def test_the_highest_average_comes_first_and_other_files_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "previews"
    folder.mkdir()
    names = ("000100_raw.png", "000100_ema_0.99.png", "000100_ema_0.9999.png", "000050_raw.png", "1000000_raw.png")
    others = ("100_raw.png", "000100_ema_.png", "000100_ema_0.9.9.png", "000100.png", "x.png", ".000100_raw.png.tmp")
    for name in (*names, *others):
        (folder / name).touch()
    found = find_previews(tmp_path)
    assert list(found) == [0.9999, 0.99, 0.0]
    assert list(found[0.0]) == [50, 100, 1_000_000]
    assert find_previews(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(("share", "lossy", "shown"), [(90_000, False, 6), (30_000, True, 6), (2_500, True, 1)])
def test_what_does_not_fit_is_smaller_then_fewer(tmp_path: Path, share: int, lossy: bool, shown: int) -> None:
    write_previews(tmp_path, range(10, 70, 10), size=12)
    ((rate, paths),) = find_previews(tmp_path).items()
    strip = read_strip(rate, paths, share)
    assert len(strip.shown) == shown
    assert {picture.lossy for picture in strip.shown.values()} == {lossy}
    assert sum(len(picture.uri) for picture in strip.shown.values()) <= share or shown == 1
    assert list(strip.shown)[-1] == 60


def test_the_page_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    write_previews(run, range(10, 100, 10))
    monkeypatch.setattr(gallery, "_FOR_PREVIEWS", 4_000)
    page = report(run, out=tmp_path / "page.html")
    assert re.search(r"raw weights: \d of 9 previews are shown, encoded anew as JPEG to keep the page small", page.text)
    assert len((tmp_path / "page.html").read_bytes()) < 150_000


def test_previews_that_cannot_be_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_previews(run, range(10, 30, 10))
    whole = (run / "previews" / "000010_raw.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 100_000, 100_000) + whole[24:29]
    bomb = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    for step, content in ((30, bomb), (40, whole[:-200]), (50, b"text"), (60, b""), (70, whole[:40] + b"\0" * 100)):
        (run / "previews" / f"{step:06d}_raw.png").write_bytes(content)
    (run / "previews" / "000080_raw.png").mkdir()
    written = write_report([run], tmp_path / "page.html")
    page = check((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert written.previews == 2
    assert "raw weights: 6 could not be read" in page.text
    for step in (10, 20):
        (run / "previews" / f"{step:06d}_raw.png").write_bytes(b"")
    assert "None could be read." in report(run, out=tmp_path / "page.html").text


def test_class_names_where_the_grid_has_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "four", previews=(100,))
    page = report(run, out=tmp_path / "page.html")
    names = page.html[page.html.index('class="names"') :].partition("</div>")[0]
    assert re.findall(r"<bdi>(\w+)</bdi>", names) == list(CLASSES)  # of the columns
    run = write_run(tmp_path / "three", of=config(("a", "b", "c")), previews=(100,))
    page = report(run, out=tmp_path / "page.html")
    names = page.html[page.html.index('class="names"') :].partition("</div>")[0]
    assert re.findall(r"<bdi>(\w+)</bdi>", names) == list("abcabcabcabcabca")
    save_grid(run / "previews" / "000100_raw.png", images(16), names=[*"abc"] * 5 + ["a"])
    (run / "previews" / "000100_ema_0.9999.png").unlink()
    assert 'class="names"' not in report(run, out=tmp_path / "page.html").html
    of = config()
    run = write_run(tmp_path / "none", of=replace(of, model=replace(of.model, class_cond=False)), previews=(100,))
    assert 'class="names"' not in report(run, out=tmp_path / "page.html").html


def test_the_first_samples_of_each_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", samples=70)
    (run / "evaluation").mkdir()
    save_npz(run / "evaluation" / "plain.npz", [images(2)], (2, 8, 8, 3))
    labels = np.array([0, 9])
    save_npz(run / "evaluation" / "odd.npz", [images(2)], (2, 8, 8, 3), arr_1=labels)
    np.savez(run / "evaluation" / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    (run / "damaged.npz").write_bytes(b"PK\x03\x04 damaged")
    page = report(run, out=tmp_path / "page.html")
    assert "the first 64 of 70 images" in page.text
    titles = [a["title"] for a in page.all("button") if "title" in a]
    assert len(titles) == 64 + 2 + 2
    assert {"image 1", "image 2", "image 1, circle", "image 2, class 9", "image 64, triangle"} <= set(titles)
    assert re.search(r"Left out: .*damaged.npz: damaged.npz is damaged or not an npz file", page.text)
    assert "statistics.npz: statistics.npz has no arr_0" in page.text
    assert str(run) not in page.html


def test_the_newest_files_of_samples(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for i in range(pictures.SETS + 3):
        save_npz(run / f"samples_{i}.npz", [images(1)], (1, 8, 8, 3))
    page = report(run, out=tmp_path / "page.html")
    assert "samples_8.npz" in page.text
    assert "samples_2.npz" not in page.text
    assert "Left out: 3 older files of samples" in page.text


def test_large_samples_become_smaller_not_fewer(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    save_npz(path, [images(8, 128)], (8, 128, 128, 3))
    whole, smaller = read_set(path, (), 10**7), read_set(path, (), 200_000)
    assert [len(found.shown) for found in (whole, smaller)] == [8, 8]
    assert not any(picture.lossy for picture in whole.shown)
    assert all(picture.lossy for picture in smaller.shown)
    assert sum(len(picture.uri) for picture in smaller.shown) <= 200_000
    assert {(picture.width, picture.height) for picture in smaller.shown} == {(128, 128)}
