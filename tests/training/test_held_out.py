"""The loss of a diffusion model on images that it is not trained on; test_classifier_run.py has a classifier's."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.data import load_dataset, normalised
from fastdiff.data.shapes import SHAPES, write_shapes
from fastdiff.kernels import philox_normal
from fastdiff.models.super_res import low_resolution
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.display import Lines as Display
from fastdiff.runtime.distributed import World
from fastdiff.training import Trainer, held_out
from fastdiff.training.held_out import hold_out, measure
from fastdiff.training.metrics import COLUMNS
from fastdiff.training.objective import HELD_OUT_NOISE_STREAM

from ..processes import launch
from ..support import randomise, refusal
from .support import TINY, Lines, file, run_config, same
from .test_classifier_run import HELD_OUT, MEASURED, WORKER, rows

FLAGS: dict[str, Any] = {**TINY, "device": "cpu", "precision": "fp32", "compile": "off", "holdout": 0.3}
FLAGS |= {"eval_interval": 2, "diffusion_steps": 20, "learn_sigma": True}
KINDS: dict[str, dict[str, Any]] = {
    "of classes": {"class_cond": True},
    "without": {},
    "super-resolution": {"small_size": 4},
    "super-resolution of classes": {"small_size": 4, "class_cond": True},
}
TERMS = ("loss", "mse", "vb")
VALUES = [f"val_{term}" for term in TERMS]


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 8 pixels in four classes, ten of which are held out at a share of 0.3. Not to be written to."""
    folder = tmp_path_factory.mktemp("data") / "figures"
    write_shapes(folder, 24, 8, seed=0)
    return folder


def trainer(run_dir: Path, images: Path, **flags: Any) -> Trainer:
    config = run_config(images, **FLAGS | flags)
    dataset = load_dataset(config.data, config.model.image_size, labelled=config.labelled)
    among, held, _ = hold_out(config, dataset, World(), Display(lambda line: None))
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(config, dataset, Runtime.resolve(config.runtime), run_dir, Lines(), None, among, held)


def train(images: Path | None, run_dir: Path, **flags: Any) -> list[str]:
    """``fastdiff.train``; what it says."""
    lines: list[str] = []
    fastdiff.train(images, run_dir, show=lines.append, recipe="improved", **flags)
    return lines


# What is measured


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_images_are_chosen_by_their_names_and_not_trained_on(tmp_path: Path, figures: Path, kind: str) -> None:
    subject = trainer(tmp_path, figures, steps=8, eval_interval=0, **KINDS[kind])
    held = subject.held_out
    assert held is not None
    assert {held.dataset.names[row] for row in held.rows} == HELD_OUT
    assert (held.labels is not None) == ("class_cond" in KINDS[kind])
    seen: list[Tensor] = []
    real = subject.objective.conditions
    subject.objective.conditions = lambda x, y, n: seen.extend(x) or real(x, y, n)  # type: ignore[method-assign, func-returns-value]
    subject.run()
    trained = normalised(torch.from_numpy(subject.dataset.images[subject.among]))
    assert len(trained) == 14
    assert len(seen) == 32
    assert all(any(torch.equal(x, other) for other in trained) for x in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_label_without_dropout_and_noise(tmp_path: Path, figures: Path, kind: str) -> None:
    """The mean over the held-out images, each at one timestep of its quarter, in batches of any size."""
    flags = dict(KINDS[kind])
    flags |= {"label_dropout": 0.9} if "class_cond" in flags else {}
    flags |= {"conditioning_noise": 1.0} if "small_size" in flags else {}
    subject = trainer(tmp_path, figures, dropout=0.9, eval_interval=1000, **flags)
    randomise(subject.model, seed=0)
    held = subject.held_out
    assert held is not None
    numbers = torch.arange(10)
    t = held_out._timesteps(numbers, 0, 20)
    x_start = normalised(torch.from_numpy(held.dataset.images[held.rows]))
    noise = philox_normal(0, numbers, HELD_OUT_NOISE_STREAM, (3, 8, 8))
    conditions: dict[str, Tensor] = {}
    if held.labels is not None:
        conditions["y"] = torch.tensor([SHAPES.index(held.dataset.names[row].split("_")[0]) for row in held.rows])
    if "small_size" in flags:
        conditions["low_res"] = low_resolution(x_start, 4)
    with torch.no_grad():
        subject.model.eval()
        terms = subject.objective.losses(subject.model, x_start, t, conditions, noise)
        subject.model.train()
    assert terms.keys() == set(TERMS)
    for size in (4, 64):
        found = measure(held, subject.objective, subject.model, subject.runtime, World(), 0, size)
        assert found.keys() == {f"val_{name}{q}" for name in TERMS for q in ("", "_q0", "_q1", "_q2", "_q3")}
        for name, values in terms.items():
            assert found[f"val_{name}"] == pytest.approx(float(values.mean()), rel=1e-5)
            for quarter in range(4):
                expected = float(values[numbers % 4 == quarter].mean())
                assert found[f"val_{name}_q{quarter}"] == pytest.approx(expected, rel=1e-5)
    assert subject.model.training


def test_measuring_changes_nothing(tmp_path: Path, figures: Path) -> None:
    for interval in (0, 1):
        trainer(tmp_path / str(interval), figures, steps=3, dropout=0.5, eval_interval=interval).run()
    one, other = (file(tmp_path / name / "model000003.safetensors")[0] for name in ("0", "1"))
    assert same(one, other)


def test_the_log(tmp_path: Path, figures: Path) -> None:
    lines = train(figures, tmp_path / "run", **FLAGS | {"log_interval": 3, "steps": 5})
    assert "held out: 10 of these images, not trained on" in lines
    found = {row["step"]: row for row in rows(tmp_path / "run")}
    assert list(found) == [2, 3, 4, 5]  # every second update, every third, and at the end
    assert [step for step, row in found.items() if "val_loss" in row] == [2, 4, 5]
    for step in (2, 4, 5):
        row = found[step]
        # as many as are trained on in two updates
        said = f"step {step}: held-out loss {row['val_loss']:.4f} (training {row['loss']:.4f}) on 8 images"
        assert said in lines
        assert row["val_loss"] == pytest.approx(row["val_mse"] + row["val_vb"], rel=1e-6)
    with (tmp_path / "run/progress.csv").open(newline="") as opened:
        table = list(csv.DictReader(opened))
    assert tuple(table[0]) == COLUMNS
    assert {name for name in table[0] if name.startswith("val_")} == {
        f"{name}{q}" for name in VALUES for q in ("", "_q0", "_q1", "_q2", "_q3")
    }
    assert [float(row["val_vb_q3"] or -1) for row in table] == [found[step].get("val_vb_q3", -1) for step in found]


def test_by_default_nothing_is_held_out_and_nothing_said(tmp_path: Path, figures: Path) -> None:
    flags = {name: value for name, value in FLAGS.items() if name != "holdout"}
    lines = train(figures, tmp_path / "run", steps=2, **flags)
    assert not [line for line in lines if "held" in line]
    assert not [name for row in rows(tmp_path / "run") for name in row if name.startswith("val_")]
    config = json.loads((tmp_path / "run/config.json").read_text())["train"]
    assert (config["holdout"], config["eval_interval"], config["val_data_dir"]) == (0.0, 2, "")


def test_too_few_or_too_many_are_held_out(tmp_path: Path, figures: Path) -> None:
    lines = train(figures, tmp_path / "run", steps=1, **FLAGS | {"holdout": 1e-6})
    said = "no image is held out, so that no held-out loss is measured: give --val-data-dir, or a larger --holdout"
    assert said in lines
    for flags, text in (
        ({"holdout": 0.99999}, f"holdout 0.99999 leaves no image of {figures} to train on: use a smaller one"),
        ({"holdout": 1.0}, "holdout must be at least 0 and below 1, not 1.0"),
        ({"eval_interval": -1}, "eval_interval must be at least 0, not -1"),
    ):
        assert refusal(lambda flags=flags: train(figures, tmp_path / "a", **FLAGS | flags)) == text
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("class_cond", [False, True])
def test_other_images_to_measure_on(tmp_path: Path, figures: Path, class_cond: bool) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("triangle_00003.png", "cross_00001.png"):
        shutil.copy(figures / name, other / name)
    subject = trainer(tmp_path / "run", figures, val_data_dir=str(other), class_cond=class_cond)
    assert subject.held_out is not None
    assert len(subject.among) == 24
    assert len(subject.held_out.rows) == 2
    if class_cond:
        assert subject.held_out.labels is not None
        assert subject.held_out.labels.tolist() == [SHAPES.index("cross"), SHAPES.index("triangle")]
    shutil.copy(figures / "cross_00001.png", other / "star_0.png")
    flags = FLAGS | {"val_data_dir": other, "class_cond": class_cond, "steps": 2}
    if class_cond:
        text = refusal(lambda: train(figures, tmp_path / "a", **flags))
        assert "has the class 'star', which the model does not know" in text
    else:
        assert any(line.endswith("on 3 images") for line in train(figures, tmp_path / "a", **flags))


# Resuming


def test_resume_is_exact_and_keeps_what_is_held_out(tmp_path: Path, figures: Path) -> None:
    flags = FLAGS | {"class_cond": True, "dropout": 0.1, "schedule_sampler": "loss-second-moment", "lr": 1e-3}
    train(figures, tmp_path / "straight", steps=6, **flags)
    train(figures, tmp_path / "run", steps=3, **flags)
    lines = train(None, tmp_path / "run", steps=6, resume=True)
    assert "held out: 10 of these images, not trained on" in lines
    ours, theirs = (file(tmp_path / name / "model000006.safetensors")[0] for name in ("run", "straight"))
    assert same(ours, theirs)
    ours, theirs = rows(tmp_path / "run"), rows(tmp_path / "straight")
    assert ours[3:] == theirs[3:]
    assert any("val_loss" in row for row in ours[3:])
    text = refusal(lambda: train(None, tmp_path / "run", resume=True, holdout=0.1))
    assert text == f"holdout is 0.3 in {tmp_path / 'run'} and 0.1 on the command line: leave the flag out"
    text = refusal(lambda: train(None, tmp_path / "run", resume=True, val_data_dir=figures))
    assert "measures a share of its images, which it does not train on, which cannot change" in text


def test_a_run_of_an_earlier_version_holds_nothing_out(tmp_path: Path, figures: Path) -> None:
    flags = {name: value for name, value in FLAGS.items() if name not in ("holdout", "eval_interval")}
    train(figures, tmp_path / "straight", steps=4, **flags)
    train(figures, tmp_path / "run", steps=2, **flags)
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    for name in ("holdout", "eval_interval", "val_data_dir"):
        del config["train"][name]
    path.write_text(json.dumps(config))
    text = refusal(lambda: train(None, tmp_path / "run", resume=True, holdout=0.3))
    assert text.startswith("holdout is 0.0 in ")
    lines = train(None, tmp_path / "run", resume=True, steps=4)
    assert not [line for line in lines if "held" in line or "changed in config" in line]
    ours, theirs = (file(tmp_path / name / "model000004.safetensors")[0] for name in ("run", "straight"))
    assert same(ours, theirs)
    train(None, tmp_path / "run", resume=True, steps=5, val_data_dir=shutil.copytree(figures, tmp_path / "other"))
    assert "val_loss" in rows(tmp_path / "run")[-1]


@pytest.mark.parametrize("setting", ["init_from", "resume_checkpoint"])
@pytest.mark.parametrize("before", [0.3, 0.0])
def test_held_out_images_that_the_weights_may_know_are_told(
    tmp_path: Path, figures: Path, setting: str, before: float
) -> None:
    train(figures, tmp_path / "run", steps=1, **FLAGS | {"holdout": before})
    path = tmp_path / "run/model000001.safetensors"
    for holdout in (0.0, 0.3, 0.4):
        lines = train(figures, tmp_path / str(holdout), **FLAGS | {"steps": 2, "holdout": holdout, setting: path})
        line = (
            f"warning: {path} held out {before:g} of its images, and this run {holdout:g} of its own: if they share "
            f"images, the held-out loss counts some that the weights were trained on; --holdout {before:g} counts none"
        )
        assert (line in lines) == (holdout > before)


# Processes


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_measure_as_one_does(tmp_path: Path, figures: Path, parallel: str) -> None:
    values = {name: value for name, value in (FLAGS | {"steps": 2, "microbatch": 1}).items() if value is not True}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    flags += ["--learn-sigma", "--class-cond", "--parallel", parallel, "--data-dir", str(figures)]
    for processes in (1, 2):
        words = ["train", *flags, "--run-dir", str(processes)]
        result = launch(WORKER, words, tmp_path, {"XDG_CACHE_HOME": str(tmp_path / "cache")}, processes)
        assert result.status == 0, result
    one, two = (rows(tmp_path / str(processes))[-1] for processes in (1, 2))
    assert {f"{name}_q3" for name in VALUES} <= one.keys()
    assert not set(MEASURED) & one.keys()
    assert one.keys() == two.keys()
    assert np.isfinite(list(one.values())).all()
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
