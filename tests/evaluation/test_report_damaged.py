"""A report of runs that are hostile, damaged or hardly begun: it says so in place, and nothing of them is markup."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from .report_support import config, evaluation, points, report, row, titles, write_evaluations, write_run

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "a\u202egnp.exe\u2066",
    "</title></style><b>&amp;\x1b[31m\n",
)


def test_nothing_of_a_run_is_markup(tmp_path: Path) -> None:
    of = config(HOSTILE)
    of = replace(of, data=replace(of.data, data_dir=HOSTILE[0], label_file=HOSTILE[1]), data_fingerprint=HOSTILE[3])
    name = "\"><script>alert('run')<&\u202e" + "'`"
    run = write_run(
        tmp_path / name.replace("/", "|"),
        of=of,
        previews=(100,),
        samples=8,
        environment=dict.fromkeys(("device", "command", "host"), HOSTILE[1]),
    )
    other = write_run(tmp_path / "other" / "<b>", of=of, previews=(100,))
    for folder in (run, other):
        line = evaluation(50, 1.0, name=HOSTILE[1])
        line |= {"checkpoint": HOSTILE[0], "samples": {"sampler": HOSTILE[0], "steps": HOSTILE[1], "count": HOSTILE[2]}}
        more = {**line, "step": 100, "figures": {HOSTILE[0]: 1.0, "fd": 2.0}}
        write_evaluations(folder, [line, more], best=more)
        (folder / "log.txt").write_text(
            "".join(
                f"2026-11-30 16:10:29  {kind}: {HOSTILE[i]!s}\n"
                for i, kind in enumerate(("data", "model", "on", "warning"))
            ),
            encoding="utf-8",
        )
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values["train"][HOSTILE[0]] = {HOSTILE[1]: [HOSTILE[2]]}
        values["train"]["steps"] = HOSTILE[1]
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    for folders in ((run,), (run, other)):
        page = report(*folders, out=tmp_path / "page.html")
        assert page.counts["b"] == page.html.count("<b>1</b>") + page.html.count("<b>2</b>")
        assert page.counts["title"] == 1
        assert not [a for a in page.all("img") if not a.get("src", "data:").startswith("data:")]
        assert "<script>alert(1)</script>" in page.text  # as text
        shown = page.text + " ".join(value for _, attributes in page.elements for value in attributes.values())
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b\x00]", shown)


def test_a_run_without_anything(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        of=config(()),
        progress=[],
    )
    page = report(run, out=tmp_path / "page.html")
    assert "A diffusion model for 8×8 images: no update was logged or saved yet." in page.text
    assert "progress.jsonl has no rows: there are no curves" in page.text
    assert {a["href"] for a in page.all("a")} == {"#settings", "#data"}
    (run / "progress.jsonl").unlink()
    assert "no curves" in report(run, out=tmp_path / "page.html").text


def test_one_row_only(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", progress=[row(10, 0.5)]), out=tmp_path / "page.html")
    assert len(points(page, "logged")) == 1
    assert "The loss ended at 0.5." in page.text


def test_a_row_of_nothing_but_nulls(tmp_path: Path) -> None:
    nothing = dict.fromkeys(row(10, 1.0)) | {"step": 10}
    page = report(write_run(tmp_path / "run", progress=[nothing]), out=tmp_path / "page.html")
    assert titles(page) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"model": 3}',
        "[" * 100_000,
        "\xff\xfe",
        '{"model": {"image_size": {}}, "train": []}',
    ],
)
def test_a_damaged_configuration(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.json").write_bytes(text.encode("latin-1"))
    page = report(run, out=tmp_path / "page.html")
    assert titles(page)[0] == "Loss"
    if not text.startswith("{") or text == "{":
        assert re.search(r"config.json is damaged \(.*\): the settings are unknown", page.text)


def test_values_of_any_kind_in_the_configuration(tmp_path: Path) -> None:
    """Numbers, texts, lists, objects and null in the place of each other."""
    strange = [None, True, -1, 10**30, 1e308, "text", "", [], [[1], {"a": None}], {}, {"b": [True]}]
    values = config().to_dict()
    run = write_run(tmp_path / "run", previews=(100,))
    for turn, value in enumerate(strange):
        changed = {
            name: dict.fromkeys(part, value) if isinstance(part, dict) else value
            for name, part in (values | {"environment": {"device": "cpu", "started": ""}}).items()
        }
        (run / "config.json").write_text(json.dumps(changed))
        assert titles(report(run, out=tmp_path / "page.html"))[0] == "Loss", turn


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"step": "x"}', '{"step": 1}', '{"step": 1, "figures": 3}', "\xff"])
def test_damaged_evaluations(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run")
    write_evaluations(run, [evaluation(100, 20.0)])
    with (run / "evaluation" / "metrics.jsonl").open("ab") as file:
        file.write(text.encode("latin-1") + b"\n")
    (run / "best.json").write_bytes(text.encode("latin-1"))
    page = report(run, out=tmp_path / "page.html")
    assert "step 100, EMA 0.9999" in page.text
    assert "metrics.jsonl has 1 damaged line, left out" in page.text
    assert "best.json is damaged" in page.text


def test_what_is_there_but_cannot_be_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "progress.jsonl").unlink()
    for name in ("progress.jsonl", "log.txt", "samples.npz", "best.json", "evaluation/metrics.jsonl"):
        (run / name).mkdir(parents=True)
    (run / "previews").touch()
    page = report(run, out=tmp_path / "page.html")
    for name in ("progress.jsonl", "evaluation/metrics.jsonl"):
        assert f"{name} cannot be read (Is a directory)" in page.text
    assert "best.json is damaged ([Errno 21] Is a directory" in page.text
    assert "previews cannot be read (Not a directory)" in page.text
    assert "Left out: samples.npz: samples.npz is not a file" in page.text
