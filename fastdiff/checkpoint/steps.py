"""The checkpoints of a run folder.

That of step 500 is ``model000500.safetensors``, one ``ema_0.9999_000500.safetensors`` per rate,
``opt000500.safetensors``, and ``manifest000500.json``, which is written last; the number counts completed updates.
A step that is being saved or deleted has a file ``.unfinished000500``.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from fastdiff.checkpoint.files import (
    FORMAT,
    UNSIGNED_FORMAT,
    NewerFormat,
    abandoned,
    refuse_newer,
    replacing,
    sha256,
    sync_folder,
)

_ANY = "*.safetensors"
_NAME = re.compile(r"(?P<kind>model|opt|ema_(?P<rate>[0-9.e-]+)_)(?P<step>\d{6,})\.safetensors")
_MANIFEST = re.compile(r"manifest(?P<step>\d{6,})\.json")
_MARK = re.compile(r"\.unfinished(?P<step>\d{6,})")


def model_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the raw weights of a step."""
    return run_dir / f"model{step:06d}.safetensors"


def ema_path(run_dir: Path, rate: float, step: int) -> Path:
    """Where a run keeps the averaged weights of a step."""
    return run_dir / f"ema_{rate}_{step:06d}.safetensors"


def optimizer_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the optimizer's state of a step."""
    return run_dir / f"opt{step:06d}.safetensors"


def manifest_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the lengths and SHA-256 of a step's files; only with it the step is saved."""
    return run_dir / f"manifest{step:06d}.json"


def _mark_path(run_dir: Path, step: int) -> Path:
    return run_dir / f".unfinished{step:06d}"


def begin_step(run_dir: Path, step: int) -> None:
    """Say that files of a step are about to be written, so that remove_leftovers knows them if it comes to no end."""
    if manifest_path(run_dir, step).exists():
        delete_step(run_dir, step)  # a damaged one: what replaces it must not be measured by its manifest
    run_dir.mkdir(parents=True, exist_ok=True)
    _mark_path(run_dir, step).touch()
    sync_folder(run_dir)


def write_manifest(run_dir: Path, step: int, paths: Sequence[Path]) -> None:
    """Declare the files of a step whole, which are on the disk by now; OSError where that cannot be written."""
    assert all(path.parent == run_dir and _NAME.fullmatch(path.name) for path in paths)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    manifest = {"format": FORMAT, "step": step, "files": files}
    with replacing(manifest_path(run_dir, step)) as temporary:
        temporary.write_text(_text({**manifest, "sha256": _digest(manifest)}), encoding="utf-8")
    _mark_path(run_dir, step).unlink(missing_ok=True)


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _digest(manifest: dict[str, Any]) -> str:
    """The SHA-256 of the manifest itself, which it holds beside those of the files."""
    return hashlib.sha256(_text(manifest).encode()).hexdigest()


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of a run that were saved to their end, oldest first: those with a manifest."""
    return sorted(int(m["step"]) for p in run_dir.glob("manifest*.json") if (m := _MANIFEST.fullmatch(p.name)))


def holds_checkpoint(run_dir: Path) -> bool:
    """Whether there is any file that a checkpoint is made of."""
    return any(_NAME.fullmatch(p.name) or _MANIFEST.fullmatch(p.name) for p in run_dir.glob("*"))


def verify_step(run_dir: Path, step: int, offer: bool = False) -> None:
    """Read every file of a step; ValueError, naming the first, where one is not what the manifest says.

    With ``offer`` the error names the newest step before it that is whole.
    """
    with _offering_a_step_before(run_dir, step) if offer else nullcontext():
        for name, said in _read_manifest(manifest_path(run_dir, step), step).items():
            _verify(run_dir / name, said)


def verify_file(path: Path) -> bool:
    """Whether a file of a run folder was compared with its step's manifest; ValueError where one is not what was saved.

    The error names the newest step before it that is whole. A file without a manifest beside it is not looked at: it
    holds a digest of itself.
    """
    match = _NAME.fullmatch(path.name)
    if match is None or not (manifest := manifest_path(path.parent, int(match["step"]))).exists():
        return False
    with _offering_a_step_before(path.parent, int(match["step"])):
        said = _read_manifest(manifest, int(match["step"])).get(path.name)
        if said is not None:
            _verify(path, said)
    return said is not None


@contextmanager
def _offering_a_step_before(run_dir: Path, step: int) -> Iterator[None]:
    """Add to a ValueError the newest step before ``step`` that is whole."""
    try:
        yield
    except NewerFormat:
        raise
    except ValueError as error:
        remedy = "copy the step again, or name another checkpoint"
        for earlier in reversed([found for found in saved_steps(run_dir) if found < step]):
            with suppress(ValueError):
                verify_step(run_dir, earlier)
                remedy = f"step {earlier} is whole: name {run_dir}@{earlier}, or a file of it"
                break
        raise ValueError(f"{error}; {remedy}") from None


def _verify(path: Path, said: dict[str, Any]) -> None:
    try:
        length = path.stat().st_size
        if length != said["bytes"]:
            raise ValueError(f"{path} is damaged: it has {length} bytes, {said['bytes']} were saved")
        if sha256(path) != said["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of what was saved")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def _read_manifest(path: Path, step: int) -> dict[str, Any]:
    written = ""
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        written = str(manifest["format"])
        files: dict[str, Any] = manifest["files"]
        whole = text == _text(manifest) and manifest["step"] == step and len(files) > 0
        if written == FORMAT:
            whole &= manifest.pop("sha256") == _digest(manifest)
        else:
            whole &= written == UNSIGNED_FORMAT
        for name, said in files.items():
            whole &= not {"/", "\\"} & set(name) and type(said["bytes"]) is int and type(said["sha256"]) is str
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: step {step} was not saved to its end") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    refuse_newer(path, written)
    if not whole:
        raise ValueError(f"{path} is damaged")
    return files


def delete_step(run_dir: Path, step: int) -> None:
    """Delete every file of a step, the manifest first: what is left cannot be taken for a whole checkpoint."""
    mark = _mark_path(run_dir, step)
    if manifest_path(run_dir, step).exists():
        manifest_path(run_dir, step).replace(mark)
    else:
        mark.touch()
    sync_folder(run_dir)
    for path in _files(run_dir, step):
        path.unlink(missing_ok=True)
    mark.unlink(missing_ok=True)


def _files(run_dir: Path, step: int) -> list[Path]:
    return [p for p in run_dir.glob(_ANY) if (m := _NAME.fullmatch(p.name)) and int(m["step"]) == step]


def remove_leftovers(run_dir: Path) -> list[str]:
    """Remove what killed processes left in a run folder, whose lease the caller holds; returns the names.

    That is temporary files, and the files of steps that were being saved or deleted. Files of steps that have neither
    a manifest nor the mark of having been begun are not ours to delete: someone put them there.
    """
    removed = [path for folder in (run_dir, run_dir / "previews") for path in abandoned(folder)]
    for path in removed:
        shutil.rmtree(path)
    for mark in run_dir.glob(".unfinished*"):
        match = _MARK.fullmatch(mark.name)
        if match and manifest_path(run_dir, int(match["step"])).exists():
            mark.unlink()  # saved to its end, all but the mark
        elif match:
            removed += _files(run_dir, int(match["step"]))
            delete_step(run_dir, int(match["step"]))
    return sorted(path.name for path in removed)


def find_checkpoint(
    place: str | os.PathLike[str] | None, runs: Path = Path("runs"), ema_rate: float | None = None
) -> Path:
    """The file that is meant by ``place``: a file, a run folder (its newest step) or ``run@step``.

    Without a place it is in the newest run under ``runs``.

    In a run folder the average of ``ema_rate`` is taken, 0 being the raw weights; by default that of the highest rate,
    else the raw weights. ValueError where there is none, or ``place`` is a file and leaves no choice.
    """
    step = None
    if place is not None:
        place, step = _split(Path(os.path.expanduser(place)))
        if not place.exists():
            raise ValueError(f"{place} does not exist")
        if not place.is_dir():
            if ema_rate is not None:
                raise ValueError(f"ema_rate {ema_rate:g} chooses among the files of a run folder, and {place} is none")
            return place
    found = [p for p in (place.glob(_ANY) if place is not None else runs.glob(f"*/{_ANY}")) if _is_model(p)]
    if not found:
        where = f"in {place}" if place is not None else f"in any folder of {runs}/"
        raise ValueError(f"no checkpoint {where}: train a model first (fastdiff train --data-dir DIR) or name a file")
    newest = max(found, key=lambda path: path.stat().st_mtime_ns).parent
    there = [path for path in found if path.parent == newest]
    if step is not None:
        steps = sorted({_rank(path)[0] for path in there})
        there = [path for path in there if _rank(path)[0] == step]
        if not there:
            raise ValueError(f"{newest} has no step {step}: it has {', '.join(map(str, steps[-10:]))}")
    if ema_rate is not None:
        rates = sorted({_rank(path)[1] for path in there})
        there = [path for path in there if _rank(path)[1] == ema_rate]
        if not there:
            known = ", ".join(f"{rate:g}" if rate else "raw" for rate in rates)
            raise ValueError(f"ema_rate {ema_rate:g}: {newest} has weights of the rates {known}")
    whole = set(saved_steps(newest))  # a killed process may leave a later step without its averages
    best = max([path for path in there if _rank(path)[0] in whole] or there, key=_rank)
    if ema_rate is None and _rank(best)[0] in whole:
        _refuse_lost(newest, best)
    return best


def _refuse_lost(run_dir: Path, best: Path) -> None:
    """ValueError where the manifest names weights of a higher rate than those that are there."""
    step = _rank(best)[0]
    try:
        names = _read_manifest(manifest_path(run_dir, step), step)
    except ValueError:
        return  # whoever reads the file says so
    saved = [run_dir / name for name in names if _is_model(Path(name))]
    if saved and _rank(lost := max(saved, key=_rank)) > _rank(best):
        raise ValueError(f"{lost} is missing: restore it, or choose by --ema-rate, or name {best}")


def run_and_step(place: Path) -> tuple[Path, str] | None:
    """The folder and the text behind the "@" of ``run@step``; None where that is no such name, or is there itself."""
    name, at, step = place.name.rpartition("@")
    folder = place.parent / name
    return (folder, step) if at and not place.exists() and folder.is_dir() else None


def _split(place: Path) -> tuple[Path, int | None]:
    """A run folder and its step; the place itself and None where it names no step."""
    if (found := run_and_step(place)) is None:
        return place, None
    folder, step = found
    if step == "best":
        raise ValueError(f"{place}: nothing says yet which step is best; name a step, such as {folder}@500")
    if not step.isdecimal():
        raise ValueError(f"{place}: {step!r} is no step; name one, such as {folder}@500")
    return folder, int(step)


def _is_model(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    return match is not None and match["kind"] != "opt"


def _rank(path: Path) -> tuple[int, float]:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match["step"]), float(match["rate"] or 0)
