"""Training metrics: sums on the device, read once per log interval, written as CSV and JSON lines."""

import csv
import errno
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.runtime.files import replacing
from fastdiff.training.trackers import Sink


def columns(*terms: str) -> tuple[str, ...]:
    """The columns of progress.csv for these terms."""
    by_quarter = (name for term in terms for name in (term, *(f"{term}_q{q}" for q in range(4))))
    speed = ("images_per_s", "mfu", "data_wait", "memory_gib")
    return ("step", "samples", *by_quarter, "grad_norm", "skipped", "lg_loss_scale", "lr", *speed)


TERMS = ("loss", "mse", "vb")
COLUMNS = columns(*TERMS, *(f"val_{term}" for term in TERMS))
"""Those of a diffusion model; val_ are of held-out images."""
SHARES = ("acc1", "acc5")
"""Terms that count images, not weighted by the timestep sampler as losses are.

With loss-second-moment their mean is therefore over the timesteps as that sampler draws them, more often those of large
losses, and differs from the accuracy at uniform timesteps; that of held-out images (val_) is at uniform ones."""

_KINDS: dict[str, type[int] | type[float]] = {"step": int, "samples": int, "skipped": int}


class LossSums:
    """Means of the loss terms since the last reading, over all timesteps and over each quarter of them (_q0 to _q3).

    Adding needs no host sync; reading needs one. Sums are float64 in a fixed order, so that the same run gives the same
    bits. Terms that are not finite are left out.
    """

    def __init__(self, device: torch.device, terms: Sequence[str] = TERMS) -> None:
        self._names = terms
        self._sums = torch.zeros(8 * len(terms) + 3, dtype=torch.float64, device=device)
        # _terms, of this process's samples: (term, total or count, quarter). _updates, equal on every process: the sum
        # of the gradient norms, the number of updates kept, and the number skipped.
        self._terms, self._updates = self._sums[:-3].view(-1, 2, 4), self._sums[-3:]
        self._quarters = torch.arange(4, device=device)[:, None]

    def add(self, terms: Mapping[str, Tensor], t: Tensor, num_timesteps: int) -> None:
        """Add per-sample terms (N,), which include the loss, at timesteps t (N,)."""
        absent = torch.full_like(terms["loss"], math.nan)
        values = torch.stack([terms.get(term, absent).detach() for term in self._names]).double()[
            :, None
        ]  # (terms, 1, N)
        counted = values.isfinite() & (self._quarters == 4 * t // num_timesteps)  # (terms, 4, N)
        self._terms[:, 0] += torch.where(counted, values, 0).sum(-1)
        self._terms[:, 1] += counted.sum(-1)

    def add_grad_norm(self, norm: Tensor, skipped: Tensor) -> None:
        """Add one update's gradient norm, and whether the update was skipped: both 0-d, on the device."""
        kept = skipped == 0
        self._updates += torch.stack([torch.where(kept, norm, 0).double(), kept.double(), (~kept).double()])

    def read(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the means and reset. Quarters without samples are left out; without data loss and grad_norm are NaN.

        ``all_reduce`` returns the sum of a tensor over all processes.
        """
        terms = all_reduce(self._terms.clone()) if all_reduce else self._terms
        values = torch.cat([terms.flatten(), self._updates]).cpu()
        self._sums.zero_()
        means = {"loss": math.nan}
        for term, (totals, counts) in zip(self._names, values[:-3].view(-1, 2, 4), strict=True):
            if counts.any():
                means[term] = float(totals.sum() / counts.sum())
            means |= {f"{term}_q{q}": float(totals[q] / counts[q]) for q in range(4) if counts[q]}
        norms, updates, skipped = values[-3:].tolist()
        return means | {"grad_norm": norms / updates if updates else math.nan, "skipped": int(skipped)}

    def state(self) -> Tensor:
        """The sums of this process since the last reading, (n,) float64 on the device, as a copy."""
        return self._sums.clone()

    def load_state(self, states: Tensor, rank: int = 0, processes: int = 1) -> None:
        """Resume from the states of all processes, (processes then, n); ``processes`` is their number now.

        If the number has changed, rank 0 takes the sums over all samples. Every process takes the update counts.
        """
        terms, updates = states[:, :-3], states[0, -3:]
        if len(states) != processes:
            terms = torch.cat([terms.sum(0, keepdim=True), terms.new_zeros(processes - 1, terms.shape[1])])
        self._sums.copy_(torch.cat([terms[rank], updates]))


class ProgressFiles(Sink):
    """progress.jsonl, the history of a run, and progress.csv, the same history as a table.

    On resume the lines after ``step`` are dropped, so that no step appears twice. Each file is replaced atomically, or
    left alone if nothing changes; OSError, naming the file, if that fails. Later, a line that cannot be written because
    the disk is full is kept and written with the next one; ``log`` receives one warning.
    """

    def __init__(self, run_dir: Path, step: int, log: Callable[[str], None], columns: Sequence[str] = COLUMNS) -> None:
        self._log = log
        self._columns = columns
        self._warned = False
        self._csv, self._jsonl = run_dir / "progress.csv", run_dir / "progress.jsonl"
        if self._csv.exists() and not self._jsonl.exists():  # from an improved-diffusion run continued here
            names = (f"progress.original{n and f'.{n}'}.csv" for n in itertools.chain([""], itertools.count(2)))
            kept = self._csv.rename(next(path for name in names if not (path := run_dir / name).exists()))
            log(f"{self._csv} is not from this run: renamed to {kept.name}")
        history = [(line, row) for line, row in _history(self._jsonl, columns) if row["step"] <= step]
        _make(self._jsonl, "".join(f"{line}\n" for line, _ in history))
        # Rebuild the table from the history: another version's table has other columns.
        _make(self._csv, _table(columns, (row for _, row in history), header=True))
        self._waiting = {self._jsonl: "", self._csv: ""}

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row to both files."""
        # JSON has no NaN or infinity: every reader accepts null.
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._waiting[self._jsonl] += json.dumps(finite) + "\n"
        self._waiting[self._csv] += _table(self._columns, [_numbers(finite, self._columns)])
        for path, text in self._waiting.items():
            try:
                _append(path, text)
            except OSError as error:
                if not self._warned:
                    self._log(f"warning: {error}; its lines are kept until it can")
                self._warned = True
            else:
                self._waiting[path] = ""


def _history(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """The lines of an earlier run, without invalid ones such as the truncated last line of a killed run."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
            yield line, _numbers(row, columns) | {"step": int(row["step"])}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue


def _numbers(row: Mapping[str, float | None], columns: Sequence[str]) -> dict[str, float]:
    """The values of a JSON row that have a column, as numbers."""
    known = {name: row[name] for name in columns if name in row}
    return {name: math.nan if v is None else _KINDS.get(name, float)(v) for name, v in known.items()}


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, float]], header: bool = False) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _make(path: Path, text: str) -> None:
    """Atomically replace the file's contents with ``text``, unless they are equal."""
    content = text.encode()
    if not path.exists() or path.read_bytes() != content:
        with _named(path), replacing(path) as temporary:
            temporary.write_bytes(content)


def _append(path: Path, text: str) -> None:
    content = text.encode()
    with _named(path), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)  # no half lines
            raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
