"""A metric over the length of the average of a run's weights (Karras et al. 2024, EDM2, figure 5)."""

from collections.abc import Collection, Sequence
from pathlib import Path

from fastdiff.checkpoint import Fit, average_path, refuse_length
from fastdiff.config import Metric
from fastdiff.config.base import tuple_of
from fastdiff.evaluation.checkpoints import Row, best_of
from fastdiff.evaluation.plot import save_lines

FOLDER = "lengths"
TABLE = "lengths.csv"
_USUAL = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25)


def lengths_to_measure(run_dir: Path, step: int, given: str | None) -> list[float]:
    """The lengths of a text such as "0.05,0.1", or usual ones; those that can be reconstructed, rising.

    ValueError if the run keeps no averages, or a given length cannot be reconstructed.
    """
    fit = Fit.of(run_dir, step)
    there = {one.length for one in fit.averages if one.step == step}
    if given is None:
        return sorted(there | {length for length in _USUAL if fit.reaches(length)})
    wanted = sorted(set(tuple_of(float, "lengths", given)))
    if not wanted:
        raise ValueError(f"lengths must be numbers separated by commas, not {given!r}")
    for length in wanted:
        refuse_length(length)
        if length not in there and not fit.reaches(length):
            raise ValueError(f"lengths {length:g}: step {step} of {run_dir} has {fit.reach()}: choose among these")
    return wanted


def keep_best(run_dir: Path, step: int, rows: Sequence[Row], metric: Metric, before: Collection[Path]) -> None:
    """Delete the averages that were reconstructed for the rows, all but the best one and those ``before`` them."""
    best = best_of(rows, metric)
    for row in rows:
        if row is not best and row.ema_length is not None:
            path = average_path(run_dir, row.ema_length, step)
            if path not in before:
                path.unlink(missing_ok=True)


def plot(path: Path, rows: Sequence[Row], metric: Metric) -> None:
    """Plot the metric over the length."""
    points = [(row.ema_length, row.figures[metric]) for row in rows if row.ema_length and metric in row.figures]
    save_lines(path, {f"step {rows[0].step:,}": points}, "length of the average (sigma_rel)", rows[0].names[metric])
