"""A class is the same class in every file that fastdiff writes and reads, whatever it is called."""

import json
import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdiff import DataConfig, ImageFolder, load_checkpoint
from fastdiff.data import load_dataset
from fastdiff.data.classes import composed
from fastdiff.evaluation.nll import labels_for
from fastdiff.sampling.base_samples import load_base_samples

from ..sampling.support import UPPER, saved
from .conftest import Cli
from .support import PLAIN, SHORT, TINY, refused, succeeded

NUMBERS = tuple(map(str, (0, 1, 2, 3, 4, 6, 7, 10, 11)))  # no 5
ODD = ("red_car", "red-car", "café", "Cat", "cat ", "-dash", "a'b\"c", "with\ttab", "red, large", "%5F", "x..", "07")


def write_classes(folder: Path, names: tuple[str, ...]) -> Path:
    """Two images of a class in its folder."""
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def train(cli: Cli, data: object, run_dir: str, *flags: object) -> None:
    args = ("--data-dir", data, "--run-dir", run_dir, *TINY, *SHORT, "--class-cond", "--steps", 1, *flags)
    succeeded(cli("train", *args))


def bits(cli: Cli, model: str, data: object, *flags: object) -> float:
    """The likelihood of the first five images."""
    what = ("--data-dir", data, "--num-samples", 5, "--steps", 3, "--out-dir", "nll", "--overwrite")
    succeeded(cli("evaluate", "nll", model, *what, *flags, *PLAIN))
    return float(json.loads(Path("nll/nll.json").read_text())["bits_per_dim"])


SAMPLES = ("a.npz", "pngs", "packed.npz")


def labels(path: str) -> list[str]:
    """What the file says that its images show."""
    with np.load(path) as file:
        return [str(file["class_names"][i]) for i in file["arr_1"]]


def comes_back(cli: Cli, names: tuple[str, ...], base: Path, again: Sequence[str] = SAMPLES) -> None:
    """Through training, npz, PNG, evaluation, packing, enlarging and training on the samples."""
    for path in base.iterdir():
        assert path.name in ("data",), path
    train(cli, write_classes(base / "data", names), "run", "--labels", "folder", "--lr", "0.1")
    known = tuple(sorted(map(composed, names)))
    assert load_checkpoint("run", ema_rate=0.0).class_names == known
    draw = ("--steps", 2, "--num-samples", 2 * len(names), "--ema-rate", "raw", *PLAIN)
    succeeded(cli("sample", "run", *draw, "--out", "a.npz", "--png-dir", "pngs"))
    assert labels("a.npz") == [*known, *known]
    folder = ImageFolder("pngs", 8)
    assert folder.class_names == known
    with np.load("a.npz") as file:
        by_number = {int(name.rpartition("_")[2][:-4]): i for i, name in enumerate(folder.names)}
        for number, (image, label) in enumerate(zip(file["arr_0"], file["arr_1"], strict=True)):
            found, place = folder[by_number[number]]
            assert np.array_equal(found, image)
            assert (place, known[label]) == (label, folder.class_names[place])
    turned = known[::-1]  # a model that numbers them otherwise
    for place, shown in (("a.npz", labels("a.npz")), ("pngs", [known[label] for label in folder.labels])):
        numbers = load_base_samples(Path(place), 8, turned).labels
        assert numbers is not None
        assert [turned[number] for number in numbers] == shown
    succeeded(cli("data", "pack", "pngs", "packed.npz", "--image-size", 8, "--labels", "prefix"))
    assert bits(cli, "run", "pngs") == bits(cli, "run", "packed.npz")
    bits(cli, "run", "a.npz")
    for data in again:
        train(cli, data, f"on {data}", "--no-flip")
        assert load_checkpoint(f"on {data}").class_names == known


def test_numbers_as_names(cli: Cli, tmp_path: Path) -> None:
    comes_back(cli, NUMBERS, tmp_path)
    succeeded(cli("sample", "run", "--class", 2, "--num-samples", 3, "--steps", 2, *PLAIN, "--out", "two.npz"))
    assert labels("two.npz") == ["2"] * 3
    # the same images as files
    succeeded(cli("sample", "run", "--class", 2, "--num-samples", 3, "--steps", 2, *PLAIN, "--png-dir", "two"))
    assert bits(cli, "run", "two.npz") == bits(cli, "run", "two")
    refused(
        cli("sample", "run", "--class", 5, "--steps", 2, *PLAIN, "--out", "five.npz"),
        "^error: class '5' is none of the model's 9 classes; there are 0, 1, 10, 11, 2",
    )


def test_odd_names(cli: Cli, tmp_path: Path) -> None:
    comes_back(cli, ODD, tmp_path)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sets(
        st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=12)
        .map(composed)
        .filter(lambda name: not name.startswith(".")),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from(SAMPLES),  # each of them with the names above
)
def test_any_names(cli: Cli, tmp_path_factory: pytest.TempPathFactory, names: set[str], again: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        comes_back(cli, tuple(names), folder, [again])


def test_a_mac_and_linux_have_one_class(cli: Cli, tmp_path: Path) -> None:
    mac, linux = (unicodedata.normalize(form, "maçã") for form in ("NFD", "NFC"))
    train(cli, write_classes(tmp_path / "data", ("uva", mac)), "run", "--labels", "folder")
    for name in (mac, linux):
        succeeded(cli("sample", "run", "--class", name, "--num-samples", 1, "--steps", 1, *PLAIN, "--overwrite"))
        assert labels("samples.npz") == [linux]
    data = write_classes(tmp_path / "linux", (linux, "uva"))
    bits(cli, "run", data, "--labels", "folder")


def test_small_images_are_enlarged_as_what_they_show(cli: Cli, tmp_path: Path) -> None:
    """By a model that numbers the classes otherwise, in two commands as in one."""
    flags = {"class_cond": True, "num_classes": 3}
    saved(tmp_path / "small.safetensors", class_names=("cat", "dog", "red_car"), **flags)
    saved(tmp_path / "large.safetensors", class_names=("red_car", "cat", "dog"), seed=1, **flags, **UPPER)
    draw = ("--num-samples", 6, "--steps", 2, *PLAIN)
    succeeded(cli("sample", "small.safetensors", *draw, "--out", "small.npz", "--png-dir", "pngs"))
    enlarge = ("large.safetensors", *draw, "--base-samples")
    for out, what in (("a.npz", "small.npz"), ("b.npz", "pngs")):
        succeeded(cli("sample", *enlarge, what, "--out", out))
    succeeded(cli("sample", "small.safetensors", *draw, "--super-res", "large.safetensors", "--out", "c.npz"))
    assert labels("a.npz") == labels("c.npz") == ["cat", "dog", "red_car"] * 2
    assert labels("b.npz") == ["cat", "cat", "dog", "dog", "red_car", "red_car"]  # in the order of the folder
    with np.load("a.npz") as a, np.load("c.npz") as c:
        assert np.array_equal(a["arr_0"], c["arr_0"])
        assert a["class_names"].tolist() == ["red_car", "cat", "dog"]
    saved(tmp_path / "other.safetensors", class_names=("eel", "cat", "dog"), **flags, **UPPER)
    refused(
        cli("sample", "other.safetensors", *draw, "--base-samples", "small.npz"), "small.npz has the class 'red_car'"
    )


@pytest.mark.filterwarnings("default")
def test_an_npz_without_names_is_read_by_number_and_says_so(cli: Cli, tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors", class_names=("a", "b", "c"), class_cond=True, num_classes=3)
    saved(tmp_path / "large.safetensors", class_names=("a", "b", "c"), class_cond=True, num_classes=3, **UPPER)
    images = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), np.uint8)
    np.savez("old.npz", images, np.array([0, 1, 2, 1]))
    for command in (
        ("evaluate", "nll", "m.safetensors", "--data-dir", "old.npz", "--steps", 2),
        ("sample", "large.safetensors", "--base-samples", "old.npz", "--steps", 2),
        ("train", "--data-dir", "old.npz", *TINY, *SHORT, "--class-cond", "--steps", 1),
    ):
        result = cli(*command, *PLAIN)
        assert result.status == 0, result
        assert re.search(r"^warning: (\S*old.npz|the data) has no class_names: ", result.err), result
    with np.load("samples.npz") as file:
        assert file["arr_1"].tolist() == [0, 1, 2, 1]


def test_a_model_without_names_writes_numbers(cli: Cli, tmp_path: Path) -> None:
    """As improved-diffusion's models are; more than ten, whose order by name is another."""
    saved(tmp_path / "m.safetensors", class_cond=True, num_classes=12)
    draw = ("m.safetensors", "--num-samples", 12, "--steps", 1, *PLAIN)
    succeeded(cli("sample", *draw, "--png-dir", "pngs"))
    assert labels("samples.npz") == [str(i) for i in range(12)]
    for data in ("samples.npz", "pngs"):
        with warnings.catch_warnings(action="ignore"):  # of a class for each image
            dataset = load_dataset(DataConfig(data_dir=data), 8, labelled=True)
        found = labels_for(load_checkpoint("m.safetensors"), dataset)
        assert found is not None
        assert found.tolist() == [int(dataset.class_names[i]) for i in dataset.labels]
        assert sorted(found) == list(range(12))


def test_a_class_whose_name_no_file_can_have(cli: Cli, tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors", class_names=("a", "b" * 240), class_cond=True, num_classes=2)
    result = cli("sample", "m.safetensors", "--steps", 1, *PLAIN, "--png-dir", "pngs")
    refused(result, "png_dir: the class b+... is too long for the name of a file")
    assert not (tmp_path / "samples.npz").exists()
