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
    """Every pair of ratios is in its table, and no two are farther apart than it says."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    pattern = r"^\| \| train \| again .*\n\|-.*\n((?:\|.*\n)+)\nNo two .* (\d+)% apart"
    (lines, apart), *_ = re.findall(pattern, text, re.MULTILINE)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
    told = {name: figures for name, *figures in cells}
    pairs: dict[tuple[str, str], list[float]] = {}
    for row in read_measured(ROOT / "benchmarks" / "results" / "cpu_repeated.csv"):
        pairs.setdefault((row["suite"], row["candidate"]), []).append(float(row["speedup"]))
    for suite, candidate in pairs:
        first, second = pairs[suite, candidate]
        place = 2 * ("train", "unet", "sample").index(suite)
        assert told[candidate][place : place + 2] == [f"{first:.2f}", f"{second:.2f}"], candidate
        assert max(first, second) / min(first, second) - 1 <= float(apart) / 100
    assert len(pairs) == sum(cell != "" for figures in told.values() for cell in figures) / 2
