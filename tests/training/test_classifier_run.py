"""A classifier is trained by the engine that trains diffusion models: runs, their resumption, and held-out images."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from fastdiff import ClassifierConfig, DiffusionConfig, build_classifier, load_classifier
from fastdiff.checkpoint import read_tensors
from fastdiff.config import ClassifierTrainConfig, RunConfig
from fastdiff.data import batches, load_dataset, normalised
from fastdiff.data.shapes import SHAPES, write_shapes
from fastdiff.interop import openai
from fastdiff.kernels import philox_normal
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.display import Lines as Display
from fastdiff.runtime.distributed import World
from fastdiff.training import Trainer, held_out
from fastdiff.training.held_out import hold_out, measure
from fastdiff.training.objective import HELD_OUT_NOISE_STREAM
from fastdiff.training.resuming import resume
from fastdiff.training.update import Updater

from ..processes import launch
from ..support import randomise, refusal
from ..watch import Watch
from .support import Lines, digests, file, same

TINY: dict[str, Any] = {
    "image_size": 8,
    "classifier_width": 64,
    "classifier_depth": 1,
    "channel_mult": "1",
    "classifier_attention_resolutions": "",
    "diffusion_steps": 20,
    "noise_schedule": "cosine",
    "batch_size": 5,
    "log_interval": 1,
    "lr": 1e-3,
    "holdout": 0.3,
    "eval_interval": 2,
    "device": "cpu",
    "precision": "fp32",
    "compile": "off",
}
HELD_OUT = {
    *("circle_00000.png", "cross_00001.png", "triangle_00003.png", "square_00010.png", "triangle_00011.png"),
    *("circle_00016.png", "cross_00017.png", "square_00018.png", "triangle_00019.png", "cross_00021.png"),
}
"""The images that the hash of their names selects at a share of 0.3, wherever and whenever it is computed."""
ALL_IN_USE = {"schedule_sampler": "loss-second-moment", "diffusion_steps": 2, "microbatch": 3, "flip": True}
ALL_IN_USE |= {"ema_rate": "0.5", "grad_clip": 1.0, "batch_size": 8}
WORKER = Path(__file__).with_name("worker.py")
MEASURED = ("images_per_s", "mfu", "data_wait", "memory_gib")

Trained = Callable[..., Trainer]


def trainer(run_dir: Path, images: Path, world: World | None = None, **flags: Any) -> Trainer:
    values = {**TINY, "num_classes": len(SHAPES), "data_dir": str(images), **flags}
    config = RunConfig.from_flags(values, classifier=True)
    dataset = load_dataset(config.data, config.model.image_size, labelled=True)
    among, held, _ = hold_out(config, dataset, World(), Display(lambda line: None))
    run_dir.mkdir(parents=True, exist_ok=True)
    runtime = Runtime.resolve(config.runtime)
    config = replace(config, class_names=dataset.class_names)
    return Trainer(config, dataset, runtime, run_dir, Lines(), world, among, held)


def updater(subject: Trainer) -> Updater:
    return Updater(subject.config, subject.state, subject.objective, subject.module, subject.forward, subject.world)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 8 pixels in the four classes circle, cross, square, triangle. Not to be written to."""
    folder = tmp_path_factory.mktemp("data") / "figures"
    write_shapes(folder, 24, 8, seed=0)
    return folder


@pytest.fixture(scope="session")
def three_updates(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The run folder that fastdiff.train_classifier leaves after 3 updates. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    fastdiff.train_classifier(images, run_dir, steps=3, show=None, **TINY)
    return run_dir


@pytest.fixture
def run_dir(three_updates: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(three_updates, tmp_path / "run"))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """progress.jsonl without what a clock has measured."""
    lines = (run_dir / "progress.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in MEASURED} for line in lines]


# The run folder


def test_the_checkpoint_of_a_run(run_dir: Path) -> None:
    """It has everything that guidance needs; no average by default, and no preview."""
    names = {path.name for path in run_dir.iterdir()} - {"log.txt", ".lease"}
    saved = {"model000003.safetensors", "opt000003.safetensors", "manifest000003.json"}
    assert names == saved | {"config.json", "progress.csv", "progress.jsonl"}
    loaded = load_classifier(run_dir)
    assert loaded.config == ClassifierConfig(
        image_size=8,
        classifier_width=64,
        classifier_depth=1,
        channel_mult=(1,),
        classifier_attention_resolutions=(),
        num_classes=4,
    )
    assert loaded.diffusion_config == DiffusionConfig(diffusion_steps=20, noise_schedule="cosine")
    assert (loaded.step, loaded.class_names) == (3, SHAPES)
    assert (loaded.metadata["noised"], loaded.metadata["class_counts"]) == (True, [6, 6, 6, 6])
    assert load_classifier(f"{run_dir}@3").step == 3
    train = json.loads((run_dir / "config.json").read_text())["train"]
    assert (train["weight_decay"], train["ema_rate"], train["noised"]) == (0.05, [], True)


def test_the_log_has_loss_and_accuracy_by_quarter(run_dir: Path) -> None:
    with (run_dir / "progress.csv").open(newline="") as opened:
        table = list(csv.DictReader(opened))
    for name in ("loss", "acc1", "acc5", "val_loss", "val_acc1", "val_acc5"):
        assert {name, *(f"{name}_q{q}" for q in range(4))} <= set(table[0]), name
    assert [bool(row["val_acc1"]) for row in table] == [False, True, True]  # every second update, and at the end
    last = {name: float(value) for name, value in table[2].items() if value}
    assert last["val_acc5"] == last["acc5"] == 1  # there are only four classes
    assert last["val_acc1"] == pytest.approx(
        np.average([last[f"val_acc1_q{q}"] for q in range(4)], weights=[3, 3, 2, 2])
    )
    assert 0 < last["loss"] < 10
    log = (run_dir / "log.txt").read_text()
    assert "held out: 10 of these images, not trained on" in log
    assert f"step 3: accuracy {last['val_acc1']:.1%} on 10 held-out images (" in log
    assert "accuracy" in next(line for line in log.splitlines() if "step 3/3" in line)


def test_it_learns(tmp_path: Path) -> None:
    """Brightness says the class; what is left at the end is the noise, in which nobody sees it."""
    from PIL import Image

    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        name, level = (("dark", 60), ("light", 190))[i % 2]
        Image.fromarray(rng.integers(level - 40, level + 40, (8, 8, 3)).astype(np.uint8)).save(
            folder / f"{name}_{i}.png"
        )
    flags = TINY | {"batch_size": 16, "eval_interval": 40, "log_interval": 40, "classifier_pool": "adaptive"}
    fastdiff.train_classifier(folder, tmp_path / "run", steps=40, show=None, **flags)
    (row,) = rows(tmp_path / "run")
    assert row["val_acc1_q0"] == row["val_acc1_q1"] == 1
    assert row["val_loss_q0"] < 0.2 < row["val_loss_q3"]


def test_previews_are_refused(run_dir: Path, images: Path) -> None:
    """There is no such flag, but config.json may be edited."""
    path = run_dir / "config.json"
    values = json.loads(path.read_text())
    values["train"]["preview_interval"] = 100
    path.write_text(json.dumps(values))
    text = refusal(lambda: fastdiff.train_classifier(images, run_dir, resume=True, show=None))
    assert "preview_interval must be 0 for a classifier, not 100" in text


def test_the_loss_scale_begins_where_guided_diffusions_does(tmp_path: Path, images: Path) -> None:
    subject = trainer(tmp_path, images, precision="fp16", fp16_scale_growth=1e-3)
    assert subject.state.scaler.get_scale() == 2.0**16


# The objective


def logits(x: Tensor, t: Tensor) -> Tensor:
    """The likeliest of seven classes is 3, then 4, 2, 1, 5, 6, 0."""
    return torch.tensor([0.0, 4.0, 5.0, 7.0, 6.0, 3.0, 1.0]).expand(len(x), 7)


def test_the_losses(tmp_path: Path, images: Path) -> None:
    subject = trainer(tmp_path, images, num_classes=7, rescale_timesteps=True)
    seen: list[Tensor] = []

    def forward(x: Tensor, t: Tensor) -> Tensor:
        seen.extend((x, t))
        return logits(x, t)

    y, t = torch.tensor([3, 4, 5, 6]), torch.tensor([0, 5, 10, 19])
    x_start, noise = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    terms = subject.objective.losses(forward, x_start, t, {"y": y}, noise)
    torch.testing.assert_close(terms["loss"], F.cross_entropy(logits(x_start, t), y, reduction="none"))
    assert terms["acc1"].tolist() == [1, 0, 0, 0]
    assert terms["acc5"].tolist() == [1, 1, 1, 0]
    assert torch.equal(seen[0], subject.objective.diffusion.q_sample(x_start, t, noise))
    assert seen[1].tolist() == [0, 250, 500, 950]


def test_without_noise_it_sees_clean_images_at_0(tmp_path: Path, images: Path) -> None:
    subject = trainer(tmp_path, images, noised=False, steps=1)
    seen: list[Tensor] = []
    real = subject.forward
    subject.forward = lambda x, t: seen.extend((x, t)) or real(x, t)  # type: ignore[func-returns-value]
    subject.run()
    stream = batches(subject.dataset, subject.config.data, 5, 0, 0, among=subject.among)
    drawn, _ = next(stream)
    stream.close()
    assert torch.equal(seen[0], normalised(drawn))
    assert seen[1].tolist() == [0] * 5
    (row,) = rows(tmp_path)
    assert row["acc1_q0"] == row["acc1"]
    assert "acc1_q1" not in row
    assert load_classifier(tmp_path).metadata["noised"] is False


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_update_waits_for_nothing(tmp_path: Path, images: Path, precision: str) -> None:
    subject = trainer(tmp_path, images, precision=precision, **ALL_IN_USE)
    update = updater(subject)
    stream = batches(subject.dataset, subject.config.data, 8, 0, 0, among=subject.among)
    update(*next(stream))  # what is made once may wait
    with Watch() as watch:
        update(*next(stream))
        update(*next(stream))
    stream.close()
    assert subject.state.step == 3
    assert watch.calls > 300
    assert watch.seen == []


@pytest.mark.slow
def test_accuracy_is_not_weighted(tmp_path: Path, images: Path) -> None:
    """The timestep sampler's weights make the loss unbiased; a share of images stays one."""
    subject = trainer(tmp_path, images, steps=30, log_interval=30, eval_interval=0, **ALL_IN_USE | {"batch_size": 12})
    subject.run()
    assert np.ptp(subject.state.sampler.weights().numpy()) > 0
    (row,) = rows(tmp_path)
    assert row["acc5"] == row["acc5_q0"] == row["acc5_q2"] == 1


# Held-out images


def test_held_out_images_are_chosen_by_their_names_and_not_trained_on(tmp_path: Path, images: Path) -> None:
    more = tmp_path / "more"
    shutil.copytree(images, more / "sub")
    shutil.copytree(images, more, dirs_exist_ok=True)
    for folder, count in ((images, 24), (more, 48)):
        subject = trainer(tmp_path / folder.name, folder, steps=8, eval_interval=1000)
        assert subject.held_out is not None
        names = {subject.dataset.names[row] for row in subject.held_out.rows}
        assert {name for name in names if "/" not in name} == HELD_OUT  # whatever else is in the folder
        assert not names & {subject.dataset.names[row] for row in subject.among}
        assert len(subject.among) + len(names) == count
    seen: list[Tensor] = []
    subject = trainer(tmp_path / "run", images, steps=8, eval_interval=0)
    real = subject.objective.conditions
    subject.objective.conditions = lambda x, y, n: seen.extend(x) or real(x, y, n)  # type: ignore[method-assign, func-returns-value]
    subject.run()
    trained = normalised(torch.from_numpy(subject.dataset.images[subject.among]))
    assert all(any(torch.equal(x, other) for other in trained) for x in seen)
    assert len(seen) == 40


def test_nothing_is_held_out(tmp_path: Path, images: Path) -> None:
    lines: list[str] = []
    flags = TINY | {"holdout": 0.0}
    fastdiff.train_classifier(images, tmp_path / "run", steps=1, show=lines.append, **flags)
    assert "no image is held out, so that no accuracy is measured: --val-data-dir gives one" in lines
    assert "val_loss" not in rows(tmp_path / "run")[0]
    text = refusal(lambda: fastdiff.train_classifier(images, tmp_path / "all", **TINY | {"holdout": 0.99999}))
    assert text.startswith(f"holdout 0.99999 leaves no image of {images} to train on")
    assert not (tmp_path / "all").exists()


def test_other_images_to_measure_on(tmp_path: Path, images: Path) -> None:
    """Their classes are the classifier's by name, in whatever order and number."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("triangle_00003.png", "cross_00001.png"):
        shutil.copy(images / name, other / name)
    subject = trainer(tmp_path / "run", images, val_data_dir=str(other))
    assert subject.held_out is not None
    assert subject.held_out.labels.tolist() == [SHAPES.index("cross"), SHAPES.index("triangle")]
    assert len(subject.among) == 24
    (other / "star_0.png").write_bytes((images / "cross_00001.png").read_bytes())
    text = refusal(lambda: fastdiff.train_classifier(images, tmp_path / "a", val_data_dir=other, **TINY))
    assert "has the class 'star', which the model does not know" in text
    inside = Path(shutil.copytree(images, tmp_path / "images")) / "val"
    shutil.copytree(images, inside)
    text = refusal(lambda: fastdiff.train_classifier(inside.parent, tmp_path / "a", val_data_dir=inside, **TINY))
    assert text == f"val_data_dir {inside} is inside the data folder: its images would be trained on"
    text = refusal(lambda: fastdiff.train_classifier(inside, tmp_path / "a", val_data_dir=inside.parent, **TINY))
    assert text == (
        f"val_data_dir {inside.parent} contains the data folder: images that are trained on would be measured, too"
    )
    assert not (tmp_path / "a").exists()


def test_what_is_measured(tmp_path: Path, images: Path) -> None:
    """The mean over the held-out images, each at one timestep of its quarter, in batches of any size."""
    subject = trainer(tmp_path, images)
    randomise(subject.model, seed=0)
    held = subject.held_out
    assert held is not None
    objective, numbers = subject.objective, torch.arange(10)
    t = held_out._timesteps(numbers, 0, 20)
    assert (4 * t // 20).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    x_start = normalised(torch.from_numpy(held.dataset.images[held.rows]))
    noise = philox_normal(0, numbers, HELD_OUT_NOISE_STREAM, (3, 8, 8))
    y = torch.from_numpy(held.labels)
    with torch.no_grad():
        terms = objective.losses(subject.model, x_start, t, {"y": y}, noise)
    for size in (4, 10, 64):
        found = measure(held, objective, subject.model, subject.runtime, World(), 0, size)
        for name, values in terms.items():
            assert found[f"val_{name}"] == pytest.approx(float(values.mean()), rel=1e-5)
            for quarter in range(4):
                expected = float(values[numbers % 4 == quarter].mean())
                assert found[f"val_{name}_q{quarter}"] == pytest.approx(expected, rel=1e-5)
    assert measure(held, objective, subject.model, subject.runtime, World(), 1, 4) != found


def test_timesteps_of_held_out_images_cover_their_quarters() -> None:
    numbers = torch.arange(4000)
    for steps in (1000, 7, 3, 1):
        t = held_out._timesteps(numbers, 5, steps)
        assert set(t.tolist()) == set(range(steps)) if steps < 10 else len(t.unique()) > 0.9 * steps
        assert (4 * t.double() / steps >= numbers % 4 - 4 / steps).all()
        assert (t * 4 <= (numbers % 4 + 1) * steps).all()


def test_each_quarter_has_every_class(tmp_path: Path, images: Path) -> None:
    """Images whose classes take turns would else have one quarter for each class."""
    subject = trainer(tmp_path, images, eval_interval=1000)
    assert isinstance(subject.config.train, ClassifierTrainConfig)
    in_turn = np.arange(16) % 4
    held = held_out._measured(subject.dataset, np.arange(16), in_turn, subject.config.train)
    assert held.labels.tolist() == in_turn[held.rows].tolist()
    t = held_out._timesteps(torch.arange(16), 0, 1000)
    assert {(int(4 * ti // 1000), int(label)) for ti, label in zip(t, held.labels, strict=True)} == {
        (quarter, label) for quarter in range(4) for label in range(4)
    }


def test_no_more_images_are_measured_than_trained_on_between(tmp_path: Path, images: Path) -> None:
    for interval, count in ((1, 5), (2, 10), (1000, 10), (0, 10)):
        held = trainer(tmp_path / str(interval), images, eval_interval=interval).held_out
        assert held is not None
        assert len(held.rows) == count
        assert set(held.rows) <= {row for row, name in enumerate(held.dataset.names) if name in HELD_OUT}


def test_of_many_held_out_images_some_are_measured(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "whole", images).held_out
    monkeypatch.setattr(held_out, "MOST", 4)
    some = trainer(tmp_path / "some", images)
    assert some.held_out is not None
    assert whole is not None
    assert some.held_out.rows.tolist() == whole.rows[[0, 2, 5, 7]].tolist()
    assert len(some.among) == 14  # the others are not trained on either


# Resuming


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_resume_is_exact(tmp_path: Path, images: Path, precision: str) -> None:
    """Weights, average, moments, the sampler's history, the log with what was measured."""
    flags = {**ALL_IN_USE, "precision": precision, "diffusion_steps": 4}
    trainer(tmp_path / "straight", images, steps=6, **flags).run()
    trainer(tmp_path / "resumed", images, steps=3, **flags).run()
    resumed = trainer(tmp_path / "resumed", images, steps=6, **flags)
    torch.manual_seed(99)  # as in another process
    resume(resumed)
    assert resumed.state.step == 3
    resumed.run()
    for kind in ("model", "ema_0.5_", "opt"):
        (one, about), (other, about_other) = (
            file(tmp_path / name / f"{kind}000006.safetensors") for name in ("straight", "resumed")
        )
        assert same(one, other), kind
        assert about == about_other, kind
    straight, again = rows(tmp_path / "straight"), rows(tmp_path / "resumed")
    assert [row.get("val_loss") for row in straight[3:]] == [row.get("val_loss") for row in again[3:]]
    assert straight[3:] == again[3:]
    assert straight[2] == {name: value for name, value in again[2].items() if "val" not in name}


def train(
    cwd: Path, images: Path, run_dir: str, processes: int = 1, status: int = 0, *more: str, **environment: str
) -> str:
    """``fastdiff train-classifier`` alone or as several processes; what it printed."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (TINY | {"batch_size": 8}).items()]
    arguments = ["train-classifier", "--data-dir", str(images), "--run-dir", run_dir, *flags, *more]
    result = launch(WORKER, arguments, cwd, {"XDG_CACHE_HOME": str(cwd / "cache"), **environment}, processes)
    assert result.status == status, result
    return result.out


def test_killed_and_resumed_is_straight_on(tmp_path: Path, images: Path) -> None:
    """SIGKILL between a measurement and the next checkpoint."""
    steps = ["--steps", "7", "--save-interval", "3"]
    train(tmp_path, images, "straight", 1, 0, *steps)
    train(tmp_path, images, "killed", 1, -9, *steps, KILL_AFTER_STEP="5")
    assert "resumed at step 3\n" in train(tmp_path, images, "killed", 1, 0, "--resume")
    assert digests(tmp_path / "straight", 7) == digests(tmp_path / "killed", 7)
    assert len(digests(tmp_path / "killed", 7)) == 2
    assert rows(tmp_path / "straight") == rows(tmp_path / "killed")
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, 8))


@pytest.mark.slow
def test_compiled_and_in_any_micro_batches_it_is_the_same(tmp_path: Path, images: Path) -> None:
    kinds = {"plain": [], "auto": ["--microbatch", "auto"], "parts": ["--microbatch", "3"]}
    for name, more in (kinds | {"compiled": ["--compile", "on"]}).items():
        train(tmp_path, images, name, 1, 0, "--steps", "3", *more, COMPILE_BACKEND="aot_eager")
    plain = rows(tmp_path / "plain")
    for name in ("auto", "parts", "compiled"):
        for ours, theirs in zip(rows(tmp_path / name), plain, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(tmp_path: Path, images: Path, parallel: str) -> None:
    steps = ["--steps", "4", "--microbatch", "3"]
    train(tmp_path, images, "one", 1, 0, *steps)
    train(tmp_path, images, "two", 2, 0, *steps, "--parallel", parallel)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == 4
    assert "val_loss_q3" in one[1]
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


# Where it starts


def test_from_a_classifier_recomputing_activations(run_dir: Path, tmp_path: Path, images: Path) -> None:
    new = fastdiff.train_classifier(
        images, tmp_path / "new", init_from=run_dir, use_checkpoint=True, steps=1, show=None, **TINY
    )
    assert new.config.use_checkpoint
    assert not load_classifier(run_dir).config.use_checkpoint


def test_from_a_classifier_with_other_classes(run_dir: Path, tmp_path: Path, images: Path) -> None:
    """Rows of the last layer follow their class by name; a new class starts afresh."""
    others = tmp_path / "others"
    others.mkdir()
    for i in range(24):
        name, source = (("arrow", "cross"), ("circle", "circle"), ("triangle", "triangle"))[i % 3]
        found = sorted(images.glob(f"{source}_*"))
        shutil.copy(found[i // 3 % len(found)], others / f"{name}_{i}.png")
    lines: list[str] = []
    flags = {k: v for k, v in TINY.items() if not k.startswith("classifier") and k != "noise_schedule"}
    fastdiff.train_classifier(
        others, tmp_path / "new", init_from=run_dir, steps=1, lr_warmup_steps=10**9, show=lines.append, **flags
    )
    new, old = load_classifier(tmp_path / "new"), load_classifier(run_dir)
    assert new.class_names == ("arrow", "circle", "triangle")
    assert new.diffusion_config == old.diffusion_config
    assert any("1 of 3 classes are not in" in line and line.endswith("newly initialised: arrow") for line in lines)
    ours, theirs = new.model.state_dict(), old.model.state_dict()
    for name in ("out.2.c_proj.weight", "out.2.c_proj.bias"):
        torch.testing.assert_close(ours[name][1:], theirs[name][[0, 3]], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours["out.2.qkv_proj.weight"], theirs["out.2.qkv_proj.weight"], rtol=0, atol=1e-6)
    text = refusal(lambda: fastdiff.train_classifier(others, tmp_path / "b", init_from=run_dir, classifier_width=128))
    assert text.startswith("classifier_width is 64 in ")


def test_a_classifier_of_a_process_without_signal_at_its_end(tmp_path: Path, images: Path, run_dir: Path) -> None:
    """It predicts nothing, so that no prediction is refused: it trains, resumes, fine-tunes and guides such a model."""
    folder, how = tmp_path / "zero", {"steps": 1, "show": None, **TINY, "zero_terminal_snr": True}
    fastdiff.train_classifier(images, folder, **how)
    fastdiff.train_classifier(run_dir=folder, resume=True, steps=2, show=None)
    zero = load_classifier(folder)
    assert zero.step == 2
    assert zero.diffusion_config == DiffusionConfig(20, "cosine", prediction="x_start", zero_terminal_snr=True)
    again = fastdiff.train_classifier(images, tmp_path / "tuned", init_from=run_dir, **how)
    assert again.diffusion_config == zero.diffusion_config
    small = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": ""}
    shared = {name: value for name, value in how.items() if "classifier" not in name}
    fastdiff.train(images, tmp_path / "model", **shared | small, prediction="v", preview_interval=0)
    for sampler in ("ddpm", "ddim", "dpm++"):
        drawing = {"num_samples": 2, "steps": 3, "sampler": sampler, "device": "cpu", "compile": "off"}
        guided = fastdiff.sample(tmp_path / "model", classifier=folder, **drawing)
        assert all(image.any() for image in guided)  # else an image is not a number


@pytest.mark.parametrize("classes", [4, 7])
def test_from_guided_diffusions_file(tmp_path: Path, images: Path, classes: int) -> None:
    """Its classes are numbers: if they are as many as the data has they are taken in order, else the last layer not."""
    config = ClassifierConfig(8, 64, 1, (), channel_mult=(1,), num_classes=classes)
    classifier = randomise(build_classifier(config), seed=0)
    torch.save(classifier.state_dict(), tmp_path / "c.pt")
    flags = {k: v for k, v in TINY.items() if not k.startswith("classifier")}
    found = fastdiff.train_classifier(
        images, tmp_path / "run", init_from=tmp_path / "c.pt", steps=1, lr_warmup_steps=10**9, show=None, **flags
    )
    assert found.config == replace(config, num_classes=4)
    for name, value in classifier.state_dict().items():
        ours = found.model.state_dict()[name]
        if classes == 4 or "c_proj" not in name:
            torch.testing.assert_close(ours, value, rtol=0, atol=1e-6)
        else:
            assert len(ours) == 4


def test_a_bare_state_dict_is_asked_for_its_process_and_read_once(
    run_dir: Path, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model000003.pt"
    torch.save(load_classifier(run_dir).model.state_dict(), path)
    flags = {k: v for k, v in TINY.items() if k not in ("diffusion_steps", "noise_schedule")}
    text = refusal(lambda: fastdiff.train_classifier(images, tmp_path / "a", init_from=path, **flags))
    assert text == (
        f"{path} does not say which diffusion process the classifier was trained on: give --diffusion-steps and "
        "--noise-schedule, or its --preset (64x64_classifier, 128x128_classifier, 256x256_classifier, "
        "512x512_classifier)"
    )
    more = {"diffusion_steps": 20}
    text = refusal(lambda: fastdiff.train_classifier(images, tmp_path / "a", init_from=path, **flags, **more))
    assert "give --noise-schedule, or its" in text
    read: list[Path] = []
    real = openai.read_file
    monkeypatch.setattr(openai, "read_file", lambda path: read.append(path) or real(path))  # type: ignore[func-returns-value]
    fastdiff.train_classifier(images, tmp_path / "a", init_from=path, steps=1, show=None, **TINY)
    assert read == [path]
    lines: list[str] = []
    resumed = fastdiff.train_classifier(
        images, tmp_path / "b", resume_checkpoint=path, steps=4, show=lines.append, **flags
    )
    assert resumed.diffusion_config == DiffusionConfig(diffusion_steps=1000, noise_schedule="linear")
    assert f"{path} does not say its diffusion process: diffusion_steps 1000, noise_schedule linear assumed" in lines


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_runs_step_is_resumed(run_dir: Path, tmp_path: Path, images: Path, suffix: str) -> None:
    """Ours with its optimizer state, or guided-diffusion's files, which have the same contents."""
    straight = tmp_path / "straight"
    fastdiff.train_classifier(images, straight, steps=5, show=None, **TINY)
    path = run_dir / "model000003.safetensors"
    if suffix == ".pt":
        loaded = load_classifier(run_dir)
        torch.save(loaded.model.state_dict(), tmp_path / "model000003.pt")
        held, _ = read_tensors(run_dir / "opt000003.safetensors", "optimizer")
        names = [name for name, _ in loaded.model.named_parameters()]
        keys = ("step", "exp_avg", "exp_avg_sq")
        state = {i: {key: held[f"{key}.{name}"] for key in keys} for i, name in enumerate(names)}
        group = {"lr": 1e-3, "weight_decay": 0.05, "params": list(range(len(names)))}
        torch.save({"state": state, "param_groups": [group]}, tmp_path / "opt000003.pt")
        path = tmp_path / "model000003.pt"
    new = tmp_path / "new"
    fastdiff.train_classifier(images, new, resume_checkpoint=path, steps=5, show=None, **TINY)
    ours, theirs = (file(folder / "model000005.safetensors")[0] for folder in (new, straight))
    assert same(ours, theirs)


def test_settings_that_change_or_do_not(run_dir: Path, images: Path) -> None:
    again = {"run_dir": run_dir, "resume": True, "show": None}
    for name, said in (("holdout", "holdout is 0.3 in"), ("noised", "noised is True in")):
        assert refusal(
            lambda name=name: fastdiff.train_classifier(images, **again, **{name: 0.1 if name == "holdout" else False})
        ).startswith(said)
    assert refusal(lambda: fastdiff.train_classifier(images, **again, classifier_width=128)).startswith(
        "classifier_width"
    )
    assert fastdiff.train_classifier(images, **again, steps=4).step == 4


def test_what_is_measured_on_stays_held_out(run_dir: Path, tmp_path: Path, images: Path) -> None:
    """A run that held out its own images would train on them with others to measure on, and the other way round."""
    again = {"resume": True, "show": None}
    other = shutil.copytree(images, tmp_path / "other")
    text = refusal(lambda: fastdiff.train_classifier(images, run_dir, val_data_dir=other, **again))
    assert text == (
        f"{run_dir} measures a share of its images, which it does not train on, which cannot change: leave "
        "val_data_dir as it is"
    )
    new = tmp_path / "new"
    fastdiff.train_classifier(images, new, val_data_dir=other, steps=1, show=None, **TINY)
    text = refusal(lambda: fastdiff.train_classifier(images, new, val_data_dir="", **again))
    assert text.startswith(f"{new} measures the images of {other}, which cannot change")
    moved, lines = other.rename(tmp_path / "moved"), list[str]()
    fastdiff.train_classifier(images, new, val_data_dir=moved, steps=2, resume=True, show=lines.append)
    assert any("changed: " in line and f'val_data_dir "{other}" becomes "{moved}"' in line for line in lines)
    none = TINY | {"holdout": 0.0}
    fastdiff.train_classifier(images, tmp_path / "none", steps=1, show=None, **none)
    fastdiff.train_classifier(images, tmp_path / "none", steps=2, val_data_dir=moved, **again)


@pytest.mark.parametrize("setting", ["init_from", "resume_checkpoint"])
def test_held_out_images_that_the_weights_may_know_are_told(
    run_dir: Path, tmp_path: Path, images: Path, setting: str
) -> None:
    path = run_dir / "model000003.safetensors"
    for holdout, told in ((0.3, False), (0.2, False), (0.4, True)):
        lines: list[str] = []
        flags = TINY | {"steps": 4, "holdout": holdout, setting: path}
        fastdiff.train_classifier(images, tmp_path / str(holdout), show=lines.append, **flags)
        line = (
            f"warning: {path} held out 0.3 of its images, and this run 0.4 of its own: if they share images, the "
            "accuracy counts some that the weights were trained on; --holdout 0.3 counts none"
        )
        assert (line in lines) == told


def test_a_run_of_the_other_kind_is_named(run_dir: Path, tmp_path: Path, images: Path) -> None:
    again = {"resume": True, "show": None}
    text = refusal(lambda: fastdiff.train(images, run_dir, **again))
    assert text == f"{run_dir} is the run of a classifier: resume it with fastdiff train-classifier"
    (run_dir / "config.json").unlink()  # which the checkpoint has, too
    assert refusal(lambda: fastdiff.train(images, run_dir, **again)) == text
    for setting in ("init_from", "resume_checkpoint"):
        text = refusal(lambda setting=setting: fastdiff.train(images, tmp_path / "a", **{setting: run_dir}, show=None))
        assert "model000003.safetensors is a classifier, not a diffusion model (--classifier " in text
    torch.save(load_classifier(run_dir).model.state_dict(), tmp_path / "model000003.pt")
    for setting in ("init_from", "resume_checkpoint"):
        given = {setting: tmp_path / "model000003.pt"}
        text = refusal(lambda given=given: fastdiff.train(images, tmp_path / "a", **given, show=None))
        assert "model000003.pt is a classifier, not a diffusion model (--classifier " in text
    other = tmp_path / "diffusion"
    tiny = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": ""}
    fastdiff.train(images, other, steps=1, batch_size=2, show=None, preview_interval=0, compile="off", **tiny)
    text = refusal(lambda: fastdiff.train_classifier(images, other, **again))
    assert text == f"{other} is the run of a diffusion model: resume it with fastdiff train"
    for setting in ("init_from", "resume_checkpoint"):
        text = refusal(
            lambda setting=setting: fastdiff.train_classifier(images, tmp_path / "a", **{setting: other}, show=None)
        )
        assert text.endswith("is a diffusion model, not a classifier")
    assert not (tmp_path / "a").exists()


def test_refusals(tmp_path: Path, images: Path) -> None:
    def said(**settings: Any) -> str:
        return refusal(lambda: fastdiff.train_classifier(images, tmp_path / "a", show=None, **TINY | settings))

    assert said(label_dropout=0.1) == "train_classifier has no setting label_dropout"
    assert said(num_channels=64) == "train_classifier has no setting num_channels"
    assert said(num_classes=3) == "num_classes 3 is too small: the data has 4 classes"
    assert said(classifier_width=48).startswith("classifier_width must be a multiple of 32")
    assert said(holdout=1.0) == "holdout must be at least 0 and below 1, not 1.0"
    assert said(eval_interval=-1) == "eval_interval must be at least 0, not -1"
    assert not (tmp_path / "a").exists()
