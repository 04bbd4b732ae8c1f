"""Find the checkpoint that a file, a run folder, ``run@step`` or ``run@best`` names."""

import os
from pathlib import Path

from fastdiff.checkpoint.averages import reconstructed, refuse_length
from fastdiff.checkpoint.files import read_metadata
from fastdiff.checkpoint.steps import (
    ANY,
    best_path,
    is_model,
    manifest_path,
    rank,
    read_manifest,
    said_to_be_best,
    saved_steps,
)


def find_checkpoint(
    place: str | os.PathLike[str] | None,
    runs: Path = Path("runs"),
    ema_rate: float | None = None,
    ema_length: float | None = None,
) -> Path:
    """Find the checkpoint file for ``place``: a file, a run folder (its newest step), ``run@step`` or ``run@best``.

    If ``place`` is None, the newest run of a diffusion model under ``runs`` is used.

    In a run folder ``ema_rate`` selects the EMA, and 0 the raw weights; the default is the highest rate, else the raw
    weights. ``ema_length`` is the length of a power-function average instead: one that was tracked, or else it is
    reconstructed (see checkpoint/averages.py) and kept beside the step's other files, with which it is deleted.

    ValueError if there is no such file, or if ``ema_rate`` or ``ema_length`` is given and ``place`` is a file.
    """
    if ema_rate is not None and ema_length is not None:
        raise ValueError("ema_rate and ema_length both choose an average of the weights: give one of them")
    if ema_length is not None:
        refuse_length(ema_length)
    step = None
    if place is not None:
        place, step, best = _split(Path(os.path.expanduser(place)))
        if best is not None and ema_rate is None and ema_length is None:
            return best
        if not place.exists():
            raise ValueError(f"{place} does not exist")
        if not place.is_dir():
            for name, chosen in (("ema_rate", ema_rate), ("ema_length", ema_length)):
                if chosen is not None:
                    raise ValueError(f"{name} {chosen:g} selects a file in a run folder, and {place} is not a folder")
            return place
    found = [p for p in (place.glob(ANY) if place is not None else runs.glob(f"*/{ANY}")) if is_model(p)]
    if not found:
        if place is not None:
            raise ValueError(
                f"no checkpoint in {place}: train a model first (fastdiff train or train-classifier), or name another "
                "place"
            )
        raise ValueError(
            f"no checkpoint in any folder of {runs}/: train a model first (fastdiff train --data-dir DIR) or name a "
            "file"
        )
    found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    newest = found[0].parent
    if place is None:
        newest = next((path.parent for path in found if not _is_classifier(path)), newest)
    there = [path for path in found if path.parent == newest]
    if step is not None:
        steps = sorted({rank(path)[0] for path in there})
        there = [path for path in there if rank(path)[0] == step]
        if not there:
            raise ValueError(f"{newest} has no step {step}: it has {', '.join(map(str, steps[-10:]))}")
    if ema_rate is not None:
        rates = sorted({rank(path)[1] for path in there})
        there = [path for path in there if rank(path)[1] == ema_rate]
        if not there:
            known = ", ".join(f"{rate:g}" if rate else "raw" for rate in rates)
            raise ValueError(f"ema_rate {ema_rate:g}: {newest} has weights of the rates {known}")
    whole = set(saved_steps(newest))  # a killed process may leave a later step without its EMAs
    best = max([path for path in there if rank(path)[0] in whole] or there, key=rank)
    if ema_length is not None:
        return reconstructed(newest, rank(best)[0], ema_length)
    if ema_rate is None and rank(best)[0] in whole:
        _refuse_lost(newest, best)
    return best


def _refuse_lost(run_dir: Path, best: Path) -> None:
    """ValueError if the manifest lists weights of a higher EMA rate than the folder contains."""
    step = rank(best)[0]
    try:
        names = read_manifest(manifest_path(run_dir, step), step)
    except ValueError:
        return  # reading the file reports the damaged manifest
    saved = [run_dir / name for name in names if is_model(Path(name))]
    if saved and rank(lost := max(saved, key=rank)) > rank(best):
        raise ValueError(f"{lost} is missing: restore it, or choose another with --ema-rate, or name {best}")


def run_and_step(place: Path) -> tuple[Path, str] | None:
    """The folder and the text after the "@" of ``run@step``; None for any other name, or a path that exists."""
    name, at, step = place.name.rpartition("@")
    folder = place.parent / name
    return (folder, step) if at and not place.exists() and folder.is_dir() else None


def _split(place: Path) -> tuple[Path, int | None, Path | None]:
    """The run folder, its step and, for run@best, the best file; ``place`` itself and None if it names no step."""
    if (found := run_and_step(place)) is None:
        return place, None, None
    folder, step = found
    if step == "best":
        best = _best(folder, place)
        return folder, rank(best)[0], best
    if not step.isdecimal():
        raise ValueError(f"{place}: {step!r} is not a step; name one, such as {folder}@500 or {folder}@best")
    return folder, int(step), None


def _best(run_dir: Path, place: Path) -> Path:
    """The checkpoint that best.json names, for messages about ``place``; ValueError if there is none."""
    evaluate = f"fastdiff evaluate checkpoints {run_dir}"
    try:
        path = said_to_be_best(run_dir)
    except FileNotFoundError:
        raise ValueError(f"{place}: the best step is not known; {evaluate} finds it") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{best_path(run_dir)} is damaged, or about weights that are not there: {evaluate} writes it again"
        ) from None
    if not path.exists():
        raise ValueError(
            f"{place}: {path.name}, which was the best, is gone: {evaluate} finds the best of what is there"
        )
    return path


def _is_classifier(path: Path) -> bool:
    try:
        return bool(read_metadata(path)["kind"] == "classifier")
    except (ValueError, OSError):
        return False  # reading the file reports what is wrong with it
