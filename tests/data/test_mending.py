"""Sound images in files that are not: metadata never decides, and what is missing does only if it has pixels."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.data import Decoding, UnreadableImage, decode, load
from fastdiff.data.images import DEFAULT, load_described

from .support import noise, save

FIRST = Decoding(reading=1)


def chunk(name: bytes, data: bytes, wrong: bool = False) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ wrong)


def png(image: Image.Image, before: bytes = b"", after: bytes = b"", **options: object) -> bytes:
    """A PNG with chunks before its pixels and after them."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    data = file.getvalue()
    return data[:33] + before + data[33:-12] + after + data[-12:]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(path: Path, decoding: Decoding = DEFAULT) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(path, decoding)
    return caught.value.reason


MANY = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(900_000))) for i in range(80))
ODD = {
    "large compressed text": chunk(b"zTXt", b"Raw profile type xmp\0\0" + zlib.compress(bytes(1_600_000))),
    "large international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"{}" * 800_000)),
    "large profile": chunk(b"iCCP", b"press\0\0" + zlib.compress(bytes(1_500_000))),
    "unknown compression of a profile": chunk(b"iCCP", b"press\0\7" + bytes(9)),
    "many texts": MANY,
    "text with a wrong checksum": chunk(b"tEXt", b"Software\0x", wrong=True),
    "text that is no number": chunk(b"tEXt", b"transparency\0much"),
    "short time": chunk(b"tIME", b"\0", wrong=True),
    "short resolution": chunk(b"pHYs", b"\0"),
    "short gamma": chunk(b"gAMA", b"\0"),
    "animation out of order": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", b"\0"),
    "wrong EXIF": chunk(b"eXIf", b"garbage", wrong=True),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("odd", ODD)
def test_metadata_does_not_decide_whether_a_png_is_read(tmp_path: Path, odd: str, place: str) -> None:
    image = noise(40, 30)
    path = written(tmp_path / "a.png", png(image, **{place: ODD[odd]}))
    np.testing.assert_array_equal(np.asarray(decode(path)), np.asarray(image))


def test_a_huge_text_is_passed_over(tmp_path: Path) -> None:
    image = noise(40, 30)
    path = written(tmp_path / "a.png", png(image, chunk(b"tEXt", b"parameters\0" + b"a" * 70_000_000)))
    np.testing.assert_array_equal(np.asarray(decode(path)), np.asarray(image))


def test_a_file_that_ends_in_a_text_has_all_its_pixels(tmp_path: Path) -> None:
    image = noise(40, 30)
    whole = png(image, after=chunk(b"tEXt", b"Comment\0" + b"a" * 100))
    path = written(tmp_path / "a.png", whole[:-80])
    np.testing.assert_array_equal(np.asarray(decode(path)), np.asarray(image))


@pytest.mark.parametrize("odd", ["large compressed text", "text with a wrong checksum"])
def test_orientation_and_transparency_outlive_other_metadata(tmp_path: Path, odd: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("red", (0, 0, 8, 8))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    path = written(tmp_path / "a.png", png(stored, ODD[odd], exif=exif, transparency=(0, 0, 0)))
    shown = np.asarray(decode(path))
    assert shown.shape == (16, 32, 3)
    assert shown[[3, 12], [3, 28]].tolist() == [[255, 0, 0], [255, 255, 255]]
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    path = written(tmp_path / "b.png", png(stored, ODD[odd] + chunk(b"iTXt", xmp)))
    assert np.asarray(decode(path)).shape == (16, 32, 3)


@pytest.mark.parametrize("transparency", [chunk(b"tRNS", b"\0"), chunk(b"tRNS", bytes(6), wrong=True)])
def test_transparency_that_is_damaged_is_none(tmp_path: Path, transparency: bytes) -> None:
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    path = written(tmp_path / "a.png", png(image, transparency))
    assert np.asarray(decode(path)).max() == 0


def test_critical_chunks_still_decide(tmp_path: Path) -> None:
    whole = png(noise(40, 30), ODD["text with a wrong checksum"])
    for place in (20, whole.index(b"IDAT") + 30):  # the size; the pixels
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        assert refused(written(tmp_path / "a.png", bytes(damaged))) == "damaged"
    assert refused(written(tmp_path / "a.png", whole[: len(whole) // 2])) == "truncated"
    palette = Image.new("P", (8, 8))
    palette.putpalette(range(256 * 3 // 3))
    coloured = bytearray(png(palette))
    coloured[coloured.index(b"PLTE") + 5] ^= 0xFF
    assert refused(written(tmp_path / "b.png", bytes(coloured))) == "damaged"


def jpeg(**options: object) -> bytes:
    file = io.BytesIO()
    smooth = Image.fromarray(np.add.outer(np.arange(61) * 4, np.arange(61)).astype(np.uint8)).convert("RGB")
    Image.blend(smooth, noise(61, 61), 0.3).save(file, "JPEG", **options)
    assert file.getvalue().endswith(b"\xff\xd9")
    return file.getvalue()


JPEGS: dict[str, dict[str, object]] = {
    "baseline": {},
    "optimised": {"optimize": True, "quality": 95},
    "progressive": {"progressive": True},
    "without subsampling": {"subsampling": 0, "quality": 100},
    "restarts": {"restart_marker_blocks": 2},
    "restarts by rows": {"restart_marker_rows": 1, "progressive": True},
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_without_its_end_marker_is_whole(tmp_path: Path, kind: str, missing: int) -> None:
    whole = jpeg(**JPEGS[kind])
    expected = np.asarray(decode(written(tmp_path / "a.jpg", whole)))
    path = written(tmp_path / "b.jpg", whole[:-missing])
    assert refused(path, FIRST) == "truncated"
    found = np.asarray(decode(path))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_lacks_pixels_is_truncated(tmp_path: Path, kind: str) -> None:
    """At every place where it may have been cut off, those between two scans and two restart intervals included."""
    whole = jpeg(**JPEGS[kind])
    first = whole.index(b"\xff\xda")
    markers = [i for i in range(first, len(whole) - 2) if whole[i] == 0xFF and whole[i + 1] not in (0, 0xFF)]
    scans = [i for i in markers if whole[i + 1] == 0xDA]
    places = [first + 14, (first + len(whole)) // 2, len(whole) - 12, len(whole) - 6]
    for place in {*places, *markers[1:12], *(i + 2 for i in markers[1:12]), *scans[1:]}:
        assert refused(written(tmp_path / "a.jpg", whole[:place])) == "truncated", place


def test_a_jpeg_with_its_header_only(tmp_path: Path) -> None:
    whole = jpeg()
    for length in (3, 4, 20, whole.index(b"\xff\xda"), whole.index(b"\xff\xda") + 5):
        assert refused(written(tmp_path / "a.jpg", whole[:length])) in ("truncated", "damaged")


@pytest.mark.parametrize(
    ("extension", "cut"),
    [("gif", lambda data: data[:-1]), ("png", lambda data: data[:-12]), ("bmp", lambda data: data)],
)
def test_other_ends_that_may_be_missing(tmp_path: Path, extension: str, cut: Callable[[bytes], bytes]) -> None:
    path = save(tmp_path / f"a.{extension}", noise(20, 12).quantize(16) if extension == "gif" else noise(20, 12))
    expected = np.asarray(decode(path))
    np.testing.assert_array_equal(np.asarray(decode(written(path, cut(path.read_bytes())))), expected)


def test_the_first_rules_take_no_such_file(tmp_path: Path) -> None:
    """A run that began under them goes on without it."""
    text = written(tmp_path / "a.png", png(noise(40, 30), ODD["large compressed text"]))
    end = written(tmp_path / "a.jpg", jpeg()[:-2])
    assert refused(text, FIRST) == "damaged"
    assert refused(end, FIRST) == "truncated"
    assert "not a PNG" in refused(save(tmp_path / "a.tif"), FIRST) or "not read" in refused(tmp_path / "a.tif", FIRST)
    sound = save(tmp_path / "sound.png")
    np.testing.assert_array_equal(load(sound, 8, FIRST), load(sound, 8))


def test_large_images_are_mended_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and third attempt at an image must not wait for the first."""
    monkeypatch.setattr("fastdiff.data.images._LARGE_PIXELS", 10)
    path = written(tmp_path / "a.jpg", jpeg()[:-2])
    assert load_described(path, 8).size == (61, 61)
