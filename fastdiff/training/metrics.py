"""What a run reports: sums kept on the device, read when a line is due, written as CSV and JSON lines."""

import csv
import errno
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoint import replacing
from fastdiff.training.trackers import Sink

TERMS = ("loss", "mse", "vb")
COLUMNS = (
    "step",
    "samples",
    *(name for term in TERMS for name in (term, *(f"{term}_q{q}" for q in range(4)))),
    "grad_norm",
    "skipped",
    "lg_loss_scale",
    "lr",
    "images_per_s",
    "mfu",
    "data_wait",
    "memory_gib",
)

_KINDS: dict[str, type[int] | type[float]] = {"step": int, "samples": int, "skipped": int}


class LossSums:
    """Means of the loss terms since the last reading, over all timesteps and over each quarter of them (_q0 to _q3).

    Adding never waits for the device; reading does, once. Sums are float64 and their order is fixed, so that the same
    run adds up to the same bits. A term that is not finite is left out.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(8 * len(TERMS) + 3, dtype=torch.float64, device=device)
        # Of this process's samples: (term, total or count, quarter). Of the updates, alike on every process: the sum
        # of their gradients' norms, how many they are, and how many were skipped.
        self._terms, self._updates = self._sums[:-3].view(-1, 2, 4), self._sums[-3:]
        self._quarters = torch.arange(4, device=device)[:, None]

    def add(self, terms: Mapping[str, Tensor], t: Tensor, num_timesteps: int) -> None:
        """Take in per-sample terms (N,), the loss at least, at timesteps t (N,)."""
        absent = torch.full_like(terms["loss"], math.nan)
        values = torch.stack([terms.get(term, absent).detach() for term in TERMS]).double()[:, None]  # (terms, 1, N)
        counted = values.isfinite() & (self._quarters == 4 * t // num_timesteps)  # (terms, 4, N)
        self._terms[:, 0] += torch.where(counted, values, 0).sum(-1)
        self._terms[:, 1] += counted.sum(-1)

    def add_grad_norm(self, norm: Tensor, skipped: Tensor) -> None:
        """Take in the gradient's norm of one update, and whether the update was skipped: both 0-d, on the device."""
        kept = skipped == 0
        self._updates += torch.stack([torch.where(kept, norm, 0).double(), kept.double(), (~kept).double()])

    def read(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means, and start again. A quarter without a sample is left out; loss and grad_norm of nothing are NaN.

        ``all_reduce`` returns the sum over the processes of the one tensor that it is given.
        """
        terms = all_reduce(self._terms.clone()) if all_reduce else self._terms
        values = torch.cat([terms.flatten(), self._updates]).cpu()
        self._sums.zero_()
        means = {"loss": math.nan}
        for term, (totals, counts) in zip(TERMS, values[:-3].view(-1, 2, 4), strict=True):
            if counts.any():
                means[term] = float(totals.sum() / counts.sum())
            means |= {f"{term}_q{q}": float(totals[q] / counts[q]) for q in range(4) if counts[q]}
        norms, updates, skipped = values[-3:].tolist()
        return means | {"grad_norm": norms / updates if updates else math.nan, "skipped": int(skipped)}

    def state(self) -> Tensor:
        """The sums of this process since the last reading, (n,) float64 on the device, as a copy."""
        return self._sums.clone()

    def load_state(self, states: Tensor, rank: int = 0, processes: int = 1) -> None:
        """Go on from the states of all processes, (their number, n), as one of perhaps another number of them.

        Then the first one takes in the sums of all their samples; what is said of the updates is everybody's.
        """
        terms, updates = states[:, :-3], states[0, -3:]
        if len(states) != processes:
            terms = torch.cat([terms.sum(0, keepdim=True), terms.new_zeros(processes - 1, terms.shape[1])])
        self._sums.copy_(torch.cat([terms[rank], updates]))


class ProgressFiles(Sink):
    """progress.jsonl, the history of a run, and progress.csv, the same as a table.

    On resume the lines past ``step`` are dropped, so that no step stands there twice: each file is replaced as a whole,
    or left alone where nothing changes; OSError, naming the file, where that cannot be. A line that cannot be written
    later on, to a disk that is full, is one warning of ``log``, and waits for the next.
    """

    def __init__(self, run_dir: Path, step: int, log: Callable[[str], None]) -> None:
        self._log = log
        self._warned = False
        self._csv, self._jsonl = run_dir / "progress.csv", run_dir / "progress.jsonl"
        if self._csv.exists() and not self._jsonl.exists():  # improved-diffusion's, of a run that goes on in its folder
            names = (f"progress.original{n and f'.{n}'}.csv" for n in itertools.chain([""], itertools.count(2)))
            kept = self._csv.rename(next(path for name in names if not (path := run_dir / name).exists()))
            log(f"{self._csv} is not of this run: it is {kept.name} from now on")
        history = [(line, row) for line, row in _history(self._jsonl) if row["step"] <= step]
        _make(self._jsonl, "".join(f"{line}\n" for line, _ in history))
        # The table is made anew from the history: one of another version has other columns.
        _make(self._csv, _table((row for _, row in history), header=True))
        self._waiting = {self._jsonl: "", self._csv: ""}

    def write(self, row: Mapping[str, float]) -> None:
        """Add a line."""
        # JSON has no NaN or infinity: null says the same and every reader takes it.
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._waiting[self._jsonl] += json.dumps(finite) + "\n"
        self._waiting[self._csv] += _table([_numbers(finite)])
        for path, text in self._waiting.items():
            try:
                _append(path, text)
            except OSError as error:
                if not self._warned:
                    self._log(f"warning: {error}; its lines wait until it can")
                self._warned = True
            else:
                self._waiting[path] = ""


def _history(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """The lines of an earlier run; what is none of ours, like the last line of a killed run, is left out."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
            yield line, _numbers(row) | {"step": int(row["step"])}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue


def _numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    """What of a JSON row has a column, as numbers."""
    known = {name: row[name] for name in COLUMNS if name in row}
    return {name: math.nan if v is None else _KINDS.get(name, float)(v) for name, v in known.items()}


def _table(rows: Iterable[Mapping[str, float]], header: bool = False) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _make(path: Path, text: str) -> None:
    """Let the file hold this text, at no moment less, and do not touch it where it does."""
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
