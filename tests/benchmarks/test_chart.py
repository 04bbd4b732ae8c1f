"""The chart of the ladder: refused before anything is measured, and every figure in its place."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fastdiff.benchmarks.chart import check_chart, draw_ladder
from fastdiff.benchmarks.harness import Timing
from fastdiff.benchmarks.rows import Row

ABOUT = {"date": "2026-11-23", "machine": "a CPU, 2 threads", "gpu": "none", "torch": "2.13.0", "commit": "1234567"}
PLAIN = (1.0, 1.1, 1.2)


def ladder(suite: str, workload: str = "32 pixels", limit: float = 0.4, **rungs: float) -> list[dict[str, object]]:
    """Rungs by how many times as fast as plain they are; a peer's name ends in _peer, one that is wrong has a 0."""
    rows = [Row(suite, workload, "plain", below := Timing("plain", PLAIN, PLAIN), limit_s=limit)]
    for name, speedup in rungs.items():
        if not speedup:
            rows.append(Row(suite, workload, name, None, remark="wrong"))
            continue
        timing = Timing(name, [s / speedup * pace for s, pace in zip(PLAIN, (1, 0.9, 1.1), strict=True)], PLAIN)
        rows.append(Row(suite, workload, name, timing, None if name.endswith("peer") else below, limit_s=limit))
    return [row.as_dict() | ABOUT for row in rows]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Draws rows, and gives the figure as it was written."""
    figures: list[Figure] = []
    write = FigureCanvasAgg.print_png

    def print_png(self: FigureCanvasAgg, path: Path) -> None:
        figures.append(self.figure)
        write(self, path)

    def draw(rows: list[dict[str, object]]) -> Figure:
        draw_ladder(rows, tmp_path / "chart.png")
        with Image.open(tmp_path / "chart.png") as image:
            assert (image.format, image.size[0] > 500) == ("PNG", True)
            assert len(image.convert("RGB").getcolors(2**24) or ()) > 10
        return figures[-1]

    monkeypatch.setattr(FigureCanvasAgg, "print_png", print_png)
    return draw


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.axison]


def words(axes: Axes) -> set[str]:
    return {text.get_text() for text in axes.texts}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_panel_a_suite_and_the_same_rungs_beside_all(drawn: Any) -> None:
    unet = ladder("unet", bf16=1.5, compiled=2.0, a_peer=0.8)
    train = ladder("train", bf16=1.2, fused=1.4, compiled=1.8, trainer=1.7, a_peer=0.9)
    kernels = ladder("kernels", triton=3.0)
    figure = drawn(kernels + train + unet)
    assert [axes.get_title() for axes in panels(figure)] == ["UNet, forward", "training step"]
    labels = [label.get_text() for label in panels(figure)[0].get_yticklabels()]
    assert labels == ["plain", "bf16", "fused", "compiled", "trainer", "a_peer"]
    bars = [[bar.get_y() + bar.get_height() / 2 for bar in axes.patches] for axes in panels(figure)]
    assert bars == [pytest.approx([0, 1, 3, 5]), pytest.approx([0, 1, 2, 3, 4, 5])]
    assert "32 pixels" in {part.get_suptitle() for part in figure.subfigs}
    assert legend(figure) == ["plain path", "fastdiff", "others, as they come", "limit of this device"]
    footer = figure.get_supxlabel()
    assert all(word in footer for word in ("a CPU, 2 threads", "torch 2.13.0", "commit 1234567"))
    assert "none" not in footer
    assert "median and p20 to p80 of 3 rounds" in footer


def test_a_rung_says_how_fast_and_what_it_gained(drawn: Any) -> None:
    (axes,) = panels(drawn(ladder("train", bf16=1.5, slower=0.9, wrong=0, a_peer=0.8)))
    # the middle of three rounds, whose paces are 1, 0.9 and 1.1
    assert words(axes) >= {"1.00×", "1.50×", "+50%", "0.90×", "−10%", "0.80×", "not timed"}
    assert "−20%" not in words(axes)  # a peer is no rung
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert len(set(colors)) == 3
    assert colors[1] == colors[2]


@pytest.mark.parametrize(("limit", "where"), [(0.55, 2.0), (0.011, None), (math.nan, None)])
def test_the_limit_is_where_a_bar_of_all_that_the_device_can_do_would_end(
    limit: float, where: float | None, drawn: Any
) -> None:
    figure = drawn(ladder("unet", limit=limit, ours=1.5))
    (axes,) = panels(figure)
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [float(line.get_xdata()[0]) for line in dashed] == (
        [] if where is None else [pytest.approx(where, rel=1e-3)]
    )
    assert ("limit: 100.0× →" in words(axes)) == (limit == 0.011)
    assert ("limit of this device" in legend(figure)) == (where is not None)
    assert axes.get_xlim()[1] < 5


def test_workloads_stand_below_each_other(drawn: Any) -> None:
    figure = drawn(
        ladder("unet", "batch 1", ours=2.0) + ladder("unet", "batch 64", ours=3.0) + ladder("train", "batch 1")
    )
    assert [part.get_suptitle() for part in figure.subfigs] == ["batch 1", "batch 64"]
    assert [len([axes for axes in part.axes if axes.axison]) for part in figure.subfigs] == [2, 1]


def test_workloads_of_suites_are_paired_by_what_they_are(drawn: Any) -> None:
    unet = ladder("unet", "batch 1", plain=0)[1:] + ladder("unet", "batch 16", ours=2.0)  # nothing timed at batch 1
    sample = [row for size in (1, 16) for row in ladder("sample", f"batch {size}, 10 steps", ours=3.0)]
    figure = drawn(unet + sample)
    found = {part.get_suptitle(): len([axes for axes in part.axes if axes.axison]) for part in figure.subfigs}
    assert found == {"batch 16": 2, "batch 1, 10 steps": 1}


@pytest.mark.parametrize(
    ("workloads", "titles"),
    [
        (("batch 1", "batch 1, 10 steps"), ["batch 1", "UNet, forward", "sampling, 10 steps"]),
        (("batch 1", "batch 16"), ["batch 1", "UNet, forward", "sampling"]),
    ],
)
def test_what_is_common_is_said_once(workloads: tuple[str, str], titles: list[str], drawn: Any) -> None:
    unet, sample = (ladder(suite, of, ours=2.0) for suite, of in zip(("unet", "sample"), workloads, strict=True))
    figure = drawn(unet + sample)
    assert [figure.subfigs[0].get_suptitle(), *(axes.get_title() for axes in panels(figure))] == titles


def test_rows_read_from_a_file_are_drawn(drawn: Any) -> None:
    rows = [{name: str(value) for name, value in row.items()} for row in ladder("unet", ours=2.0)]
    assert "2.00×" in words(*panels(drawn(rows)))


def test_the_commits_are_those_of_what_is_drawn(drawn: Any) -> None:
    unet, train = ladder("unet", ours=2.0), [row | {"commit": "later"} for row in ladder("train", ours=2.0)]
    figure = drawn([*unet, *train, *(row | {"commit": "other"} for row in ladder("growth"))])
    assert f"commit {ABOUT['commit']}, later, " in " ".join(figure.get_supxlabel().split())


@pytest.mark.parametrize("rows", [[], ladder("kernels", triton=2.0), ladder("unet", wrong=0)[1:]])
def test_nothing_to_draw(rows: list[dict[str, object]], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^chart \S*a\.png: nothing to draw, no row of unet, train, sample has a time$"
    ):
        draw_ladder(rows, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.pdf", r"a\.pdf must end in \.png"),
        ("folder.png", r"folder\.png is a folder: name a file"),
        ("old.png", r"old\.png exists: name another file"),
        ("old.png/a.png", r"\S*old\.png cannot be written: .* is not a folder"),
        ("none.png", r"none\.png is a broken link: name another file, or delete it"),
    ],
)
def test_a_chart_that_cannot_be_written(name: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "old.png").touch()
    (tmp_path / "none.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=rf"^chart \S*{remedy}"):
        check_chart(tmp_path / name)
    check_chart(tmp_path / "deep" / "new.PNG")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = r"^chart needs matplotlib: pip install matplotlib \(extra 'plot'\), or leave --chart out$"
    with pytest.raises(ValueError, match=missing):
        check_chart(Path("a.png"))
