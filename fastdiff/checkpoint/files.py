"""Single files: they appear whole or not at all, and say what they are."""

import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.interop import openai

FORMAT = "fastdiff-2"
UNSIGNED_FORMAT = "fastdiff-1"
"""Files of this one carry no digest of themselves."""
_FORMATS = re.compile(r"fastdiff-(\d+)")
_DESCRIBED = {"model_config", "diffusion_config"}
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'("%b":"\{\\"sha256\\": \\")([0-9a-f]{64})' % FORMAT.encode())  # JSON in a string of JSON
_CHUNK = 2**20
_CLOCK_TICK = 3  # seconds; the coarsest clock has two
_known_hashes: dict[tuple[object, ...], str] = {}
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
_being_written: set[str] = set()  # names, which are random: one folder has many paths
_lock = threading.Lock()  # for who looks: a folder that is there and of this process is in the set


class NewerFormat(ValueError):
    """A file is whole, but a later version's."""


def read_tensors(path: Path, kind: str, verified: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a fastdiff file of the kind "model" or "optimizer"; ValueError where it is not one.

    The file must have the SHA-256 that it says of itself, which covers every byte of it (but for files of a version
    before that), unless it is ``verified`` already.
    """
    with _opened(path, kind, verified) as (file, metadata):
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118  # not a dict


def read_metadata(path: Path, kind: str) -> dict[str, Any]:
    """The metadata alone, of a file that was verified; errors as read_tensors raises them."""
    with _opened(path, kind, verified=True) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: Path, kind: str, verified: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            for key in raw:
                refuse_newer(path, key)
            metadata = json.loads(raw.get(FORMAT, raw.get(UNSIGNED_FORMAT, "{}")))
            if (
                not isinstance(metadata, dict)
                or "kind" not in metadata
                or (kind == "model" and not metadata.keys() >= _DESCRIBED and metadata["kind"] == kind)
            ):
                raise ValueError(f"{path} is a safetensors file, but not one of fastdiff's")
            said = metadata.pop("sha256", None)
            if FORMAT in raw and not verified and said != _own_digest(path):
                raise ValueError(f"{path} is damaged: its SHA-256 is not that of what was saved; copy it again")
            if metadata["kind"] != kind:
                other = (
                    "the model*.safetensors or ema_*.safetensors file beside it" if kind == "model" else "the opt* file"
                )
                raise ValueError(f"{path} is a file of the kind {metadata['kind']}, not {kind}: name {other}")
            yield file, metadata
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({openai.first_line(error)})") from None


def refuse_newer(path: Path, written: str) -> None:
    """NewerFormat where the format that ``path`` was written in is one of a later version."""
    match, ours = _FORMATS.fullmatch(written), _FORMATS.fullmatch(FORMAT)
    if match and ours and int(match[1]) > int(ours[1]):
        raise NewerFormat(f"{path} was made by a newer fastdiff: upgrade this one")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write tensors and metadata as one safetensors file, whole or not at all."""
    packed = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            described = {"sha256": _NO_DIGEST, **metadata} | {
                "sha256": _NO_DIGEST
            }  # in the first place, whatever comes
            save_file(packed, temporary, metadata={FORMAT: json.dumps(described)})
            _sign(temporary)
        except SafetensorError as error:  # a full disk, too, is one of these
            raise OSError(f"{path} cannot be written: {openai.first_line(error)}") from error
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, on the disk of ``path``; on success it takes path's place, on failure it is gone.

    The file is on the disk before it is renamed, and has the mode that the umask gives any new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, which holds the temporary files of the libraries that write to it, too: safetensors'
    # have names that nobody could tell from others', and a process that is killed leaves them.
    with _lock:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        _being_written.add(Path(folder.name).name)
    try:
        with folder:
            temporary = Path(folder.name) / path.name
            temporary.touch()
            mode = temporary.stat().st_mode  # of any new file; safetensors' own is its owner's alone
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with _lock:
            _being_written.discard(Path(folder.name).name)


def abandoned(folder: Path, of: str | None = None) -> list[Path]:
    """The temporary folders in ``folder``, or those for the file called ``of``, that this process is not writing to."""
    with _lock:
        found = [p for p in folder.glob(".*.tmp") if _TEMPORARY.fullmatch(p.name) and p.name not in _being_written]
    return [p for p in found if of is None or p.name[: -len(".12345678.tmp")] == f".{of}"]


def refuse_unwritable(option: str, wanted: Path) -> None:
    """ValueError, naming the option, where a folder is not there and cannot be made, or may not be written to."""
    folder = wanted
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {wanted} cannot be written: {folder} is not a folder that you may write to")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits; a process reads a file once for it, until the file changes."""
    return _cached("sha256", path, lambda: _hash(path))


def _own_digest(path: Path) -> str:
    """The SHA-256 of a safetensors file in whose header the digest itself stands as zeros."""
    return _cached("own digest", path, lambda: _hash(path, *_signed_header(path)))


def _cached(what: str, path: Path, compute: Callable[[], str]) -> str:
    status = path.stat()
    key = (what, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key not in _known_hashes:
        found = compute()
        if abs(time.time() - max(status.st_mtime, status.st_ctime)) < _CLOCK_TICK:
            return found  # what changes it within a tick of the file system's clock would not show
        _known_hashes[key] = found
    return _known_hashes[key]


def _hash(path: Path, header: bytes = b"", instead: bytes = b"") -> str:
    """The SHA-256 of a file that begins with ``header``, as if it began with ``instead``."""
    digest = hashlib.sha256(instead)
    with path.open("rb") as file:
        file.seek(len(header))
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _signed_header(path: Path) -> tuple[bytes, bytes]:
    """The beginning of a safetensors file, up to the tensors, and the same with zeros for the digest."""
    with path.open("rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
    found = _DIGEST.findall(header)
    if len(found) != 1:
        raise ValueError(f"{path} is damaged: its header does not say what its SHA-256 is")
    return header, _DIGEST.sub(rb"\g<1>" + _NO_DIGEST.encode(), header)


def _sign(path: Path) -> None:
    """Put the digest of a new file in the place of its zeros."""
    header, unsigned = _signed_header(path)
    assert header == unsigned
    signed = _DIGEST.sub(rb"\g<1>" + _hash(path).encode(), header)
    with path.open("rb+") as file:
        file.write(signed)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows, where a rename needs no such thing
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
