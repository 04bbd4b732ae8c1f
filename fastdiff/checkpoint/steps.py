"""The checkpoints of a run folder.

The checkpoint of step 500 is ``model000500.safetensors``, one ``ema_0.9999_000500.safetensors`` per EMA rate,
``opt000500.safetensors``, and ``manifest000500.json``, which is written last. The number counts completed updates.
A step that is being saved or deleted has a marker file ``.unfinished000500``.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from fastdiff.checkpoint.files import FORMAT, UNSIGNED_FORMAT, NewerFormat, read_metadata, refuse_newer, sha256
from fastdiff.runtime.files import abandoned, replacing, sync

_ANY = "*.safetensors"
_NAME = re.compile(r"(?P<kind>model|opt|ema_(?P<rate>[0-9.e-]+)_)(?P<step>\d{6,})\.safetensors")
_MANIFEST = re.compile(r"manifest(?P<step>\d{6,})\.json")
_NEXT = "next"
"""In a manifest: the file that takes the place of one, whose replacement was not completed."""
_MARK = re.compile(r"\.unfinished(?P<step>\d{6,})")


def model_path(run_dir: Path, step: int) -> Path:
    """The path of a step's raw weights."""
    return run_dir / f"model{step:06d}.safetensors"


def ema_path(run_dir: Path, rate: float, step: int) -> Path:
    """The path of a step's EMA weights."""
    return run_dir / f"ema_{rate}_{step:06d}.safetensors"


def optimizer_path(run_dir: Path, step: int) -> Path:
    """The path of a step's optimizer state."""
    return run_dir / f"opt{step:06d}.safetensors"


def manifest_path(run_dir: Path, step: int) -> Path:
    """The path of a step's manifest: the lengths and SHA-256 of its files. A step without one is not saved."""
    return run_dir / f"manifest{step:06d}.json"


def _mark_path(run_dir: Path, step: int) -> Path:
    return run_dir / f".unfinished{step:06d}"


def begin_step(run_dir: Path, step: int) -> None:
    """Mark a step as being saved, so that remove_leftovers recognises its files if the save does not finish."""
    if manifest_path(run_dir, step).exists():
        delete_step(run_dir, step)  # damaged: the old manifest must not describe the files that replace it
    run_dir.mkdir(parents=True, exist_ok=True)
    _mark_path(run_dir, step).touch()
    sync(run_dir)


def write_manifest(run_dir: Path, step: int, paths: Sequence[Path]) -> None:
    """Write a step's manifest, once its files are on the disk; OSError if that fails."""
    assert all(path.parent == run_dir and _NAME.fullmatch(path.name) for path in paths)
    _write_manifest(run_dir, step, {path.name: _described(path) for path in paths})
    _mark_path(run_dir, step).unlink(missing_ok=True)


def _write_manifest(run_dir: Path, step: int, files: dict[str, Any]) -> None:
    manifest = {"format": FORMAT, "step": step, "files": files}
    with replacing(manifest_path(run_dir, step)) as temporary:
        temporary.write_text(_text({**manifest, "sha256": _digest(manifest)}), encoding="utf-8")


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a checkpoint's file by the one that ``write`` writes to the temporary path that it is given.

    In a run folder, whose lease the caller holds, the step's manifest and best.json then describe the new file. A step
    is whole at every moment, also if the process is killed: meanwhile the manifest knows both files. OSError if a file
    cannot be written.
    """
    run_dir, match, before = path.parent, _NAME.fullmatch(path.name), _described(path)
    step = int(match["step"]) if match else 0
    manifest = manifest_path(run_dir, step)
    files = _read_manifest(manifest, step) if match and manifest.exists() else {}
    with replacing(path) as temporary:
        write(temporary)
        after = _described(temporary)
        if path.name in files:
            _write_manifest(run_dir, step, {**files, path.name: {**before, _NEXT: after}})
    if path.name in files:
        _write_manifest(run_dir, step, {**files, path.name: after})
    with suppress(OSError, ValueError, AttributeError, RecursionError):  # a damaged best.json is told where it is read
        best = json.loads(best_path(run_dir).read_text(encoding="utf-8"))
        if best.get("checkpoint") == path.name and best.get("sha256") == before["sha256"]:
            with replacing(best_path(run_dir)) as temporary:
                text = json.dumps({**best, "sha256": after["sha256"]}, indent=2)
                temporary.write_text(text + "\n", encoding="utf-8")


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _digest(manifest: dict[str, Any]) -> str:
    """The SHA-256 of the manifest itself, which it stores beside those of the files."""
    return hashlib.sha256(_text(manifest).encode()).hexdigest()


def saved_steps(run_dir: Path) -> list[int]:
    """The completely saved steps of a run, which have a manifest, oldest first."""
    return sorted(int(m["step"]) for p in run_dir.glob("manifest*.json") if (m := _MANIFEST.fullmatch(p.name)))


def weights_of(run_dir: Path, step: int) -> list[Path]:
    """The files with a step's weights: the raw ones, then the EMAs by rising rate."""
    return sorted(filter(_is_model, _files(run_dir, step)), key=_rank)


def holds_checkpoint(run_dir: Path) -> bool:
    """Whether the folder contains any checkpoint file or manifest."""
    return any(_NAME.fullmatch(p.name) or _MANIFEST.fullmatch(p.name) for p in run_dir.glob("*"))


def verify_step(run_dir: Path, step: int, offer: bool = False) -> None:
    """Verify every file of a step against its manifest; ValueError naming the first file that differs.

    With ``offer`` the error also names the newest earlier step that is intact.
    """
    with _offering_a_step_before(run_dir, step) if offer else nullcontext():
        for name, said in _read_manifest(manifest_path(run_dir, step), step).items():
            _verify(run_dir / name, said)


def verify_file(path: Path) -> bool:
    """Verify a file of a run folder against its step's manifest; ValueError if it differs from what was saved.

    Returns whether the file was checked. The error names the newest earlier step that is intact. A file without a
    manifest beside it is not checked here: it contains its own SHA-256.
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
    """Add the newest intact step before ``step`` to a ValueError."""
    try:
        yield
    except NewerFormat:
        raise
    except ValueError as error:
        remedy = "copy the step again, or name another checkpoint"
        for earlier in reversed([found for found in saved_steps(run_dir) if found < step]):
            with suppress(ValueError):
                verify_step(run_dir, earlier)
                remedy = f"step {earlier} is intact: name {run_dir}@{earlier}, or one of its files"
                break
        raise ValueError(f"{error}; {remedy}") from None


def _verify(path: Path, said: dict[str, Any]) -> None:
    try:
        length = path.stat().st_size
        if said.get(_NEXT) == _described(path):
            return
        if length != said["bytes"]:
            raise ValueError(f"{path} is damaged: it has {length} bytes instead of {said['bytes']}")
        if sha256(path) != said["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 does not match the saved one")
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
            whole &= type(said.get(_NEXT, {})) is dict
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: step {step} was not saved completely") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    refuse_newer(path, written)
    if not whole:
        raise ValueError(f"{path} is damaged")
    return files


def delete_step(run_dir: Path, step: int) -> None:
    """Delete every file of a step, the manifest first, so that the rest cannot pass for a complete checkpoint."""
    mark = _mark_path(run_dir, step)
    if manifest_path(run_dir, step).exists():
        manifest_path(run_dir, step).replace(mark)
    else:
        mark.touch()
    sync(run_dir)
    for path in _files(run_dir, step):
        path.unlink(missing_ok=True)
    mark.unlink(missing_ok=True)


def _files(run_dir: Path, step: int) -> list[Path]:
    return [p for p in run_dir.glob(_ANY) if (m := _NAME.fullmatch(p.name)) and int(m["step"]) == step]


def remove_leftovers(run_dir: Path) -> list[str]:
    """Remove what killed processes left in a run folder, whose lease the caller holds; returns the file names.

    These are temporary files, and the files of steps that were being saved or deleted. Files of a step with neither a
    manifest nor a marker are kept: someone put them there.
    """
    removed = [path for folder in (run_dir, run_dir / "previews") for path in abandoned(folder)]
    for path in removed:
        shutil.rmtree(path)
    for mark in run_dir.glob(".unfinished*"):
        match = _MARK.fullmatch(mark.name)
        if match and manifest_path(run_dir, int(match["step"])).exists():
            mark.unlink()  # completely saved, only the marker was left
        elif match:
            removed += _files(run_dir, int(match["step"]))
            delete_step(run_dir, int(match["step"]))
    return sorted(path.name for path in removed)


def find_checkpoint(
    place: str | os.PathLike[str] | None, runs: Path = Path("runs"), ema_rate: float | None = None
) -> Path:
    """Find the checkpoint file for ``place``: a file, a run folder (its newest step), ``run@step`` or ``run@best``.

    If ``place`` is None, the newest run of a diffusion model under ``runs`` is used.

    In a run folder ``ema_rate`` selects the EMA, and 0 the raw weights; the default is the highest rate, else the raw
    weights. ValueError if there is no such file, or if ``ema_rate`` is given and ``place`` is a file.
    """
    step = None
    if place is not None:
        place, step, best = _split(Path(os.path.expanduser(place)))
        if best is not None and ema_rate is None:
            return best
        if not place.exists():
            raise ValueError(f"{place} does not exist")
        if not place.is_dir():
            if ema_rate is not None:
                raise ValueError(f"ema_rate {ema_rate:g} selects a file in a run folder, and {place} is not a folder")
            return place
    found = [p for p in (place.glob(_ANY) if place is not None else runs.glob(f"*/{_ANY}")) if _is_model(p)]
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
    whole = set(saved_steps(newest))  # a killed process may leave a later step without its EMAs
    best = max([path for path in there if _rank(path)[0] in whole] or there, key=_rank)
    if ema_rate is None and _rank(best)[0] in whole:
        _refuse_lost(newest, best)
    return best


def _refuse_lost(run_dir: Path, best: Path) -> None:
    """ValueError if the manifest lists weights of a higher EMA rate than the folder contains."""
    step = _rank(best)[0]
    try:
        names = _read_manifest(manifest_path(run_dir, step), step)
    except ValueError:
        return  # reading the file reports the damaged manifest
    saved = [run_dir / name for name in names if _is_model(Path(name))]
    if saved and _rank(lost := max(saved, key=_rank)) > _rank(best):
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
        return folder, _rank(best)[0], best
    if not step.isdecimal():
        raise ValueError(f"{place}: {step!r} is not a step; name one, such as {folder}@500 or {folder}@best")
    return folder, int(step), None


def best_path(run_dir: Path) -> Path:
    """The file that says which checkpoint is the best; fastdiff evaluate checkpoints writes it."""
    return run_dir / "best.json"


def best_step(run_dir: Path) -> int | None:
    """The step of the best checkpoint; None if it is not known."""
    try:
        return _rank(_said_to_be_best(run_dir))[0]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _said_to_be_best(run_dir: Path) -> Path:
    """The file of the run folder that best.json names; ValueError and others if it is damaged."""
    said = json.loads(best_path(run_dir).read_text(encoding="utf-8"))
    name = said["checkpoint"]
    if not _is_model(Path(name)) or Path(name).name != name:
        raise ValueError
    path = run_dir / name
    if path.exists() and said.get("sha256", sha256(path)) != sha256(path):
        raise ValueError  # of another run that was here before
    return path


def _best(run_dir: Path, place: Path) -> Path:
    """The checkpoint that best.json names, for messages about ``place``; ValueError if there is none."""
    evaluate = f"fastdiff evaluate checkpoints {run_dir}"
    try:
        path = _said_to_be_best(run_dir)
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


def _is_model(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    return match is not None and match["kind"] != "opt"


def _is_classifier(path: Path) -> bool:
    try:
        return bool(read_metadata(path)["kind"] == "classifier")
    except (ValueError, OSError):
        return False  # reading the file reports what is wrong with it


def _rank(path: Path) -> tuple[int, float]:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match["step"]), float(match["rate"] or 0)
