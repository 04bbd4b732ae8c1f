"""Single checkpoint files: tensors, with metadata that describes them."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.runtime.files import refuse_other_kind, replacing
from fastdiff.runtime.words import first_line

FORMAT = "fastdiff-2"
UNSIGNED_FORMAT = "fastdiff-1"
"""Files of this format contain no SHA-256 of themselves."""
_FORMATS = re.compile(r"fastdiff-(\d+)")
_DESCRIBED = {
    "model": {"model_config", "diffusion_config"},
    "classifier": {"classifier_config", "diffusion_config"},
    "optimizer": set[str](),
    "averages": {"ema_lengths"},
}
"""What the metadata of each kind of file contain."""
_CALLED = {"model": "a diffusion model", "classifier": "a classifier"}
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'("%b":"\{\\"sha256\\": \\")([0-9a-f]{64})' % FORMAT.encode())  # JSON inside a JSON string
_CHUNK = 2**20
_CLOCK_TICK = 3  # seconds; the coarsest file-system clock ticks every two
_known_hashes: dict[tuple[object, ...], str] = {}


class NewerFormat(ValueError):
    """The file is intact, but a later version of fastdiff wrote it."""


def read_tensors(path: Path, kind: str, verified: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a fastdiff file of ``kind`` "model", "classifier", "optimizer" or "averages".

    ValueError if it is not one.

    Unless the file is ``verified`` already, its SHA-256 must match the one in its header, which covers every byte.
    Files of the older format have no SHA-256 and are not checked.
    """
    with _opened(path, kind, verified) as (file, metadata):
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118  # not a dict


def read_metadata(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The metadata alone, of a file of any kind or the given one that is verified already; errors as read_tensors'."""
    with _opened(path, kind, verified=True) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: Path, kind: str | None, verified: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            for key in raw:
                refuse_newer(path, key)
            metadata = json.loads(raw.get(FORMAT, raw.get(UNSIGNED_FORMAT, "{}")))
            if (
                not isinstance(metadata, dict)
                or "kind" not in metadata
                or not metadata.keys() >= _DESCRIBED.get(str(metadata["kind"]), set())
            ):
                raise ValueError(f"{path} is a safetensors file, but not a fastdiff checkpoint")
            said = metadata.pop("sha256", None)
            if FORMAT in raw and not verified and said != _own_digest(path):
                raise ValueError(f"{path} is damaged: its SHA-256 does not match the saved one; copy it again")
            if kind is not None and metadata["kind"] != kind:
                _refuse_kind(path, metadata["kind"], kind)
            yield file, metadata
    except (SafetensorError, json.JSONDecodeError) as error:
        refuse_other_kind(path)
        raise ValueError(f"{path} is damaged or incomplete ({first_line(error, limit=300)})") from None


def _refuse_kind(path: Path, found: object, wanted: str) -> NoReturn:
    if str(found) in _CALLED and wanted in _CALLED:
        use = f" (--classifier {path} guides a model)" if found == "classifier" else ""
        raise ValueError(f"{path} is {_CALLED[str(found)]}, not {_CALLED[wanted]}{use}")
    models = "the model*.safetensors or ema_*.safetensors file beside it"
    other = "the opt* file" if wanted == "optimizer" else models
    raise ValueError(f"{path} is a file of the kind {found}, not {wanted}: name {other}")


def refuse_newer(path: Path, written: str) -> None:
    """NewerFormat if ``written``, the format of the file ``path``, is a later version's."""
    match, ours = _FORMATS.fullmatch(written), _FORMATS.fullmatch(FORMAT)
    if match and ours and int(match[1]) > int(ours[1]):
        raise NewerFormat(f"{path} was made by a newer fastdiff: upgrade this one")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write tensors and metadata atomically as one safetensors file."""
    packed = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            # always the first key, even if metadata has one
            described = {"sha256": _NO_DIGEST, **metadata} | {"sha256": _NO_DIGEST}
            save_file(packed, temporary, metadata={FORMAT: json.dumps(described)})
            _sign(temporary)
        except SafetensorError as error:  # raised for a full disk too
            raise OSError(f"{path} cannot be written: {first_line(error, limit=300)}") from error
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits; cached for the process until the file changes."""
    return _cached("sha256", path, lambda: _hash(path))


def _own_digest(path: Path) -> str:
    """The SHA-256 of a safetensors file, computed with zeros in place of the digest in its header."""
    return _cached("own digest", path, lambda: _hash(path, *_signed_header(path)))


def _cached(what: str, path: Path, compute: Callable[[], str]) -> str:
    status = path.stat()
    key = (what, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key not in _known_hashes:
        found = compute()
        if abs(time.time() - max(status.st_mtime, status.st_ctime)) < _CLOCK_TICK:
            return found  # a change within one tick of the file system's clock would go unnoticed
        _known_hashes[key] = found
    return _known_hashes[key]


def _hash(path: Path, header: bytes = b"", instead: bytes = b"") -> str:
    """The SHA-256 of a file with its first bytes, ``header``, replaced by ``instead``."""
    digest = hashlib.sha256(instead)
    with path.open("rb") as file:
        file.seek(len(header))
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _signed_header(path: Path) -> tuple[bytes, bytes]:
    """The header of a safetensors file (all bytes before the tensors), and the same with zeros for the digest."""
    with path.open("rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
    found = _DIGEST.findall(header)
    if len(found) != 1:
        raise ValueError(f"{path} is damaged: its header does not contain its SHA-256")
    return header, _DIGEST.sub(rb"\g<1>" + _NO_DIGEST.encode(), header)


def _sign(path: Path) -> None:
    """Replace the zeros in a new file's header with its digest."""
    header, unsigned = _signed_header(path)
    assert header == unsigned
    signed = _DIGEST.sub(rb"\g<1>" + _hash(path).encode(), header)
    with path.open("rb+") as file:
        file.write(signed)
