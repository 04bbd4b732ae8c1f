"""The record of evaluations in a run folder: a line of metrics.jsonl for each, and the best checkpoint in best.json."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fastdiff.checkpoint import Checkpoint, sha256
from fastdiff.evaluation.extractors import Extractor
from fastdiff.evaluation.quality import Figure
from fastdiff.runtime.files import refuse_unwritable
from fastdiff.runtime.words import printable

RECORD = "metrics.jsonl"

_LARGEST = 1e30  # a figure beyond it is no one's


def about_checkpoint(loaded: Checkpoint, path: Path) -> dict[str, Any]:
    """What a record says of the checkpoint at ``path``."""
    about: dict[str, Any] = {
        "checkpoint": path.name,
        "step": loaded.step,
        # a bare state dict does not say whether it is an EMA
        "ema_rate": loaded.metadata.get("ema_rate", 0.0) if loaded.metadata else None,
        "sha256": sha256(path),
    }
    if (length := loaded.metadata.get("ema_length")) is not None:
        about |= {"ema_rate": None, "ema_length": length}
    return about


def record_of(
    figures: Sequence[Figure],
    samples: Mapping[str, Any],
    reference: Mapping[str, Any],
    extractor: Extractor,
    checkpoint: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An evaluation as values for JSON, with the figures' names; ``checkpoint`` is that of about_checkpoint."""
    values = {str(figure.key): figure.value for figure in figures}
    values |= {f"{f.key}_deviation": f.deviation for f in figures if f.deviation is not None}
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        **(checkpoint or {}),
        "samples": dict(samples),
        "reference": dict(reference),
        "extractor": {"name": extractor.name, "sha256": extractor.sha256},
        "figures": {name: value if math.isfinite(value) else None for name, value in values.items()},
        "names": {figure.key: figure.name for figure in figures},
    }


def append_record(out_dir: Path, record: Mapping[str, Any]) -> Path:
    """Add the record to metrics.jsonl of the folder; returns its path. OSError if it cannot be written."""
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / RECORD
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # a killed process left half a line
    with path.open("ab") as file:
        file.write(b"\n" * torn + (json.dumps(record, allow_nan=False) + "\n").encode())
    return path


def refuse_folder(out_dir: Path) -> None:
    """ValueError unless results can be written to the folder."""
    refuse_unwritable("out_dir", out_dir)
    if (out_dir / RECORD).exists() and not (out_dir / RECORD).is_file():
        raise ValueError(f"{out_dir / RECORD} is not a file: move it away, or name another folder with --out-dir")


def _is_sound(figures: object, names: object) -> bool:
    """Whether the figures of a record, and their names, are such as record_of writes."""
    if not (isinstance(figures, dict) and isinstance(names, dict) and names):
        return False
    numbers = [figures.get(key) for key in names]
    if not all(isinstance(value, float) and abs(value) < _LARGEST for value in numbers):
        return False
    return all(isinstance(name, str) and name == printable(name) for name in names.values())


def read_records(out_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, oldest first, without damaged lines such as the last one of a killed process."""
    path = out_dir / RECORD
    found = []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and _is_sound(record.get("figures"), record.get("names")):
            found.append(record)
    return found
