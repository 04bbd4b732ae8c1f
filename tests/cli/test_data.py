"""``fastdiff data``: archives in, folders out, and training straight from one file."""

import shlex
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..processes import Job
from .conftest import Cli
from .support import SHORT, TINY, refused, succeeded


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-10 in binary: two images a batch."""
    monkeypatch.setattr("fastdiff.data.cifar10._ROWS", 2)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rng = np.random.default_rng(i)
        records = [bytes([label]) + rng.bytes(3072) for label in (i % 2, 8)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)
    return tmp_path / "cifar-10-binary.tar.gz"


def train_line(out: str) -> list[str]:
    """The command to go on with, without the name of the program."""
    (line,) = [line for line in out.splitlines() if line.startswith("train with: ")]
    return shlex.split(line.removeprefix("train with: fastdiff "))


def test_help(cli: Cli) -> None:
    for arguments in (["data"], ["data", "--help"]):
        out = succeeded(cli(*arguments)).out
        assert all(command in out for command in ("cifar10", "lsun", "imagenet", "check", "pack"))
    assert "data" in succeeded(cli("--help")).out


def test_cifar10_to_training(cli: Cli, cifar: Path, tmp_path: Path) -> None:
    result = succeeded(cli("data", "cifar10", cifar, "out"))
    assert "12 images in 10 classes in out" in result.out
    assert len(list((tmp_path / "out/cifar_train").iterdir())) == 10
    command = train_line(result.out)
    assert command == ["train", "--data-dir", "out/cifar_train", "--image-size", "32", "--class-cond"]
    result = cli(*command, *TINY, *SHORT, "--image-size", 8, "--steps", 2, "--run-dir", "run")
    assert "in 3 classes: car, plane, ship" in succeeded(result).out
    refused(cli("data", "cifar10", cifar, "out"), "out exists already")
    refused(cli("data", "cifar10", "nowhere", "other"), "nowhere does not exist: give the archive")
    assert not (tmp_path / "other").exists()


def test_imagenet(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for path in shapes.iterdir():
            archive.add(path, f"{path.name.split('_')[0]}/{path.name}")
        archive.add(__file__, "readme.txt")
    result = succeeded(cli("data", "imagenet", "x.tar", "out", "--image_size", 8))  # the old spelling, too
    assert "12 images in 4 sub-folders in out, left out 1 (not an image)" in result.out
    assert train_line(result.out)[-3:] == ["--class-cond", "--labels", "folder"]
    succeeded(cli(*train_line(result.out), *TINY, *SHORT, "--steps", 2, "--run-dir", "run"))


@pytest.mark.parametrize("name", ["/tmp/a.png", "../a.png", "a/../../b.png", "link"])
def test_archives_that_lead_out(cli: Cli, tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo(name)
        if name == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    refused(
        cli("data", "imagenet", "x.tar", "out"), "x.tar holds .*", "link or a device" if name == "link" else "out of"
    )
    assert names(tmp_path) == {"x.tar"}


def test_lsun(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open("db", map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for path in [*shapes.iterdir()][:3]:
            transaction.put(path.name.encode(), path.read_bytes())
        transaction.put(b"z", b"no image")
    result = succeeded(cli("data", "lsun", "db", "out", "--image-size", 16, "--prefix", "church"))
    assert "3 images in out, 1 could not be read" in result.out
    assert names(tmp_path / "out") == {f"church_000000{i}.png" for i in range(3)}
    with Image.open(tmp_path / "out/church_0000000.png") as image:
        assert image.size == (16, 16)


def test_check(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    (data / "triangle_x.png").touch()
    (data / "notes.txt").touch()
    result = cli("data", "check", "data", "--image-size", 8, "--sheet", "sheet.png")
    assert result.status == 0
    for text in ("12 png", "8x8", "4 classes", "3 circle", "triangle_x.png (empty file)", "notes.txt (not an image)"):
        assert text in result.out
    assert result.err == (
        "warning: data has 4 of 4 classes with fewer than 10 images: circle, cross, square, triangle\n"
    )
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 100
    refused(cli("data", "check", "data", "--sheet", "sheet.png"), "sheet.png exists already")
    refused(cli("data", "check", "data", "--sheet", "sheet.jpg"), "does not end in .png")
    refused(cli("data", "check", "data", "--labels", "folder"), r"and \d+ more lie in data itself")
    refused(cli("data", "check", "data", "--label-file", "nowhere.csv"), "nowhere.csv does not exist")
    refused(cli("data", "check", "nowhere"), "does not exist")
    refused(cli("data", "check", ""), "DIR.*must not be empty")
    refused(cli("data", "lsun", "data", "out", "--image-size", 5000), "--image-size.*4096")


def test_check_says_what_is_wrong_and_what_helps(cli: Cli, tmp_path: Path) -> None:
    for i in range(24):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 40 if i == 5 else 64), (i, 0, 0)).save(path)
    shutil.copy(tmp_path / "data/a/02.png", tmp_path / "data/b/99.png")
    result = cli("data", "check", "data")
    assert result.status == 0
    assert "labels: the sub-folders are the classes; --labels prefix takes the file names" in result.out
    assert result.err == (
        "warning: data has 1 image smaller than 64 pixels, which will be enlarged and blurred: b/05.png\n"
        "warning: data has 1 image with the same pixels as another, at 64x64: b/99.png is a/02.png\n"
    )
    told = cli("data", "check", "data", "--labels", "prefix").err
    assert "25 classes in 25 images" in told
    assert "--labels folder" in told
    rows = [f"{i:02}.png,{'odd' if i % 2 else 'even'}" for i in (*range(24), 99)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,class", *rows]))
    assert "12 even" in cli("data", "check", "data", "--label-file", "labels.csv").out
    result = succeeded(cli("data", "pack", "data", "out.npz", "--image-size", 8))
    assert "in 2 classes: a, b" in result.out
    assert "labels: the sub-folders are the classes" in result.out


def test_a_sheet_that_cannot_be_written_is_refused_at_once(
    cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdiff.data.survey.survey", lambda *_: pytest.fail("looked at"))
    (tmp_path / "file").touch()
    refused(cli("data", "check", shapes, "--sheet", "file/s.png"), r"file/s\.png cannot be written")


def test_home(cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand what is quoted, and an editor's or a Dockerfile's list of words has no shell."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(shapes, home / "photos")
    result = succeeded(cli("data", "pack", "~/photos", "~/x.zip"))
    assert f"{home}/x.zip: 12 files" in result.out
    assert cli("data", "check", "~/x.zip", "--image-size", 8, "--sheet", "~/s.png").status == 0
    with tarfile.open(tmp_path / "home/x.tar", "w") as archive:
        archive.add(home / "photos", "photos")
    succeeded(cli("data", "imagenet", "~/x.tar", "~/out"))
    assert {path.name for path in home.iterdir()} == {"photos", "x.zip", "s.png", "x.tar", "out"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    refused(cli("data", "check", "~nobody-of-this-name/x"), "does not exist")


def test_check_shows_what_a_terminal_can_bear(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    for i in range(30):
        shutil.copy(shapes / "circle_00000.png", data / f"![red]{i:02}\x1b[2J_1.png")
        (data / f"{i:02}.png").touch()
    result = cli("data", "check", "data", "--image-size", 8)
    assert result.status == 0
    assert "\x1b" not in result.out + result.err
    assert "![red]" in result.out
    assert "and 44 more" in result.out  # of 64 classes
    assert "and 20 more" in result.out  # of 30 files


@pytest.mark.parametrize("kind", ["zip", "npz"])
def test_pack_and_train(cli: Cli, shapes: Path, tmp_path: Path, kind: str) -> None:
    size = ["--image-size", 8] if kind == "npz" else []
    result = succeeded(cli("data", "pack", shapes, f"out.{kind}", *size))
    assert f"out.{kind}: 12 " in result.out
    flags = [*TINY, "--class-cond", *SHORT, "--steps", 2, "--log-interval", 1]
    succeeded(cli("train", "--data-dir", shapes, "--run-dir", "one", *flags))
    assert (
        "in 4 classes: circle, cross, square, triangle"
        in succeeded(cli("train", "--data-dir", f"out.{kind}", "--run-dir", "two", *flags)).out
    )
    one, two = (next((tmp_path / run).glob("model*2.safetensors")).read_bytes() for run in ("one", "two"))
    assert one[-1000:] == two[-1000:]  # the weights; what stands before them names the folder
    resumed = cli("train", "--data-dir", f"out.{kind}", "--run-dir", "one", "--resume", "--steps", 3)
    if kind == "zip":
        succeeded(resumed)
    else:
        refused(resumed, "are not the ones this run was trained on")


def test_pack_refuses(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    refused(cli("data", "pack", shapes, "out.tar"), "out.tar must end in .zip")
    refused(cli("data", "pack", shapes, "out.npz"), "say which with --image-size")
    refused(cli("data", "pack", shapes, "out.zip", "--image-size", 8), "leave them out")
    refused(cli("data", "pack", "nowhere", "out.zip"), "does not exist")
    assert names(tmp_path) == set()
    succeeded(cli("data", "pack", shapes, "out.npz", "--image-size", 8))
    refused(cli("data", "pack", shapes, "out.npz", "--image-size", 8), "exists already")
    large = ["--image-size", 16, "--num-channels", 32, "--run-dir", "run"]
    refused(cli("train", "--data-dir", "out.npz", *large), "8x8 pixels, not 16x16: pack .* train with --image-size 8")


@pytest.mark.filterwarnings("default")
def test_one_class_warns(cli: Cli, tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "data").mkdir()
    for path in shapes.glob("circle*"):
        shutil.copy(path, tmp_path / "data")
    train = ["train", "--data-dir", "data", *TINY, *SHORT, "--batch-size", 2, "--steps", 1]
    result = cli(*train, "--run-dir", "one", "--class-cond")
    assert result.status == 0
    assert result.err.endswith("data has one class (circle): class labels teach the model nothing\n")
    succeeded(cli(*train, "--run-dir", "two"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_stopped_preparation_leaves_nothing_that_looks_whole(tmp_path: Path, number: signal.Signals) -> None:
    rows = 10_000
    for name in ("data_batch_1", "data_batch_2"):
        (tmp_path / f"{name}.bin").write_bytes(bytes(rows * 3073))
    job = Job(None, ["data", "cifar10", ".", "deep/out"], cwd=tmp_path)
    job.wait_for(lambda: bool(list(tmp_path.glob("deep/.out.*/out/cifar_train/*.png"))))
    job.send_signal(number)
    status = job.finish().status
    assert status == {signal.SIGTERM: 143, signal.SIGHUP: 129}.get(number, status or 1)
    assert not (tmp_path / "deep/out").exists()
    assert len(list((tmp_path / "deep").iterdir())) == (number == signal.SIGKILL)
