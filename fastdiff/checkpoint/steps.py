"""The checkpoints of a run folder.

The checkpoint of step 500 is ``model000500.safetensors``, one ``ema_0.9999_000500.safetensors`` per EMA rate, one
``average_0.1_000500.safetensors`` per length of a power-function average, ``opt000500.safetensors``, and
``manifest000500.json``, which is written last. The number counts completed updates.
A step that is being saved or deleted has a marker file ``.unfinished000500``.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from fastdiff.checkpoint.files import FORMAT, UNSIGNED_FORMAT, NewerFormat, refuse_newer, sha256
from fastdiff.runtime.files import abandoned, replacing, sync

ANY = "*.safetensors"
_NAME = re.compile(
    r"(?P<kind>model|opt|ema_(?P<rate>[0-9.e-]+)_|average_(?P<length>[0-9.e-]+)_)(?P<step>\d{6,})\.safetensors"
)
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


def average_path(run_dir: Path, length: float, step: int) -> Path:
    """The path of a step's power-function average of this relative length: a tracked or a reconstructed one."""
    return run_dir / f"average_{length}_{step:06d}.safetensors"


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
    files = read_manifest(manifest, step) if match and manifest.exists() else {}
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


def averages_of(run_dir: Path, step: int) -> dict[float, Path]:
    """The files with a step's power-function averages, tracked and reconstructed ones, by rising length."""
    names = ((path, _NAME.fullmatch(path.name)) for path in _files(run_dir, step))
    return dict(sorted((float(m["length"]), path) for path, m in names if m and m["length"]))


def weights_of(run_dir: Path, step: int) -> list[Path]:
    """The files with a step's weights: the raw ones, then the EMAs by rising rate."""
    return sorted(filter(is_model, _files(run_dir, step)), key=rank)


def holds_checkpoint(run_dir: Path) -> bool:
    """Whether the folder contains any checkpoint file or manifest."""
    return any(_NAME.fullmatch(p.name) or _MANIFEST.fullmatch(p.name) for p in run_dir.glob("*"))


def verify_step(run_dir: Path, step: int, offer: bool = False) -> None:
    """Verify every file of a step against its manifest; ValueError naming the first file that differs.

    With ``offer`` the error also names the newest earlier step that is intact.
    """
    with _offering_a_step_before(run_dir, step) if offer else nullcontext():
        for name, said in read_manifest(manifest_path(run_dir, step), step).items():
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
        said = read_manifest(manifest, int(match["step"])).get(path.name)
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
        if _NEXT in said and said[_NEXT] == _described(path):
            return
        if length != said["bytes"]:
            raise ValueError(f"{path} is damaged: it has {length} bytes instead of {said['bytes']}")
        if sha256(path) != said["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 does not match the saved one")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def read_manifest(path: Path, step: int) -> dict[str, Any]:
    """The lengths and SHA-256 of a step's files, by name; ValueError if the manifest is missing or damaged."""
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
    return [p for p in run_dir.glob(ANY) if (m := _NAME.fullmatch(p.name)) and int(m["step"]) == step]


def remove_leftovers(run_dir: Path) -> list[str]:
    """Remove what killed processes left in a run folder, whose lease the caller holds; returns the file names.

    These are temporary files, and the files of steps that were being saved or deleted. Files of a step with neither a
    manifest nor a marker are kept: someone put them there.
    """
    removed = [path for folder in (run_dir, run_dir / "previews", run_dir / "averages") for path in abandoned(folder)]
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


def best_path(run_dir: Path) -> Path:
    """The file that says which checkpoint is the best; fastdiff evaluate checkpoints writes it."""
    return run_dir / "best.json"


def best_step(run_dir: Path) -> int | None:
    """The step of the best checkpoint; None if it is not known."""
    try:
        return rank(said_to_be_best(run_dir))[0]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def said_to_be_best(run_dir: Path) -> Path:
    """The file of the run folder that best.json names; ValueError and others if it is damaged."""
    said = json.loads(best_path(run_dir).read_text(encoding="utf-8"))
    name = said["checkpoint"]
    if not is_model(Path(name)) or Path(name).name != name:
        raise ValueError
    path = run_dir / name
    if path.exists() and said.get("sha256", sha256(path)) != sha256(path):
        raise ValueError  # of another run that was here before
    return path


def is_model(path: Path) -> bool:
    """Whether a file's name is that of a step's raw or EMA weights."""
    match = _NAME.fullmatch(path.name)
    return match is not None and (match["kind"] == "model" or match["rate"] is not None)


def rank(path: Path) -> tuple[int, float]:
    """The step and the EMA rate, 0 for raw weights, of a file for which is_model holds."""
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match["step"]), float(match["rate"] or 0)
