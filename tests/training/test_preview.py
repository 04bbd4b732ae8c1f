"""Preview grids: what is drawn, and under which names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data import normalised
from fastdiff.data.shapes import SHAPES
from fastdiff.models import UNet
from fastdiff.models.super_res import low_resolution
from fastdiff.training import Trainer, preview
from fastdiff.training.preview import save_previews

from .support import trainer


def drawn(subject: Trainer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[Any]]:
    """What sampling was asked for, and the arguments of the first grid."""
    asked: dict[str, Any] = {}
    grids: list[Any] = []
    real_generate, real_save = preview.generate, preview.save_grid

    def generate(*args: Any, **kwargs: Any) -> Any:
        asked.update(kwargs)
        return real_generate(*args, **kwargs)

    def save(path: Path, *args: Any) -> None:
        grids.append(args)
        real_save(path, *args)

    monkeypatch.setattr(preview, "generate", generate)
    monkeypatch.setattr(preview, "save_grid", save)
    assert isinstance(subject.model, UNet)
    paths = save_previews(folder, subject.state, subject.model, subject.dataset, subject.runtime)
    assert [path.name for path in paths] == ["000000_raw.png", "000000_ema_0.9999.png"]
    assert all(path.exists() for path in paths)
    assert len(grids) == 2
    return asked, grids[0]


def of_classes(run_dir: Path, shapes: Path, **flags: Any) -> Trainer:
    subject = trainer(run_dir, shapes, diffusion_steps=2, class_cond=True, **flags)
    config = replace(subject.config, class_names=SHAPES)
    subject.config = subject.state.config = config
    return subject


def test_a_column_for_each_class(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = of_classes(tmp_path, shapes)
    asked, (_, columns, names) = drawn(subject, tmp_path, monkeypatch)
    assert asked["labels"].tolist() == [0, 1, 2, 3] * 4
    assert (columns, names) == (4, [*SHAPES] * 4)
    with Image.open(tmp_path / "000000_raw.png") as grid:
        top = grid.height - 8 * 42  # 4 rows of 8 pixels and 2 between, each pixel 8 wide
        assert (grid.width, top > 8) == (8 * 42, True)
        assert (np.asarray(grid)[:top] < 128).any()  # the names


def test_classes_that_the_data_lacks_have_numbers(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = of_classes(tmp_path, shapes, num_classes=20)
    _, (_, columns, names) = drawn(subject, tmp_path, monkeypatch)
    assert (columns, names) == (16, [*SHAPES, *map(str, range(4, 16))])


def test_without_classes_no_names(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for small_size in (None, 4):
        subject = trainer(tmp_path, shapes, diffusion_steps=2, small_size=small_size)
        asked, (_, columns, names) = drawn(subject, tmp_path, monkeypatch)
        assert (asked["labels"], columns, names) == (None, None, None)


def test_an_enlarged_image_has_its_own_class(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = of_classes(tmp_path, shapes, small_size=4)
    asked, (_, columns, names) = drawn(subject, tmp_path, monkeypatch)
    assert asked["labels"].tolist() == [0, 1, 2, 3] * 4
    assert (columns, names) == (4, [*SHAPES] * 4)
    dataset = subject.dataset
    assert dataset.labels is not None
    seen = asked["low_res"](np.arange(16))
    for number in range(16):
        own = dataset.images[dataset.labels == number % 4][number // 4 % 3]  # of three of each class
        expected = low_resolution(normalised(torch.from_numpy(own[None])), 4)
        assert torch.equal(seen[number : number + 1], expected), number


def test_images_that_are_few_or_of_rare_classes_are_repeated() -> None:
    class Few:
        images = np.zeros((5, 1, 1, 3), np.uint8)
        labels = np.array([2, 2, 0, 2, 0])

    rows, labels = preview._chosen(Few(), 3, True)  # type: ignore[arg-type]
    assert rows.tolist()[:6] == [2, 0, 4, 1, 3, 2]
    assert labels is not None
    assert labels.tolist() == Few.labels[rows].tolist()
