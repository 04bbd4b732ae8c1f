"""CIFAR-10: both archives and their folders give the same files; the pickles are never run."""

import pickle
import struct
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fastdiff.data import cifar10 as module
from fastdiff.data import load
from fastdiff.data.cifar10 import CLASSES, prepare_cifar10

from ..support import refusal
from .archive_support import found_below, tar

ROWS = 3
BATCHES = [*(f"data_batch_{i}" for i in (4, 1, 5, 2, 3)), "test_batch"]  # in no order, as in the real one


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", ROWS)


def batch(name: str) -> tuple[np.ndarray, list[int]]:
    """Pixels (3, 3, 32, 32) and labels of a batch."""
    seed = BATCHES.index(name)
    pixels = np.random.default_rng(seed).integers(0, 256, (ROWS, 3, 32, 32), dtype=np.uint8)
    return pixels, [seed, (seed + 3) % 10, 9]


def short(text: bytes) -> bytes:
    return (b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + struct.pack("<i", len(text))) + text


def python2(data: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2's cPickle wrote, as the real batches are."""
    raw = data.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + short(b"b") + b"tR"
        b"(K\x01(M" + struct.pack("<H", len(data)) + b"M" + struct.pack("<H", data.shape[1]) + b"t"
        b"cnumpy\ndtype\n(" + short(b"u1") + b"K\x00K\x01tR(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89" + short(raw) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([x]) for x in labels) + b"e"
    return b"\x80\x02}(" + short(b"labels") + numbers + short(b"data") + array + b"u."


def python3(data: np.ndarray, labels: list[int], protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": data, b"labels": labels, b"batch_label": b"x"}, protocol)


def pickled(name: str) -> bytes:
    pixels, labels = batch(name)
    return python2(pixels.reshape(ROWS, -1), labels)


def binary(name: str) -> bytes:
    pixels, labels = batch(name)
    return b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, pixels, strict=True))


def python_members() -> dict[str, bytes]:
    members = {f"cifar-10-batches-py/{name}": pickled(name) for name in BATCHES}
    return {"cifar-10-batches-py/batches.meta": b"not read", **members}


@pytest.mark.parametrize("source", ["python", "binary", "python folder", "the folder in it"])
def test_names_and_pixels(tmp_path: Path, source: str) -> None:
    if source == "binary":
        members = {f"cifar-10-batches-bin/{name}.bin": binary(name) for name in BATCHES}
        path = tar(tmp_path / "x.tar.gz", members, "w:gz")
    else:
        path = tar(tmp_path / "x.tar.gz", python_members(), "w:gz")
    if "folder" in source:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "x", filter="data")
        path = tmp_path / "x" if source == "python folder" else tmp_path / "x/cifar-10-batches-py"
    progress: list[tuple[int, int]] = []
    assert prepare_cifar10(path, tmp_path / "out", lambda *at: progress.append(at)) == 18
    assert progress == [(i, 18) for i in range(1, 19)]
    expected = {}
    for name in BATCHES:
        split, first = ("test", 0) if name == "test_batch" else ("train", (int(name[-1]) - 1) * ROWS)
        for i, (image, label) in enumerate(zip(*batch(name), strict=True), start=first):
            expected[f"cifar_{split}/{CLASSES[label]}_{i:05d}.png"] = image.transpose(1, 2, 0)
    assert found_below(tmp_path / "out") == {"cifar_train", "cifar_test", *expected}
    for file, image in expected.items():
        np.testing.assert_array_equal(load(tmp_path / "out" / file, 32), image)


def refused(tmp_path: Path, content: bytes, suffix: str = "") -> str:
    path = tar(tmp_path / "x.tar", {f"x/test_batch{suffix}": content})
    message = refusal(lambda: prepare_cifar10(path, tmp_path / "out"), "test_batch")
    assert found_below(tmp_path) == {"x.tar"}
    return message


class _Code:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> object:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    pixels, labels = batch("test_batch")
    marker = tmp_path / "marker"
    for code in (_Code(marker.mkdir), _Code(exec, f"open({str(marker)!r}, 'w')"), _Code(time.sleep, 100)):
        content = pickle.dumps({b"x": code, b"data": pixels.reshape(ROWS, -1), b"labels": labels}, protocol)
        assert re_run(refused(tmp_path, content))
        assert not marker.exists()


def re_run(message: str) -> bool:
    return "asks to run" in message and ", which no CIFAR-10 batch does" in message


def test_stand_ins_do_nothing_that_a_pickle_could_use(tmp_path: Path) -> None:
    """What a name in a pickle finds is a stand-in, dotted names and numpy's own functions included."""
    for name in (b"numpy\nload", b"numpy.core.multiarray\nfrombuffer", b"numpy\nndarray.tofile", b"builtins\ngetattr"):
        assert re_run(refused(tmp_path, b"\x80\x04c" + name + b"\n."))
    state = b"\x80\x02cnumpy\nndarray\n)\x81}(U\x09__class__cnumpy\ndtype\nub."
    assert "damaged or not a CIFAR-10 batch" in refused(tmp_path, state)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_that_python_3_wrote(tmp_path: Path, protocol: int) -> None:
    def written(name: str) -> bytes:
        pixels, labels = batch(name)
        return python3(pixels.reshape(ROWS, -1), labels, protocol)

    path = tar(tmp_path / "x.tar", {name: written(name) for name in BATCHES})
    assert prepare_cifar10(path, tmp_path / "out") == 18
    np.testing.assert_array_equal(
        load(tmp_path / "out/cifar_test/dog_00000.png", 32), batch("test_batch")[0][0].transpose(1, 2, 0)
    )


PIXELS = np.zeros((ROWS, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or not a CIFAR-10 batch"),
        (pickle.dumps(3), "damaged or not a CIFAR-10 batch"),
        (pickle.dumps({b"data": PIXELS}), "damaged or not a CIFAR-10 batch"),
        (python2(PIXELS, [0, 1, 2])[:-20], "damaged or not a CIFAR-10 batch"),
        (python2(PIXELS[:2], [0, 1]), r"does not hold uint8 \(3, 3072\)"),
        (python3(PIXELS.astype(np.int8), [0, 1, 2]), "does not hold uint8"),
        (python3(PIXELS[:, :3], [0, 1, 2]), "does not hold uint8"),
        (pickle.dumps({b"data": b"x", b"labels": [0, 1, 2]}), "does not hold uint8"),
        (python3(np.asfortranarray(PIXELS), [0, 1, 2]), "is damaged"),
        (python3(PIXELS, [0, 1, 10]), "does not hold 3 labels from 0 to 9"),
        (python3(PIXELS, [0, 1, -1]), "does not hold 3 labels"),
        (python3(PIXELS, [0, 1]), "does not hold 3 labels"),
        (python3(PIXELS, [0, 1, 2.0]), "does not hold 3 labels"),
        (python3(PIXELS, [0, 1, True]), "does not hold 3 labels"),
        (python3(PIXELS, "012"), "does not hold 3 labels"),
    ],
)
def test_pickles_of_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refused(tmp_path, content))


@pytest.mark.parametrize(
    "claim",
    [
        b"\x80\x05\x96" + (2**63 - 1).to_bytes(8, "little") + b"x.",  # a bytearray
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",  # bytes
        b"\x80\x02}r" + (2**29).to_bytes(4, "little") + b".",  # the number of an object
        b"}p%d\n." % 2**29,
    ],
)
def test_a_pickle_that_claims_memory(tmp_path: Path, claim: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """The unpickler would allocate some GiB, or print an error of its own."""
    tracemalloc.start()
    message = refused(tmp_path, claim)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "damaged or not a CIFAR-10 batch" in message
    assert peak < 2**23
    assert capfd.readouterr().err == ""


def test_binary_batches_of_something_else(tmp_path: Path) -> None:
    content = binary("test_batch")
    assert "does not have the length of a CIFAR-10 batch" in refused(tmp_path, content[:-1], ".bin")
    assert "does not have the length of a CIFAR-10 batch" in refused(tmp_path, content + b"\0", ".bin")
    assert "more than 87,040 bytes" in refused(tmp_path, content + b"\0" * 10**6, ".bin")
    assert "does not hold 3 labels" in refused(tmp_path, b"\x0a" + content[1:], ".bin")


def test_a_batch_too_few_and_too_many(tmp_path: Path) -> None:
    members = python_members()
    del members["cifar-10-batches-py/data_batch_2"], members["cifar-10-batches-py/test_batch"]
    with pytest.raises(ValueError, match="has no data_batch_2, test_batch: give cifar-10-python"):
        prepare_cifar10(tar(tmp_path / "x.tar", members), tmp_path / "out")
    with pytest.raises(ValueError, match="holds data_batch_2 twice"):
        prepare_cifar10(tar(tmp_path / "y.tar", python_members() | {"data_batch_2": b""}), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no data_batch_1, data_batch_2, data_batch_3"):
        prepare_cifar10(tmp_path / "empty", tmp_path / "out")
    assert found_below(tmp_path) == {"x.tar", "y.tar", "empty"}


def test_stopped_in_the_middle(tmp_path: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    path = tar(tmp_path / "x.tar", python_members())
    with pytest.raises(KeyboardInterrupt):
        prepare_cifar10(path, tmp_path / "out", stop)
    assert found_below(tmp_path) == {"x.tar"}


@pytest.mark.parametrize("form", ["python 2", "python 3", "binary"])
def test_a_batch_of_the_real_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(module, "_ROWS", 10_000)
    monkeypatch.setattr(module, "_BATCHES", 1)  # the test batch alone
    saved = []
    monkeypatch.setattr(module, "_save", lambda item: saved.append(item[1][0, 0, 0]))
    pixels, labels = np.full((10_000, 3072), 255, np.uint8), [3] * 10_000  # bytes that become two in UTF-8
    if form == "binary":
        content = (b"\3" + b"\xff" * 3072) * 10_000
    else:
        content = (python2 if form == "python 2" else python3)(pixels, labels)
    assert len(content) > (60_000_000 if form == "python 3" else 30_000_000)
    path = tar(tmp_path / "x.tar.gz", {f"x/test_batch{'.bin' * (form == 'binary')}": content}, "w:gz")
    assert prepare_cifar10(path, tmp_path / "out") == 10_000
    assert saved == [255] * 10_000


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_a_batch_of_gigabytes_is_not_read(tmp_path: Path, kind: str) -> None:
    info = tarfile.TarInfo("test_batch")
    info.size = 2**40
    with (tmp_path / "test_batch").open("xb") as file:
        file.write(info.tobuf() if kind == "tar" else b"")
        file.truncate(2**41)  # of holes, which take no disk
    with pytest.raises(ValueError, match="test_batch of more than 87,040 bytes, which is too large"):
        prepare_cifar10(tmp_path / "test_batch" if kind == "tar" else tmp_path, tmp_path / "out")
