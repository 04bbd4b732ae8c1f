"""What fastdiff sample refuses, in one line that says what to do, and what stays of a job that comes to no end."""

import errno
import json
import os
import re
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.checkpoint import Lease
from fastdiff.checkpoint.files import read_tensors, write_tensors
from fastdiff.sampling import Loop, shards
from fastdiff.sampling.shards import Shards, parts_of

from ..processes import Job
from ..sampling.support import CLASSES, NAMES, UPPER, saved
from ..sampling.test_output import full_after
from .conftest import Cli
from .support import PLAIN, Result, contents, refused, succeeded

BATCHES = ("--num-samples", 8, "--batch-size", 2, "--steps", 3)
"""Four batches of three steps."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """cats (classes), plain, up (8 to 16 pixels) and upcats. Not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "cats.safetensors").symlink_to(checkpoint)
    for name, flags in (("plain", {}), ("up", UPPER), ("upcats", UPPER | CLASSES)):
        saved(folder / f"{name}.safetensors", **flags)
    return folder


@pytest.fixture
def here(tmp_path: Path, models: Path) -> Path:
    """The current folder, with the models to try."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    images, labels = np.zeros((3, 8, 8, 3), np.uint8), np.array([0, 1, 2])
    np.savez(tmp_path / "small.npz", images, labels, class_names=NAMES)
    np.savez(tmp_path / "large.npz", np.zeros((3, 16, 16, 3), np.uint8), labels)
    np.savez(tmp_path / "unlabelled.npz", images)
    np.savez(tmp_path / "other.npz", images, labels + 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "blocked.npz.parts").touch()
    return tmp_path


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def left_nothing(folder: Path, run: Callable[[], Result], *patterns: str) -> None:
    before = everything(folder), contents(folder)
    refused(run(), *patterns)
    assert (everything(folder), contents(folder)) == before


REFUSALS: list[tuple[str, tuple[object, ...], list[str]]] = [
    # where it goes
    ("cats", ("--out", "a.png"), [r"out a\.png must end in \.npz"]),
    ("cats", ("--out", "folder.npz"), [r"out folder\.npz is a folder"]),
    ("cats", ("--out", "text.txt/a.npz"), [r"out text\.txt cannot be written: text\.txt is not a folder"]),
    (
        "cats",
        ("--out", "blocked.npz"),
        [r"blocked\.npz\.parts is not a folder for the unfinished images.*remove it, or name another --out"],
    ),
    ("cats", ("--png-dir", "text.txt"), [r"png_dir text\.txt cannot be written"]),
    ("cats", ("--png-dir", "."), [r"png_dir \. holds PNG files.*--overwrite"]),
    ("cats", ("--trajectory", "a.mp4"), [r"trajectory a\.mp4 must end in \.gif.*\.png"]),
    ("cats", ("--trajectory", "samples.png"), [r"samples\.png", "same file|grid", "name another"]),
    (
        "cats",
        ("--trajectory", "image.png"),
        [r"trajectory image\.png|image\.png exists.*--trajectory", "or use --overwrite"],
    ),
    ("cats", ("--out", "image.npz"), [r"\bout\b", r"image\.png exists: .*or use --overwrite"]),
    # how many steps, which images
    ("cats", ("--steps", 21), ["timestep_respacing '21'", "21 of 20"]),
    ("cats", ("--steps", 0), ["steps must be positive, not 0"]),
    ("cats", ("--steps", 5, "--timestep-respacing", 5), ["steps and timestep_respacing", "one of them"]),
    ("cats", ("--num-samples", 3, "--indices", "1,2"), ["num_samples and indices", "one of them"]),
    ("cats", ("--num-samples", 10**11), ["num_samples must be at most 100,000,000, not 100000000000"]),
    *(
        ("cats", ("--indices", text), ["indices", re.escape(text) if text else "''"])
        for text in ("", "a", "5-3", "1,,2", "-1", "1-2-3", "1.5", "0x10", "3-", "-3", "²", "9" * 19)
    ),
    *(("cats", ("--indices", text), ["indices", "twice"]) for text in ("1,1", "0-3,2", "01,1")),
    ("cats", ("--indices", "0-100000000"), ["indices '0-100000000' are more than 100,000,000"]),
    ("cats", ("--seed", -1), ["seed", "-1"]),
    ("cats", ("--seed", 2**64), ["seed", "2.64"]),
    # classes and guidance
    ("cats", ("--class", "zebr"), ["'zebr'", "zebra"]),
    ("cats", ("--class", "cat,eel"), ["'eel' is none of the model's 3 classes"]),
    ("cats", ("--class", ""), ["class"]),
    ("cats", ("--class", ","), ["class"]),
    ("plain", ("--class", "cat"), ["class cat", "without classes"]),
    ("cats", ("--class-mix", "data"), ["class_mix data", "does not say how many"]),
    ("cats", ("--guidance-scale", 2), ["guidance_scale 2", "without label dropout", "--label-dropout 0.1"]),
    ("plain", ("--guidance-scale", 2), ["guidance_scale 2", "without classes"]),
    ("cats", ("--guidance-scale", -1), ["guidance_scale must be between 0 and 1000"]),
    ("cats", ("--guidance-scale", "1e30"), ["guidance_scale"]),
    ("cats", ("--guidance-scale", "nan"), ["guidance_scale", "nan"]),
    ("cats", ("--guidance-interval", "5,0.3"), [r"guidance_interval must be .*lower one first.*\(5\.0, 0\.3\)"]),
    ("cats", ("--guidance-interval", "0.3,5"), ["guidance_interval: nothing guides", "--guidance-scale"]),
    ("cats", ("--guide", "plain.safetensors"), ["guide: say by how much", "--guidance-scale 2"]),
    ("cats", ("--guide", "nowhere.safetensors", "--guidance-scale", 2), [r"nowhere\.safetensors does not exist"]),
    ("cats", ("--guide", "cats.safetensors", "--guidance-scale", 2), ["guide cats.safetensors: it is the model itsel"]),
    ("cats", ("--guide", "plain.safetensors", "--guidance-scale", 2), ["guide: it was trained without classes"]),
    ("cats", ("--eta", 0.5), ["eta", "ddim"]),
    # base samples
    ("up", (), ["super-resolution", "--base-samples", "8 pixels", "--super-res"]),
    ("plain", ("--base-samples", "small.npz"), ["base_samples", "not a super-resolution model"]),
    ("up", ("--base-samples", "nowhere.npz"), [r"nowhere\.npz does not exist"]),
    ("up", ("--base-samples", "text.txt"), [r"text\.txt is damaged or not an npz"]),
    ("up", ("--base-samples", "large.npz"), [r"large\.npz", "16x16", "8x8"]),
    ("upcats", ("--base-samples", "small.npz", "--class-mix", "data"), ["class_mix data", "have their own classes"]),
    ("upcats", ("--base-samples", "unlabelled.npz"), [r"unlabelled\.npz has no labels"]),
    ("upcats", ("--base-samples", "other.npz"), [r"other\.npz", "class 3", "the classes 0 to 2"]),
    ("upcats", ("--base-samples", "small.npz", "--class", "cat"), ["class cat", "base samples"]),
    ("up", ("--base-samples", "small.npz", "--super-res", "up.safetensors"), ["super.res"]),
    # another model after it
    ("cats", ("--super-res", "plain.safetensors"), ["super_res", "not a super-resolution model"]),
    ("cats", ("--super-res", "nowhere.safetensors"), [r"nowhere\.safetensors does not exist"]),
    ("plain", ("--super-res", "upcats.safetensors"), ["3 classes, and the base no classes"]),
    # interpolation
    ("plain", ("--interpolate", 1, 2), ["interpolate", "--sampler ddim"]),
    ("plain", ("--interpolate", 1, "nowhere.png", "--sampler", "ddim"), [r"interpolate nowhere\.png", "seed"]),
    ("plain", ("--interpolate", 1, "text.txt", "--sampler", "ddim"), [r"text\.txt"]),
    ("plain", ("--interpolate", 1, 2**64, "--sampler", "ddim"), ["interpolate 18446744073709551616"]),
    ("cats", ("--interpolate", 1, 2, "--sampler", "ddim"), ["interpolate", "--class"]),
    # of how many images the whole way is, is not said by it
    ("plain", ("--interpolate", 1, 2, "--sampler", "ddim", "--indices", 20), ["interpolate", "indices"]),
    # from which file
    ("nowhere", (), [r"nowhere\.safetensors does not exist"]),
    ("cats", ("--ema-rate", 0.99), [r"ema_rate 0\.99", "run folder", r"cats\.safetensors"]),
    ("cats", ("--ema-rate", "best"), ["ema_rate", "best", "raw"]),
    ("cats", ("--timeout", 0), ["timeout"]),
]


@pytest.mark.parametrize(("model", "flags", "patterns"), REFUSALS, ids=[f"{m}{f}" for m, f, _ in REFUSALS])
def test_refusals(sample: Cli, here: Path, model: str, flags: tuple[object, ...], patterns: list[str]) -> None:
    left_nothing(here, lambda: sample(f"{model}.safetensors", *flags), *patterns)


def lying(path: Path, shape: tuple[int, ...]) -> None:
    """An npz of 244 bytes or so whose header says that it holds an array of that shape."""
    header = str({"descr": "|u1", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    assert path.stat().st_size < 300


@pytest.mark.parametrize("shape", [(2**43 // 192, 8, 8, 3), (2**62, 8, 8, 3), (2, 8, 8, 3)])
def test_a_header_that_promises_more_than_the_file_holds(sample: Cli, here: Path, shape: tuple[int, ...]) -> None:
    lying(here / "lying.npz", shape)
    left_nothing(here, lambda: sample("up.safetensors", "--base-samples", "lying.npz"), r"lying\.npz claims to hold")


ENLARGE = ("up.safetensors", "--base-samples", "base", "--batch-size", 1, "--steps", 2)


@pytest.fixture
def base(here: Path) -> Path:
    """A folder of six small pictures, of which the fourth and the fifth cannot be read."""
    (here / "base").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(here / f"base/{i}.png")
    (here / "base/3.png").write_bytes(b"no image")
    (here / "base/4.png").write_bytes((here / "base/4.png").read_bytes()[:50])
    return here / "base"


def test_pictures_that_cannot_be_read_are_named_before_the_first_is_drawn(
    sample: Cli, here: Path, base: Path, at_step: Callable[..., list[int]]
) -> None:
    taken = at_step()
    told = (r"base_samples base: 2 of 6 images cannot be read: 3\.png \(not a PNG", r"4\.png \(", "--skip-unreadable")
    left_nothing(here, lambda: sample(*ENLARGE), *told)
    assert taken == [0]
    succeeded(sample(*ENLARGE, "--num-samples", 3))  # they are not among these
    for name in ("3.png", "4.png"):
        Image.new("RGB", (8, 8)).save(base / name)
    succeeded(sample(*ENLARGE, "--out", "b.npz"))
    assert np.shape(contents_of("b.npz")["arr_0"]) == (6, 16, 16, 3)


def test_pictures_that_cannot_be_read_are_left_out_and_named(sample: Cli, base: Path) -> None:
    result = succeeded(sample(*ENLARGE, "--skip-unreadable"))
    assert "skipped: 3.png (not a PNG" in result.out
    assert "skipped: 4.png (" in result.out
    images = contents_of("samples.npz")["arr_0"]
    for name in ("3.png", "4.png"):
        (base / name).unlink()
    succeeded(sample(*ENLARGE, "--out", "b.npz"))
    assert np.array_equal(contents_of("b.npz")["arr_0"], images)  # the images that the job draws are the same
    for path in base.iterdir():
        path.write_bytes(b"")
    refused(sample(*ENLARGE, "--out", "c.npz", "--skip-unreadable"), "none of the 4 images in base can be read")


@pytest.mark.parametrize("change", ["removed", "mended", "restored"])
def test_a_job_goes_on_after_a_bad_picture_is_out_of_the_way(
    sample: Cli, base: Path, at_step: Callable[..., list[int]], change: str
) -> None:
    """As long as the pictures of its finished images are what they were."""
    at_step(4, interrupt())  # after the second image
    assert sample(*ENLARGE, "--skip-unreadable").status == 143
    assert sum(map(len, spans())) == 2
    if change == "removed":
        (base / "3.png").unlink()
        (base / "4.png").unlink()
    elif change == "mended":
        Image.new("RGB", (8, 8), "green").save(base / "3.png")
        (base / "4.png").unlink()
    at_step()
    result = succeeded(sample(*ENLARGE, *(["--skip-unreadable"] if change == "restored" else [])))
    count = 5 if change == "mended" else 4
    assert f"resuming: 2 of {count} images are finished" in result.out
    resumed = contents_of("samples.npz")["arr_0"]
    again = sample(*ENLARGE, "--out", "b.npz", *(["--skip-unreadable"] if change == "restored" else []))
    succeeded(again)
    assert np.array_equal(resumed, contents_of("b.npz")["arr_0"])


@pytest.mark.parametrize("changed", [False, True])
def test_a_job_of_an_earlier_version_goes_on_with_the_same_pictures(
    sample: Cli, base: Path, at_step: Callable[..., list[int]], changed: bool
) -> None:
    """It did not write which file each image is from."""
    for name in ("3.png", "4.png"):
        (base / name).unlink()
    at_step(4, interrupt())
    assert sample(*ENLARGE).status == 143
    manifest = Path("samples.npz.parts/job.json")
    written = json.loads(manifest.read_text())
    del written["settings"]["inputs"]
    manifest.write_text(json.dumps(written))
    at_step()
    if changed:
        (base / "5.png").rename(base / "6.png")
        refused(sample(*ENLARGE), "another base_samples", "--overwrite")
    else:
        assert "resuming: 2 of 4 images are finished" in succeeded(sample(*ENLARGE)).out


def test_a_job_does_not_go_on_with_other_pictures_of_finished_images(
    sample: Cli, base: Path, at_step: Callable[..., list[int]]
) -> None:
    at_step(4, interrupt())
    assert sample(*ENLARGE, "--skip-unreadable").status == 143
    (base / "0.png").rename(base / "00.png")
    at_step()
    refused(sample(*ENLARGE, "--skip-unreadable"), "another base_samples .that of image 0", "--overwrite")
    (base / "00.png").rename(base / "0.png")
    refused(sample(*ENLARGE, "--skip-unreadable", "--indices", "1-3"), "another indices .0-3, not 1-3")
    refused(sample(*ENLARGE, "--skip-unreadable", "--num-samples", "1"), "another indices .0-3, not 0")
    refused(sample(*ENLARGE, "--skip-unreadable", "--seed", "1"), "another seed")
    assert "resuming: 2 of 9" in succeeded(sample(*ENLARGE, "--skip-unreadable", "--num-samples", "9")).out


def test_an_optimizers_file(train: Cli, sample: Cli, run_dir: Path, tmp_path: Path) -> None:
    for flags in ((run_dir / "opt000002.safetensors",), (run_dir, "--super-res", run_dir / "opt000002.safetensors")):
        left_nothing(tmp_path, lambda flags=flags: sample(*flags), r"opt000002\.safetensors", "model.*ema_")


def test_the_rate_of_the_average(train: Cli, sample: Cli, tmp_path: Path) -> None:
    succeeded(train("runs/a", "--steps", 2, "--ema-rate", "0.5,0.99"))
    wanted = {"0.99": "ema_0.99_000002", "0.5": "ema_0.5_000002", "raw": "model000002", "0": "model000002"}
    for rate, name in wanted.items():
        for place in (("runs/a",), ()):
            result = succeeded(sample(*place, "--num-samples", 1, "--steps", 1, "--ema-rate", rate, "--overwrite"))
            assert f"model: runs/a/{name}.safetensors, step 2" in result.out
    for rate in ("0.9999", "nan"):
        run = lambda rate=rate: sample("runs/a", "--ema-rate", rate, "--out", "b.npz")  # noqa: E731
        left_nothing(tmp_path, run, rf"ema_rate {rate}: runs/a has weights of the rates raw, 0\.5, 0\.99")


def test_weights_that_are_not_finite(sample: Cli, here: Path) -> None:
    weights, metadata = read_tensors(here / "plain.safetensors", "model")
    weights["out.2.bias"][0] = torch.nan
    write_tensors(here / "bad.safetensors", weights, metadata)
    left_nothing(here, lambda: sample("bad.safetensors", "--steps", 2), "not finite", "damaged", "fp32")


def test_too_little_memory(sample: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Loop) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(Loop, "step", step)
    left_nothing(here, lambda: sample("cats.safetensors"), "out of memory: use a smaller --batch-size than 16")


# Jobs that come to no end


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """``at_step(8, action)`` does something after the eighth step; returns a list with the steps taken since."""
    real = Loop.step

    def arrange(number: int = -1, action: Callable[[], None] = lambda: None) -> list[int]:
        taken = [0]

        def step(self: Loop) -> None:
            real(self)
            taken[0] += 1
            if taken[0] == number:
                action()

        monkeypatch.setattr(Loop, "step", step)
        return taken

    return arrange


def interrupt(number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def spans(out: str = "samples.npz") -> list[range]:
    return Shards(parts_of(Path(out))).spans()


@pytest.fixture
def unfinished(sample: Cli, here: Path, at_step: Callable[..., list[int]]) -> Path:
    """The folder with a job of eight cats of which the first four are drawn."""
    at_step(8, interrupt())
    assert sample("cats.safetensors", *BATCHES, "--seed", 5, "--class", "cat").status == 143
    at_step()
    assert spans() == [range(2), range(2, 4)]
    return here


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_it_and_it_goes_on(
    sample: Cli, here: Path, at_step: Callable[..., list[int]], number: signal.Signals, status: int
) -> None:
    succeeded(sample("cats.safetensors", *BATCHES, "--out", "whole.npz"))
    taken = at_step(8, interrupt(number))
    result = sample("cats.safetensors", *BATCHES)
    assert result.status == status
    assert (
        f"stopped by {number.name}: 4 of 8 images are finished, in samples.npz.parts; "
        "the same command resumes the job\n" in result.out
    )
    assert taken == [8]
    assert not Path("samples.npz").exists()
    taken = at_step()
    result = succeeded(sample("cats.safetensors", *BATCHES))
    assert "resuming: 4 of 8 images are finished\n" in result.out
    assert taken == [6]
    assert contents_of("samples.npz") == contents_of("whole.npz")
    assert not Path("samples.npz.parts").exists()


def contents_of(path: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name].tolist() for name in file.files}


def test_ctrl_c_as_it_is_sent(here: Path, sample: Cli) -> None:
    flags = ["--num-samples", "4000", "--batch-size", "4"]
    job = Job(None, ["sample", "cats.safetensors", *flags, *PLAIN], cwd=here)
    parts = here / "samples.npz.parts"
    job.wait_for(lambda: bool(list(parts.glob("0*.npz"))))
    job.send_signal(signal.SIGINT)
    result = job.finish()
    assert (result.status, result.err) == (130, "\nstopping after this step; finished images are kept\n")
    found = re.search(r"stopped by SIGINT: (\d+) of 4000 images are finished", result.out)
    assert found
    assert int(found[1]) == sum(map(len, spans())) > 0
    assert {path.name for path in parts.iterdir() if not path.name[0].isdigit()} <= {"job.json", ".lease"}


def test_an_unfinished_job_with_other_settings(cli: Cli, unfinished: Path) -> None:
    before = contents(unfinished)
    common = ("cats.safetensors", *BATCHES, "--seed", 5, "--class", "cat")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--seed", 6), r"seed \(5, not 6\)"),
        (("--steps", 4), r"steps \(3, not 4\)"),
        (("--sampler", "ddim"), r"sampler \(ddpm, not ddim\)"),
        (("--class", "dog"), r"class(es)? \(.*cat.*, not .*dog.*\)"),
        (("--num-samples", 9), r"(indices|num_samples) \((0-7|8), not (0-8|9)\)"),
        (("--no-clip-denoised",), r"clip_denoised \(True, not False\)"),
        (("--precision", "bf16"), r"precision \(fp32, not bf16\)"),
        (("--seed", 6, "--steps", 4), r"(seed|steps) \("),
    ]
    for flags, said in cases:
        result = cli("sample", *common, *PLAIN, *flags)
        refused(result, rf"samples\.npz\.parts .*another {said}", "--out", "--overwrite")
        assert contents(unfinished) == before


def test_an_unfinished_job_of_another_model(sample: Cli, unfinished: Path) -> None:
    """Of the same name even."""
    (unfinished / "cats.safetensors").unlink()
    saved(unfinished / "cats.safetensors", seed=1, **CLASSES)
    before = contents(unfinished)
    refused(sample("cats.safetensors", *BATCHES, "--seed", 5, "--class", "cat"), "another model's sha256")
    assert contents(unfinished) == before


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_an_unfinished_job_from_other_base_samples(
    sample: Cli, here: Path, at_step: Callable[..., list[int]], kind: str
) -> None:
    """Of the same name and number: what was begun from one picture must not be ended from another."""

    def write(value: int) -> None:
        if kind == "npz":
            np.savez(here / "base.npz", np.full((8, 8, 8, 3), value, np.uint8))
            return
        (here / "base").mkdir(exist_ok=True)
        for i in range(8):
            Image.new("RGB", (8 + value, 8), (value, 0, 0)).save(here / f"base/{i}.png")

    flags = ("up.safetensors", "--base-samples", "base.npz" if kind == "npz" else "base", "--batch-size", 2)
    write(0)
    at_step(8, interrupt())
    assert sample(*flags, "--steps", 3).status == 143
    assert spans()
    write(100)
    refused(sample(*flags, "--steps", 3), "another base_samples", "--overwrite")


def test_overwrite_begins_anew(sample: Cli, unfinished: Path, at_step: Callable[..., list[int]]) -> None:
    taken = at_step()
    succeeded(sample("cats.safetensors", *BATCHES, "--seed", 6, "--overwrite"))
    assert taken == [12]
    assert contents_of("samples.npz")["seed"] == 6
    assert not Path("samples.npz.parts").exists()


def test_an_unfinished_job_may_lie_beside_what_it_is_to_replace(
    sample: Cli, here: Path, at_step: Callable[..., list[int]]
) -> None:
    """Killed after --overwrite was said once: what it replaces is there until the end, and is its own by then."""
    flags = ("cats.safetensors", *BATCHES)
    succeeded(sample(*flags, "--seed", 1))
    at_step(8, interrupt())
    assert sample(*flags, "--overwrite").status == 143
    assert contents_of("samples.npz")["seed"] == 1
    at_step()
    assert "resuming: 4 of 8" in succeeded(sample(*flags)).out
    assert contents_of("samples.npz")["seed"] == 0


def test_it_goes_on_with_the_files_that_it_began_with(sample: Cli, unfinished: Path) -> None:
    """Without a trajectory and PNG files, that is: of those that are there none is its own, or would become whole."""
    (unfinished / "mine.gif").write_bytes(b"mine")
    (unfinished / "pngs").mkdir()
    (unfinished / "pngs/cat_000000.png").write_bytes(b"mine")
    flags = ("cats.safetensors", *BATCHES, "--seed", 5, "--class", "cat")
    for option, name in (("trajectory", "mine.gif"), ("trajectory", "b.gif"), ("png-dir", "pngs"), ("png-dir", "b")):
        left_nothing(unfinished, lambda: sample(*flags, f"--{option}", name), option.replace("-", "_"), "--overwrite")  # noqa: B023
    succeeded(sample(*flags))


def test_png_files_without_a_finished_shard_are_the_jobs_own(
    sample: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("cats.safetensors", *BATCHES, "--png-dir", "pngs")

    def full(path: Path, *args: Any, **arrays: Any) -> None:
        raise OSError(errno.ENOSPC, f"{path} cannot be written (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_npz", full)
        refused(sample(*flags), "No space left", "the same command resumes the job")
    assert list((here / "pngs").iterdir())
    succeeded(sample(*flags))
    assert len(list((here / "pngs").iterdir())) == 8


def test_a_folder_under_another_name_is_the_same(
    sample: Cli, here: Path, at_step: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(8, interrupt())
    assert sample("cats.safetensors", *BATCHES, "--png-dir", "pngs").status == 143
    at_step()
    assert "resuming" in succeeded(sample("cats.safetensors", *BATCHES, "--png-dir", f"../{here.name}/pngs")).out


def test_base_samples_at_home(sample: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    succeeded(sample("up.safetensors", "--base-samples=~/small.npz", "--steps", 1))


def test_png_files_go_on_too(sample: Cli, here: Path, at_step: Callable[..., list[int]]) -> None:
    flags = ("cats.safetensors", *BATCHES, "--png-dir", "pngs", "--trajectory", "t.gif")
    at_step(8, interrupt())
    assert sample(*flags).status == 143
    assert len(list((here / "pngs").iterdir())) == 4
    at_step()
    succeeded(sample(*flags))
    assert len(list((here / "pngs").iterdir())) == 8
    assert (here / "t.gif").is_file()


def test_a_disk_without_room_for_the_npz(sample: Cli, here: Path, at_step: Callable[..., list[int]]) -> None:
    flags = ("cats.safetensors", *BATCHES)
    with full_after(6000):
        refused(sample(*flags), r"samples\.npz cannot be written \(File too large\)")
    assert sum(map(len, spans())) == 8
    assert not Path("samples.npz").exists()
    taken = at_step()
    succeeded(sample(*flags))
    assert taken == [0]
    assert len(contents_of("samples.npz")["arr_0"]) == 8


@pytest.mark.parametrize(("first", "kept"), [(0, []), (4, [range(2), range(2, 4)])])
def test_a_disk_that_becomes_full(
    sample: Cli,
    here: Path,
    at_step: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    first: int,
    kept: list[range],
) -> None:
    real = shards.save_npz

    def save(path: Path, *args: Any, **arrays: Any) -> None:
        if path.name >= f"{first:06d}":
            raise OSError(errno.ENOSPC, f"{path} cannot be written (No space left on device)")
        real(path, *args, **arrays)

    before = everything(here)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_npz", save)
        refused(sample("cats.safetensors", *BATCHES), "No space left", "the finished images stay")
    assert spans() == kept
    if not kept:
        assert everything(here) == before
    taken = at_step()
    succeeded(sample("cats.safetensors", *BATCHES))
    assert taken == [12 - 3 * len(kept)]


def test_a_disk_that_is_full_before_anything_is_drawn(sample: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replacing(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "replacing", replacing)
    left_nothing(here, lambda: sample("cats.safetensors"), r"samples\.npz\.parts cannot be written to", "--out")


def test_a_grid_that_cannot_be_written(sample: Cli, here: Path, at_step: Callable[..., list[int]]) -> None:
    """Nothing is lost by it, and nothing is drawn again."""

    def in_the_way() -> None:
        (here / "samples.png").mkdir()

    at_step(12, in_the_way)
    refused(sample("cats.safetensors", *BATCHES), r"samples\.png cannot be written")
    assert sum(map(len, spans())) == 8
    (here / "samples.png").rmdir()
    taken = at_step()
    succeeded(sample("cats.safetensors", *BATCHES))
    assert taken == [0]


def test_two_jobs_on_one_file(sample: Cli, unfinished: Path) -> None:
    flags = ("cats.safetensors", *BATCHES, "--seed", 5, "--class", "cat")
    with Lease(parts_of(Path("samples.npz"))):
        before = contents(unfinished)
        for more in ((), ("--overwrite",), ("--seed", 6)):
            refused(sample(*flags, *more), r"samples\.npz\.parts is in use by process \d+", "--out")
        assert contents(unfinished) == before
    succeeded(sample(*flags))


def test_a_job_whose_settings_are_damaged(sample: Cli, unfinished: Path) -> None:
    flags = ("cats.safetensors", *BATCHES, "--seed", 5, "--class", "cat")
    manifest = unfinished / "samples.npz.parts/job.json"
    for text, said in (("{", "damaged: use --overwrite"), ('{"format": "fastdiff-samples-2"}', "newer fastdiff")):
        manifest.write_text(text)
        left_nothing(unfinished, lambda: sample(*flags), r"job\.json", said)
    succeeded(sample(*flags, "--overwrite"))


def test_a_shard_that_is_damaged(sample: Cli, unfinished: Path, at_step: Callable[..., list[int]]) -> None:
    """It is told, and its images are drawn again."""
    flags = ("cats.safetensors", *BATCHES, "--seed", 5, "--class", "cat")
    shard = unfinished / "samples.npz.parts/000002-000004.npz"
    shard.write_bytes(shard.read_bytes()[:-400])
    refused(sample(*flags), r"000002-000004\.npz is damaged", "the same command draws its images again")
    shard.unlink(missing_ok=True)
    taken = at_step()
    succeeded(sample(*flags))
    assert taken == [3]
