"""fastdiff evaluate fid, neighbours and checkpoints, and what they refuse."""

import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.checkpoint import Lease, saved_steps
from fastdiff.evaluation import checkpoints, metrics, quality
from fastdiff.evaluation.records import read_records
from fastdiff.sampling import SampleFiles, job
from fastdiff.sampling.shards import parts_of
from fastdiff.training.held_out import is_held_out

from ..evaluation.colours import Quarters, pictures, program
from ..sampling.support import UPPER, command, saved
from .conftest import Cli
from .support import SHORT, TINY, Result, contents, refused, succeeded


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extractor that sees images as they are, at their 8 pixels."""
    return program(tmp_path_factory.mktemp("extractor") / "colours.pt")


@pytest.fixture
def evaluate(cli: Cli, colours: Path, tmp_path: Path) -> Cli:
    machine = ["--compile", "off", "--precision", "fp32", "--device", "cpu", "--cache-dir", tmp_path / "cache"]

    def run(what: str, *args: object) -> Result:
        return cli("evaluate", what, "--extractor", colours, "--trust", "--extractor-size", 8, *machine, *args)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A run with the steps 2 and 4 and two averages. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained") / "a"
    flags = (
        *TINY,
        *SHORT,
        "--class-cond",
        "--save-interval",
        2,
        "--steps",
        4,
        "--ema-rate",
        "0.5,0.99",
        "--lr",
        "1e-2",
    )
    command("train", "--data-dir", shapes, "--run-dir", folder, *flags)
    return folder


@pytest.fixture
def run_dir(cli: Cli, trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "a"))


@pytest.fixture
def two(tmp_path: Path) -> None:
    """a.npz and b.npz, 40 and 50 images of 8 pixels."""
    np.savez(tmp_path / "a.npz", arr_0=pictures(40))
    np.savez(tmp_path / "b.npz", arr_0=pictures(50, seed=1))


def value(result: Result, name: str) -> float:
    """What the line that begins with the name ends in."""
    (line,) = [line for line in result.out.splitlines() if line.startswith(f"{name} (")]
    return float(line.split()[-1])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    def seen(images: np.ndarray) -> metrics.Statistics:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return metrics.statistics_of(Quarters()((x - mean) / deviation).numpy())

    return metrics.frechet_distance(seen(one), seen(other))


@pytest.mark.usefixtures("two")
def test_two_files(evaluate: Cli, tmp_path: Path) -> None:
    result = succeeded(evaluate("fid", "a.npz", "b.npz"))
    assert value(result, "FD-colours") == pytest.approx(distance(pictures(40), pictures(50, seed=1)), abs=1e-4)
    for name in ("KD-colours", "precision", "recall", "density", "coverage"):
        assert "(n=40, colours at 8 pixels" in result.out
        assert np.isfinite(value(result, name))
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "b.npz"}


@pytest.mark.usefixtures("two")
def test_statistics_saved_and_read_back(evaluate: Cli) -> None:
    one = succeeded(evaluate("fid", "a.npz", "b.npz", "--save-stats", "b-stats.npz", "--out-dir", "out"))
    two = succeeded(evaluate("fid", "a.npz", "b-stats.npz", "--out-dir", "out"))
    assert value(two, "FD-colours") == value(one, "FD-colours")
    assert "reference: statistics of 50 images" in two.out
    assert "precision" not in two.out
    first, second = read_records(Path("out"))
    assert first["figures"].keys() > second["figures"].keys() == {"fd"}
    assert first["extractor"] == second["extractor"]
    assert (first["samples"]["count"], first["reference"]["count"]) == (40, 50)
    assert second["names"] == {"fd": "FD-colours (n=40, colours at 8 pixels)"}
    refused(evaluate("fid", "a.npz", "b.npz", "--save-stats", "b-stats.npz"), "save_stats b-stats.npz exists")


def test_a_folder_and_an_npz(evaluate: Cli, two: None, tmp_path: Path) -> None:
    """The folder's images are cropped to the size of the npz, whichever side it is on."""
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(pictures(20, size=24, seed=2)):
        Image.fromarray(pixels[:, : 24 - i % 3]).save(tmp_path / "photos" / f"{i}.png")
    for pair in (("a.npz", "photos"), ("photos", "b.npz")):
        assert "20 images at 8 pixels" in succeeded(evaluate("fid", *pair)).out
    refused(evaluate("fid", "photos", "photos"), "22x24 to 24x24 pixels: give the size to compare at with --image-size")
    result = succeeded(evaluate("fid", "photos", "photos", "--image-size", 8, "--num-samples", 10))
    assert "(n=10, colours at 8 pixels)" in result.out


def test_samples_of_a_run_are_drawn_once(evaluate: Cli, run_dir: Path, shapes: Path, monkeypatch) -> None:
    first = succeeded(evaluate("fid", run_dir, "--num-samples", 7, "--batch-size", 3))
    assert "drawing: 7 images of 8 pixels, 20 dpm++ steps, seed 0" in first.out
    classes = "4 classes: circle, cross, square, triangle"
    assert f"reference: 12 images at 8 pixels: 12 images (12 png, 8x8) in {classes}, {shapes}" in first.out
    (drawn,) = (run_dir / "evaluation").glob("samples_ema_0.99_000004_*.npz")

    def fails(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(job.Job, "run", fails)
    second = succeeded(evaluate("fid", run_dir, "--num-samples", 7, "--batch-size", 4))
    assert f"samples: {drawn.relative_to(Path.cwd())}, drawn before" in second.out.replace(f"{Path.cwd()}/", "")
    assert value(first, "FD-colours") == value(second, "FD-colours")
    one, two = read_records(run_dir / "evaluation")
    assert (one["checkpoint"], one["step"], one["ema_rate"]) == ("ema_0.99_000004.safetensors", 4, 0.99)
    assert (one["samples"]["sampler"], one["samples"]["steps"], one["samples"]["count"]) == ("dpm++", 20, 7)
    assert {k: v for k, v in one.items() if k != "time"} == {k: v for k, v in two.items() if k != "time"}
    with np.load(drawn) as stored:
        assert stored["arr_0"].shape == (7, 8, 8, 3)
        expected = distance(stored["arr_0"], np.stack([np.asarray(Image.open(p)) for p in sorted(shapes.iterdir())]))
    assert value(first, "FD-colours") == pytest.approx(expected, abs=1e-3)


def test_other_settings_are_other_samples(evaluate: Cli, run_dir: Path) -> None:
    for flags in ((), ("--seed", 1), ("--sampler", "ddim"), ("--ema-rate", "raw")):
        succeeded(evaluate("fid", run_dir, "--num-samples", 4, *flags))
    assert len(list((run_dir / "evaluation").glob("samples_*.npz"))) == 4
    steps = [record["samples"]["steps"] for record in read_records(run_dir / "evaluation")]
    assert steps == [20, 20, None, 20]


def test_a_process_with_fewer_timesteps_than_the_sampler(evaluate: Cli, two: None, tmp_path: Path) -> None:
    saved(tmp_path / "few.safetensors", diffusion_steps=5)
    assert "5 dpm++ steps" in succeeded(evaluate("fid", "few.safetensors", "a.npz", "--num-samples", 4)).out
    assert (tmp_path / "evaluation" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("a.npz",), "name the images to compare a.npz with"),
        (("a.npz", "none.npz"), "none.npz does not exist: name images"),
        (("a.npz", "b.npz", "--steps", 3), "steps is for drawing from a checkpoint, and a.npz holds images"),
        (("a.npz", "b.npz", "--ema-rate", "0.9"), "ema_rate is for drawing"),
        (("a.npz", "b.npz", "--num-samples", 41), "num_samples 41: .*a.npz has 40 images"),
        (("a.npz", "b.npz", "--num-samples", 1), "num_samples must be at least 2"),
        (("a.npz", "b.npz", "--save-stats", "x.txt"), "save_stats x.txt must end in .npz"),
        (("a.npz", "b.npz", "--image-size", 9), "a.npz holds images of 8 pixels, not 9"),
        (("a.npz", "text.npz"), "text.npz is damaged or not an npz file"),
        (("a.npz", "nothing"), "no images in data_dir nothing"),
        (("none", "b.npz"), "none does not exist: name images"),
        (("none",), "none does not exist: name images"),
        (("a.npz", "b.npz", "--preset", "cifar10_uncond"), "preset is for drawing from a checkpoint"),
        (("a.npz", "b.npz", "--out-dir", "text.npz"), "out_dir text.npz"),
    ],
)
def test_bad_input_of_fid(evaluate: Cli, tmp_path: Path, args: tuple[object, ...], said: str) -> None:
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "nothing").mkdir()
    refused(evaluate("fid", *args), said)


def test_an_upsampler_draws_nothing_alone(evaluate: Cli, two: None, tmp_path: Path) -> None:
    saved(tmp_path / "up.safetensors", **UPPER)
    np.savez(tmp_path / "large.npz", arr_0=pictures(4, size=16))
    refused(evaluate("fid", "up.safetensors", "large.npz"), "enlarges images of 8 pixels: draw with fastdiff sample")


def test_training_images_that_are_gone(cli: Cli, evaluate: Cli, shapes: Path, tmp_path: Path) -> None:
    saved(tmp_path / "bare.safetensors")
    refused(evaluate("fid", "bare.safetensors"), "does not say which images it was trained on: name the images")
    shutil.copytree(shapes, "images")
    succeeded(cli("train", "--data-dir", "images", "--run-dir", "run", *TINY, *SHORT, "--steps", 1))
    shutil.rmtree("images")
    refused(evaluate("fid", "run"), "images, on which run/ema_0.9999_000001.safetensors was trained, does not exist")


def test_a_run_whose_random_crops_are_of_an_npz(cli: Cli, evaluate: Cli, tmp_path: Path) -> None:
    """Training takes larger images than the model's; compared are the whole ones at the model's size."""
    large = pictures(12, size=10)
    np.savez(tmp_path / "large.npz", large)
    np.savez(tmp_path / "small.npz", pictures(12))
    train = ("train", *TINY, *SHORT, "--steps", 1, "--random-crop", "0.8", "--run-dir", "run", "--data-dir")
    refused(cli(*train, "small.npz"), "8x8 pixels, not 10x10: pack the images again with --image-size 10, from which")
    succeeded(cli(*train, "large.npz"))
    result = succeeded(evaluate("neighbours", "run", "--num-samples", 4))
    assert "reference: 12 images at 8 pixels" in result.out
    succeeded(evaluate("fid", "run", "--num-samples", 4))


def test_held_out_images_are_no_reference(cli: Cli, evaluate: Cli, shapes: Path) -> None:
    flags = (*TINY, *SHORT, "--steps", 1, "--holdout", "0.4")
    trained = succeeded(cli("train", "--data-dir", shapes, "--run-dir", "run", *flags))
    (held_out,) = re.findall(r"held out: (\d+) of these images", trained.out)
    result = succeeded(evaluate("fid", "run", "--num-samples", 4))
    kept = 12 - int(held_out)
    assert f"reference: {kept} images at 8 pixels, without {held_out} that were held out" in result.out
    (record,) = read_records(Path("run/evaluation"))
    assert (record["reference"]["count"], record["reference"]["held_out"]) == (kept, int(held_out))
    result = succeeded(evaluate("neighbours", "run", "--num-samples", 4))
    with open("neighbours.csv", newline="") as file:
        nearest = {row[f"nearest_{i}"] for row in csv.DictReader(file) for i in range(1, 6)}
    assert not nearest & {name for name in (p.name for p in shapes.iterdir()) if is_held_out([name], 0.4).all()}


@pytest.mark.usefixtures("two")
def test_a_run_as_the_reference_is_drawn_from(evaluate: Cli, run_dir: Path) -> None:
    """Its folder holds pictures, which are no reference; its images are drawn from other noise."""
    flags = ("--num-samples", 6)
    same = succeeded(evaluate("fid", f"{run_dir}@2", f"{run_dir}@2", *flags))
    assert value(same, "FD-colours") > 1e-3
    assert "seed 0" in same.out
    assert "seed 1" in same.out
    for samples in ("a.npz", run_dir):
        result = succeeded(evaluate("fid", samples, f"{run_dir}@2", *flags))
        assert "model: " in result.out
        assert "ema_0.99_000002.safetensors" in result.out
        assert "6 images at 8 pixels" in result.out
    with pytest.raises(ValueError, match="is a run or checkpoint, not images: name images"):
        fastdiff.sample_metrics(pictures(9), run_dir, device="cpu")


def test_neighbours(evaluate: Cli, two: None, tmp_path: Path) -> None:
    """Ten samples are images of b, 30 are not."""
    np.savez(tmp_path / "s.npz", arr_0=np.concatenate([pictures(30, seed=7), pictures(50, seed=1)[5:15]]))
    result = succeeded(evaluate("neighbours", "s.npz", "b.npz"))
    assert "10 of 40 samples have the pixels of a training image" in result.out
    assert "nearest: sample 30 to image 5, at 0.00" in result.out
    assert 0 < value(result, "authenticity") <= 0.75
    with Image.open("neighbours.png") as sheet:
        assert sheet.width > 6 * 64
    with open("neighbours.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sample"] for row in rows[:10]] == [f"sample {i}" for i in range(30, 40)]
    assert [row["nearest_1"] for row in rows[:10]] == [f"image {i}" for i in range(5, 15)]
    assert len(rows) == 40
    refused(evaluate("neighbours", "s.npz", "b.npz"), "neighbours.png exists: .*--overwrite")
    succeeded(evaluate("neighbours", "s.npz", "b.npz", "--overwrite"))


def test_neighbours_of_a_run(evaluate: Cli, run_dir: Path) -> None:
    result = succeeded(evaluate("neighbours", run_dir, "--num-samples", 5, "--out", "sheet.png"))
    assert "authenticity (n=5, colours at 8 pixels)" in result.out
    with open("sheet.csv", newline="") as file:
        names = {row["nearest_1"] for row in csv.DictReader(file)}
    assert all(name.endswith(".png") for name in names)


@pytest.mark.usefixtures("two")
def test_bad_input_of_neighbours(evaluate: Cli, tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(12), sigma=np.eye(12), extractor="colours at 8 pixels")
    refused(evaluate("neighbours", "a.npz", "stats.npz"), "stats.npz holds statistics: name the training images")
    refused(evaluate("neighbours", "a.npz", "b.npz", "--out", "x.jpg"), "out x.jpg must end in .png")


def test_checkpoints(evaluate: Cli, run_dir: Path, sample: Cli) -> None:
    flags = ("--num-samples", 8, "--batch-size", 8)
    first = succeeded(evaluate("checkpoints", run_dir, *flags, "--plot", "plot.png"))
    records = read_records(run_dir / "evaluation")
    assert [(r["step"], r["ema_rate"]) for r in records] == [(2, 0.5), (2, 0.99), (4, 0.5), (4, 0.99)]
    best = min(records, key=lambda record: record["figures"]["fd"])
    told = json.loads((run_dir / "best.json").read_text())
    assert told["checkpoint"] == best["checkpoint"]
    assert told["value"] == best["figures"]["fd"]
    assert (told["metric"], told["name"]) == ("fd", "FD-colours (n=8, colours at 8 pixels)")
    with open(run_dir / "evaluation" / "checkpoints.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["fd"]) for row in rows] == [record["figures"]["fd"] for record in records]
    (marked,) = [line for line in first.out.splitlines() if line.endswith("best")]
    assert marked.split()[0] == str(best["step"])
    assert first.out.splitlines()[-1].endswith(f"@best is step {best['step']}, EMA {best['ema_rate']:g}")
    with Image.open("plot.png") as picture:
        assert picture.width > 400
    kept = [path.stem for path in (run_dir / "evaluation").glob("samples_*")]
    assert {stem.rpartition("_")[0] for stem in kept} == {f"samples_{Path(best['checkpoint']).stem}"}
    # the best checkpoint by its name, everywhere
    drawn = succeeded(sample(f"{run_dir}@best", "--num-samples", 1, "--steps", 1))
    assert best["checkpoint"] in drawn.out


def test_checkpoints_are_measured_once(evaluate: Cli, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--num-samples", 8, "--batch-size", 8)
    first = succeeded(evaluate("checkpoints", run_dir, *flags))
    before = contents(run_dir)

    def fails(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(job.Job, "run", fails)
    second = succeeded(evaluate("checkpoints", run_dir, *flags, "--metric", "fd"))
    assert second.out.splitlines()[-7:] == first.out.splitlines()[-7:]
    assert contents(run_dir) == before
    result = succeeded(evaluate("checkpoints", run_dir, *flags, "--metric", "recall", "--ema-rate", "0.5"))
    assert json.loads((run_dir / "best.json").read_text())["metric"] == "recall"
    assert sum(line.split()[1:3] == ["EMA", "0.5"] for line in result.out.splitlines()[-4:-1]) == 2


def test_bad_input_of_checkpoints(evaluate: Cli, run_dir: Path, sample: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(evaluate("checkpoints", "empty"), "empty has no checkpoint to compare")
    refused(evaluate("checkpoints", run_dir, "--ema-rate", "0.7"), "no checkpoint of the rate 0.7")
    refused(evaluate("checkpoints", run_dir, "--ema-rate", "high"), "ema_rate must be a rate")
    refused(evaluate("checkpoints", run_dir / "model000002.safetensors"), "is not a folder: name the folder of a run")
    said = "with this extractor, reference and num_samples there is"
    refused(evaluate("checkpoints", run_dir, "--metric", "sfid"), f"metric sfid: {said}")
    refused(evaluate("checkpoints", run_dir, "--metric", "recall", "--num-samples", 4), f"metric recall: {said}")
    refused(evaluate("checkpoints", run_dir.parent), "is no run; it holds .*/a: name one of them")
    assert not (run_dir / "evaluation").exists() or not list((run_dir / "evaluation").glob("samples*"))
    refused(sample(f"{run_dir}@best"), "best step is not known; fastdiff evaluate checkpoints .*/runs/a finds it")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "best.json is damaged, or about weights that are not there: fastdiff evaluate checkpoints"),
        ("[]", "best.json is damaged"),
        ('{"checkpoint": "../../x.safetensors"}', "best.json is damaged"),
        ('{"checkpoint": "opt000002.safetensors"}', "best.json is damaged"),
        ('{"checkpoint": 3}', "best.json is damaged"),
        ('{"checkpoint": "model000003.safetensors"}', "model000003.safetensors, which was the best, is gone"),
    ],
)
def test_a_damaged_best(run_dir: Path, sample: Cli, text: str, said: str) -> None:
    (run_dir / "best.json").write_text(text)
    refused(sample(f"{run_dir}@best"), said)


def test_the_best_step_with_another_average(run_dir: Path, sample: Cli) -> None:
    (run_dir / "best.json").write_text('{"checkpoint": "ema_0.5_000002.safetensors"}')
    flags = ("--num-samples", 1, "--steps", 1)
    assert "ema_0.5_000002" in succeeded(sample(f"{run_dir}@best", *flags)).out
    assert "model000002" in succeeded(sample(f"{run_dir}@best", *flags, "--ema-rate", "raw", "--out", "b.npz")).out
    refused(sample(f"{run_dir}@worst", *flags, "--out", "c.npz"), "'worst' is not a step; name one, such as .*@best")


def test_another_reference_is_measured_again(evaluate: Cli, run_dir: Path) -> None:
    """Other statistics under the same name, or another size for the extractor."""
    flags = ("--num-samples", 6, "--ema-rate", "0.5")
    found = []
    for mean in (0, 1):
        stats = {"mu": np.full(12, mean), "sigma": np.eye(12), "extractor": "colours at 8 pixels"}
        np.savez("stats.npz", **stats)
        found.append(succeeded(evaluate("checkpoints", run_dir, "stats.npz", *flags)).out.splitlines()[-3:])
    assert found[0] != found[1]
    assert len(read_records(run_dir / "evaluation")) == 4
    succeeded(evaluate("checkpoints", run_dir, *flags))
    succeeded(evaluate("checkpoints", run_dir, *flags, "--extractor-size", 4))
    assert len(read_records(run_dir / "evaluation")) == 8


def test_other_training_images_are_told(cli: Cli, evaluate: Cli, shapes: Path) -> None:
    shutil.copytree(shapes, "images")
    succeeded(cli("train", "--data-dir", "images", "--run-dir", "run", *TINY, "--class-cond", *SHORT, "--steps", 1))
    assert "trained on" not in succeeded(evaluate("fid", "run", "--num-samples", 20)).out
    next(Path("images").iterdir()).unlink()
    result = succeeded(evaluate("fid", "run", "--num-samples", 20))
    assert "images are not those that run/ema_0.9999_000001.safetensors was trained on" in result.out.replace(
        f"the images in {Path('images').resolve()}", "images"
    )


def test_held_out_images_of_an_npz(cli: Cli, evaluate: Cli, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", arr_0=pictures(30))
    flags = (*TINY, *SHORT, "--steps", 1, "--holdout", "0.3")
    trained = succeeded(cli("train", "--data-dir", "data.npz", "--run-dir", "run", *flags))
    (held_out,) = re.findall(r"held out: (\d+) of these images", trained.out)
    result = succeeded(evaluate("fid", "run", "--num-samples", 20))
    assert f"reference: {30 - int(held_out)} images at 8 pixels, without {held_out} that were held out" in result.out


def test_damaged_records_are_measured_again(evaluate: Cli, run_dir: Path) -> None:
    flags = ("--num-samples", 4, "--ema-rate", "0.5")
    first = succeeded(evaluate("checkpoints", run_dir, *flags))
    path = run_dir / "evaluation" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for figures in ({"fd": float("nan")}, {"fd": "low"}, {}, {"fd": 1e308}, {"fd": None}):
        path.write_text("".join(json.dumps(json.loads(line) | {"figures": figures}) + "\n" for line in lines))
        assert succeeded(evaluate("checkpoints", run_dir, *flags)).out.splitlines()[-3:] == first.out.splitlines()[-3:]


def test_a_best_that_was_deleted_meanwhile(evaluate: Cli, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As --keep-last does while the run is measured."""
    real = checkpoints.best_of

    def late(*args: Any) -> checkpoints.Row:
        best = real(*args)
        (run_dir / best.checkpoint).unlink(missing_ok=True)
        return best

    monkeypatch.setattr(checkpoints, "best_of", late)
    refused(evaluate("checkpoints", run_dir, "--num-samples", 4, "--ema-rate", "0.5"), "was deleted meanwhile")
    assert not (run_dir / "best.json").exists()


def test_the_best_of_other_weights(evaluate: Cli, run_dir: Path, sample: Cli) -> None:
    succeeded(evaluate("checkpoints", run_dir, "--num-samples", 4, "--ema-rate", "0.5"))
    best = run_dir / json.loads((run_dir / "best.json").read_text())["checkpoint"]
    shutil.copy(run_dir / "ema_0.99_000004.safetensors", best)
    refused(sample(f"{run_dir}@best"), "best.json is damaged, or about weights that are not there")


def test_a_step_without_its_raw_weights(evaluate: Cli, run_dir: Path) -> None:
    for path in run_dir.glob("model*.safetensors"):
        path.unlink()
    succeeded(evaluate("checkpoints", run_dir, "--num-samples", 4))
    assert len(read_records(run_dir / "evaluation")) == 4
    refused(evaluate("checkpoints", run_dir, "--ema-rate", "raw"), "no checkpoint with raw weights to compare")


def test_the_best_checkpoint_is_not_pruned(cli: Cli, run_dir: Path) -> None:
    (run_dir / "best.json").write_text('{"checkpoint": "ema_0.5_000002.safetensors"}')
    flags = ("--steps", 8, "--save-interval", 2, "--keep-last", 1)
    succeeded(cli("train", "--resume", "--run-dir", run_dir, *flags))
    assert saved_steps(run_dir) == [2, 8]


def test_half_a_line_of_a_record(evaluate: Cli, run_dir: Path) -> None:
    flags = ("--num-samples", 4)
    succeeded(evaluate("fid", run_dir, *flags))
    path = run_dir / "evaluation" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"time": "20')
    succeeded(evaluate("fid", run_dir, *flags))
    assert len(read_records(path.parent)) == 2


def test_an_interrupted_drawing_goes_on(evaluate: Cli, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after some images: nothing is recorded, and the same command draws the others."""
    real = SampleFiles.keep

    def interrupting(self: SampleFiles, *args: Any) -> None:
        real(self, *args)
        os.kill(os.getpid(), signal.SIGINT)

    flags = ("--num-samples", 24, "--batch-size", 4)
    monkeypatch.setattr(SampleFiles, "keep", interrupting)
    assert evaluate("fid", run_dir, *flags).status == 130
    assert not (run_dir / "evaluation" / "metrics.jsonl").exists()
    monkeypatch.setattr(SampleFiles, "keep", real)
    result = succeeded(evaluate("fid", run_dir, *flags))
    assert re.search(r"resuming: \d+ of 24 images are finished", result.out)
    assert "(n=24, colours at 8 pixels)" in result.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_extraction_says_how_to_go_on(
    evaluate: Cli, run_dir: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupting(*_: object) -> None:
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(quality, "extract", interrupting)
        result = evaluate("fid", run_dir, "--num-samples", 4)
    assert result.status == 128 + number
    assert result.out.endswith("stopped: what is drawn and recorded stays, and the same command does the rest\n")
    assert ", drawn before" in succeeded(evaluate("fid", run_dir, "--num-samples", 4)).out


def test_a_damaged_checkpoint_is_left_out(evaluate: Cli, run_dir: Path) -> None:
    """The newest, which would name the training images, or another; if all are, the last one ends the command."""
    damaged = ["ema_0.99_000004", "ema_0.5_000002"]
    paths = [run_dir / f"{name}.safetensors" for name in damaged]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-9])
    result = succeeded(evaluate("checkpoints", run_dir, "--num-samples", 4))
    for path in paths:
        assert re.search(rf"left out: \S*{path.name} .*damaged", result.out)
    assert [(r["step"], r["ema_rate"]) for r in read_records(run_dir / "evaluation")] == [(2, 0.99), (4, 0.5)]
    refused(evaluate("checkpoints", run_dir, "--num-samples", 4, "--ema-rate", "0.9"), "no checkpoint of the rate 0.9")
    for path in run_dir.glob("*_00000?.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    refused(evaluate("checkpoints", run_dir, "--num-samples", 4), "ema_0.5_000002.safetensors .*damaged")


def test_two_evaluations_of_one_run(evaluate: Cli, run_dir: Path) -> None:
    """The second one is told to wait, not to use a flag that it lacks; a grid without its npz is drawn again."""
    flags = ("--num-samples", 4, "--ema-rate", "0.5")
    succeeded(evaluate("checkpoints", run_dir, *flags))
    (drawn,) = (run_dir / "evaluation").glob("samples_*.npz")
    drawn.unlink()
    (run_dir / "evaluation" / "metrics.jsonl").unlink()
    refusals = []
    with Lease(parts_of(drawn)):
        refusals.append(evaluate("checkpoints", run_dir, *flags))
    refused(refusals[-1], r"\.npz\.parts is in use by process \d+ .*: stop it, or wait for its end")
    (parts_of(drawn) / "job.json").write_text("{")
    refusals.append(evaluate("checkpoints", run_dir, *flags))
    refused(refusals[-1], rf"is damaged: delete {parts_of(drawn)} to draw all images again")
    assert "--out" not in "".join(result.err for result in refusals)
    shutil.rmtree(parts_of(drawn))
    assert drawn.with_suffix(".png").exists()
    succeeded(evaluate("checkpoints", run_dir, *flags))
