"""Names of classes as files have them, and classes of one file as another numbers them."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.data import ImageFolder
from fastdiff.data.classes import class_of_file, completed, file_name_of, renumbered

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@given(NAMES)
def test_a_name_comes_back_from_a_file(name: str) -> None:
    file = f"{file_name_of(name)}_000017.png"
    assert class_of_file(file) == name
    assert not file.startswith(".")
    assert not {"/", "\\"} & set(file)


@pytest.mark.parametrize(
    "name", ["red_car", "a%5Fb", "%25", "100%", ".hidden", "", "a%255Fb", "_", "caf\udce9", "a:b", "ab:c"]
)
def test_names_that_would_be_taken_for_others(name: str) -> None:
    assert class_of_file(f"{file_name_of(name)}_1_2.png") == name


@pytest.mark.parametrize("file", ["50%20off_1.png", "a%5fb_1.png", "cat_1.png", "x%_1.png", "%2Ea%2E_1.png"])
def test_other_files_keep_their_names(file: str) -> None:
    """What fastdiff would not have written so is no code."""
    assert class_of_file(file) == file.split("_")[0]


def test_a_mac_and_linux_name_one_class(tmp_path: Path) -> None:
    for i, form in enumerate(("NFC", "NFD")):
        name = unicodedata.normalize(form, "maçã")
        (tmp_path / "prefix").mkdir(exist_ok=True)
        (tmp_path / "prefix" / f"{name}_{i}.png").write_bytes(b"")
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "0.png").write_bytes(b"")
    assert len(os.listdir(tmp_path / "folder")) == 2
    for labels in ("prefix", "folder"):
        assert ImageFolder(tmp_path / labels, 8, labels).class_names == ("maçã",)


def test_a_macs_classes_keep_their_numbers(tmp_path: Path) -> None:
    """In the order of the names as they are written, in which é is e and an accent."""
    for name in ("fig", unicodedata.normalize("NFD", "éclair"), "zoo"):
        (tmp_path / f"{name}_1.png").write_bytes(b"")
    folder = ImageFolder(tmp_path, 8, "prefix")
    assert folder.class_names == ("éclair", "fig", "zoo")
    assert folder.written_class_names == tuple(unicodedata.normalize("NFD", name) for name in folder.class_names)


LABELS = np.array([0, 1, 1, 2])


def test_classes_are_matched_by_name() -> None:
    assert renumbered(LABELS, ("b", "c", "a"), ("a", "b", "c", "d"), 4, "x", "y").tolist() == [1, 2, 2, 0]
    assert renumbered(LABELS, ("3", "10", "1"), ("1", "10", "3"), 3, "x", "y").tolist() == [2, 1, 1, 0]
    assert renumbered(LABELS[:1], ("e\u0301", "strange"), ("é",), 1, "x", "y").tolist() == [0]


def test_names_that_are_numbers_are_those_of_a_model_without_names() -> None:
    assert renumbered(LABELS, ("3", "10", "1"), (), 11, "x", "y").tolist() == [3, 10, 10, 1]


def test_classes_are_matched_by_number_where_there_are_no_names() -> None:
    with pytest.warns(
        UserWarning, match="^x has no class_names: its labels are taken as the model's class numbers, 0 being a$"
    ):
        assert renumbered(LABELS, None, ("a", "b", "c"), 3, "x", "y").tolist() == LABELS.tolist()
    with pytest.warns(UserWarning, match="^the model has no class names: .* 0 being b$"):
        assert renumbered(LABELS, ("b", "c", "a"), (), 3, "x", "y").tolist() == LABELS.tolist()
    with pytest.warns(UserWarning, match="^x has no class_names: its labels are taken as the model's class numbers$"):
        assert renumbered(LABELS, None, (), 3, "x", "y").tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("labels", "names", "known", "said"),
    [
        ([0, 2], ("a", "b", "z"), ("a", "b"), "x has the class 'z', which the model does not know; it knows a, b: y"),
        ([0, 2], ("a", "b"), ("a", "b"), "x has labels from 0 to 2, which must be from 0 to 1"),
        ([0, -1], ("a", "b"), ("a", "b"), "x has labels from -1 to 0"),
        ([0, 2], None, ("a", "b"), "x has the class 2, but the model has the classes 0 to 1: y"),
        ([0, -1], None, (), "x has the class -1"),
        ([0, 2], ("a", "b", "z"), (), "x has the class 2, but the model has the classes 0 to 1"),
        ([0, 1], ("0", "7"), (), "x has the class '7'"),
    ],
)
def test_classes_that_a_model_lacks(
    labels: list[int], names: tuple[str, ...] | None, known: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        renumbered(np.array(labels), names, known, 2, "x", "y")


def test_an_npz_of_a_model_without_names_is_read_by_number() -> None:
    numbers, labels = ("0", "1", "2"), np.array([2, 0])
    with pytest.warns(UserWarning, match="has no class_names"):
        assert renumbered(labels, numbers, ("a", "b", "c"), 3, "x", "y", npz=True).tolist() == [2, 0]
    assert renumbered(labels, numbers, ("1", "0", "2"), 3, "x", "y", npz=True).tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"^x has the class '2'"):
        renumbered(labels, numbers, ("a", "b", "c"), 3, "x", "y")


def test_a_class_that_no_image_has_may_be_unknown() -> None:
    assert renumbered(np.array([0, 0]), ("a", "z"), ("b", "a"), 2, "x", "y").tolist() == [1, 1]


def test_classes_without_a_name_have_one() -> None:
    assert completed((), 3) == ("0", "1", "2")
    assert completed(("cat", "2"), 4) == ("cat", "2", "class 2", "3")
