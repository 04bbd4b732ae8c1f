"""The files that samples are kept in."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.sampling import make_grid, save_grid, save_npz, save_pngs

IMAGES = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), dtype=np.uint8)  # 255 is the grid's ground


def test_npz(tmp_path: Path) -> None:
    save_npz(tmp_path / "a.npz", IMAGES)
    save_npz(tmp_path / "b.npz", IMAGES, np.arange(5))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        assert np.array_equal(file["arr_0"], IMAGES)
    with np.load(tmp_path / "b.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert np.array_equal(file["arr_1"], np.arange(5))


def test_a_failed_npz_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space left"):
        save_npz(tmp_path / "a.npz", IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("columns", "rows_columns"), [(None, (2, 3)), (2, (3, 2)), (5, (1, 5))])
def test_grid(columns: int | None, rows_columns: tuple[int, int]) -> None:
    rows, wide = rows_columns
    grid = make_grid(IMAGES, columns, gap=1)
    assert grid.shape == (rows * 5 + 1, wide * 7 + 1, 3)
    for i, image in enumerate(IMAGES):
        top, left = 1 + i // wide * 5, 1 + i % wide * 7
        assert np.array_equal(grid[top : top + 4, left : left + 6], image)
    assert (grid == 255).all(2).sum() == grid.shape[0] * grid.shape[1] - 5 * 4 * 6


def test_a_small_grid_is_enlarged_by_a_whole_factor(tmp_path: Path) -> None:
    save_grid(tmp_path / "g.png", IMAGES)
    with Image.open(tmp_path / "g.png") as image:
        pixels = np.asarray(image)
    assert np.array_equal(pixels, make_grid(IMAGES).repeat(4, 0).repeat(4, 1))
    save_grid(tmp_path / "l.png", np.zeros((1, 900, 900, 3), np.uint8))
    with Image.open(tmp_path / "l.png") as image:
        assert image.size == (904, 904)


def test_single_pngs(tmp_path: Path) -> None:
    save_pngs(tmp_path / "new/folder", IMAGES, list("abcde"))
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == [f"{c}.png" for c in "abcde"]
    with Image.open(tmp_path / "new/folder/c.png") as image:
        assert np.array_equal(np.asarray(image), IMAGES[2])
