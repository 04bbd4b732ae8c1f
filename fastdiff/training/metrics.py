"""What a run reports: sums kept on the device, read when a line is due, written as CSV, JSON lines and TensorBoard."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

TERMS = ("loss", "mse", "vb")
COLUMNS = (
    "step",
    "samples",
    *(name for term in TERMS for name in (term, *(f"{term}_q{q}" for q in range(4)))),
    "grad_norm",
    "lg_loss_scale",
    "lr",
    "images_per_s",
    "data_wait",
)

_KINDS: dict[str, type[int] | type[float]] = {"step": int, "samples": int}


class LossSums:
    """Means of the loss terms since the last reading: over all timesteps, and over each quarter of them (_q0 to _q3).

    Adding never waits for the device; reading does, once.
    """

    def __init__(self, device: torch.device) -> None:
        self._totals = {term: torch.zeros(4, device=device) for term in TERMS}
        self._counts = {term: torch.zeros(4, device=device) for term in TERMS}
        self._grad_norm = torch.zeros((), device=device)
        self._updates = torch.zeros((), device=device)

    def add(self, terms: Mapping[str, Tensor], t: Tensor, num_timesteps: int) -> None:
        """Take in per-sample terms (N,) at timesteps t (N,)."""
        quarter = 4 * t // num_timesteps
        for term in TERMS:
            if term in terms:
                self._totals[term].index_add_(0, quarter, terms[term].detach().float())
                self._counts[term].index_add_(0, quarter, torch.ones_like(terms[term], dtype=torch.float32))

    def add_grad_norm(self, norm: Tensor) -> None:
        """Take in the gradient's norm of one update; one that is not finite belongs to a skipped update."""
        finite = norm.isfinite()
        self._grad_norm += torch.where(finite, norm, 0)
        self._updates += finite

    def read(self) -> dict[str, float]:
        """The means, and start again. A quarter without a sample is left out."""
        norms = torch.stack([self._grad_norm, self._updates]).repeat(2)  # (4,), as wide as the rest
        values = torch.stack([*self._totals.values(), *self._counts.values(), norms]).cpu().double()
        means: dict[str, float] = {}
        for i, term in enumerate(TERMS):
            totals, counts = values[i], values[i + len(TERMS)]
            if counts.sum() > 0:
                means[term] = float(totals.sum() / counts.sum())
            for q in range(4):
                if counts[q] > 0:
                    means[f"{term}_q{q}"] = float(totals[q] / counts[q])
        norm, updates = values[-1][:2].tolist()
        means["grad_norm"] = norm / updates if updates else math.nan
        for tensor in (*self._totals.values(), *self._counts.values(), self._grad_norm, self._updates):
            tensor.zero_()
        return means


class ProgressFiles:
    """progress.csv and progress.jsonl in a run folder, and TensorBoard's event files if asked for.

    On resume the lines past ``step`` are dropped, so that no step stands there twice.
    """

    def __init__(self, run_dir: Path, step: int, tensorboard: bool) -> None:
        csv_path, jsonl_path = run_dir / "progress.csv", run_dir / "progress.jsonl"
        self._tensorboard = _summary_writer(run_dir) if tensorboard else None  # before anything is opened for writing
        rows = [row for row in _rows(jsonl_path) if row["step"] <= step]
        self._jsonl = jsonl_path.open("w", encoding="utf-8")
        self._csv_file = csv_path.open("w", encoding="utf-8", newline="")
        self._csv = csv.DictWriter(self._csv_file, COLUMNS, restval="")
        self._csv.writeheader()
        for row in rows:
            self._write_lines(row)
        self._flush()

    def write(self, row: Mapping[str, float]) -> None:
        """Add a line."""
        self._write_lines(row)
        self._flush()
        if self._tensorboard is not None:
            for name, value in row.items():
                self._tensorboard.add_scalar(name, value, row["step"])

    def _write_lines(self, row: Mapping[str, float]) -> None:
        self._csv.writerow(row)
        # JSON has no NaN: null says the same and every reader takes it
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._jsonl.write(json.dumps(finite) + "\n")

    def _flush(self) -> None:
        self._csv_file.flush()
        self._jsonl.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._csv_file.close()
        self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _rows(path: Path) -> list[dict[str, float]]:
    """The lines of an earlier run; what is none of ours, like the last line of a killed run, is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                known = [name for name in COLUMNS if name in row]
                values = {name: math.nan if row[name] is None else _KINDS.get(name, float)(row[name]) for name in known}
                rows.append(values | {"step": int(row["step"])})
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return rows


def _summary_writer(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard is not installed: pip install tensorboard") from None
    return SummaryWriter(run_dir / "tensorboard")
