"""The checkpoints of a run compared: the metrics of each, as a table, and the best one."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.checkpoint import Checkpoint, best_path, ema_path, model_path, saved_steps, sha256, weights_of
from fastdiff.config import Metric
from fastdiff.evaluation.extractors import Extractor
from fastdiff.evaluation.image_sets import ImageSet, ReferenceStatistics
from fastdiff.evaluation.metrics import NEAREST_OF_DENSITY
from fastdiff.evaluation.plot import save_lines
from fastdiff.evaluation.quality import Comparison, Reference, shown
from fastdiff.evaluation.records import about_checkpoint, append_record, read_records, record_of
from fastdiff.evaluation.session import Session
from fastdiff.runtime.files import replacing

TABLE = "checkpoints.csv"


@dataclass(frozen=True)
class Row:
    """The figures of one checkpoint by key, and their names."""

    checkpoint: str
    step: int
    ema_rate: float
    figures: Mapping[str, float]
    names: Mapping[str, str]
    ema_length: float | None = None

    @property
    def weights(self) -> str:
        """Which weights they are, in words."""
        if self.ema_length is not None:
            return f"length {self.ema_length:g}"
        return f"EMA {self.ema_rate:g}" if self.ema_rate else "raw weights"


def checkpoints_of(run_dir: Path, ema_rate: float | None = None) -> list[Path]:
    """The files to compare, by step: of each step its EMAs, or its raw weights if it has none.

    ``ema_rate`` takes only the EMA of this rate, and 0 the raw weights. ValueError if there is none.
    """
    found: list[Path] = []
    for step in saved_steps(run_dir):
        there, raw = weights_of(run_dir, step), model_path(run_dir, step)
        if ema_rate is None:
            found += [path for path in there if path != raw] or there
        else:
            found += [path for path in there if path == (ema_path(run_dir, ema_rate, step) if ema_rate else raw)]
    if not found and (inside := sorted(str(path.parent) for path in run_dir.glob("*/manifest*.json"))):
        raise ValueError(f"{run_dir} is no run; it holds {', '.join(dict.fromkeys(inside))}: name one of them")
    if not found:
        which = "" if ema_rate is None else f" of the rate {ema_rate:g}" if ema_rate else " with raw weights"
        raise ValueError(f"{run_dir} has no checkpoint{which} to compare: name a run folder of fastdiff train")
    return found


def refuse_metric(
    metric: Metric, extractor: Extractor, reference: ImageSet | ReferenceStatistics, num_samples: int
) -> None:
    """ValueError if comparisons of so many samples with this reference and extractor do not have the figure."""
    known = {Metric.FD}
    images = reference if isinstance(reference, ImageSet) else reference.images
    if images is not None:
        known.add(Metric.KD)
        if min(num_samples, len(images)) > NEAREST_OF_DENSITY:
            known |= {Metric.PRECISION, Metric.RECALL, Metric.DENSITY, Metric.COVERAGE}
    if extractor.gives_spatial and (isinstance(reference, ImageSet) or reference.spatial is not None):
        known.add(Metric.SFID)
    if extractor.gives_probabilities and not extractor.family:
        known.add(Metric.SCORE)
    if metric not in known:
        there = ", ".join(key for key in Metric if key in known)
        raise ValueError(f"metric {metric}: with this extractor, reference and num_samples there is {there}")


class Comparing:
    """Measures the checkpoints of a run, and knows those that are in the record of an earlier call.

    ``reference`` is extracted when the first checkpoint needs it. The samples of the best checkpoint stay in
    ``out_dir``, others that are drawn here do not.
    """

    def __init__(
        self,
        session: Session,
        comparison: Comparison,
        reference: ImageSet | ReferenceStatistics,
        out_dir: Path,
        metric: Metric,
    ) -> None:
        self._session, self._comparison, self._known, self._out_dir = session, comparison, reference, out_dir
        self._metric = metric
        self._reference: Reference | None = None
        self._extracted = False
        self._records = session.world.from_main(lambda: read_records(out_dir))
        self._best: tuple[Row, Path, bool] | None = None

    def measure(self, loaded: Checkpoint, path: Path) -> Row | int:
        """The figures of the checkpoint at ``path``, or the exit status of a signal that came meanwhile. Collective."""
        session, world = self._session, self._session.world
        about = world.from_main(lambda: about_checkpoint(loaded, path))
        drawing = session.drawing(loaded, path, self._out_dir)
        extractor = {"name": session.extractor.name, "sha256": session.extractor.sha256}
        told = (about["sha256"], drawing.origin, self._known.about, extractor)
        if (record := next(filter(lambda record: _told(record) == told, reversed(self._records)), None)) is None:
            if status := drawing.run():
                return status
            if not self._extracted:
                self._reference, self._extracted = self._comparison.reference(self._known), True
            figures = self._comparison.figures(
                session.images(drawing.path, loaded.model_config.image_size), self._reference
            )

            def recorded() -> dict[str, Any]:
                found = record_of(figures, drawing.origin, self._known.about, session.extractor, about)
                append_record(self._out_dir, found)
                return found

            record = world.from_main(recorded)
        rate, length = about["ema_rate"] or 0.0, about.get("ema_length")
        row = Row(path.name, about["step"], rate, record["figures"], record["names"], length)
        self._keep_best(row, drawing.path, drawn=not drawing.there)
        return row

    def _keep_best(self, row: Row, samples: Path, drawn: bool) -> None:
        """Delete the samples of the checkpoint that is not the best so far, if they were drawn here."""
        other: tuple[Row, Path, bool] | None = (row, samples, drawn)
        if self._best is None or best_of([self._best[0], row], self._metric) is row:
            self._best, other = (row, samples, drawn), self._best
        if other is not None and other[2] and self._session.world.main:
            for path in (other[1], other[1].with_suffix(".png")):
                path.unlink(missing_ok=True)


def _told(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides whether a record's figures are those that would be found again."""
    return tuple(record.get(name) for name in ("sha256", "samples", "reference", "extractor"))


def best_of(rows: Sequence[Row], metric: Metric) -> Row:
    """The row with the best value of the metric, the earliest of equal ones; ValueError if no row has one."""
    known = [row for row in rows if isinstance(row.figures.get(metric), (int, float))]
    if not known:
        there = ", ".join(sorted({key for row in rows for key in row.figures if key in tuple(Metric)}))
        raise ValueError(f"metric {metric}: these figures are {there or 'none'}; choose one of them")
    return (min if metric.lower_is_better else max)(known, key=lambda row: row.figures[metric])


def write_best(run_dir: Path, best: Row, metric: Metric) -> Path:
    """Write which checkpoint is the best of the run, for run@best; returns the file's path."""
    path = best_path(run_dir)
    if not (run_dir / best.checkpoint).exists():
        raise ValueError(f"{run_dir / best.checkpoint}, the best, was deleted meanwhile: run the command again")
    said: dict[str, Any] = {
        "checkpoint": best.checkpoint,
        "step": best.step,
        "ema_rate": best.ema_rate,
        "metric": metric,
    }
    said["sha256"] = sha256(run_dir / best.checkpoint)
    with replacing(path) as temporary:
        text = json.dumps({**said, "name": best.names[metric], "value": best.figures[metric]}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV, atomically."""
    text = io.StringIO()
    keys = [
        key for key in (*Metric, "kd_deviation", "inception_score_deviation") if any(key in row.figures for row in rows)
    ]
    writer = csv.writer(text, lineterminator="\n")
    chosen = "ema_rate" if rows[0].ema_length is None else "ema_length"
    writer.writerow(("checkpoint", "step", chosen, *keys))
    for row in rows:
        writer.writerow((row.checkpoint, row.step, getattr(row, chosen), *(row.figures.get(key, "") for key in keys)))
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def table(rows: Sequence[Row], best: Row) -> list[str]:
    """The rows as lines of aligned columns, the best one marked, below the names of the figures."""
    keys = [key for key in Metric if any(key in row.figures for row in rows)]
    titles = [rows[0].names.get(key, key).partition(" (")[0] for key in keys]
    cells = [["step", "weights", *titles, ""]]
    for row in rows:
        values = (shown(key, value) if (value := row.figures.get(key)) is not None else "" for key in keys)
        cells.append([str(row.step), row.weights, *values, "best" if row is best else ""])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    named = next(name for key in keys if (name := rows[0].names.get(key)))
    return [f"figures: {named.partition(' (')[2].removesuffix(')')}", *lines]


def plot(path: Path, rows: Sequence[Row], metric: Metric) -> None:
    """Plot the metric over the steps, a line for each average."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.figures.get(metric) is not None:
            lines.setdefault(row.weights, []).append((row.step, row.figures[metric]))
    save_lines(path, lines, "step", rows[0].names[metric])
