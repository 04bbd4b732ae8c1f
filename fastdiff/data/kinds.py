"""What a file is, by its name and by its first bytes."""

import os
import re

from fastdiff.runtime.files import other_kind

EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "pjpeg", "pjp", "png", "apng", "gif", "webp", "bmp", "tif", "tiff", "avif")
"""File extensions that count as images, in upper or lower case. A file without an extension counts by its content."""

FIRST_EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp")
"""The extensions of the first rules (config.READING), under which a file without one is no image."""

START = 132  # bytes: enough to recognise every kind

READ = ("PNG", "JPEG", "GIF", "WebP", "BMP", "TIFF", "AVIF")
"""The kinds that can be read; FIRST_READ are those of the first rules."""

FIRST_READ = READ[:5]

_RAW = "camera raw"
_BY_EXTENSION = {
    **dict.fromkeys(("heic", "heif"), "HEIC"),
    **dict.fromkeys(("jp2", "j2k", "jpf", "jpx"), "JPEG 2000"),
    **dict.fromkeys(("ppm", "pgm", "pbm", "pnm"), "Netpbm"),
    **dict.fromkeys(("cr2", "cr3", "nef", "arw", "dng", "orf", "rw2", "raf"), _RAW),
    **dict.fromkeys(("psd", "psb"), "Photoshop"),
    "jxl": "JPEG XL",
    "exr": "OpenEXR",
    "hdr": "Radiance HDR",
    "dds": "DDS",
    "ico": "ICO",
    "svg": "SVG",
    "tga": "TGA",
    "dcm": "DICOM",
}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_BY_START: tuple[tuple[bytes, str], ...] = (
    (rb"\x89PNG\r\n\x1a\n....CgBI", "PNG for iOS (CgBI)"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"GIF8", "GIF"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"(II\*\0|MM\0\*).{4}CR|IIRO|IIU\0|FUJIFILMCCD", _RAW),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"8BPS", "Photoshop"),
    (rb"\x76\x2f\x31\x01", "OpenEXR"),
    (rb"#\?RADIANCE|#\?RGBE", "Radiance HDR"),
    (rb"DDS ", "DDS"),
    (rb"\0\0\x01\0[^\0]\0", "ICO"),
    (rb"P[1-7]\s", "Netpbm"),
    (rb"\s*(<\?xml.*)?<svg", "SVG"),
    (rb"%PDF", "PDF"),
    (rb".{128}DICM", "DICOM"),
    (rb"BM", "BMP"),
)


def extension(name: str) -> str:
    """The extension of a file name in lower case, without the dot; empty if it has none."""
    return os.path.splitext(name)[1][1:].lower()


def kind_of(start: bytes) -> str | None:
    """The kind of image that begins with ``start`` (START bytes), by its signature; None if it is not known."""
    if start[4:8] == b"ftyp":
        brands = {start[at : at + 4] for at in (8, *range(16, min(int.from_bytes(start[:4], "big"), START), 4))}
        known = (({b"avif", b"avis"}, "AVIF"), ({b"crx "}, _RAW), (_HEIF_BRANDS, "HEIC"))
        return next((kind for those, kind in known if brands & those), None)
    return next((kind for pattern, kind in _BY_START if re.match(pattern, start, re.DOTALL)), None)


def unread(name: str) -> str | None:
    """Why an image file with this name is not read, and the remedy; None if the name is of no such kind."""
    kind = _BY_EXTENSION.get(extension(name))
    return None if kind is None else _remedy(kind)


def unread_content(start: bytes) -> str:
    """Why a file that begins with ``start`` is not read, and the remedy if it is known."""
    if (kind := kind_of(start)) is not None:
        return _remedy(kind)
    return other_kind(start) or f"not a {', '.join(READ[:-1])} or {READ[-1]} inside"


def unread_inside(start: bytes) -> str | None:
    """Why a file without an extension that begins with ``start`` is not read; None if it is an image to read."""
    kind = kind_of(start)
    if kind is None or (kind == "BMP" and start[6:10] != bytes(4)):  # a text may begin with BM
        return "not an image"
    return None if kind in READ else _remedy(kind)


def _remedy(kind: str) -> str:
    return f"{kind}, which is not read: convert it to PNG"
