"""The ladder as a chart: the gain of each change, the peers, and the limit of the device."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.benchmarks.rows import refuse_unwritable_file
from fastdiff.checkpoint import replacing
from fastdiff.evaluation.plot import refuse_without_matplotlib

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

Row = Mapping[str, object]
Panel = Mapping[str, Row]
"""The candidates of one suite on one workload, by name."""

PANELS = {"unet": "UNet, forward", "train": "training step", "sample": "sampling"}
_OURS, _PLAIN, _PEER, _QUIET = "#2a6f97", "#a9b4bd", "#dd8a3c", "#6b7278"
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_FARTHEST = 1.8
"""Multiple of the longest bar beyond which a limit is printed at the edge: drawn, it would make the bars too short."""


def check_chart(path: Path) -> None:
    """Raise a ValueError if no chart can be written. Call it before anything is measured."""
    refuse_without_matplotlib("chart")
    if path.suffix.lower() != ".png":
        raise ValueError(f"chart {path} must end in .png")
    refuse_unwritable_file("chart", path)
    if path.exists():
        raise ValueError(f"chart {path} exists: name another file, or delete it")


def draw_ladder(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of PANELS' suites, ``Row.as_dict() | environment(device)``, as a PNG file.

    Each suite has one panel, all with the same rungs at the left. A bar is the speedup over the plain path, with
    whiskers from p20 to p80. A row that is not the first of its suite and has no gain over a rung below is a peer.
    Several workloads are stacked. ValueError if there is nothing to draw; OSError if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    blocks = _blocks(rows)
    if not blocks:
        raise ValueError(f"chart {path}: nothing to draw, no row of {', '.join(PANELS)} has a time")
    names = [_merged([list(panel) for panel in block.values()]) for block in blocks]
    heights = [0.27 * len(each) + 0.8 for each in names]
    columns = max(map(len, blocks))
    width = 2.4 + 2.75 * columns
    figure = Figure(figsize=(width, sum(heights) + 0.8), dpi=150, layout="constrained")
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    limited = [
        _draw_block(part, block, rungs, columns) for part, block, rungs in zip(parts, blocks, names, strict=True)
    ]
    peers = any(_is_peer(name, panel) for block in blocks for panel in block.values() for name in panel)
    kinds: list[Artist] = [Patch(color=_PLAIN, label="plain path"), Patch(color=_OURS, label="fastdiff")]
    kinds += [Patch(color=_PEER, label="others, as they come")] * peers
    kinds += [Line2D([], [], color="black", linewidth=1, linestyle="--", label="limit of this device")] * any(limited)
    figure.legend(handles=kinds, loc="outside upper center", ncols=len(kinds), fontsize=8, frameon=False)
    about = rows[-1]
    where = ", ".join(str(about[name]) for name in ("machine", "gpu") if about[name] != "none")
    notes = [
        f"Speedup over the plain path, median and p20 to p80 of {_rounds(rows)} rounds; grey: over the rung above."
    ]
    drawn = [row for block in blocks for panel in block.values() for row in panel.values()]
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in drawn))  # a file may hold several runs
    notes.append(f"{where}, torch {about['torch']}, commit {commits}, {about['date']}")
    footer = "\n".join(textwrap.fill(note, int(17 * width)) for note in notes)
    figure.supxlabel(footer, fontsize=7.5, color=_QUIET)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _draw_block(part: "SubFigure", block: Mapping[str, Panel], rungs: Sequence[str], columns: int) -> bool:
    """Draw one panel per suite, with the rungs at the left. Returns whether a panel draws a limit."""
    all_axes = part.subplots(1, columns, sharey=True, squeeze=False)[0]
    workloads = {suite: str(next(iter(panel.values()))["workload"]) for suite, panel in block.items()}
    common = min(workloads.values(), key=len)  # "..., batch 16" of "..., batch 16, 10 DDIM steps"
    part.suptitle(common, fontsize=9.5, fontweight="bold")
    limited = False
    for axes, (suite, panel) in zip(all_axes, block.items(), strict=False):
        particular = workloads[suite].removeprefix(common).removeprefix(", ")
        axes.set_title(textwrap.fill(", ".join(filter(None, (PANELS[suite], particular))), 40), fontsize=8.5)
        limited |= _draw_panel(axes, panel, rungs)
    for axes in all_axes[len(block) :]:
        axes.set_axis_off()
    all_axes[0].set_yticks(range(len(rungs)), rungs, fontsize=8.5)
    all_axes[0].set_ylim(len(rungs) + 0.1, -0.6)  # the first rung on top, and below the last one room for the limit
    return limited


def _draw_panel(axes: "Axes", panel: Panel, rungs: Sequence[str]) -> bool:
    timed = {name: row for name, row in panel.items() if _number(row, "speedup") > 0}
    longest = max(_number(row, "speedup_p80") for row in timed.values())
    for name, row in panel.items():
        y = rungs.index(name)
        if name not in timed:
            axes.text(0.03 * longest, y, "not timed", fontsize=7.5, va="center", color=_QUIET, style="italic")
            continue
        speedup, low, high, gain = (
            _number(row, column) for column in ("speedup", "speedup_p20", "speedup_p80", "gain")
        )
        color = _PLAIN if name == next(iter(panel)) else _PEER if _is_peer(name, panel) else _OURS
        axes.barh(y, speedup, height=0.68, color=color, zorder=2)
        if high > low:
            whiskers: Any = [[speedup - low], [high - speedup]]
            axes.errorbar(speedup, y, xerr=whiskers, color="#22303a", elinewidth=0.9, capsize=2, zorder=3)
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "zorder": 3, "bbox": _ON_WHITE}
        label = axes.annotate(f"{speedup:.2f}×", (high, y), (4, 0), fontsize=8, **beside)
        if gain > 0:
            words = f"{gain - 1:+.0%}".replace("-", "−")
            axes.annotate(words, (1, 0.5), (3, 0), xycoords=label, fontsize=7.5, color=_QUIET, **beside)
    ours = [row for name, row in timed.items() if not _is_peer(name, panel) and _number(row, "share_of_limit") > 0]
    # the farthest of the rungs' limits, that of the lowest precision
    limit = max((_number(row, "speedup") / _number(row, "share_of_limit") for row in ours), default=math.nan)
    near = limit <= _FARTHEST * longest
    if near:
        axes.axvline(limit, color="black", linewidth=1, linestyle="--", zorder=1)
        at = axes.get_xaxis_transform()
        axes.text(limit, 0.01, f"{limit:.1f}×", transform=at, fontsize=7.5, ha="center", va="bottom", bbox=_ON_WHITE)
    elif limit > 0:
        words = f"limit: {limit:.1f}× →"
        axes.text(0.99, 0.01, words, transform=axes.transAxes, fontsize=7.5, ha="right", va="bottom")
    axes.set_xlim(0, max(1.5 * longest, 1.08 * limit) if near else 1.5 * longest)
    axes.tick_params(axis="x", labelsize=7.5, length=2)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e3e6e8", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    return near


def _is_peer(name: str, panel: Panel) -> bool:
    """Whether the row has a time, is not the first, and has no gain over a rung below."""
    row = panel[name]
    return name != next(iter(panel)) and _number(row, "speedup") > 0 and math.isnan(_number(row, "gain"))


def _blocks(rows: Sequence[Row]) -> list[dict[str, Panel]]:
    """For each workload the suites, and for each suite the candidates. Suites without any time are left out.

    A suite's workload may be more specific: "..., batch 16, 10 DDIM steps" belongs to "..., batch 16".
    """
    panels: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        suite, workload = str(row["suite"]), str(row["workload"])
        panels.setdefault(suite, {}).setdefault(workload, {})[str(row["candidate"])] = row
    blocks: dict[str, dict[str, Panel]] = {}
    for suite in PANELS:
        for workload, panel in panels.get(suite, {}).items():
            if any(_number(row, "speedup") > 0 for row in panel.values()):
                base = next((of for of in blocks if f"{workload}, ".startswith(f"{of}, ")), workload)
                blocks.setdefault(base, {})[suite] = panel
    return list(blocks.values())


def _rounds(rows: Sequence[Row]) -> str:
    """The number of rounds of the drawn rows, or its range."""
    counts = {int(str(row["rounds"])) for row in rows if row["suite"] in PANELS} - {0}
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def _merged(lists: Sequence[Sequence[str]]) -> list[str]:
    """The names of all lists, each before the name that follows it in its list."""
    merged: list[str] = []
    for names in lists:
        place = len(merged)
        for name in reversed(names):
            if name not in merged:
                merged.insert(place, name)
            place = merged.index(name)
    return merged


def _number(row: Row, name: str) -> float:
    return float(str(row[name]))
