"""Archives made on the spot, the hostile kinds included."""

import io
import tarfile
import zipfile
from pathlib import Path

from .support import noise

UNSAFE = ["/etc/a.png", "../a.png", "x/../../a.png", "C:a.png", "c:/a.png", "x\\..\\a.png"]
"""Names that lead out of a folder, here or on another system."""


def png(seed: int = 0, width: int = 12, height: int = 8) -> bytes:
    file = io.BytesIO()
    noise(width, height, seed).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes], mode: str = "w", extra: tarfile.TarInfo | None = None) -> Path:
    """A tar of the members, and of one without content where there is an ``extra``."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if extra is not None:
            archive.addfile(extra)
    return path


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zipped(path: Path, members: dict[str, bytes], mode: int = 0, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo("x")
            info.filename = name  # as it is: the constructor would mend some
            info.external_attr = mode << 16
            info.compress_type = method
            archive.writestr(info, content)
    return path


def encrypted(path: Path) -> Path:
    """Say of every member of a zip that it is encrypted."""
    raw = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := raw.find(magic, at + 1)) >= 0:
            raw[at + offset] |= 1
    path.write_bytes(raw)
    return path


def found_below(folder: Path) -> set[str]:
    """The files and folders below a folder, hidden ones included."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
