"""Plots of an evaluation: the terms of the bound, metrics over steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastdiff.evaluation.nll import Bound, Int64Array
from fastdiff.runtime.files import refuse_unwritable, replacing

_PANELS = {
    "vb": "variational bound (bits/dim)",
    "mse": "mean squared error of the noise",
    "xstart_mse": "mean squared error of $x_0$",
}


def refuse_without_matplotlib(option: str = "plot") -> None:
    """ValueError, naming the extra, if matplotlib is not installed; ``option`` is the flag that needs it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{option} needs matplotlib: pip install matplotlib (extra 'plot'), or leave --{option} out"
        ) from None


def refuse_plot(path: Path, overwrite: bool = False, kinds: Sequence[str] = (".png",)) -> None:
    """ValueError unless a plot can be written to ``path``, which must be new unless it may ``overwrite`` a file.

    ``kinds`` are the suffixes that it may have.
    """
    refuse_without_matplotlib()
    if path.suffix.lower() not in kinds:
        raise ValueError(f"plot {path} must end in {' or '.join(kinds)}")
    if path.is_dir():
        raise ValueError(f"plot {path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"plot {path} exists: name another file, or use --overwrite")
    refuse_unwritable("plot", path.parent)


def save_plot(path: Path, bound: Bound, timesteps: Int64Array, title: str) -> None:
    """Plot the three terms against ``timesteps`` (T,), t = T-1 first, as a PNG; OSError if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for axes, (name, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        values = bound.terms[name]
        axes.plot(timesteps, values, color="#2a6f97", linewidth=1.2, marker="." if len(values) <= 50 else None)
        if (np.isfinite(values) & (values > 0)).any():  # terms near t = 0 are many times the others
            axes.set_yscale("log")
        axes.set_title(label, fontsize="medium")
        axes.set_xlabel("timestep")
        axes.grid(color="#d9d9d9", linewidth=0.6)
        axes.set_axisbelow(True)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def save_lines(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> None:
    """Plot lines by name, each of points (x, y), as a PNG or SVG; OSError if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker=".")
    axes.set_xlabel(x)
    axes.set_ylabel(y, fontsize="small")
    axes.legend(frameon=False)
    axes.grid(color="#d9d9d9", linewidth=0.6)
    axes.set_axisbelow(True)
    with replacing(path) as temporary:
        if path.suffix.lower() == ".svg":
            FigureCanvasSVG(figure).print_svg(temporary)
        else:
            FigureCanvasAgg(figure).print_png(temporary)
