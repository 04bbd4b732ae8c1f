"""Images that are whole although their file is not: PNGs with damaged metadata, and JPEGs without their end marker."""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from PIL import Image

Decode = Callable[[BinaryIO], Image.Image]

_SIGNATURE = 8  # bytes before the first chunk of a PNG
_MOST = 2**20  # bytes of a chunk about the orientation; larger ones are about other things, too
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION = re.compile(rb"(XML:com\.adobe\.xmp|Raw profile type exif)\0")  # keywords of texts
_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xff]")  # in entropy-coded data 0xff is followed by 0
_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_RESTART, _END, _SCAN = 0xD0, 0xD9, 0xDA
_FILL = 1024  # bytes: more than one unit of a JPEG takes


def mended(kind: str, file: BinaryIO, decode: Decode) -> Image.Image | None:
    """The image of a file that ``decode`` could not read, if its pixels are complete; else None.

    ``kind`` is that of ``kinds.kind_of``. If ``decode`` fails without the metadata, too, this error is raised.
    """
    if kind == "PNG":
        return _from_png(file, decode)
    return _from_jpeg(file, decode) if kind == "JPEG" else None


def _from_png(file: BinaryIO, decode: Decode) -> Image.Image | None:
    """The image of a PNG without the chunks that are not needed to draw it (PNG specification, section 4.7.2).

    What says how to draw it is kept as far as it is sound: first transparency and orientation, then only the former.
    """
    chunks = last = list(_chunks(file))
    failed: Exception | None = None
    for kept in (_shown, _transparent, _critical):
        parts = [chunk for chunk in chunks if kept(*chunk)]
        if len(parts) == len(last):  # it has been tried
            continue
        last = parts
        file.seek(0)
        try:
            return decode(io.BytesIO(b"".join([file.read(_SIGNATURE), *(content for _, content, _ in parts)])))
        except Exception as error:  # decoders raise nearly anything
            failed = error
    if failed is not None:
        raise failed
    return None


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes, bytes | None]]:
    """The chunks of a PNG: name, all bytes, and the data, None if it is large or the checksum is wrong.

    A critical chunk is yielded as far as it goes; the others only if they are short.
    """
    file.seek(_SIGNATURE)
    while len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        critical = name[:1].isupper()
        if not critical and length > _MOST:
            file.seek(length + 4, 1)
            yield name, b"", None
            continue
        body = file.read(length + 4)
        data, checksum = body[:-4], body[-4:]
        sound = len(body) == length + 4 and zlib.crc32(data, zlib.crc32(name)) == int.from_bytes(checksum, "big")
        yield name, header + body, data if sound else None


def _critical(name: bytes, content: bytes, data: bytes | None) -> bool:
    return name[:1].isupper()


def _transparent(name: bytes, content: bytes, data: bytes | None) -> bool:
    return _critical(name, content, data) or (name == b"tRNS" and data is not None)


def _shown(name: bytes, content: bytes, data: bytes | None) -> bool:
    about = data is not None and (name == b"eXIf" or (name in _TEXTS and _ORIENTATION.match(data) is not None))
    return about or _transparent(name, content, data)


def _from_jpeg(file: BinaryIO, decode: Decode) -> Image.Image | None:
    """The image of a JPEG that lacks no more than its end marker (ITU-T T.81, annex B).

    The decoder does not say whether it found all coefficients, and takes what is missing for zeros. So the file is
    continued in several ways: if all of them give the same pixels, nothing that is missing could have changed them.
    """
    file.seek(0)
    data = file.read().rstrip(b"\xff")
    try:
        restart = _open_scan(data)
    except (IndexError, KeyError, ValueError):  # a damaged header
        restart = None
    if restart is None:
        return None
    found: Image.Image | None = None
    for bits in (b"\x00", b"\x55", b"\xaa"):
        # A decoder between two restart intervals skips everything up to the next restart marker.
        more = bits * _FILL + bytes((0xFF, _RESTART + restart)) + bits * _FILL
        try:
            image = decode(io.BytesIO(data + more + bytes((0xFF, _END))))
        except Exception:  # as many as decoders raise
            return None
        if found is not None and image.tobytes() != found.tobytes():
            return None
        found = image
    return found


def _open_scan(data: bytes) -> int | None:
    """The number of the next restart marker of the scan in which a JPEG ends.

    None if it ends elsewhere, or if earlier scans do not hold every coefficient to its last bit: a progressive JPEG
    without its last scans would look complete.
    """
    components: dict[int, list[int]] = {}  # the bit to which each of the 64 coefficients is known, -1 for none
    restart: int | None = None
    at = 2
    while (found := _NEXT_MARKER.search(data, at)) is not None:
        marker, at = found[0][-1], found.end()
        if _RESTART <= marker < _RESTART + 8:
            restart = (marker - _RESTART + 1) % 8
            continue
        segment = data[at + 2 : at + int.from_bytes(data[at : at + 2], "big")]
        if marker == _END or len(segment) + 2 < int.from_bytes(data[at : at + 2], "big"):
            return None
        at += len(segment) + 2
        if marker in _FRAMES:
            components = {name: [-1] * 64 for name in segment[6::3]}
        elif marker == _SCAN:
            restart, count = 0, segment[0]
            first, last, bits = segment[1 + 2 * count : 4 + 2 * count]
            for name in segment[1 : 1 + 2 * count : 2]:
                components[name][first : last + 1] = [bits & 15] * (last + 1 - first)
    whole = bool(components) and not any(map(any, components.values()))
    return restart if whole else None
