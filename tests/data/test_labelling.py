"""Where classes come from: what the files suggest, what a label file says, and what is told about it."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastdiff.data import ImageFolder

from ..support import refusal
from .archive_support import png, zipped
from .support import save


def made(root: Path, *names: str) -> Path:
    for name in names:
        save(root / name)
    return root


def classes(folder: ImageFolder) -> dict[str, str]:
    assert folder.labels is not None
    return {n: folder.class_names[i] for n, i in zip(folder.names, folder.labels.tolist(), strict=True)}


def automatic(root: Path) -> ImageFolder:
    return ImageFolder(root, 8, labels="auto")


PHOTOS = [f"{kind}/{i:04}.jpg" for kind in ("cats", "dogs", "horses") for i in range(29)]


def test_sub_folders_are_classes_and_87_file_names_are_not(tmp_path: Path) -> None:
    folder = automatic(made(tmp_path, *PHOTOS))
    assert folder.class_names == ("cats", "dogs", "horses")
    assert folder.notes == ("labels: the sub-folders are the classes; --labels prefix takes the file names",)
    assert len(ImageFolder(tmp_path, 8).class_names) == 29  # improved-diffusion's rule, as ever
    assert ImageFolder(tmp_path, 8, labels=None).notes == ()


@pytest.mark.parametrize(
    "parts",
    [("test", "train", "val"), ("Training", "Validation"), ("cifar_test", "cifar_train"), ("test_set", "training_set")],
)
def test_parts_of_a_data_set_are_no_classes(tmp_path: Path, parts: tuple[str, ...]) -> None:
    folder = automatic(
        made(tmp_path, *(f"{part}/{kind}/{i}.png" for part in parts for kind in ("cat", "dog") for i in "01"))
    )
    assert folder.class_names == ("cat", "dog")
    assert len(folder) == 4 * len(parts)
    assert folder.notes == (
        f"labels: the sub-folders of {', '.join(parts)} are the classes; --labels prefix takes the file names; "
        f"--data-dir {tmp_path / next(part for part in parts if 'rain' in part)} takes one part",
    )
    assert ImageFolder(tmp_path, 8, labels="folder").class_names == parts  # asked for


def test_parts_with_classes_in_the_file_names(tmp_path: Path) -> None:
    folder = automatic(made(tmp_path, "train/cat_1.png", "train/dog_1.png", "test/cat_2.png"))
    assert folder.class_names == ("cat", "dog")
    one = f"--data-dir {tmp_path / 'train'} takes one part"
    assert folder.notes == (f"labels: the file names hold the classes, in all of test, train; {one}",)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    folder = automatic(made(tmp_path, "bus/1.png", "train/1.png", "test/1.png"))
    assert folder.class_names == ("bus", "test", "train")


@pytest.mark.parametrize("around", ["", "photos/"])
def test_parts_beside_another_folder_become_classes_and_a_line_says_so(tmp_path: Path, around: str) -> None:
    names = [f"{around}{part}/{kind}/{i}.png" for part in ("test", "train") for kind in ("cat", "dog") for i in "01"]
    folder = automatic(made(tmp_path, *names, f"{around}extra/1.png"))
    assert folder.class_names == ("extra", "test", "train")
    (note,) = folder.notes
    assert note.endswith(
        "--labels prefix takes the file names; warning: test, train became classes: for a part use --data-dir "
        f"{tmp_path / around / 'train'}"
    )


def test_one_part_beside_another_folder(tmp_path: Path) -> None:
    zipped(tmp_path / "a.zip", {name: png() for name in ("train/1.png", "more/1.png")})
    (note,) = automatic(tmp_path / "a.zip").notes
    assert note.endswith("; warning: train became a class: for a part use a zip of one part")
    (note,) = automatic(made(tmp_path / "b", *(f"{name}/1.png" for name in ("bus", "car", "plane", "train")))).notes
    assert "warning" not in note


@pytest.mark.parametrize("around", ["", "photos/", "a/b/"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_folder_around_everything_is_no_class(tmp_path: Path, around: str, kind: str) -> None:
    names = [f"{around}{name}" for name in ("cat/1.png", "cat/2.png", "dog/1.png")]
    root = made(tmp_path / "data", *names)
    if kind == "zip":
        more = {f"__MACOSX/{around}cat/._1.png": b"\0\5\x16\7"}
        root = zipped(tmp_path / "a.zip", {name: png() for name in names} | more)
    folder = automatic(root)
    assert folder.names == names
    assert folder.class_names == ("cat", "dog")
    of = f" of {around.rstrip('/')}" if around else ""
    assert folder.notes == (f"labels: the sub-folders{of} are the classes; --labels prefix takes the file names",)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat_1.png", "dog_1.png"], ("cat", "dog")),
        (["only/cat_1.png", "only/dog_1.png"], ("cat", "dog")),
        (["n01/n01_1.png", "n02/n02_1.png"], ("n01", "n02")),
        (["cat_1.png", "more/dog_1.png"], ("cat", "dog")),
    ],
)
def test_file_names_are_classes_as_ever(tmp_path: Path, names: list[str], expected: tuple[str, ...]) -> None:
    folder = automatic(made(tmp_path, *names))
    assert (folder.class_names, folder.notes) == (expected, ())
    ever = ImageFolder(tmp_path, 8)
    assert ever.class_names == expected
    assert np.array_equal(ever.labels, folder.labels)


def test_one_image_beside_the_class_folders_is_named(tmp_path: Path) -> None:
    made(tmp_path, *(f"{kind}/{kind}{i:02}.png" for kind in ("cat", "dog") for i in range(20)), "cover.png")
    refusal(lambda: automatic(tmp_path), r"cover\.png lies in .* itself .* labels prefix")
    (tmp_path / "photos").mkdir()
    for path in [*tmp_path.glob("???"), tmp_path / "cover.png"]:
        path.rename(tmp_path / "photos" / path.name)
    refusal(lambda: automatic(tmp_path), r"photos/cover\.png lies in .*photos itself")


def test_a_camera_s_names_in_folders_with_images_beside_them_are_told(tmp_path: Path) -> None:
    made(tmp_path, *(f"{kind}/IMG_{i:04}.jpg" for kind in ("cats", "dogs") for i in range(9)), "a_1.png", "b_1.png")
    folder = automatic(tmp_path)
    assert folder.class_names == ("IMG", "a", "b")
    assert folder.notes == (
        "labels: the file names hold the classes, because a_1.png and 1 more lie in no sub-folder; else the "
        "sub-folders were the classes: cats, dogs",
    )
    for name in ("a_1.png", "b_1.png"):
        (tmp_path / name).unlink()
    assert automatic(tmp_path).class_names == ("cats", "dogs")


def test_all_images_outside_of_the_class_folders_are_counted(tmp_path: Path) -> None:
    made(tmp_path, "cat/1.png", "dog/1.png", "a.png", "b.png", "c.png")
    refusal(lambda: ImageFolder(tmp_path, 8, "folder"), r"labels folder: a\.png and 2 more lie in .* itself and so")


STYLEGAN = {"labels": [[f"00000/img{i:08}.png", i % 2] for i in range(4)]}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("form", ["numbers", "vectors", "mapping"])
def test_dataset_json_of_stylegan_and_edm(tmp_path: Path, kind: str, form: str) -> None:
    pairs = STYLEGAN["labels"]
    labels: object = {
        "numbers": pairs,
        "vectors": [[name, [1.0 - label, float(label)]] for name, label in pairs],
        "mapping": dict(map(tuple, pairs)),
    }[form]
    root = made(tmp_path / "data", *(name for name, _ in pairs))
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    if kind == "zip":
        root = zipped(tmp_path / "a.zip", {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.*")})
    folder = automatic(root)
    assert classes(folder) == {name: str(label) for name, label in pairs}
    assert folder.notes == ("labels: the classes come from dataset.json",)
    assert folder.left_out == []
    flag = "dataset.json" if kind == "zip" else str(root / "dataset.json")
    for labels, told in (("prefix", "--label-file"), (None, "--class-cond --label-file")):
        other = ImageFolder(root, 8, labels=labels)  # type: ignore[arg-type]
        assert other.notes == (f"labels: dataset.json is not used: {told} {flag} takes the classes from it",)
    assert classes(ImageFolder(root, 8, label_file=flag)) == classes(folder)


def test_dataset_json_without_labels(tmp_path: Path) -> None:
    made(tmp_path, "00000/a.png", "00001/b.png")
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    folder = automatic(tmp_path)
    assert folder.class_names == ("00000", "00001")
    assert folder.notes[0].startswith("labels: dataset.json has no labels: wanted are columns")
    assert ImageFolder(tmp_path, 8, labels=None).notes == ()


def test_the_names_of_numbered_classes(tmp_path: Path) -> None:
    made(tmp_path, "a.png", "b.png")
    (tmp_path / "dataset.json").write_text('{"labels": {"a.png": 1, "b.png": 0}, "class_names": ["cat", "dog", "cow"]}')
    assert automatic(tmp_path).class_names == ("cat", "dog", "cow")
    assert classes(automatic(tmp_path)) == {"a.png": "dog", "b.png": "cat"}


def test_numbers_are_in_their_order(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(12)]
    made(tmp_path, *names)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[name, i % 12] for i, name in enumerate(names)]}))
    folder = ImageFolder(tmp_path, 8, label_file="dataset.json")
    assert folder.class_names == tuple(map(str, range(12)))  # not 0, 1, 10, 11, 2, ...


METADATA = {
    "metadata.csv": "file_name,label\n0.png,cat\n1.png,dog\n",
    "metadata.jsonl": '{"file_name": "0.png", "label": "cat"}\n{"file_name": "1.png", "label": "dog"}\n',
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_hugging_face(tmp_path: Path, name: str) -> None:
    """Its paths are relative to its own folder, of which there is one for each part."""
    made(tmp_path, "train/0.png", "train/1.png")
    (tmp_path / "train" / name).write_text(METADATA[name])
    expected = {"train/0.png": "cat", "train/1.png": "dog"}
    assert classes(automatic(tmp_path)) == expected
    assert classes(automatic(tmp_path / "train")) == {key[6:]: value for key, value in expected.items()}
    made(tmp_path, "test/0.png", "test/1.png")
    folder = automatic(tmp_path)
    assert folder.notes[0].startswith(f"labels: train/{name} has no class for 2 of 4 images, the first is test/0.png")
    (tmp_path / "test" / name).write_text(METADATA[name].replace("cat", "cow"))
    folder = automatic(tmp_path)
    assert classes(folder) == {**expected, "test/0.png": "cow", "test/1.png": "dog"}
    assert folder.notes == (f"labels: the classes come from test/{name}, train/{name}",)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_metadata_in_parquet_is_named_with_the_remedy(tmp_path: Path, kind: str) -> None:
    content = b"PAR1\x15\x04" + bytes(2000) + b"PAR1"
    names = ("train/0.png", "train/1.png")
    if kind == "zip":
        root = zipped(tmp_path / "a.zip", {name: png() for name in names} | {"train/metadata.parquet": content})
    else:
        root = made(tmp_path / "a", *names)
        (root / "train" / "metadata.parquet").write_bytes(content)
    said = "train/metadata.parquet is in Parquet, which is not read here: save it as metadata.csv, such as with pandas."
    assert automatic(root).notes[0].startswith(f"labels: {said}")
    assert "\n" not in automatic(root).notes[0]
    refusal(lambda: ImageFolder(root, 8, label_file="train/metadata.parquet"), f"^{said}")
    if kind == "folder":
        (root / "train" / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n")
        assert automatic(root).notes == ("labels: the classes come from train/metadata.csv",)


def test_images_inside_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1" + bytes(100))
    said = r"found 1 \.parquet; images inside Parquet files are not read: save them as files$"
    refusal(lambda: ImageFolder(tmp_path, 8), said)


def test_captions_are_no_classes(tmp_path: Path) -> None:
    made(tmp_path, "cat_1.png", "dog_1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\ncat_1.png,a cat\ndog_1.png,a dog\n")
    assert automatic(tmp_path).class_names == ("cat", "dog")
    assert ImageFolder(tmp_path, 8).notes == ()


def test_a_label_per_image_is_no_class(tmp_path: Path) -> None:
    names = [f"cat_{i:02}.png" for i in range(12)]
    made(tmp_path, *names)
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(f"{name},{name}\n" for name in names))
    folder = automatic(tmp_path)
    assert folder.class_names == ("cat",)
    assert folder.notes == ("labels: metadata.csv has nearly one class per image; it is not used",)


TABLES = {
    "a.csv": "image,class\nx/1.png,cat\nx/2.png,dog\n3.png,cat\n",
    "b.csv": "1.png;cat\n2.png;dog\n3.png;cat\n",  # without a header
    "c.tsv": "id\tlabel\tclass_name\n1\t0\tcat\n2\t1\tdog\n3\t0\tcat\n",  # a name before its number, no extension
    "d.csv": "\ufefffilename,width,species\nall\\x\\1.png,20,cat\nall\\x\\2.png,20,dog\nall\\3.png,20,cat\n",
    "e.csv": "image,cat,dog\n1,1.0,0.0\n2,0.0,1.0\n3,1.0,0.0\n",  # one-hot columns
    "f.json": '{"1.png": "cat", "2.png": "dog", "3.png": "cat"}',
    "g.json": '[{"file": "1.png", "category": "cat"}, {"file": "2.png", "category": "dog"}, {"file": "3.png", '
    '"category": "cat"}]',
    "h.json": '{"1": {"label": "cat"}, "2": {"label": "dog"}, "3": {"label": "cat"}}',
    "i.json": '{"file": "1.png", "label": "cat"}\n{"file": "2.png", "label": "dog"}\n{"file": "3.png", "label": "cat"}',
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_many_forms(tmp_path: Path, name: str, inside: bool) -> None:
    root = made(tmp_path / "data", "x/1.png", "x/2.png", "3.png")
    path = (root if inside else tmp_path) / name
    path.write_text(TABLES[name], encoding="utf-8")
    expected = {"x/1.png": "cat", "x/2.png": "dog", "3.png": "cat"}
    assert classes(ImageFolder(root, 8, label_file=str(path))) == expected
    if inside:
        assert classes(ImageFolder(root, 8, label_file=name)) == expected
        (note,) = automatic(root).notes
        assert note == f"labels: {name} is not used: --label-file {path} takes the classes from it"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "image,class\n1.png,cat\n",
            "has no class for 1 of 2 images, the first is 2.png: add it, or move the image away",
        ),
        ("image,class\n1.png,cat\n2.png,\n", "has no class for 1 of 2 images"),
        ("image,class\n1.png,cat\n1.png,dog\n2.png,dog", "gives 1.png two classes, cat and dog"),
        ("", "is empty: wanted are columns file_name and label"),
        ("image,class\n", "has no class for any file"),
        ("a,b,c\n1.png,x,y\n", r"has no column with the files \(a, b, c\)"),
        ("image,b,c\n1.png,x,y\n", r"has no column with the classes \(image, b, c\)"),
        ("image,b,c\n1.png,1,1\n", r"has no column with the classes \(image, b, c\)"),
    ],
)
def test_tables_that_do_not_say_it(tmp_path: Path, content: str, message: str) -> None:
    made(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.csv").write_text(content)
    refusal(lambda: ImageFolder(tmp_path, 8, label_file="labels.csv"), rf"^labels\.csv {message}")
    assert ImageFolder(tmp_path, 8).notes == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"labels"', "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[1, 2]", "has no labels"),
        (b'{"labels": [["1.png", [0.3, 0.7]], ["2.png", [1, 0]]]}', "has vectors that are not one-hot"),
        (b"\xff\xfe\x00", "is not in UTF-8: save it so"),
    ],
)
def test_json_that_does_not_say_it(tmp_path: Path, content: bytes, message: str) -> None:
    made(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.json").write_bytes(content)
    refusal(lambda: ImageFolder(tmp_path, 8, label_file="labels.json"), rf"^labels\.json {message}")


def test_a_label_file_that_is_not_there(tmp_path: Path) -> None:
    made(tmp_path, "1.png")
    refusal(lambda: ImageFolder(tmp_path, 8, label_file="labels.csv"), r"^label_file labels\.csv does not exist")


def test_two_images_of_one_name(tmp_path: Path) -> None:
    """A table that names neither's folder gives neither a class; one that names both does."""
    made(tmp_path, "x/1.png", "y/1.png")
    (tmp_path / "labels.csv").write_text("image,class\n1.png,cat\n")
    refusal(lambda: ImageFolder(tmp_path, 8, label_file="labels.csv"), "has no class for 2 of 2 images")
    (tmp_path / "labels.csv").write_text("image,class\ny/1.png,cat\nx/1.png,dog\n")
    assert classes(ImageFolder(tmp_path, 8, label_file="labels.csv")) == {"x/1.png": "dog", "y/1.png": "cat"}


def test_an_annotation_beside_every_image_is_no_label_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i:02}.png" for i in range(12)]
    made(tmp_path, *names)
    for name in names:
        (tmp_path / f"{name}.json").write_text("{}")
    monkeypatch.setattr("fastdiff.data.labelling.read_label_file", lambda *_: pytest.fail("read"))
    assert ImageFolder(tmp_path, 8).notes == ()


def test_a_large_label_file_is_not_read_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.csv").write_text("image,class\n1.png,cat\n2.png,dog\n")
    assert ImageFolder(tmp_path, 8).notes
    monkeypatch.setattr("fastdiff.data.labelling._OFFERED_BYTES", 30)
    assert ImageFolder(tmp_path, 8).notes == ()
    assert ImageFolder(tmp_path, 8, label_file="labels.csv").class_names == ("cat", "dog")


def test_names_that_a_terminal_would_obey(tmp_path: Path) -> None:
    root = made(tmp_path / "a\x1b[2J", "1.png", "2.png")
    (root / "lab\x1b[2Jels.csv").write_text("image,class\n1.png,cat\n2.png,dog\n")
    (note,) = ImageFolder(root, 8).notes
    assert note.isprintable()
