"""fastdiff train --label-dropout: what is refused, and what the files say of it and of the classes."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastdiff import load_checkpoint

from .conftest import Cli
from .support import PLAIN, SHORT, TINY, contents, refused, succeeded


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Three cats, a dog that cannot be read, and two eels."""
    data = tmp_path / "animals"
    data.mkdir()
    for name in ("cat_1", "cat_2", "cat_3", "eel_1", "eel_2"):
        Image.new("RGB", (8, 8), "red").save(data / f"{name}.png")
    (data / "dog_1.png").write_bytes(b"")
    return data


def metadata(run_dir: Path, step: int) -> dict[str, Any]:
    """What the model's file of a step says, and its averages' alike."""
    model, ema = (load_checkpoint(run_dir / f"{kind}{step:06d}.safetensors") for kind in ("model", "ema_0.9999_"))
    for name in ("label_dropout", "class_counts", "class_names", "run_config"):
        assert model.metadata[name] == ema.metadata[name]
    return dict(model.metadata)


def test_the_files_say_what_sampling_needs(train: Cli, animals: Path, tmp_path: Path) -> None:
    succeeded(train("r", "--data-dir", animals, "--batch-size", 2, "--steps", 1, "--label-dropout", 0.25))
    said = metadata(tmp_path / "r", 1)
    assert (said["label_dropout"], said["class_counts"]) == (0.25, [3, 0, 2])
    assert said["class_names"] == ["cat", "dog", "eel"]
    assert json.loads((tmp_path / "r/config.json").read_text())["class_counts"] == [3, 0, 2]


def test_a_run_without_classes(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    succeeded(cli("train", "--data-dir", shapes, "--run-dir", "r", *TINY, *SHORT, "--steps", 1))
    said = metadata(tmp_path / "r", 1)
    assert (said["label_dropout"], said["class_counts"]) == (0.0, [])


def test_resume_counts_anew(train: Cli, cli: Cli, animals: Path, tmp_path: Path) -> None:
    """Where the data have changed, and where an older run did not count."""
    succeeded(train("r", "--data-dir", animals, "--batch-size", 2, "--steps", 1, "--label-dropout", 0.25))
    path = tmp_path / "r/config.json"
    config = json.loads(path.read_text())
    del config["class_counts"]
    path.write_text(json.dumps(config))
    resume = ("train", "--run-dir", "r", "--resume", *PLAIN)
    succeeded(cli(*resume, "--steps", 2))
    said = metadata(tmp_path / "r", 2)
    assert (said["class_counts"], said["label_dropout"]) == ([3, 0, 2], 0.25)
    Image.new("RGB", (8, 8), "blue").save(animals / "dog_2.png")
    result = succeeded(cli(*resume, "--steps", 3, "--allow-changes", "--label-dropout", 0.5))
    assert "label_dropout 0.25 becomes 0.5" in result.out
    said = metadata(tmp_path / "r", 3)
    assert (said["class_counts"], said["label_dropout"]) == ([3, 1, 2], 0.5)


def test_classes_that_the_data_do_not_have_are_not_counted(train: Cli, animals: Path, tmp_path: Path) -> None:
    succeeded(train("r", "--data-dir", animals, "--batch-size", 2, "--steps", 1, "--num-classes", 9))
    assert metadata(tmp_path / "r", 1)["class_counts"] == [3, 0, 2]


@pytest.mark.parametrize("share", ["1", "-0.1", "nan"])
def test_a_share_that_is_none(train: Cli, share: str, tmp_path: Path) -> None:
    refused(train("r", "--steps", 1, "--label-dropout", share), "label.dropout", share)
    assert not (tmp_path / "r").exists()


def test_a_model_without_classes(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    run = ("train", "--data-dir", shapes, "--run-dir", "r", *TINY, *SHORT)
    said = r"^error: label_dropout 0\.1 needs a class-conditional model: train one with --class-cond$"
    refused(cli(*run, "--steps", 1, "--label-dropout", 0.1), said)
    assert not (tmp_path / "r").exists()
    succeeded(cli(*run, "--steps", 1))
    before = contents(tmp_path / "r")
    refused(cli(*run, "--steps", 2, "--resume", "--label-dropout", 0.1), said)
    assert contents(tmp_path / "r") == before
