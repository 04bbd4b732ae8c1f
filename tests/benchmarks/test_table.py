"""The table: at most 100 columns, no column without a figure, remarks where there is no time."""

import io
import math

from rich.console import Console

from fastdiff.benchmarks.harness import Timing
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.table import markdown, print_rows


def printed(*rows: Row) -> list[str]:
    out = io.StringIO()
    print_rows(rows, Console(file=out, width=100))
    return out.getvalue().splitlines()


def timing(*seconds: float) -> Timing:
    return Timing("", seconds, [1.0] * len(seconds))


def test_every_figure_in_100_columns() -> None:
    figures = {"images": 16, "flops": 1e12, "n_bytes": 1e9, "limit_s": 0.1, "peak_gib": 12.3456}
    first = Row("train", "a workload", "denoising-diffusion-pytorch", timing(0.1234, 0.1239, 0.1251), **figures)
    wrong = Row("train", "a workload", "wrong", None, remark="ValueError: differs: not timed", failed=True)
    second = Row("train", "a workload", "+ bf16", timing(1.0, 1.0, 1.0), before=first.timing, **figures)
    lines = printed(first, wrong, second)
    assert "train: a workload" in lines
    (header,) = [line for line in lines if "candidate" in line]
    for title in ("median, ms", "p20 to p80", "images/s", "× first", "× before", "of limit", "GiB"):
        assert title in header
    (row,) = [line for line in lines if "denoising-diffusion-pytorch" in line]
    assert row.split() == ["denoising-diffusion-pytorch", "124", "123", "to", "125", "129", "8.07", "81%", "12.3"]
    assert lines[-1] == "  wrong: ValueError: differs: not timed"
    assert max(map(len, lines)) <= 100


def test_a_narrow_terminal_keeps_the_names_and_goes_without_columns() -> None:
    figures = {"images": 16, "limit_s": 0.1, "peak_gib": 12.3456}
    row = Row("train", "a workload", "+ channels_last", timing(0.1234, 0.1239, 0.1251), **figures)
    for width, gone in ((100, []), (66, ["GiB"]), (45, ["GiB", "p20 to p80", "of limit"])):
        out = io.StringIO()
        print_rows([row], Console(file=out, width=width))
        lines = out.getvalue().splitlines()
        assert any(line.strip().startswith("+ channels_last ") for line in lines), lines
        assert max(map(len, lines)) <= width
        titles = ("GiB", "p20 to p80", "of limit", "images/s", "× first")
        assert [title for title in titles if title not in out.getvalue()] == gone, width


def test_what_nobody_has_is_no_column() -> None:
    text = "\n".join(printed(Row("kernels", "a", "triton", timing(2e-6))))
    assert "median, us" in text
    assert not any(title in text for title in ("p20", "images/s", "before", "limit", "GiB"))


def test_nothing_timed() -> None:
    lines = printed(Row("unet", "a", "plain", None, limit_s=math.nan, remark="OutOfMemoryError: [b]a lot[/b]"))
    assert lines[-1] == "  plain: OutOfMemoryError: [b]a lot[/b]"


def test_as_a_document() -> None:
    first = Row("train", "a", "plain", timing(0.2, 0.2), peak_gib=1.0)
    second = Row("train", "a", "peer", timing(0.25, 0.25), remark="1 M parameters")
    other = Row("unet", "b", "plain", timing(2.0))
    assert markdown([row.as_dict() for row in (first, second, other)]).splitlines() == [
        "**train: a**",
        "",
        "| | median, ms | p20 to p80 | × first | GiB |",
        "|---|---:|---:|---:|---:|",
        "| plain | 200 | 200 to 200 | 5.00 | 1.00 |",
        "| peer | 250 | 250 to 250 | 4.00 |  |",
        "",
        "- peer: 1 M parameters",
        "",
        "**unet: b**",
        "",
        "| | median, s | × first |",
        "|---|---:|---:|",
        "| plain | 2.00 | 0.50 |",
    ]
