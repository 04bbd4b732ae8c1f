"""No figure in the documents that the command did not print: they are compared with the rows that are kept."""

import re
from pathlib import Path

import pytest

from fastdiff.benchmarks.compare import read_measured
from fastdiff.benchmarks.table import markdown

ROOT = Path(__file__).parents[2]
ROWS = read_measured(ROOT / "benchmarks" / "results" / "cpu.csv")
CANDIDATES = {
    "plain": ("plain", "plain"),
    "diffusers": ("diffusers", "diffusers"),
    "denoising-diffusion-pytorch": ("denoising-diffusion-pytorch", "denoising-diffusion-pytorch"),
    "eager": ("+ fused optimizer", "+ bf16"),
    "compile": ("trainer", "+ compile"),
}
"""In the order of the READMEs' tables: the candidates of training and of sampling."""


def test_the_tables_of_the_document_are_the_rows() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    sections = {}
    for row in ROWS:
        sections.setdefault((row["suite"], row["workload"]), []).append(row)
    told = re.findall(r"^\*\*(\w+): (.*)\*\*$", text, re.MULTILINE)
    assert {suite for suite, _ in told} == {"train", "sample", "unet", "step", "data", "growth"}
    for key in told:
        assert markdown(sections[key]) in text, key


@pytest.mark.parametrize("readme", ["README.md", "README.pt-BR.md"])
def test_the_table_of_the_readme_is_of_the_rows(readme: str) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE)
    (table,) = [t for t in tables if "denoising-diffusion-pytorch" in t]
    lines = [line.replace(",", ".").strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(lines) == len(CANDIDATES)
    for (_, *figures), names in zip(lines, CANDIDATES.values(), strict=True):
        train, sample = (
            next(row for row in ROWS if (row["suite"], row["candidate"]) == (suite, name))
            for suite, name in zip(("train", "sample"), names, strict=True)
        )
        seconds = [float(row["median_s"]) for row in (train, sample)]
        speedups = [f"{float(row['speedup']):.2f}" for row in (train, sample)]
        assert figures == [f"{seconds[0]:.3f}", speedups[0], f"{seconds[1]:.2f}", speedups[1]]


def test_two_runs_of_the_same_as_the_document_tells_them() -> None:
    """Every pair of ratios is in its table, and those that are farther apart than 5% are told."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    pattern = r"^\| \|((?: \w+ \| again \|)+)\n\|-.*\n((?:\|.*\n)+)\nAll pairs are within 5% but one: (.*) apart"
    ((head, lines, said),) = re.findall(pattern, text, re.MULTILINE)
    columns = [name for name in re.findall(r"\w+", head) if name != "again"]
    told: dict[tuple[str, str], list[str]] = {}
    for line in lines.splitlines():
        candidate, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        for suite, first, second in zip(columns, cells[::2], cells[1::2], strict=True):
            told.setdefault((suite, candidate), []).extend(cell for cell in (first, second) if cell)
    found: dict[tuple[str, str], list[float]] = {}
    for row in read_measured(ROOT / "benchmarks" / "results" / "cpu_repeated.csv"):
        found.setdefault((row["suite"], row["candidate"]), []).append(float(row["speedup"]))
    assert {key: cells for key, cells in told.items() if cells} == {
        key: [f"{ratio:.2f}" for ratio in ratios] for key, ratios in found.items()
    }
    far = [
        f"{candidate} in `{suite}`, {100 * apart:.0f}%"
        for (suite, candidate), ratios in found.items()
        for pair in zip(ratios[::2], ratios[1::2], strict=True)
        if (apart := max(pair) / min(pair) - 1) > 0.05
    ]
    assert far == [said]
