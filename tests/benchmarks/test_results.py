"""No figure in the documents that the command did not print: their tables are compared with the rows that are kept."""

from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest

from fastdiff.benchmarks.compare import read_measured
from fastdiff.benchmarks.rows import read_rows
from fastdiff.benchmarks.table import markdown

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = read_measured(RESULTS / "cpu.csv")
GROUPS = [(suite, list(rows)) for (suite, _), rows in groupby(ROWS, itemgetter("suite", "workload"))]
SECTIONS = [markdown(rows) for suite, rows in GROUPS if suite != "kernels"]
"""What docs/performance.md is to tell: everything but single kernels, whose rows are kept for comparisons."""

CANDIDATES = {
    "plain": ("plain", "plain"),
    "diffusers": ("diffusers", "diffusers"),
    "denoising-diffusion-pytorch": ("denoising-diffusion-pytorch", "denoising-diffusion-pytorch"),
    "eager": ("+ fused optimizer", "+ bf16"),
    "compile": ("trainer", "+ compile"),
}
"""In the order of the READMEs' tables: the candidates of training and of sampling."""

Table = list[list[str]]
"""The cells of a table, line by line, without the line of dashes."""


def document(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tables(text: str) -> list[Table]:
    """Every table of a Markdown text, in order."""
    groups = groupby(text.splitlines(), key=lambda line: line.startswith("|"))
    found = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] for is_table, lines in groups if is_table
    ]
    return [[head, *rest] for head, _, *rest in found]


def is_printed(table: Table) -> bool:
    """Whether a table has the header of ``markdown``: no other has a median."""
    return any(title.startswith("median, ") for title in table[0])


def test_the_tables_of_the_document_are_the_rows() -> None:
    text = document("docs/performance.md")
    assert [section for section in SECTIONS if section not in text] == []  # with their titles and remarks
    kept = [table for section in SECTIONS for table in tables(section)]
    assert all(map(is_printed, kept))
    assert sorted(filter(is_printed, tables(text))) == sorted(kept)


@pytest.mark.parametrize("readme", ["README.md", "README.pt-BR.md"])
def test_the_table_of_the_readme_is_of_the_rows(readme: str) -> None:
    (lines,) = [
        lines for _, *lines in tables(document(readme)) if any("denoising-diffusion-pytorch" in x[0] for x in lines)
    ]
    assert len(lines) == len(CANDIDATES)
    for (_, *figures), names in zip(lines, CANDIDATES.values(), strict=True):
        train, sample = (
            next(row for row in ROWS if (row["suite"], row["candidate"]) == (suite, name))
            for suite, name in zip(("train", "sample"), names, strict=True)
        )
        seconds = [float(row["median_s"]) for row in (train, sample)]
        speedups = [f"{float(row['speedup']):.2f}" for row in (train, sample)]
        expected = [f"{seconds[0]:.3f}", speedups[0], f"{seconds[1]:.2f}", speedups[1]]
        assert [figure.replace(",", ".") for figure in figures] == expected


def test_the_table_of_repeated_runs_is_of_the_rows() -> None:
    """The ratios of every run, in the order of the runs."""
    _, after = document("docs/performance.md").split("<!-- cpu_repeated.csv -->\n")
    (_, *suites), *lines = tables(after)[0]
    told: dict[tuple[str, str], list[str]] = {}
    suite_of = [name if name != "again" else suites[i - 1] for i, name in enumerate(suites)]
    for candidate, *ratios in lines:
        for suite, ratio in zip(suite_of, ratios, strict=True):
            if ratio:
                told.setdefault((suite, candidate), []).append(ratio)
    found: dict[tuple[str, str], list[str]] = {}
    for row in read_measured(RESULTS / "cpu_repeated.csv"):
        found.setdefault((row["suite"], row["candidate"]), []).append(f"{float(row['speedup']):.2f}")
    assert told == found


GPU_ROWS = read_rows(RESULTS / "h200.csv")
OURS = ("reference", "triton")


def gpu_table() -> list[str]:
    """The kernels' figures: ours, its share of the floor, and the fastest of the others, with the ratio."""
    lines = ["| | ours, us | of the floor | fastest other, us | × |", "|---|---:|---:|---|---:|"]
    kernels = sorted((row for row in GPU_ROWS if row["suite"] == "kernels"), key=itemgetter("workload"))
    for workload, rows in groupby(kernels, itemgetter("workload")):
        found = {row["candidate"]: row for row in rows if row["median_s"] != "nan"}
        own = found["triton"]
        ours = float(own["median_s"])
        others = [(float(row["median_s"]), name) for name, row in found.items() if name not in OURS]
        best = "| |"
        if others:
            seconds, name = min(others)
            best = f"{seconds * 1e6:.1f} ({name}) | {seconds / ours:.2f} |"
        share = float(own["share_of_limit"])
        lines.append(
            f"| {workload.replace(', bfloat16', '').replace(', float32', '')} | {ours * 1e6:.1f} | {share:.0%} | {best}"
        )
    return lines


def test_the_figures_of_a_gpu_are_of_the_rows() -> None:
    text = document("docs/performance.md")
    assert "\n".join(gpu_table()) in text
    for row in GPU_ROWS:
        if row["suite"] in ("train", "step"):
            seconds = float(row["median_s"])
            assert f"| {row['candidate']}, batch {row['workload'].split()[-1]} | {seconds * 1000:.2f} |" in text
