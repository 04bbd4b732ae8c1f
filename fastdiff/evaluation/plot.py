"""Plots the terms of the bound."""

from pathlib import Path

import numpy as np

from fastdiff.evaluation.nll import Bound, Int64Array
from fastdiff.runtime.files import replacing

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
