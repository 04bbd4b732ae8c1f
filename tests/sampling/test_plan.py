"""What is to be drawn: which classes, and what does not go together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastdiff import Checkpoint, DiffusionConfig, SampleConfig
from fastdiff.diffusion import build_diffusion
from fastdiff.sampling import save_npz, split_classes
from fastdiff.sampling.classes import Classes, labels_of

from .support import CLASSES, MODEL, NAMES, UPPER, loaded, plan, runtime


def of_counts(counts: list[int]) -> Checkpoint:
    """A model that was trained on so many images of each class; it is not drawn from."""
    config = MODEL.from_dict(MODEL.to_dict() | {"class_cond": True, "num_classes": max(len(counts), 3)})
    process = DiffusionConfig()
    names = tuple(f"c{i}" for i in range(len(counts)))
    model = build_diffusion(process)  # anything stands for the net
    return Checkpoint(model, model, config, process, 0, names, {"class_counts": counts})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return loaded(tmp_path_factory.mktemp("plan"), **CLASSES, class_counts=[5, 0, 2])


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ((), [0, 1, 2, 0, 1]),
        (("dog",), [1, 1, 1, 1, 1]),
        (("zebra", "cat"), [2, 0, 2, 0, 2]),
        ((1,), [1, 1, 1, 1, 1]),
        (("2", 0, "cat", "dog"), [2, 0, 0, 1, 2]),
    ],
)
def test_classes_are_drawn_in_turn(checkpoint: Checkpoint, classes: tuple[str | int, ...], expected: list[int]) -> None:
    labels = labels_of(Classes.of(checkpoint), np.arange(5), classes)
    assert labels is not None
    assert (labels.tolist(), labels.dtype) == (expected, np.int64)
    part = labels_of(Classes.of(checkpoint), np.array([4, 1]), classes)
    assert part is not None
    assert part.tolist() == [expected[4], expected[1]]  # by its number, whatever else is drawn


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**60), min_size=1, max_size=9),
)
def test_as_in_the_data_every_class_exists(counts: list[int], seed: int, numbers: list[int]) -> None:
    """And a label is a function of seed and number: whatever is drawn beside it, and in whatever order."""
    subject = of_counts(counts)
    whole = labels_of(Classes.of(subject), np.array(numbers), mix="data", seed=seed)  # type: ignore[arg-type]
    assert whole is not None
    assert all(counts[label] for label in whole)
    alone = [labels_of(Classes.of(subject), np.array([number]), mix="data", seed=seed) for number in numbers]  # type: ignore[arg-type]
    assert whole.tolist() == [int(label[0]) for label in alone if label is not None]


@pytest.mark.parametrize("counts", [[5, 0, 2], [1, 1, 1], [10**6, 10**6, 2 * 10**6]])
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_as_in_the_data_is_as_often(counts: list[int], seed: int) -> None:
    labels = labels_of(Classes.of(of_counts(counts)), np.arange(20000), mix="data", seed=seed)  # type: ignore[arg-type]
    assert labels is not None
    expected = 20000 * np.array(counts) / sum(counts)
    found = np.bincount(labels, minlength=len(counts))
    assert (np.abs(found - expected) < 5 * np.sqrt(expected.clip(1))).all(), (found, expected)
    other = labels_of(Classes.of(of_counts(counts)), np.arange(20000), mix="data", seed=1)  # type: ignore[arg-type]
    assert not np.array_equal(labels, other)


def test_as_in_the_data_wants_its_numbers(tmp_path: Path) -> None:
    subject = plan(loaded(tmp_path, **CLASSES), SampleConfig(class_mix="data"))
    with pytest.raises(ValueError, match=r"^class_mix data: the checkpoint does not say how many"):
        subject.labels(np.arange(2))


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("cat", NAMES, ("cat",)),
        ("cat,dog", NAMES, ("cat", "dog")),
        (" cat , 7", NAMES, ("cat", "7")),
        ("", NAMES, ("",)),  # which is none, and is told so
        ("cat,", NAMES, ("cat", "")),
        ("cat,dog", ("cat,dog", "cat"), ("cat,dog",)),
        ("a b", (), ("a b",)),
    ],
)
def test_splitting_classes(text: str, names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert split_classes(text, names) == expected


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("zebr", r"^class 'zebr' is none of the model's 3 classes; there are zebra and more$"),
        ("Dog", r"there are dog"),
        ("3", r"^class '3' is none of the model's 3 classes; there are cat, dog, zebra$"),
        (3, r"class '3' is none"),
        (-1, r"class '-1' is none"),
        ("²", r"class '²' is none"),
        ("", r"class '' is none"),
    ],
)
def test_a_class_that_does_not_exist(checkpoint: Checkpoint, wanted: str | int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(checkpoint, SampleConfig(), classes=("cat", wanted)).labels(np.arange(4))


def test_classes_of_a_model_without(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class cat: this model was trained without classes"):
        plan(loaded(tmp_path), SampleConfig(), classes=("cat",)).labels(np.arange(4))
    assert plan(loaded(tmp_path), SampleConfig()).labels(np.arange(4)) is None


def test_class_names_that_are_numbers(tmp_path: Path) -> None:
    """Folders of digits are sorted as text; where a class is called by a number, a number is a name."""
    names = ("1", "10", "2")
    subject = loaded(tmp_path, **CLASSES | {"class_names": names})
    for text, expected in (("2", 2), ("10", 1), ("1", 0)):
        labels = labels_of(Classes.of(subject), np.zeros(1, np.int64), split_classes(text, names))
        assert labels is not None
        assert labels[0] == expected
    for wanted in (10, "10"):
        labels = labels_of(Classes.of(subject), np.zeros(1, np.int64), (wanted,))
        assert labels is not None
        assert labels[0] == 1
    for unknown in (0, "0"):
        with pytest.raises(ValueError, match=r"^class '0' is none of the model's 3 classes; there are 10"):
            labels_of(Classes.of(subject), np.zeros(1, np.int64), (unknown,))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    save_npz(tmp_path / "small.npz", [images], images.shape, arr_1=np.array([0, 1, 2]), class_names=np.array(NAMES))
    return tmp_path / "small.npz"


def test_base_samples_are_for_super_resolution(tmp_path: Path, small: Path) -> None:
    with pytest.raises(ValueError, match=r"^base_samples: this is not a super-resolution model"):
        plan(loaded(tmp_path), SampleConfig(), base_samples=small)
    with pytest.raises(ValueError, match=r"^this is a super-resolution model: give it images .*--base-samples.* 8 pix"):
        plan(loaded(tmp_path, **UPPER), SampleConfig())
    subject = plan(loaded(tmp_path, **UPPER), SampleConfig(), base_samples=small)
    assert subject.config.num_samples == 3
    assert plan(loaded(tmp_path, **UPPER), SampleConfig(), base_samples=small, num_samples=7).config.num_samples == 7


def test_classes_come_with_the_base_samples(tmp_path: Path, small: Path) -> None:
    upper = loaded(tmp_path, **UPPER, **CLASSES)
    with pytest.raises(ValueError, match=r"^class dog: the images have the classes of the base samples$"):
        plan(upper, SampleConfig(), base_samples=small, classes=("dog",))
    # a model without names for its classes is told by the file alone, which may be another model's
    other = loaded(tmp_path, **UPPER, class_cond=True, num_classes=2)
    with pytest.raises(
        ValueError, match=r"small\.npz has the class 2, but the model has the classes 0 to 1: give samples of"
    ):
        plan(other, SampleConfig(), base_samples=small)


@pytest.mark.parametrize(
    ("upper", "said"),
    [
        ({}, r"^super_res: this is not a super-resolution model$"),
        ({"image_size": 32, "small_size": 16}, r"enlarges images of 16 pixels, and the base draws 8$"),
    ],
)
def test_a_cascade_of_models_that_do_not_fit(tmp_path: Path, upper: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(loaded(tmp_path, **CLASSES), SampleConfig(), super_res=loaded(tmp_path, **upper))


def test_a_cascade_of_other_classes(tmp_path: Path) -> None:
    """What is drawn must be known to both, by name, or by number where one has none."""
    upper = {**UPPER, **CLASSES, "num_classes": 4, "class_names": ("eel", "dog", "cat", "ant")}
    numbers = np.arange(4)
    subject = plan(loaded(tmp_path, **CLASSES), SampleConfig(), super_res=loaded(tmp_path, **upper), classes=("cat",))
    labels = subject.labels(numbers)
    assert labels is not None
    engine = subject.engine(runtime(), 4)
    assert engine.upper_labels is not None
    assert engine.upper_labels(labels).tolist() == [2] * 4
    subject = plan(loaded(tmp_path, **CLASSES), SampleConfig(), super_res=loaded(tmp_path, **upper))
    with pytest.raises(
        ValueError, match=r"^the base has the class 'zebra', which the model does not know; it knows eel"
    ):
        subject.labels(numbers)
    nameless = loaded(tmp_path, class_cond=True, num_classes=3)
    subject = plan(nameless, SampleConfig(), super_res=loaded(tmp_path, **upper))
    with pytest.warns(
        UserWarning,
        match="^the base has no class_names: its labels are taken as the model's class numbers, 0 being eel",
    ):
        assert subject.labels(numbers) is not None


def test_a_cascade_from_a_base_without_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^super_res: the model has 3 classes, and the base no classes$"):
        plan(loaded(tmp_path), SampleConfig(), super_res=loaded(tmp_path, **UPPER, **CLASSES))
    plan(loaded(tmp_path, **CLASSES), SampleConfig(), super_res=loaded(tmp_path, **UPPER))  # needs none


def test_enlarged_and_enlarged_again_is_two_commands(tmp_path: Path, small: Path) -> None:
    upper, more = loaded(tmp_path, **UPPER), loaded(tmp_path, image_size=32, small_size=16)
    with pytest.raises(ValueError, match=r"super.res"):
        plan(upper, SampleConfig(), base_samples=small, super_res=more)


@pytest.mark.parametrize(
    ("how", "choices", "flags", "said"),
    [
        ({}, {"ends": ("1", "2")}, {}, r"^interpolate needs a deterministic sampler: use --sampler ddim"),
        ({"sampler": "dpm++-sde"}, {"ends": ("1", "2")}, {}, r"needs a deterministic sampler"),
        ({"sampler": "ddim", "eta": 0.1}, {"ends": ("1", "2")}, {}, r"without eta"),
        ({"sampler": "ddim"}, {"ends": ("1", "no.png")}, {}, r"^interpolate no\.png: neither a seed nor an image"),
        ({"sampler": "ddim"}, {"ends": ("-1", "2")}, {}, r"^interpolate -1: neither"),
        ({"sampler": "ddim"}, {"ends": ("1", "2")}, CLASSES, r"^interpolate: this model has classes.*--class$"),
        ({"sampler": "ddim"}, {"ends": ("1", "2"), "classes": ("cat", "dog")}, CLASSES, r"this model has classes"),
        ({"sampler": "ddim"}, {"ends": ("1", str(2**64))}, {}, r"^interpolate 18446744073709551616: neither"),
    ],
)
def test_interpolations_that_are_none(
    tmp_path: Path, how: dict[str, Any], choices: dict[str, Any], flags: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        plan(loaded(tmp_path, **flags), SampleConfig(**how), **choices)


def test_interpolation_is_not_for_super_resolution(tmp_path: Path, small: Path) -> None:
    how, ends = SampleConfig(sampler="ddim"), ("1", "2")
    for choices, flags in (({"base_samples": small}, UPPER), ({"super_res": loaded(tmp_path, **UPPER)}, {})):
        with pytest.raises(ValueError, match=r"^interpolate: not with a super-resolution model"):
            plan(loaded(tmp_path, **flags), how, ends=ends, **choices)


def test_an_end_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    ends = (str(tmp_path / "good.png"), str(tmp_path / "bad.png"))
    with pytest.raises(ValueError, match=r"bad\.png"):
        plan(loaded(tmp_path), SampleConfig(sampler="ddim", steps=2), ends=ends).engine(runtime(), 2)


def test_the_size_of_the_images_is_the_last_models(tmp_path: Path) -> None:
    assert plan(loaded(tmp_path), SampleConfig()).image_size == 8
    assert plan(loaded(tmp_path), SampleConfig(), super_res=loaded(tmp_path, **UPPER)).image_size == 16
