"""The figures of a run: real images are the best, noise is the worst, and what cannot be measured is left out."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import fastdiff
from fastdiff.benchmarks.quality import command, measure
from fastdiff.benchmarks.quality.judge import open_judge
from fastdiff.benchmarks.quality.measure import Bench, Figures
from fastdiff.benchmarks.quality.pictures import read_pictures, write_pictures
from fastdiff.config import QualityConfig

from ...support import refusal
from .support import COLOURED, PLAIN, SIZE, TINY, Means, machine

FEW = QualityConfig(set="digits", num_samples=12, steps=3)
ONE = {**TINY, "image_size": SIZE, "steps": 1, "preview_interval": 0, **PLAIN}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measure")
    write_pictures(COLOURED, folder)
    open_judge(COLOURED, folder, tell=lambda _: None)
    return folder


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "NLL_IMAGES", 3)
    monkeypatch.setattr(measure, "NLL_STEPS", 5)


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    fastdiff.train(data / "train", data / "run", class_cond=True, show=None, **ONE)
    return data / "run"


def test_real_images_are_best(data: Path) -> None:
    bench = Bench(COLOURED, data, FEW, machine([]), quick=True)
    real, random = read_pictures(data / "train"), np.random.default_rng(0)
    good = bench.figures(real.images, real.labels)
    noise = random.integers(0, 256, real.images.shape, np.uint8)
    bad = bench.figures(noise, real.labels)
    assert good.accuracy == 1
    assert bad.accuracy < 0.6
    assert good.fd < bad.fd / 20
    assert good.precision > 0.5 > bad.precision == 0
    assert good.recall > 0.5
    assert math.isnan(good.fd_efficientnet)
    assert math.isnan(good.bits_per_dim)
    same = bench.figures(read_pictures(data / "reference").images, None)
    assert same.fd == pytest.approx(0, abs=1e-9)
    assert same.recall == same.precision == 1
    assert math.isnan(same.accuracy)


def test_accuracy_is_of_the_class_that_was_asked_for(data: Path) -> None:
    bench = Bench(COLOURED, data, FEW, machine([]), quick=True)
    real = read_pictures(data / "held_out")
    asked = real.labels.copy()
    asked[:6] = 2  # blue ones, as if red had been asked for
    assert bench.figures(real.images, asked).accuracy == 1 - 6 / len(asked)


def test_a_run(data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(measure, "open_extractor", lambda device: Means())
    bench = Bench(COLOURED, data, FEW, machine(said), quick=False)
    figures = bench.measure(run)
    assert not any(map(math.isnan, (getattr(figures, name) for name in Figures.__dataclass_fields__)))
    assert figures.bits_per_dim > 5  # it has learned nothing yet
    drawn = list((run / "evaluation").glob("samples_*.npz"))
    assert len(drawn) == 1
    with np.load(drawn[0]) as file:
        assert len(file["arr_0"]) == 12
    assert bench.measure(run) == figures  # from the same samples
    assert any("drawn before" in line for line in said)


def test_samples(data: Path, run: Path, tmp_path: Path) -> None:
    bench = Bench(COLOURED, data, FEW, machine([]), quick=True)
    drawn = bench.measure(run)
    (samples,) = (run / "evaluation").glob("samples_*.npz")
    assert bench.measure(samples) == drawn
    with np.load(samples) as file:
        np.savez(tmp_path / "unnamed.npz", file["arr_0"])
        np.savez(tmp_path / "small.npz", file["arr_0"][:, 1:, 1:])
        others = {**file, "class_names": np.array(["a", "b", "c"])}
    unnamed = bench.measure(tmp_path / "unnamed.npz")
    assert unnamed.fd == drawn.fd
    assert math.isnan(unnamed.accuracy)
    assert "small.npz has images of 7 pixels" in refusal(lambda: bench.measure(tmp_path / "small.npz"))
    np.savez(tmp_path / "others.npz", **others)
    assert "others.npz has other classes than colours" in refusal(lambda: bench.measure(tmp_path / "others.npz"))


def test_without_efficientnet(data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: object) -> None:
        raise ValueError("extractor efficientnet-lite0 needs its weights")

    said: list[str] = []
    monkeypatch.setattr(measure, "open_extractor", missing)
    figures = Bench(COLOURED, data, FEW, machine(said), quick=False).measure(run)
    assert math.isnan(figures.fd_efficientnet)
    assert figures.fd > 0
    assert "FD-EfficientNet is left out: extractor efficientnet-lite0 needs its weights" in said


def test_a_flow_has_no_likelihood(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = ONE | {"prediction": "flow", "noise_schedule": "linear"}
    fastdiff.train(data / "train", tmp_path / "run", class_cond=True, show=None, **flow)
    said: list[str] = []
    monkeypatch.setattr(measure, "open_extractor", lambda device: Means())
    assert math.isnan(Bench(COLOURED, data, FEW, machine(said), quick=False).measure(tmp_path / "run").bits_per_dim)
    assert "bits/dim is left out: a flow has no variational bound" in said


def test_a_failed_likelihood_is_no_row(data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without it would pass for one that is complete."""

    def refused(*_: object) -> None:
        raise ValueError("the images cannot be read")

    monkeypatch.setattr(measure, "Nll", refused)
    monkeypatch.setattr(measure, "open_extractor", lambda device: Means())
    bench = Bench(COLOURED, data, FEW, machine([]), quick=False)
    assert refusal(lambda: bench.measure(run)) == "the images cannot be read"


def test_likelihood_is_of_every_class(data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    real = measure.Nll

    def watched(loaded: object, dataset: object, *rest: object) -> object:
        seen.append(dataset.labels.tolist())  # type: ignore[attr-defined]
        return real(loaded, dataset, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "Nll", watched)
    monkeypatch.setattr(measure, "open_extractor", lambda device: Means())
    Bench(COLOURED, data, FEW, machine([]), quick=False).measure(run)
    assert seen == [[0, 1, 2]]


def test_a_model_without_classes_has_no_accuracy(data: Path, tmp_path: Path) -> None:
    fastdiff.train(data / "train", tmp_path / "run", show=None, **ONE)
    figures = Bench(COLOURED, data, FEW, machine([]), quick=True).measure(tmp_path / "run")
    assert math.isnan(figures.accuracy)
    assert figures.fd > 0


def test_runs_of_other_images_are_refused(data: Path, shapes: Path, tmp_path: Path) -> None:
    bench = Bench(COLOURED, data, FEW, machine([]), quick=True)
    fastdiff.train(shapes, tmp_path / "a", class_cond=True, show=None, **ONE)
    assert f"has other classes than colours: train on {data / 'train'}" in refusal(
        lambda: bench.measure(tmp_path / "a")
    )
    fastdiff.train(data / "train", tmp_path / "b", show=None, **ONE | {"image_size": 16, "channel_mult": "1,1"})
    said = refusal(lambda: bench.measure(tmp_path / "b"))
    assert "has images of 16 pixels, and colours have 8: choose another --set" in said


@pytest.mark.parametrize("damage", [lambda path: save_file({}, path), lambda path: path.write_bytes(b"torn")])
def test_a_judge_of_unknown_origin_is_replaced(damage: Callable[[Path], object], data: Path) -> None:
    path = data / "judge.safetensors"
    kept = path.read_bytes()
    damage(path)
    said: list[str] = []
    Bench(COLOURED, data, FEW, machine(said), quick=True)
    assert path.read_bytes() == kept
    assert said[0].startswith("training the judge")


def test_the_line() -> None:
    assert Figures(0.5, 1.25).line() == "accuracy 0.5000, fd 1.2500"


def test_how_many_samples_were_measured(data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run as many as were asked for, of an npz all that it has."""
    folder = tmp_path / "data" / "digits"
    folder.parent.mkdir()
    folder.symlink_to(data)
    monkeypatch.setitem(command.SOURCES, "digits", COLOURED)
    said: list[str] = []

    def line(of: Path) -> str:
        config = dataclasses.replace(FEW, run=str(of), out_dir=str(tmp_path))
        command.measure_run(config, machine(said), quick=True)
        return said[-1]

    assert f"{run} on digits (n=12, dpm++ 3 steps): accuracy" in line(run)
    (samples,) = (run / "evaluation").glob("samples_*.npz")
    with np.load(samples) as file:
        np.savez(tmp_path / "some.npz", **{**file, "arr_0": file["arr_0"][:5], "arr_1": file["arr_1"][:5]})
    assert "some.npz on digits (n=5): accuracy" in line(tmp_path / "some.npz")
