"""Samples from npz files: mapped where that can be, and nothing believed that the file cannot show."""

import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastdiff.data import Samples, read_samples
from fastdiff.data import npz as module

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5])
SMALL = 4 * 2**20  # bytes: what reading any of these files may take, whatever it says


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text: str, version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    """The beginning of an .npy file with this text as its header."""
    raw = text.encode("latin1")
    packed = struct.pack("<H" if version == (1, 0) else "<I", len(raw) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + packed + raw


def described(shape: str, descr: str = "'|u1'", fortran_order: str = "False") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': {fortran_order}, 'shape': {shape}, }}\n")


def archive(path: Path, method: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def attempt(path: Path) -> Samples | str:
    """The samples, or the refusal without the path that it begins with; in little memory either way."""
    tracemalloc.start()
    try:
        return read_samples(path)
    except ValueError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < SMALL
    assert message.startswith(f"{path} ")
    assert message.isprintable()
    return message.removeprefix(f"{path} ")


def accepted(path: Path) -> Samples:
    samples = attempt(path)
    assert isinstance(samples, Samples), samples
    return samples


def refused(path: Path) -> str:
    message = attempt(path)
    assert isinstance(message, str)
    return message


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_and_labels(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", IMAGES, LABELS)
    samples = accepted(tmp_path / "a.npz")
    assert isinstance(samples.images, np.memmap) == (save is np.savez)
    assert samples.images.dtype == np.uint8
    assert np.array_equal(samples.images, IMAGES)
    assert samples.labels is not None
    assert (samples.labels.dtype, type(samples.labels)) == (np.int64, np.ndarray)
    assert samples.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_alone(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", IMAGES, mu=np.zeros(3), sigma=np.zeros((3, 3)))
    samples = read_samples(tmp_path / "a.npz")
    assert np.array_equal(samples.images, IMAGES)
    assert samples.labels is None


def test_stored_images_take_no_memory(tmp_path: Path) -> None:
    many = np.random.default_rng(0).integers(0, 256, (400, 128, 128, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", many, np.arange(400))
    assert many.nbytes > 4 * SMALL
    images = accepted(tmp_path / "a.npz").images
    assert np.array_equal(images, many)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i4", ">i4", ">i8", "u4"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_labels_of_any_integers(tmp_path: Path, dtype: str, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", IMAGES, LABELS.astype(dtype))
    labels = read_samples(tmp_path / "a.npz").labels
    assert labels is not None
    assert (labels.dtype, labels.tolist()) == (np.int64, LABELS.tolist())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_columns_first(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", np.asfortranarray(IMAGES))
    assert np.array_equal(accepted(tmp_path / "a.npz").images, IMAGES)


def test_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of more than 4 GiB is written: its sizes and offsets stand in extra fields."""
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 20)
        np.savez(tmp_path / "a.npz", IMAGES, LABELS)
    assert b"PK\x06\x06" in (tmp_path / "a.npz").read_bytes()
    samples = accepted(tmp_path / "a.npz")
    assert np.array_equal(samples.images, IMAGES)
    assert samples.labels is not None
    assert samples.labels.tolist() == LABELS.tolist()


def test_lengths_of_the_members_own_header(tmp_path: Path) -> None:
    """np.savez writes an extra field there that the directory does not repeat, others none; some put bytes in front."""
    np.savez(tmp_path / "a.npz", IMAGES)
    archive(tmp_path / "b.npz", arr_1=npy(LABELS), arr_0=npy(IMAGES))
    (tmp_path / "c.npz").write_bytes(b"in front" + (tmp_path / "b.npz").read_bytes())
    for name in "abc":
        assert np.array_equal(read_samples(tmp_path / f"{name}.npz").images, IMAGES)


def test_versions_of_the_header(tmp_path: Path) -> None:
    for version in [(1, 0), (2, 0), (3, 0)]:
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.lib.format.write_array(file, IMAGES, version)
        assert np.array_equal(read_samples(archive(tmp_path / "a.npz", arr_0=file.getvalue())).images, IMAGES)


def test_a_header_that_python_2_wrote(tmp_path: Path) -> None:
    """NumPy reads it, and warns, here as an error."""
    path = archive(tmp_path / "a.npz", arr_0=described("(5L, 4L, 6L, 3L)") + IMAGES.tobytes())
    assert np.array_equal(accepted(path).images, IMAGES)


def test_it_stays_readable_when_the_name_is_gone(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", IMAGES)
    images = read_samples(tmp_path / "a.npz").images
    np.savez(tmp_path / "b.npz", IMAGES[:1])
    (tmp_path / "b.npz").replace(tmp_path / "a.npz")
    assert np.array_equal(images, IMAGES)


def test_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "a.npz") == "does not exist: give an npz file of images"
    assert refused(tmp_path) == "is not a file: give an npz file of images"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.npz").touch(0)
    with pytest.raises(PermissionError, match=r"a\.npz"):
        read_samples(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"PK", b"\x89PNG\r\n\x1a\n" * 10, npy(IMAGES), b"PK\x05\x06" + bytes(18)])
def test_no_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    assert "np.savez(file, images, labels)" in refused(tmp_path / "a.npz")


def test_other_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    said = "has no arr_0, images, image, x_train, X_train, train_images, x or X (only mu.npy, sigma.npy): save uint8 im"
    assert refused(tmp_path / "a.npz").startswith(said)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (IMAGES.astype(np.float32) * 2, "float32 from 0 to 510"),
        (IMAGES / 16, "float64 from 0 to 15.9375"),  # who knows what is white
        (IMAGES / 255 - 2, "float64 from -2 to -1"),
        (np.where(IMAGES == 0, np.nan, IMAGES), "float64 from nan to nan"),
        (IMAGES.view(np.int8), "int8 from -128 to 127"),
        (IMAGES.astype(np.uint16) * 257, "uint16 from 0 to 65535"),
        (IMAGES.astype(complex), "complex128 (5, 4, 6, 3)"),
        (IMAGES.astype(object), "object (5, 4, 6, 3)"),
        (IMAGES.view("u1,u1,u1"), "void24 (5, 4, 6, 1)"),
        (IMAGES[0], "uint8 (4, 6, 3)"),
        (IMAGES[0].transpose(1, 0, 2)[..., :1], "uint8 (6, 4, 1)"),
        (IMAGES[..., :2], "uint8 (5, 4, 6, 2)"),
        (IMAGES[:0], "uint8 (0, 4, 6, 3)"),
        (IMAGES[:, :0], "uint8 (5, 0, 6, 3)"),
        (IMAGES[:, :, :0], "uint8 (5, 4, 0, 3)"),
        (np.uint8(3), "uint8 ()"),
    ],
)
def test_other_images(tmp_path: Path, images: np.ndarray, found: str) -> None:
    np.savez(tmp_path / "a.npz", images)
    must = (
        "and floats must be from 0 to 1, from -1 to 1, or from 0 to 255 with one above 127"
        if found.startswith("float")
        else "and integers must be from 0 to 255"
        if " from " in found
        else "which must be numbers (N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels C"
    )
    assert refused(tmp_path / "a.npz").startswith(f"holds {found} as arr_0, {must}: save uint8 images (N, H, W, 3)")


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (LABELS + 0.5, "float64 that are no whole numbers"),
        (LABELS * np.nan, "float64 that are no whole numbers"),
        (LABELS.astype(np.uint64) + 2**63, "uint64 that are no whole numbers"),
        (LABELS.astype("m8[s]"), "timedelta64[s] (5,)"),
        (LABELS.astype(object), "object (5,)"),
        (np.array([*"abcdefghij"]).reshape(5, 2), "str32 (5, 2)"),
        (LABELS[:, None] * np.ones((1, 2), int), "rows of 2 numbers that are not one-hot"),
        (np.eye(5)[:, :4], "rows of 4 numbers that are not one-hot"),
        (LABELS[:, None, None], "int64 (5, 1, 1)"),
        (LABELS[:4], "int64 (4,)"),
        (np.arange(6), "int64 (6,)"),
        (np.int64(3), "int64 ()"),
    ],
)
def test_other_labels(tmp_path: Path, labels: np.ndarray, found: str) -> None:
    np.savez(tmp_path / "a.npz", IMAGES, labels)
    must = ", which must be whole numbers or text (5,) or (5, 1), or one-hot (5, K)" if found.endswith(")") else ""
    assert refused(tmp_path / "a.npz").startswith(f"holds {found} as arr_1{must}: save uint8 images (N, H, W, 3)")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"names": np.array(["a"] * 4)}, "holds str32 (4,) as names, which must be text (5,): "),
        ({"class_names": np.arange(3)}, "holds int64 (3,) as class_names, which must be text (K,): "),
    ],
)
def test_other_names(tmp_path: Path, more: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "a.npz", IMAGES, **more)
    assert refused(tmp_path / "a.npz").startswith(said)


def test_an_entry_that_swallows_the_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", IMAGES, LABELS)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(b"PK\1\2") + 33] = 1  # its comment has 256 bytes
    (tmp_path / "a.npz").write_bytes(content)
    assert refused(tmp_path / "a.npz") == "is damaged (1 of its 2 files are found): copy it again"


GREY = IMAGES[..., 0]
RGBA = np.concatenate([IMAGES, np.full((5, 4, 6, 1), 255, np.uint8)], axis=3)
CLEAR = np.concatenate([IMAGES, np.zeros((5, 4, 6, 1), np.uint8)], axis=3)
PLAIN: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "channels first": (IMAGES.transpose(0, 3, 1, 2), IMAGES),
    "grey": (GREY, GREY[..., None].repeat(3, 3)),
    "grey of one channel": (GREY[..., None], GREY[..., None].repeat(3, 3)),
    "grey, channels first": (GREY[:, None], GREY[..., None].repeat(3, 3)),
    "floats to 1": ((IMAGES / 255).astype(np.float32), IMAGES),
    "half floats to 1": ((IMAGES / 255).astype(np.float16), IMAGES),
    "floats from -1 to 1": (IMAGES / 127.5 - 1, IMAGES),
    "floats to 255": (IMAGES.astype(np.float64), IMAGES),
    "grey floats, channels first": ((GREY / 255)[:, None], GREY[..., None].repeat(3, 3)),
    "integers": (IMAGES.astype(np.int64), IMAGES),
    "truth values": (GREY > 99, ((GREY > 99) * 255).astype(np.uint8)[..., None].repeat(3, 3)),
    "opaque": (RGBA, IMAGES),
    "transparent": (CLEAR, np.full_like(IMAGES, 255)),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_a_plain_meaning(tmp_path: Path, kind: str, save: Callable[..., None]) -> None:
    stored, expected = PLAIN[kind]
    save(tmp_path / "a.npz", stored)
    images = accepted(tmp_path / "a.npz").images
    assert images.dtype == np.uint8
    assert np.array_equal(images, expected)


def test_many_parts_are_converted_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.data.arrays._PART", 100)
    np.savez(tmp_path / "a.npz", IMAGES / 255)
    assert np.array_equal(accepted(tmp_path / "a.npz").images, IMAGES)


def test_images_that_do_not_fit_as_uint8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.data.arrays.available_memory", lambda: 300)
    np.savez(tmp_path / "a.npz", GREY)
    assert refused(tmp_path / "a.npz").startswith("holds uint8 as arr_0, which take 0.00 GiB as uint8 RGB, more than")


@pytest.mark.parametrize(
    ("stored", "expected", "names"),
    [
        (LABELS[:, None], LABELS, None),
        (LABELS.astype(np.float32), LABELS, None),
        (LABELS.astype(np.uint64), LABELS, None),
        (LABELS > 2, LABELS > 2, None),
        (np.eye(6, dtype=int)[LABELS], LABELS, None),
        (np.eye(6)[LABELS], LABELS, None),
        (np.array(["cow", "ant", "bee", "ant", "cow"]), [2, 0, 1, 0, 2], ("ant", "bee", "cow")),
        (np.array([b"cow", b"ant", b"bee", b"ant", b"cow"])[:, None], [2, 0, 1, 0, 2], ("ant", "bee", "cow")),
    ],
)
def test_labels_of_a_plain_meaning(
    tmp_path: Path, stored: np.ndarray, expected: object, names: tuple[str, ...] | None
) -> None:
    np.savez(tmp_path / "a.npz", IMAGES, stored)
    samples = accepted(tmp_path / "a.npz")
    assert samples.labels is not None
    assert (samples.labels.dtype, samples.labels.ndim) == (np.int64, 1)
    assert np.array_equal(samples.labels, expected)  # type: ignore[arg-type]
    assert samples.class_names == names


def test_text_and_class_names(tmp_path: Path) -> None:
    texts = np.array(["cow", "ant", "bee", "ant", "cow"])
    np.savez(tmp_path / "a.npz", IMAGES, texts, class_names=["dog", "cow", "bee", "ant"])
    samples = accepted(tmp_path / "a.npz")
    assert samples.labels is not None
    assert (samples.labels.tolist(), samples.class_names) == ([1, 3, 2, 3, 1], ("dog", "cow", "bee", "ant"))
    np.savez(tmp_path / "b.npz", IMAGES, texts, class_names=["dog", "cow"])
    assert refused(tmp_path / "b.npz") == "holds the class 'ant' as arr_1, which is not in its class_names"


@pytest.mark.parametrize(
    "keys", [("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"), ("X", "y")]
)
def test_other_names_of_arrays(tmp_path: Path, keys: tuple[str, str]) -> None:
    """Keras' and MedMNIST's, whose test images stay out."""
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (GREY, LABELS), strict=True)), x_test=GREY[:1], y_test=LABELS[:1])
    samples = accepted(tmp_path / "a.npz")
    assert (samples.images.shape, samples.checksum > 0) == ((5, 4, 6, 3), True)
    assert samples.labels is not None
    assert samples.labels.tolist() == LABELS.tolist()


def test_one_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    assert refused(tmp_path / "a.npy").startswith("is one array: save uint8 images")


def test_labels_of_another_pair(tmp_path: Path) -> None:
    """Images beside y have its labels; of two that could be meant neither counts, nor do numbers that are no labels."""
    np.savez(tmp_path / "a.npz", images=IMAGES, y=LABELS)
    labels = accepted(tmp_path / "a.npz").labels
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()
    np.savez(tmp_path / "b.npz", IMAGES, labels=LABELS[:, None])
    labels = accepted(tmp_path / "b.npz").labels
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()
    for others in ({"y": LABELS, "label": LABELS}, {"y": LABELS / 2}, {"y": LABELS[:2]}, {"y": np.array(3)}):
        np.savez(tmp_path / "c.npz", IMAGES, **others)
        assert accepted(tmp_path / "c.npz").labels is None


def test_two_classes_of_one_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", IMAGES, LABELS, class_names=[*"abcde", "a"])
    assert refused(tmp_path / "a.npz").startswith("has two class_names that are the same")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    content = pickle.dumps(Payload(tmp_path / "made"))
    for name, start in {
        "object": described("(5, 4, 6, 3)", "'|O'"),
        "pickle": b"",
        "bytes": described(f"({len(content)}, 1, 1, 3)"),
    }.items():
        assert refused(archive(tmp_path / f"{name}.npz", arr_0=start + content))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_could_grow_without_bounds(tmp_path: Path, method: int) -> None:
    path = archive(tmp_path / "a.npz", method, arr_0=npy(IMAGES))
    assert refused(path).startswith("is compressed in a way that NumPy does not know: save uint8 images")


EIGHT_TIB = described("(44739243, 256, 256, 3)").ljust(128)
"""A header alone: its file is some 240 bytes long."""


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_promises_what_is_not_there(tmp_path: Path, method: int) -> None:
    path = archive(tmp_path / "a.npz", method, arr_0=EIGHT_TIB)
    assert path.stat().st_size <= 244
    expected = "claims to hold (44739243, 256, 256, 3) as arr_0 but does not: copy it again"
    assert refused(path) == expected


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [3 * 2**30, 8 * 2**40])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("real", [0, 2**16])
def test_a_directory_that_promises_it_too(
    tmp_path: Path, method: int, size: int, compressed: bool, real: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 2**50)
    content = described(f"({size // 3}, 1, 1, 3)")
    promised = len(content) + size // 3 * 3
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as file:
        file.writestr("arr_0.npy", content + np.random.default_rng(0).bytes(real))
        info = file.getinfo("arr_0.npy")
        info.file_size = promised  # the directory is written when the file is closed
        if compressed:
            info.compress_size = promised
    message = refused(tmp_path / "a.npz")
    assert "as arr_0 but does not: copy it again" in message or "damaged or not an npz file (truncated)" in message


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("off", [-1, 1])
def test_a_byte_too_few_or_too_many(tmp_path: Path, method: int, off: int) -> None:
    content = described(f"({IMAGES.nbytes // 3}, 1, 1, 3)") + IMAGES.tobytes()
    content = content[:off] if off < 0 else content + b"x"
    assert "as arr_0 but does not: copy it again" in refused(archive(tmp_path / "a.npz", method, arr_0=content))


@pytest.mark.parametrize(
    "text",
    [
        "(-5, 4, -6, 3)",
        "(-1, 4, 6, 3)",
        f"({2**62}, {2**62}, {2**62}, 3)",
        f"({10**1000}, 1, 1, 3)",
        f"({'9' * 5000}, 1, 1, 3)",
        f"({'1, ' * 3000})",
        "(5.0, 4, 6, 3)",
        "[5, 4, 6, 3]",
        "(" * 3000 + ")" * 3000,
        "-" * 9000 + "1",
        "'\\d'",
        "{[]: 1}",
        "x",
        "",
    ],
)
def test_absurd_shapes(tmp_path: Path, text: str) -> None:
    assert len(refused(archive(tmp_path / "a.npz", arr_0=described(text) + IMAGES.tobytes()))) < 300


@pytest.mark.parametrize(
    "descr", ["'|u1,'", "('|u1', 4)", "()", "[('\\n' , '|u1')]", "'S0'", "'a5'", "5", "None", "'V'"]
)
def test_absurd_types(tmp_path: Path, descr: str) -> None:
    assert len(refused(archive(tmp_path / "a.npz", arr_0=described("(5, 4, 6, 3)", descr) + IMAGES.tobytes()))) < 300


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_of_gigabytes(tmp_path: Path, method: int) -> None:
    content = header("", (2, 0), 2**32 - 1) + bytes(8 * SMALL)
    refused(archive(tmp_path / "a.npz", method, arr_0=content))


def test_a_directory_of_gigabytes(tmp_path: Path) -> None:
    """zipfile reads it at once."""
    path, size = tmp_path / "a.npz", 2**30
    with path.open("wb") as file:
        file.truncate(size)  # takes no room on the disk
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, size, 0, 0))
    assert refused(path).startswith("is damaged or not an npz file (a directory of 1,073,741,824 bytes)")


def test_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 300)
    np.savez(tmp_path / "a.npz", IMAGES, LABELS)
    assert np.array_equal(read_samples(tmp_path / "a.npz").images, IMAGES)
    np.savez_compressed(tmp_path / "b.npz", IMAGES)
    assert refused(tmp_path / "b.npz").startswith("holds 0.00 GiB compressed, more than the available memory")


def test_deflate_that_ends_early(tmp_path: Path) -> None:
    """Its checksum is right, and what is missing must not be whatever lay in memory."""
    content = described("(1000, 1, 1, 3)")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("arr_0.npy", content + bytes(2000))
        file.getinfo("arr_0.npy").file_size = len(content) + 3000
    assert refused(tmp_path / "a.npz").startswith("is damaged or not an npz file (truncated)")


def test_every_byte_counts(tmp_path: Path) -> None:
    """Of what is mapped, too."""
    whole = bytearray(written(np.savez))
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        members = [range(info.header_offset + 59, info.header_offset + 59 + info.file_size) for info in file.infolist()]
    assert bytes(whole[members[0].start :]).startswith(b"\x93NUMPY")
    for position in (position for member in members for position in member):
        whole[position] ^= 1
        (tmp_path / "a.npz").write_bytes(whole)
        refused(tmp_path / "a.npz")
        whole[position] ^= 1


def written(save: Callable[..., None], **arrays: Any) -> bytes:
    file = io.BytesIO()
    save(file, IMAGES, LABELS, **arrays)
    return file.getvalue()


WHOLE = [written(np.savez), written(np.savez_compressed), written(np.savez, mu=np.zeros(3))]
CHANGES = st.lists(
    st.tuples(st.integers(0, 2**16), st.integers(0, 6), st.binary(max_size=8)),  # where, how much goes, what comes
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(WHOLE), CHANGES)
def test_damage_is_refused_or_harmless(tmp_path: Path, whole: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    damaged = bytearray(whole)
    for where, length, replacement in changes:
        start = where % (len(damaged) + 1)
        damaged[start : start + length] = replacement
    check(tmp_path / "a.npz", bytes(damaged))


@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(WHOLE), st.data())
def test_half_a_file_is_refused(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    (tmp_path / "a.npz").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refused(tmp_path / "a.npz")


@pytest.mark.parametrize("every", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("whole", WHOLE[:2])
def test_every_byte_of_the_zip_itself(tmp_path: Path, whole: bytes, every: bool) -> None:
    """The members' headers, the directory and its end: every bit, or one bit of each byte."""
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        places = [range(info.header_offset, info.header_offset + 59) for info in file.infolist()]
        places.append(range(file.start_dir, len(whole)))
    for position in (position for place in places for position in place):
        for bit in range(8) if every else [position % 8]:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            check(tmp_path / "a.npz", bytes(damaged))


def check(path: Path, content: bytes) -> None:
    """The right images or a refusal."""
    path.write_bytes(content)
    if not isinstance(samples := attempt(path), str):
        assert np.array_equal(samples.images, IMAGES)
        assert samples.labels is None or samples.labels.tolist() == LABELS.tolist()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES, st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
@example([(6, 1, b"\x02")], zipfile.ZIP_STORED)  # as a header of version 2 it would be gigabytes long
def test_headers_that_somebody_wrote_on_purpose(
    tmp_path: Path, changes: list[tuple[int, int, bytes]], method: int
) -> None:
    """In a whole zip file, with the right checksum."""
    content, length = bytearray(npy(IMAGES)), 128
    for where, cut, replacement in changes:
        start = where % length
        content[start : start + cut] = replacement
    samples = attempt(archive(tmp_path / "a.npz", method, arr_0=bytes(content)))
    if not isinstance(samples, str):
        images = samples.images
        assert (images.dtype, images.ndim, images.shape[3]) == (np.uint8, 4, 3)
        assert 0 < images.nbytes <= len(content)
