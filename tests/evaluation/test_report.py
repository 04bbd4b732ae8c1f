"""The page of a report: what it says of a run, and that it keeps to itself."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fastdiff.data.npz import read_samples
from fastdiff.evaluation.report import write_report
from fastdiff.runtime.lease import Lease

from ..support import refusal
from .report_support import (
    CLASSES,
    NAME,
    Page,
    check,
    config,
    evaluation,
    points,
    report,
    row,
    rows,
    titles,
    write_evaluations,
    write_run,
)

ENVIRONMENT = {
    "fastdiff": "0.1.0",
    "torch": "2.13.0",
    "triton": None,
    "python": "3.11.7",
    "commit": "c" * 40,
    "command": "fastdiff train --data-dir /data/shapes",
    "device": "NVIDIA H200",
    "processes": 1,
    "precision": "bf16",
    "kernels": "triton",
    "compile": True,
    "host": "bench",
    "started": "2026-11-30T16:10:29+00:00",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    return write_run(folder, environment=ENVIRONMENT, previews=(50, 100), samples=6)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return report(run, out=run.parent / "page.html")


def test_a_sentence_about_the_run(page: Page) -> None:
    said = (
        "A class-conditional diffusion model for 8×8 images, trained on 12 images of 4 classes: 100 updates of 4 "
        "images in 50 s on NVIDIA H200. The loss ended at 0.111, down from 1."
    )
    assert said in page.text
    assert "finished" in page.text
    assert "step 100 of 100" in page.text
    assert page.all("h1")
    assert "<title>shapes · fastdiff</title>" in page.html


def test_the_curves(page: Page) -> None:
    quarters = ["0–25% of the timesteps, least noise", "25–50%", "50–75%", "75–100%, most noise"]
    others = ["Gradient norm", "Learning rate", "Images per second", "Waiting for data"]
    assert titles(page) == ["Loss", *quarters, *others]
    found = points(page, "logged")
    assert [x for x, _ in found] == list(range(10, 101, 10))
    heights = [y for _, y in found]
    assert heights == sorted(heights)  # a loss that falls is a line that falls, to larger y
    assert len(points(page, "median")) == 10
    assert "running median of 5% of the rows, at least 5" in page.text
    (plot,) = (a for a in page.all("div", "plot") if a["aria-label"].startswith("Loss. logarithmic."))
    low, high, scale = plot["data-y"].split()
    assert scale == "log"
    assert float(low) < 0.1 < 1 < float(high)
    assert plot["data-x"] == "0 1 100"
    assert plot["tabindex"] == "0"


def test_the_quarters_share_an_axis(page: Page) -> None:
    quarters = page.all("figure", "small")
    assert len(quarters) == 4
    axes = re.findall(r'<figure class="chart small">.*?data-y="([^"]*)"', page.html, re.DOTALL)
    assert len(axes) == 4
    assert len(set(axes)) == 1


def test_all_settings_have_their_help_and_what_is_no_default_stands_out(page: Page) -> None:
    table = page.html[page.html.index('id="settings"') :]
    first, folded = table[: table.index("<details>")], table[table.index("<details>") :]
    assert ">image_size<" in first
    assert ">dropout<" not in first
    assert ">dropout<" in folded
    assert 'title="Side of the square images in pixels.">image_size' in first
    assert '<td class="changed">8</td><td class="quiet">64</td>' in first
    assert ">labels<" not in first  # auto is the default of the command line
    assert '<td class="changed">/data/shapes</td>' in first


def test_the_data_and_the_environment(page: Page) -> None:
    for said in ("fingerprint0123abcd", "images12", "circle3", "PyTorch2.13.0", "hostbench", "commit" + "c" * 40):
        assert said in page.text
    assert "Triton" not in page.text


def test_previews_and_samples_are_in_the_page(page: Page, run: Path, tmp_path: Path) -> None:
    shown = page.all("figure", "preview")
    assert [(a["data-rate"], a["data-step"]) for a in shown] == [
        ("0.9999", "50"),
        ("0.9999", "100"),
        ("0.0", "50"),
        ("0.0", "100"),
    ]
    assert [a["data-step"] for a in page.all("figure", "on")] == ["100"]
    assert [a["data-steps"] for a in page.all("input") if a.get("type") == "range"] == ["50 100"]
    assert all(name in page.text for name in CLASSES)
    buttons = [a["title"] for a in page.all("button") if "title" in a]
    assert buttons == [f"image {i + 1}, {CLASSES[i % 4]}" for i in range(6)]
    # The pixels are those of the files.
    import base64
    import io

    import numpy as np

    uri = next(a["src"] for a in page.all("img") if a.get("alt") == "image 2, cross")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert np.array_equal(pixels, read_samples(run / "samples.npz").images[1])
    uri = next(a["src"] for a in page.all("img") if a.get("alt", "").endswith("step 100, EMA 0.9999"))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    whole = np.asarray(Image.open(run / "previews" / "000100_ema_0.9999.png"))
    factor = whole.shape[0] // pixels.shape[0]
    assert factor == 8  # as save_grid enlarges images of 8 pixels
    assert np.array_equal(pixels.repeat(factor, 0).repeat(factor, 1), whole)


def test_several_runs_over_each_other(run: Path, tmp_path: Path) -> None:
    other = write_run(
        tmp_path / "slow", of=config(lr=3e-4), progress=[row(step, 20 / step) for step in range(20, 61, 20)]
    )
    page = report(run, other, out=tmp_path / "page.html")
    assert "2 runs compared" in page.text
    assert [x for x, _ in points(page, "slow, logged")] == [20, 40, 60]
    assert [x for x, _ in points(page, "shapes, logged")][-1] == 100
    assert [a["data-run"] for a in page.all("input") if "data-run" in a] == ["0", "1"]
    assert "stopped after 60 of 100 updates" in page.text
    table = page.html[page.html.index('id="settings"') :]
    first = table[: table.index("<details>")]
    assert re.findall(r'<th scope="row" title="[^"]*">(\w+)', first) == ["lr"]
    assert '<td>0.0001</td><td class="changed">0.0003</td>' in first
    assert "All runs were trained on the same data." in page.text
    assert "This run has no previews." in page.text


def test_names_tell_runs_apart(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "b" / "shapes")
    page = report(run, tmp_path / "b" / "shapes", out=tmp_path / "page.html")
    assert "b/shapes, logged" in page.attributes("data-n")
    said = refusal(lambda: write_report([run, run.parent / "." / "shapes"], tmp_path / "other.html"))
    assert said == f"run {run} is named twice: name each run once"
    assert not (tmp_path / "other.html").exists()


def test_metrics_over_the_steps_with_the_best_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [
        evaluation(step, fd, kd=fd / 100, kd_deviation=0.01, mystery=1.0) for step, fd in ((50, 30.0), (100, 20.0))
    ]
    lines += [evaluation(100, 25.0, rate=0.0), evaluation(50, None), evaluation(75, 12.0, name="FD-other (n=5)")]
    lines += [evaluation(100, 21.0)]  # measured once more
    write_evaluations(run, lines, best=lines[-1])
    page = report(run, out=tmp_path / "page.html")
    assert titles(page)[-4:] == [NAME, "kd", "mystery", "FD-other (n=5)"]
    assert "lower is better, ring: the best" in page.text
    assert f"Its best checkpoint is that of step 100 (EMA 0.9999): {NAME} 21." in page.text
    assert [x for x, _ in points(page, "EMA 0.9999")] == [0, 50]
    assert len(page.all("path", "ring")) == 2  # of fd, and of kd, whose lowest value is marked
    assert len(page.all("path", "whisker")) == 1
    assert "0.2 ± 0.01" in page.text
    assert "<b>21</b>" in page.html
    assert page.html.count('<span class="badge">best</span>') == 1


def test_one_evaluation_is_a_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_evaluations(run, [evaluation(100, 20.0)])
    page = report(run, out=tmp_path / "page.html")
    assert NAME not in titles(page)
    assert "step 100, EMA 0.9999" in page.text


def test_held_out_losses_are_beside_those_of_training(tmp_path: Path) -> None:
    progress = [
        row(step, 10 / step, **({"val_loss": 12 / step, "val_loss_q1": 3.0} if step % 50 == 0 else {}))
        for step in range(10, 101, 10)
    ]
    page = report(write_run(tmp_path / "run", progress=progress), out=tmp_path / "page.html")
    assert [x for x, _ in points(page, "held out")] == [50, 100]
    assert len(page.all("path", "held")) == 2
    assert "On held-out images the loss is 0.12." in page.text


def test_a_classifier(tmp_path: Path) -> None:
    progress = [
        {"step": step, "samples": 4 * step, "loss": 1.0, "acc1": step / 200, "acc5": 1.0, "images_per_s": 8.0}
        | ({"val_acc1": 0.25, "val_loss": 1.1} if step == 100 else {})
        for step in range(10, 101, 10)
    ]
    page = report(
        write_run(tmp_path / "run", of=config(classifier=True), progress=progress), out=tmp_path / "page.html"
    )
    assert "A classifier of noisy 8×8 images in 4 classes, trained on 12 images: 100 updates" in page.text
    assert "On held-out images the accuracy is 25.0%." in page.text
    assert titles(page)[:2] == ["Loss", "Accuracy"]  # among five of four classes is every image
    assert "classifier_width" in page.text
    assert "learn_sigma" not in page.text


def test_skipped_updates_are_marked(tmp_path: Path) -> None:
    progress = rows()
    progress[3] |= {"skipped": 2}
    progress[6] = row(70, None, skipped=10)
    page = report(write_run(tmp_path / "run", progress=progress), out=tmp_path / "page.html")
    marks = [a["d"] for a in page.all("path", "skip")]
    assert [re.findall(r"M(\d+),", mark) for mark in marks] == [["40", "70"]] * 2
    assert "12 updates were skipped, marked below the curves; logged at steps 40, 70." in page.text
    path = next(a["d"] for a in page.all("path") if a.get("data-n") == "logged")
    assert path.count("M") == 2  # where no update was kept there is no loss


def test_a_resumed_run_draws_no_line_backwards(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", progress=[*rows(80), *rows()[4:]]), out=tmp_path / "page.html")
    for chart in range(len(titles(page))):
        steps = [x for x, _ in points(page, "logged", chart)] if chart < 8 else []
        assert steps == sorted(set(steps))
    assert "the steps go back" in page.text


def test_a_run_that_is_running(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", progress=rows(50))
    with (run / "progress.jsonl").open("a") as file:
        file.write('{"step": 60, "sam')
    with Lease(run):
        page = report(run, out=tmp_path / "page.html")
    assert "running" in page.text
    assert "so far 50 of 100 updates" in page.text
    assert "progress.jsonl ends in half a line, which is left out" in page.text
    assert "stopped early" in report(run, out=tmp_path / "page.html").text


def test_many_runs_have_colours(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run{i}", progress=rows(30)) for i in range(10)]
    written = write_report(folders, tmp_path / "page.html")
    assert re.fullmatch(r"wrote .*page\.html \((\d+ kB|0\.\d MB), 10 runs, 0 previews\)", written.line())
    assert ".c9 { --c: var(--p1); }" in check((tmp_path / "page.html").read_text(encoding="utf-8")).html


def test_figures_of_several_references_are_told_apart(tmp_path: Path) -> None:
    """They do not compare: neither in a chart nor in a column."""
    run = write_run(tmp_path / "run")
    path = run / "evaluation" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    records = []
    for data, fd in (("/data/photos", 1.5), ("/data/others", 2.5), ("/elsewhere/photos", 3.5)):
        record = {"step": 50, "ema_rate": 0.0, "checkpoint": "model000050.safetensors", "samples": {"count": 16}}
        record |= {"reference": {"data": data, "count": 60}, "extractor": {"name": "x", "sha256": "0"}}
        records.append(record | {"figures": {"fd": fd}, "names": {"fd": "FD-x (n=16, x)"}})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "best.json").write_text(json.dumps(records[1] | {"metric": "fd", "name": "FD-x (n=16, x)", "value": 2.5}))
    write_report([run], tmp_path / "report.html")
    text = re.sub("<[^>]*>", "", (tmp_path / "report.html").read_text())
    for label in ("photos (60)", "others (60)", "photos (60) no. 2"):
        assert f"n=16, x, against {label}" in text
    assert "FD-x (n=16, x, against others (60)) 2.5" in text  # the sentence about the best
