"""The ladder as a chart: the gain of each change, the peers, and the limit of the device."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.benchmarks.rows import Values, number, refuse_unwritable_file
from fastdiff.evaluation.plot import refuse_without_matplotlib
from fastdiff.runtime.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Mapping[str, Values]
"""The candidates of one suite on one workload, by name."""

PANELS = {"unet": "UNet, forward", "train": "training step", "sample": "sampling"}
_PLAIN, _OURS, _PEER, _LIMIT = "plain path", "fastdiff", "others, as they come", "limit of this device"
_COLORS = {_PLAIN: "#a9b4bd", _OURS: "#2a6f97", _PEER: "#dd8a3c"}
_QUIET = "#6b7278"
_DASHED: Any = {"color": "black", "linewidth": 1, "linestyle": "--", "label": _LIMIT}
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


def draw_ladder(rows: Sequence[Values], path: Path) -> None:
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
    rungs = [_merged(block.values()) for block in blocks.values()]
    heights = [0.27 * len(names) + 0.8 for names in rungs]
    columns = max(map(len, blocks.values()))
    width = 2.4 + 2.75 * columns
    figure = Figure(figsize=(width, sum(heights) + 0.8), dpi=150, layout="constrained")
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, names, (workload, block) in zip(parts, rungs, blocks.items(), strict=True):
        part.suptitle(workload, fontsize=9.5, fontweight="bold")
        all_axes = part.subplots(1, columns, sharey=True, squeeze=False)[0]
        for axes, (suite, panel) in zip(all_axes, block.items(), strict=False):
            particular = str(next(iter(panel.values()))["workload"]).removeprefix(workload).removeprefix(", ")
            axes.set_title(textwrap.fill(", ".join(filter(None, (PANELS[suite], particular))), 40), fontsize=8.5)
            _draw_panel(axes, panel, names)
        for axes in all_axes[len(block) :]:
            axes.set_axis_off()
        all_axes[0].set_yticks(range(len(names)), names, fontsize=8.5)
        all_axes[0].set_ylim(len(names) + 0.1, -0.6)  # the first rung on top, and below the last one room for the limit
    labels = {label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]}
    handles = [*(Patch(color=color, label=kind) for kind, color in _COLORS.items()), Line2D([], [], **_DASHED)]
    handles = [handle for handle in handles if handle.get_label() in labels]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    drawn = [row for block in blocks.values() for panel in block.values() for row in panel.values()]
    counts = {int(number(row, "rounds")) for row in drawn} - {0}
    rounds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    about = rows[-1]
    where = ", ".join(str(about[name]) for name in ("machine", "gpu") if about[name] != "none")
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in drawn))  # a file may hold several runs
    notes = (
        f"Speedup over the plain path, median and p20 to p80 of {rounds} rounds; grey: over the rung above.",
        f"{where}, torch {about['torch']}, commit {commits}, {about['date']}",
    )
    footer = "\n".join(textwrap.fill(note, int(17 * width)) for note in notes)
    figure.supxlabel(footer, fontsize=7.5, color=_QUIET)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _draw_panel(axes: "Axes", panel: Panel, rungs: Sequence[str]) -> None:
    timed = {name: row for name, row in panel.items() if number(row, "speedup") > 0}
    longest = max(number(row, "speedup_p80") for row in timed.values())
    limits = []
    for name, row in panel.items():
        y = rungs.index(name)
        if name not in timed:
            axes.text(0.03 * longest, y, "not timed", fontsize=7.5, va="center", color=_QUIET, style="italic")
            continue
        columns = ("speedup", "speedup_p20", "speedup_p80", "gain", "share_of_limit")
        speedup, low, high, gain, share = (number(row, column) for column in columns)
        kind = _PLAIN if name == next(iter(panel)) else _PEER if math.isnan(gain) else _OURS
        axes.barh(y, speedup, height=0.68, color=_COLORS[kind], label=kind, zorder=2)
        if high > low:
            whiskers: Any = [[speedup - low], [high - speedup]]
            axes.errorbar(speedup, y, xerr=whiskers, color="#22303a", elinewidth=0.9, capsize=2, zorder=3)
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "zorder": 3, "bbox": _ON_WHITE}
        label = axes.annotate(f"{speedup:.2f}×", (high, y), (4, 0), fontsize=8, **beside)
        if gain > 0:
            words = f"{gain - 1:+.0%}".replace("-", "−")
            axes.annotate(words, (1, 0.5), (3, 0), xycoords=label, fontsize=7.5, color=_QUIET, **beside)
        if kind != _PEER and share > 0:
            limits.append(speedup / share)
    limit = max(limits, default=math.nan)  # the farthest of the rungs' limits, that of the lowest precision
    near = limit <= _FARTHEST * longest
    if near:
        axes.axvline(limit, zorder=1, **_DASHED)
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


def _blocks(rows: Sequence[Values]) -> dict[str, dict[str, Panel]]:
    """For each workload the suites, and for each suite the candidates. Suites without any time are left out.

    A suite's workload may be more specific: "..., batch 16, 10 DDIM steps" belongs to "..., batch 16".
    """
    panels: dict[tuple[object, str], dict[str, Values]] = {}
    for row in rows:
        panels.setdefault((row["suite"], str(row["workload"])), {})[str(row["candidate"])] = row
    blocks: dict[str, dict[str, Panel]] = {}
    for suite in PANELS:
        for (of, workload), panel in panels.items():
            if of == suite and any(number(row, "speedup") > 0 for row in panel.values()):
                base = next((known for known in blocks if f"{workload}, ".startswith(f"{known}, ")), workload)
                blocks.setdefault(base, {})[suite] = panel
    return blocks


def _merged(lists: Iterable[Iterable[str]]) -> list[str]:
    """The names of all lists, each before the name that follows it in its list."""
    merged: list[str] = []
    for names in lists:
        place = len(merged)
        for name in reversed(list(names)):
            if name not in merged:
                merged.insert(place, name)
            place = merged.index(name)
    return merged
