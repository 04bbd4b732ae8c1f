"""The files that samples are kept in."""

import errno
import io
import os
import re
import resource
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont, features
from PIL._util import DeferredError

from fastdiff.sampling import output
from fastdiff.sampling.output import (
    columns_by_class,
    make_grid,
    save_gif,
    save_grid,
    save_npz,
    save_pngs,
    save_trajectories,
)

IMAGES = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), dtype=np.uint8)  # 255 is the grid's ground
NAMES = ["cat", "a dog of a very long name", "", "línea\n\x1b[31m\udcff", "日本"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_npz(tmp_path: Path) -> None:
    """Whatever the batches: the bytes of np.savez, read without pickle, or as a stream as the ADM evaluator does."""
    labels, more = np.arange(5), {"seed": np.uint64(2**64 - 1), "settings": np.array('{"eta": 0.0, "è": 1}')}
    reference = io.BytesIO()
    np.savez(reference, arr_0=IMAGES, arr_1=labels, **more)
    for sizes in ([5], [1, 1, 1, 1, 1], [2, 0, 3]):
        batches = np.split(IMAGES, np.cumsum(sizes)[:-1])
        save_npz(tmp_path / "a.npz", iter(batches), IMAGES.shape, arr_1=labels, **more)
        assert (tmp_path / "a.npz").read_bytes() == reference.getvalue()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1", "seed", "settings"]
        assert np.array_equal(file["arr_0"], IMAGES)
        assert (file["arr_1"].dtype, file["arr_1"].tolist()) == (np.int64, [0, 1, 2, 3, 4])
        assert (int(file["seed"]), file["settings"].item()) == (2**64 - 1, '{"eta": 0.0, "è": 1}')
    with zipfile.ZipFile(tmp_path / "a.npz") as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        assert np.lib.format.read_array_header_1_0(member) == (IMAGES.shape, False, np.uint8)
        assert member.read() == IMAGES.tobytes()


def test_images_that_lie_in_memory_in_another_order(tmp_path: Path) -> None:
    save_npz(tmp_path / "a.npz", [IMAGES[:, ::-1], np.asfortranarray(IMAGES)], (10, 4, 6, 3))
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], np.concatenate([IMAGES[:, ::-1], IMAGES]))


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "got 0 images, expected 5"),
        ([IMAGES[:4]], "got 4 images, expected 5"),
        ([IMAGES, IMAGES[:1]], "got 6 images, expected 5"),
        ([IMAGES[:, :3]], r"a batch of uint8 \(5, 3, 6, 3\) among images of \(5, 4, 6, 3\)"),
        ([IMAGES.astype(np.float32)], "a batch of float32"),
    ],
)
def test_batches_that_do_not_make_up_the_shape(tmp_path: Path, batches: list[np.ndarray], says: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.npz: {says}"):
        save_npz(tmp_path / "a.npz", batches, (5, 4, 6, 3))
    assert not list(tmp_path.iterdir())


def test_objects_are_never_pickled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Object arrays"):
        save_npz(tmp_path / "a.npz", [IMAGES], IMAGES.shape, arr_1=np.array([None]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [500, 2000])
def test_only_a_batch_is_in_memory(tmp_path: Path, count: int) -> None:
    batch = 20 * 64 * 64 * 3  # bytes

    def batches() -> Iterator[np.ndarray]:
        for i in range(count // 20):
            yield np.full((20, 64, 64, 3), i, np.uint8)

    tracemalloc.start()
    try:
        save_npz(tmp_path / "a.npz", batches(), (count, 64, 64, 3))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert batch < peak < 3 * batch
    assert (tmp_path / "a.npz").stat().st_size > count * 64 * 64 * 3


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.npz": lambda path: save_npz(path, [IMAGES[:3], IMAGES[3:]], IMAGES.shape, arr_1=np.arange(5)),
    "a.png": lambda path: save_grid(path, IMAGES, names=NAMES),
    "strip.png": lambda path: save_trajectories(path, IMAGES[None]),
    "a.gif": lambda path: save_gif(path, IMAGES),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_is_full_at_any_byte(tmp_path: Path, name: str, there: bool) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    if not there:
        path.unlink()
    for size in [*range(0, len(whole), max(1, len(whole) // 50)), len(whole) - 1]:
        with full_after(size), pytest.raises(OSError, match=rf"^/.*{name} cannot be written \(File too large\)$"):
            WRITERS[name](path)
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([(name, whole)] if there else [])
    with full_after(len(whole)):
        WRITERS[name](path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_when_the_file_is_flushed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"^/.*{name} cannot be written \(No space left on device\)$"):
        WRITERS[name](tmp_path / name)
    assert not list(tmp_path.iterdir())


# Grids


@pytest.mark.parametrize(("columns", "rows_columns"), [(None, (2, 3)), (2, (3, 2)), (5, (1, 5))])
def test_grid(columns: int | None, rows_columns: tuple[int, int]) -> None:
    rows, wide = rows_columns
    grid = make_grid(IMAGES, columns, gap=1)
    assert grid.shape == (rows * 5 + 1, wide * 7 + 1, 3)
    for i, image in enumerate(IMAGES):
        top, left = 1 + i // wide * 5, 1 + i % wide * 7
        assert np.array_equal(grid[top : top + 4, left : left + 6], image)
    assert (grid == 255).all(2).sum() == grid.shape[0] * grid.shape[1] - 5 * 4 * 6


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        ([0, 1, 2] * 4, 3),
        ([5, 2] * 8, 4),  # near square
        ([0, 1, 2, 0, 1], 3),
        (range(16), 16),
        (range(17), None),
        ([0, 1, 1, 0], None),
        ([3, 3, 3], None),
    ],
)
def test_columns_of_one_class(labels: Sequence[int], columns: int | None) -> None:
    assert columns_by_class(np.array(labels)) == columns


def test_a_small_grid_is_enlarged_by_a_whole_factor(tmp_path: Path) -> None:
    """To at least 64 pixels an image."""
    save_grid(tmp_path / "g.png", IMAGES)
    assert np.array_equal(pixels(tmp_path / "g.png"), make_grid(IMAGES).repeat(16, 0).repeat(16, 1))
    save_grid(tmp_path / "s.png", np.zeros((4, 64, 64, 3), np.uint8))
    assert pixels(tmp_path / "s.png").shape == (4 * 134, 4 * 134, 3)
    save_grid(tmp_path / "m.png", np.zeros((900, 32, 32, 3), np.uint8))
    assert pixels(tmp_path / "m.png").shape == (2 * (30 * 34 + 2), 2 * (30 * 34 + 2), 3)
    save_grid(tmp_path / "l.png", np.zeros((1, 900, 900, 3), np.uint8))
    assert pixels(tmp_path / "l.png").shape == (904, 904, 3)


@pytest.fixture(params=["FreeType", "none"])
def font(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow as it is, and as it is where it was built without FreeType."""
    if request.param == "none":
        monkeypatch.setattr(features, "check", lambda name: False)
        monkeypatch.setattr(ImageFont, "core", DeferredError(ImportError("no FreeType")))
    else:
        assert features.check("freetype2")


@pytest.mark.usefixtures("font")
@pytest.mark.parametrize("size", [1, 8, 32, 64, 256])
def test_a_name_that_a_column_shares_stands_above_it(tmp_path: Path, size: int) -> None:
    images = np.repeat(IMAGES[:, :1, :1], size, 1).repeat(size, 2)
    save_grid(tmp_path / "plain.png", images, columns=2)
    save_grid(tmp_path / "named.png", images, columns=2, names=["cat", "dog", "cat", "dog", "cat"])
    plain, named = pixels(tmp_path / "plain.png"), pixels(tmp_path / "named.png")
    band, factor = len(named) - len(plain), plain.shape[1] // (2 * (size + 2) + 2)
    assert 0 < band < max(32, 2 * factor)
    assert np.array_equal(named[band:], plain)
    written = (named[:band] < 128).any((0, 2))
    half = len(written) // 2
    assert written[:half].any()
    assert written[half:].any()
    if size >= 8:
        assert not (named[:band, (named[band:] == 255).all((0, 2))] < 255).any()  # none in the gaps


@pytest.mark.usefixtures("font")
@pytest.mark.parametrize("size", [1, 8, 32, 64, 256])
def test_other_names_stand_below_their_images(tmp_path: Path, size: int) -> None:
    images = np.repeat(IMAGES[:, :1, :1], size, 1).repeat(size, 2)
    save_grid(tmp_path / "plain.png", images, columns=2)
    save_grid(tmp_path / "named.png", images, columns=2, names=NAMES)
    plain, named = pixels(tmp_path / "plain.png"), pixels(tmp_path / "named.png")
    factor = plain.shape[1] // (2 * (size + 2) + 2)
    band = (len(named) - len(plain)) // 3
    assert 0 < band < 110
    for i, name in enumerate(NAMES):
        top, left = factor * (2 + i // 2 * (size + 2)), factor * (2 + i % 2 * (size + 2))
        tile = slice(left, left + factor * size)
        below = top + i // 2 * band
        assert np.array_equal(named[below : below + factor * size, tile], plain[top : top + factor * size, tile])
        text = named[below + factor * size : below + factor * size + band, tile]
        assert (text < 128).any() == (name != "")
    if size >= 8:
        assert (named[:, : 2 * factor] == 255).all()
        assert (named[:, -2 * factor :] == 255).all()


def test_a_long_name_is_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    real = output.ImageDraw.ImageDraw.text

    def text(self: object, xy: object, text: str, **kwargs: object) -> None:
        drawn.append(text)
        real(self, xy, text, **kwargs)

    monkeypatch.setattr(output.ImageDraw.ImageDraw, "text", text)
    images = np.zeros((6, 16, 16, 3), np.uint8)
    names = ["cat", "i" * 999, "Afghan hound", "chaînée", "a\nb", "golden_retriever-puppy"]
    save_grid(tmp_path / "g.png", images, names=names)
    assert drawn[0] == "cat"
    assert len(drawn[1:7]) == output.MOST_LINES
    assert all(re.fullmatch("i{8,32}", line) for line in drawn[1:6])
    assert re.fullmatch(r"i{8,32}\.\.\.", drawn[6])
    assert drawn[7:] == ["Afghan", "hound", "chainee", "a?b", "golden_", "retriever-", "puppy"]


@settings(max_examples=50)
@given(st.text())
def test_a_name_may_be_anything(name: str) -> None:
    text = output._ascii(name)
    assert text.isascii()
    assert text == "" or text.isprintable()
    canvas = Image.new("RGB", (64, 32), "white")
    writer = output._Text(64)
    lines = writer.wrapped(name)
    assert 1 <= len(lines) <= output.MOST_LINES
    assert "".join("".join(lines).split()) == "".join(text.split()) or lines[-1].endswith("...")
    writer.draw(output.ImageDraw.Draw(canvas), lines, 0, 0)


def test_single_pngs(tmp_path: Path) -> None:
    save_pngs(tmp_path / "new/folder", IMAGES, list("abcde"))
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == [f"{c}.png" for c in "abcde"]
    assert np.array_equal(pixels(tmp_path / "new/folder/c.png"), IMAGES[2])


# Trajectories


def animation(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """The frames of a GIF and how many milliseconds each is shown."""
    with Image.open(path) as image:
        frames, durations = [], []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
        assert image.info["loop"] == 0  # for ever
        return frames, durations


def test_gif(tmp_path: Path) -> None:
    """Frames of at most 256 colours come back as they were, enlarged."""
    save_gif(tmp_path / "t.gif", IMAGES, seconds=2)
    frames, durations = animation(tmp_path / "t.gif")
    assert durations == [400] * 4 + [1900]
    assert np.array_equal(np.stack(frames), IMAGES.repeat(16, 1).repeat(16, 2))


def test_a_gif_of_more_frames_than_can_be_shown(tmp_path: Path) -> None:
    many = np.arange(251, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    save_gif(tmp_path / "t.gif", many)
    frames, durations = animation(tmp_path / "t.gif")
    assert durations == [40] * 74 + [1540]
    levels = [int(frame[0, 0, 0]) for frame in frames]
    assert (levels[0], levels[-1]) == (0, 250)
    assert set(np.diff(levels)) == {3, 4}


def test_a_gif_of_many_colours_is_near_the_frames(tmp_path: Path) -> None:
    y, x = np.mgrid[:64, :64]
    smooth = np.stack([4 * x, 4 * y, 255 - 2 * (x + y)], -1).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, smooth.shape, dtype=np.uint8)
    save_gif(tmp_path / "t.gif", np.stack([noise, smooth]))
    frames, _ = animation(tmp_path / "t.gif")
    errors = [frame[::4, ::4].astype(float) - true for frame, true in zip(frames, (noise, smooth), strict=True)]
    assert np.sqrt(np.mean(errors[0] ** 2)) < 24
    assert np.sqrt(np.mean(errors[1] ** 2)) < 10


def test_a_trajectory_is_what_its_name_ends_in(tmp_path: Path) -> None:
    save_trajectories(tmp_path / "t.gif", IMAGES[None])
    assert len(animation(tmp_path / "t.gif")[0]) == 5
    save_trajectories(tmp_path / "t.png", IMAGES[None])
    assert np.array_equal(pixels(tmp_path / "t.png"), make_grid(IMAGES, columns=5).repeat(16, 0).repeat(16, 1))
    save_trajectories(tmp_path / "one.gif", IMAGES[None, :1])
    assert np.array_equal(pixels(tmp_path / "one.gif"), IMAGES[0].repeat(16, 0).repeat(16, 1))
    several = np.stack([IMAGES, 255 - IMAGES])
    save_trajectories(tmp_path / "two.png", several)
    both = make_grid(np.concatenate([IMAGES, 255 - IMAGES]), columns=5)
    assert np.array_equal(pixels(tmp_path / "two.png"), both.repeat(16, 0).repeat(16, 1))
    save_trajectories(tmp_path / "two.gif", several)
    frames, _ = animation(tmp_path / "two.gif")
    assert len(frames) == 5
    factor = len(frames[0]) // len(make_grid(several[:, 0]))
    assert np.array_equal(frames[2][::factor, ::factor], make_grid(several[:, 2]))
    for name in ("t.jpg", "t", "gif"):
        with pytest.raises(ValueError, match=rf"{name} must end in \.gif, .* or in \.png"):
            save_trajectories(tmp_path / name, IMAGES[None])
