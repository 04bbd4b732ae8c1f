"""Decoding: a decided behaviour for each kind of file that people (and attackers) have in their folders."""

import io
import re
import struct
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fastdiff.data import MAX_PIXELS, Decoding, UnreadableImage, decode, load, resize_and_crop
from fastdiff.data import images as module
from fastdiff.data.images import load_described

from .support import BROKEN_EXIF, noise, save


def pixels(path: Path, **how: object) -> np.ndarray:
    image = decode(path, Decoding(**how))
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(path: Path, **how: object) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(path, Decoding(**how))
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    return caught.value.reason


def original(image: Image.Image, size: int) -> np.ndarray:
    """improved-diffusion's image_datasets.py, word for word."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image.convert("RGB"))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize(
    "shape", [(64, 64), (65, 64), (127, 300), (128, 128), (301, 129), (20, 31), (1, 1), (640, 480)]
)
def test_resize_and_crop_is_the_originals(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    result = resize_and_crop(image, 64)
    assert result.shape == (64, 64, 3)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, original(image, 64))


@pytest.mark.parametrize("extension", ["png", "bmp", "gif", "webp", "jpg", "tif", "avif"])
def test_every_format(tmp_path: Path, extension: str) -> None:
    flat = Image.new("RGB", (10, 6), (200, 30, 90))
    array = pixels(save(tmp_path / f"a.{extension}", flat)).astype(int)
    assert array.shape == (6, 10, 3)
    assert np.abs(array - (200, 30, 90)).max() <= (8 if extension in ("webp", "jpg", "avif") else 0)


@pytest.mark.parametrize("shape", [(30000, 2), (2, 30000), (6001, 300)])
def test_extreme_aspect_ratio_is_the_centre_of_the_originals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    x, y = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]))
    image = Image.fromarray(np.stack([x % 256, y % 256, (x // 100) % 256], -1).astype(np.uint8))
    path = save(tmp_path / "long.png", image)
    resized: list[int] = []
    resize = Image.Image.resize

    def counting(self: Image.Image, size: tuple[int, int], *args: object, **kwargs: object) -> Image.Image:
        resized.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", counting)
    result = load(path, 16)
    assert max(resized) <= shape[0] * shape[1]  # never larger than the image itself
    monkeypatch.undo()
    assert np.abs(result.astype(int) - original(image, 16)).max() <= 2


def test_zero_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert refused(tmp_path / "a.png") == "empty file"


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "bmp", "webp", "avif"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_truncated(tmp_path: Path, extension: str, kept: float) -> None:
    path = save(tmp_path / f"a.{extension}", noise(60, 50))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert refused(path) in ("truncated", "damaged")
    if extension in ("png", "jpg", "bmp"):
        assert refused(path) == "truncated"


def test_damaged(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(60, 50))
    data = bytearray(path.read_bytes())
    data[2000:2040] = bytes(40)
    path.write_bytes(data)
    assert refused(path) == "damaged"


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "bmp", "webp", "tif", "avif"])
def test_noise_after_the_magic_is_never_another_error(tmp_path: Path, extension: str) -> None:
    path = save(tmp_path / f"a.{extension}", noise(30, 20))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        data = whole.copy()
        data[rng.integers(8, len(data), 10)] = rng.integers(0, 256, 10)
        path.write_bytes(data.tobytes())
        try:
            decode(path)
        except UnreadableImage:
            continue


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "gone.png") == "no such file or directory"


def test_text_named_png(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    assert "not a PNG" in refused(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "AVIF"])
def test_another_kind_named_png_is_read(tmp_path: Path, kind: str) -> None:
    assert pixels(save(tmp_path / "a.png", format=kind)).shape == (8, 12, 3)


def test_a_page_of_a_tiff_is_the_first(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = save(tmp_path / "a.tif", first, save_all=True, append_images=[second], compression="tiff_lzw")
    assert pixels(path)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kept", [0.3, 0.6])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_half_a_tiff(tmp_path: Path, kept: float, compression: str | None) -> None:
    path = save(tmp_path / "a.tif", noise(60, 50), compression=compression)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert refused(path) in ("truncated", "damaged, or a TIFF that is not read: convert it to PNG")


@pytest.mark.skipif(sys.platform != "linux", reason="Pillow's wheels export libtiff's functions on Linux")
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_a_damaged_tiff_is_told_by_its_reason_alone(
    tmp_path: Path, compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "a.tif", noise(60, 50), compression=compression)
    content = bytearray(path.read_bytes())
    for at in (100, 101, 150):
        content[at] ^= 0x5A
    path.write_bytes(content)
    assert refused(path).startswith("damaged")
    assert capfd.readouterr().err == ""  # where libtiff writes by itself


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIC"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "camera raw"),
        (b"II*\0\x10\0\0\0CR\2\0", "camera raw"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "Photoshop"),
        (b"P6\n8 8\n255\n", "Netpbm"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x">', "SVG"),
        (b"%PDF-1.7", "PDF"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI", r"PNG for iOS \(CgBI\)"),
    ],
)
def test_kinds_that_are_not_read_are_named(tmp_path: Path, start: bytes, kind: str) -> None:
    (tmp_path / "a.jpg").write_bytes(start + bytes(200))
    assert re.fullmatch(kind + ", which is not read: convert it to PNG", refused(tmp_path / "a.jpg"))


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    assert refused(tmp_path / "a.jpg") == "a web page, not the file itself: download that"
    (tmp_path / "a.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refused(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(40))
    assert "not a PNG" in refused(tmp_path / "a.jpg")


def test_a_pillow_without_avif_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.avif")
    monkeypatch.setattr(module.features, "check", lambda name: False)
    assert refused(path) == "AVIF, which is not read: convert it to PNG"


def test_mpo_of_a_phone_is_its_first_picture(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = save(tmp_path / "a.jpg", first, format="MPO", save_all=True, append_images=[second])
    assert pixels(path)[0, 0, 0] > 240


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_animation_is_its_first_frame(tmp_path: Path, extension: str) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = save(tmp_path / f"a.{extension}", first, save_all=True, append_images=[second])
    assert pixels(path)[0, 0, 0] > 240


def too_large_png() -> bytes:
    out = io.BytesIO()
    Image.new("1", (1, 1)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = struct.pack(">II", 10_000, 10_000)
    data[29:33] = struct.pack(">I", PngImagePlugin._crc32(bytes(data[12:29])))
    return bytes(data)


def too_large_gif(side: int) -> bytes:
    """A screen of one pixel and a frame that is larger than allowed."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\x00;"
    return b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\x00\x00" + bytes(3) + b"\xff\xff\xff" + frame


@pytest.mark.parametrize(
    "data", [too_large_png(), too_large_gif(10_000), too_large_gif(65_535)], ids=["png", "gif", "huge-gif"]
)
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_decompression_bomb_is_refused_from_its_header(tmp_path: Path, data: bytes, action: str) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(data)
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter(action)  # type: ignore[arg-type]
        assert f"over the limit of {MAX_PIXELS:,} pixels" in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_large_png_gives_no_warning_of_pillow(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(too_large_png())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        refused(path)
    assert seen == []


def test_large_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", noise(60, 60))
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    assert refused(path) == "over the limit of 1,000 bytes (16 for each of --max-pixels)"
    assert pixels(path, max_pixels=2**26 * 20).shape == (60, 60, 3)


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "bmp", "webp", "tif", "avif"])
def test_the_limit_of_pixels_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str) -> None:
    """Pillow's own limit, which it checks for some kinds, rises with it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    path = save(tmp_path / f"a.{extension}", noise(60, 50))
    assert refused(path, max_pixels=2999) == "60x50 is over the limit of 2,999 pixels: raise it with --max-pixels"
    assert pixels(path, max_pixels=3000).shape == (50, 60, 3)


def test_many_large_images_are_decoded_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(module, "_LARGE_PIXELS", 10)
    inside: list[int] = []
    upright = module._upright_rgb

    def watched(image: Image.Image, *how: object) -> object:
        inside.append(module._large_images._value)
        return upright(image, *how)

    monkeypatch.setattr(module, "_upright_rgb", watched)
    decode(path)
    assert inside == [1]
    assert module._large_images._value == 2  # given back


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    array = pixels(save(tmp_path / "a.png", Image.fromarray(values)))
    np.testing.assert_array_equal(array, np.repeat((values >> 8)[..., None], 3, axis=2))


def test_16_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    values = np.array([[1000, 30000]], np.uint16)
    array = pixels(save(tmp_path / "a.png", Image.fromarray(values), transparency=1000))
    assert array[0, :, 0].tolist() == [255, 30000 >> 8]


def test_wide_integers_are_scaled_too() -> None:
    image = Image.fromarray(np.array([[0, 256, 65535, 70000, -5]], np.int32))
    assert image.mode == "I"
    assert np.asarray(module._upright_rgb(image, None)[0])[0, :, 0].tolist() == [0, 1, 255, 255, 0]


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_a_window_of_16_bit_grey(tmp_path: Path, extension: str) -> None:
    """A CT or a camera has 12 bits; their high byte is nearly black."""
    values = np.array([[0, 1000, 2048, 4095, 65535]], np.uint16)
    path = save(tmp_path / f"a.{extension}", Image.fromarray(values))
    assert pixels(path)[0, :, 0].tolist() == [0, 3, 8, 15, 255]
    assert pixels(path, window=(0, 4095))[0, :, 0].tolist() == [0, 62, 128, 255, 255]
    assert pixels(path, window=(1000, 2000))[0, :, 0].tolist() == [0, 0, 255, 255, 255]


def test_values_below_zero_have_a_window(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.array([[-1000, -160, 40, 240, 3000]], np.int32)))
    assert pixels(path, window=(-160, 240))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_the_peak_of_16_bits(tmp_path: Path) -> None:
    grey = lambda high: Image.fromarray(np.array([[0, high]], np.uint16))  # noqa: E731
    assert load_described(save(tmp_path / "a.png", grey(4095)), 8).peak == 4095
    assert load_described(save(tmp_path / "b.tif", grey(60000)), 8).peak == 60000
    assert load_described(save(tmp_path / "c.png", Image.new("L", (8, 8), 3)), 8).peak is None
    for value, peak in ((4095, 4095), (40000, 40191)):
        (tmp_path / "d.png").write_bytes(png16(value))
        described = load_described(tmp_path / "d.png", 8)
        assert (described.peak, described.pixels[0, 0].tolist()) == (peak, [value >> 8] * 3)


def png16(value: int) -> bytes:
    """A PNG of one 16-bit colour, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", PngImagePlugin._crc32(name + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = (b"\0" + struct.pack(">H", value) * 24) * 8
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_white_is_zero(tmp_path: Path) -> None:
    values = np.array([[0, 65535]], np.uint16)
    path = save(tmp_path / "a.tif", Image.fromarray(values), tiffinfo={262: 0})
    assert pixels(path)[0, :, 0].tolist() == [255, 0]


def test_floats(tmp_path: Path) -> None:
    unit = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert pixels(save(tmp_path / "a.tif", unit))[0, :, 0].tolist() == [0, 128, 255]
    wide = save(tmp_path / "b.tif", Image.fromarray(np.array([[-1, 0.5, np.nan]], np.float32)))
    assert refused(wide) == "float values other than 0 to 1: name black and white with --window LOW,HIGH"
    assert pixels(wide, window=(-1, 1))[0, :, 0].tolist() == [0, 191, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("extension", ["png", "webp"])
def test_transparency_is_over_white(tmp_path: Path, mode: str, extension: str) -> None:
    rgba = np.zeros((4, 12, 4), np.uint8)  # hidden colour: black
    rgba[:, 4:8, 3], rgba[:, 8:, 3] = 128, 255
    path = save(tmp_path / f"a.{extension}", Image.fromarray(rgba).convert(mode), lossless=True)
    array = pixels(path)[1]
    assert array[[1, 10]].tolist() == [[255] * 3, [0] * 3]
    assert np.abs(array[6].astype(int) - 127).max() <= 1


def palette(**options: object) -> Callable[[Path], Path]:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 200, 30, 240, 0, 60])
    image.putpixel((1, 0), 1)
    return lambda path: save(path, image, **options)


@pytest.mark.parametrize("extension", ["png", "gif", "bmp"])
def test_palette(tmp_path: Path, extension: str) -> None:
    assert pixels(palette()(tmp_path / f"a.{extension}"))[0].tolist() == [[10, 200, 30], [240, 0, 60]]


@pytest.mark.parametrize(("extension", "transparency"), [("png", 1), ("gif", 1), ("png", b"\xff\x00")])
def test_palette_with_transparency(tmp_path: Path, extension: str, transparency: int | bytes) -> None:
    path = palette(transparency=transparency)(tmp_path / f"a.{extension}")
    assert pixels(path)[0].tolist() == [[10, 200, 30], [255, 255, 255]]


def test_palette_is_converted_before_it_is_resized(tmp_path: Path) -> None:
    stripes = Image.fromarray(np.indices((64, 64))[1].astype(np.uint8) % 2)
    stripes.putpalette([0, 0, 0, 255, 255, 255])
    result = load(save(tmp_path / "a.png", stripes), 16)
    assert 120 <= result.min() <= result.max() <= 135  # the mean; resizing palette numbers keeps black or white


@pytest.mark.parametrize("mode", ["L", "1"])
@pytest.mark.parametrize("extension", ["png", "bmp", "gif"])
def test_grey_and_black_and_white(tmp_path: Path, mode: str, extension: str) -> None:
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    assert pixels(save(tmp_path / f"a.{extension}", image))[0].tolist() == [[0] * 3, [255] * 3]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    assert np.abs(pixels(path)[4, 4].astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, extension: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("white", (0, 0, 8, 8))  # one white corner, top left
    stored = {  # the transformation that undoes each orientation
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = upright if stored is None else upright.transpose(stored)
    array = pixels(save(tmp_path / f"a.{extension}", image, exif=exif))
    assert array.shape == (16, 32, 3)
    assert (array[3, 3] > 200).all()
    assert (array[[3, 12, 12], [28, 3, 28]] < 50).all()


def test_broken_exif_does_not_matter(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise(16, 8), exif=BROKEN_EXIF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as load_dataset does
        assert pixels(path).shape == (8, 16, 3)
