"""The likelihood of a data set: each term beside the process's own functions, whatever the batches."""

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import Checkpoint, DataConfig
from fastdiff.config import NllConfig, RuntimeConfig
from fastdiff.data import Dataset, load_dataset
from fastdiff.data.shapes import write_shapes
from fastdiff.evaluation.nll import TERMS, Bound, Nll, Stopped, labels_for
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.distributed import World
from fastdiff.runtime.signals import StopRequest

from ..sampling.support import loaded, runtime
from ..watch import Watch
from .support import ByHand, assert_same_bound, by_hand

CLASSES: dict[str, Any] = {
    "class_cond": True,
    "num_classes": 5,
    "class_names": ("triangle", "star", "square", "cross", "circle"),  # not in the data's order
}
SHORT = {"diffusion_steps": 8}
MODELS: dict[str, dict[str, Any]] = {
    "plain": SHORT,
    "by class": {**SHORT, **CLASSES, "learn_sigma": True},
    "super-resolution": {**SHORT, "image_size": 16, "small_size": 8},
}


def data(folder: Path, checkpoint: Checkpoint) -> Dataset:
    config = checkpoint.model_config
    return load_dataset(DataConfig(data_dir=str(folder)), config.image_size, labelled=config.class_cond)


def evaluated(
    checkpoint: Checkpoint, dataset: Dataset, on: Runtime | None = None, tell: Any = None, **settings: Any
) -> Bound:
    subject = Nll(checkpoint, dataset, NllConfig(**settings), on or runtime(), World())
    with StopRequest() as stop:
        return subject.run(stop, tell or (lambda *progress: None))


@pytest.mark.parametrize("model", MODELS)
def test_every_term_is_the_process_s_own(model: str, shapes: Path, tmp_path: Path) -> None:
    checkpoint = loaded(tmp_path, **MODELS[model])
    dataset = data(shapes, checkpoint)
    labels = None
    if model == "by class":
        labels = [CLASSES["class_names"].index(name.split("_")[0]) for name in dataset.names]
    reference, truth = (
        by_hand(checkpoint, dataset, 3, seed=9, labels=labels, double=double) for double in (False, True)
    )
    found = evaluated(checkpoint, dataset, num_samples=3, batch_size=2, seed=9)
    assert_same_bound(found, reference.bound(3), truth.bound(3))
    assert found.terms["vb"].sum() + found.prior_bpd.mean() == pytest.approx(found.total_bpd.mean(), rel=1e-12)


@dataclass
class Subject:
    """A model with classes and the shapes, of 15 draws of which the bound is known."""

    checkpoint: Callable[[], Checkpoint]  # evaluation takes a checkpoint over
    dataset: Dataset
    reference: ByHand
    truth: ByHand

    def __call__(self, **settings: Any) -> Bound:
        return evaluated(self.checkpoint(), self.dataset, **settings)

    def hold(self, found: Bound) -> None:
        """``found`` are the first draws of those that are known."""
        n = len(found.total_bpd)
        assert_same_bound(found, self.reference.bound(n), self.truth.bound(n))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Subject:
    folder = tmp_path_factory.mktemp("nll")
    checkpoint = loaded(folder, **MODELS["by class"])
    dataset = data(shapes, checkpoint)
    labels = [CLASSES["class_names"].index(name.split("_")[0]) for name in dataset.names]
    known = (by_hand(checkpoint, dataset, 15, labels=labels, double=double) for double in (False, True))
    return Subject(lambda: loaded(folder, **MODELS["by class"]), dataset, *known)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_whatever_the_batch(subject: Subject, batch_size: int) -> None:
    subject.hold(subject(batch_size=batch_size))


def test_a_part_is_the_beginning_of_the_whole(subject: Subject) -> None:
    subject.hold(subject(num_samples=7))


def test_more_than_there_are_begin_anew_with_other_noise(subject: Subject) -> None:
    found = subject(num_samples=15, batch_size=4)
    assert len(found.total_bpd) == 15
    subject.hold(found)
    truth = subject.truth.bound(15)
    repeated, first = truth.total_bpd[12:], truth.total_bpd[:3]
    assert (np.abs(repeated - first) > 1e-3 * first).all()


def test_the_seed(subject: Subject) -> None:
    one, again, other = (subject(seed=seed, num_samples=4) for seed in (1, 1, 2**64 - 1))
    np.testing.assert_array_equal(one.total_bpd, again.total_bpd)
    assert (one.total_bpd != other.total_bpd).all()


def test_fewer_timesteps_are_another_bound(subject: Subject) -> None:
    few = subject(steps=5)
    assert {name: values.shape for name, values in few.terms.items()} == dict.fromkeys(TERMS, (5,))
    same = subject(timestep_respacing="5")
    np.testing.assert_array_equal(few.total_bpd, same.total_bpd)
    assert few.total_bpd.mean() != pytest.approx(subject.reference.bound(12).total_bpd.mean(), rel=1e-3)


def test_clipping(subject: Subject) -> None:
    clipped = subject.reference.bound(12).total_bpd.mean()
    assert subject(clip_denoised=False).total_bpd.mean() != pytest.approx(clipped, rel=1e-3)


def test_half_precision_is_near(shapes: Path, tmp_path: Path) -> None:
    totals = []
    for precision in ("fp32", "bf16"):
        checkpoint = loaded(tmp_path, **MODELS["by class"])
        on = Runtime.resolve(RuntimeConfig(device="cpu", precision=precision, compile="off"))
        totals.append(evaluated(checkpoint, data(shapes, checkpoint), on, num_samples=3).total_bpd)
    assert (totals[0] != totals[1]).all()
    np.testing.assert_allclose(*totals, rtol=0.05)


def test_compiled_it_has_one_shape(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, real = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend=counter, **options))
    on = Runtime.resolve(RuntimeConfig(device="cpu", precision="fp32", compile="on"))
    found = evaluated(subject.checkpoint(), subject.dataset, on, num_samples=10, batch_size=4)
    assert counter.frame_count == 1
    subject.hold(found)
    torch._dynamo.reset()


def test_a_batch_is_read_once(shapes: Path, tmp_path: Path) -> None:
    checkpoint = loaded(tmp_path, **MODELS["by class"])
    seen: list[int] = []
    with Watch() as watch:
        evaluated(checkpoint, data(shapes, checkpoint), tell=lambda *told: seen.append(len(watch.seen)), batch_size=4)
    assert watch.calls > 1000
    assert seen == [0] * 24


def test_numbers_that_are_not_finite_are_seen(shapes: Path, tmp_path: Path) -> None:
    checkpoint = loaded(tmp_path, **SHORT)
    with torch.no_grad():
        checkpoint.model.out[2].bias.fill_(torch.nan)
    found = evaluated(checkpoint, data(shapes, checkpoint), num_samples=2)
    assert np.isnan(found.total_bpd).all()
    assert math.isnan(found.figures()["bits_per_dim"])


def test_figures() -> None:
    totals, priors = np.array([1.0, 2.0, 6.0]), np.array([0.0, 0.3, 0.0])
    figures = Bound(totals, priors, {}, len(totals)).figures()
    assert figures == pytest.approx(
        {"bits_per_dim": 3.0, "standard_error": math.sqrt(7 / 3), "prior_bits_per_dim": 0.1}
    )
    assert math.isnan(Bound(totals[:1], priors[:1], {}, 9).figures()["standard_error"])
    twice = Bound(
        np.array([1.0, 3.0, 2.0, 4.0]), np.zeros(4), {}, 2
    ).figures()  # 1 and 2 of an image, 3 and 4 of another
    assert twice["standard_error"] == pytest.approx(1.0)
    infinite = Bound(np.array([1.0, np.inf]), priors[:2], {}, 2).figures()
    assert infinite["bits_per_dim"] == math.inf
    assert math.isnan(infinite["standard_error"])


def test_progress(shapes: Path, tmp_path: Path) -> None:
    checkpoint = loaded(tmp_path, **SHORT)
    told: list[tuple[int, int, str]] = []
    found = evaluated(checkpoint, data(shapes, checkpoint), tell=lambda *progress: told.append(progress), batch_size=5)
    # twelve images in batches of 4
    assert [(done, total) for done, total, _ in told] == [(4 * (i + 1), 96) for i in range(24)]
    assert told[6][2].startswith("0 of 12 images, ")
    assert told[7][2].startswith(f"4 of 12 images, {found.total_bpd[:4].mean():.2f} bits/dim, ")
    assert told[-1][2] == f"12 of 12 images, {found.total_bpd.mean():.2f} bits/dim, 0 s left"


@pytest.mark.parametrize(("after", "images"), [(3, 0), (8, 4), (18, 8)])
def test_a_signal_stops_it(shapes: Path, tmp_path: Path, after: int, images: int) -> None:
    checkpoint = loaded(tmp_path, **SHORT)
    told: list[str] = []
    subject = Nll(checkpoint, data(shapes, checkpoint), NllConfig(batch_size=4), runtime(), World())
    with StopRequest() as stop:

        def tell(done: int, total: int, note: str) -> None:
            told.append(note)
            if len(told) == after:
                stop.received = signal.SIGTERM

        with pytest.raises(Stopped) as stopped:
            subject.run(stop, tell)
    assert len(told) == after
    assert (stopped.value.signal, stopped.value.images) == (signal.SIGTERM, images)
    assert math.isnan(stopped.value.total_bpd) == (images == 0)


def test_a_signal_in_the_last_step_comes_too_late(shapes: Path, tmp_path: Path) -> None:
    checkpoint = loaded(tmp_path, **SHORT)
    subject = Nll(checkpoint, data(shapes, checkpoint), NllConfig(batch_size=4), runtime(), World())
    with StopRequest() as stop:

        def tell(done: int, total: int, note: str) -> None:
            if done == total:
                stop.received = signal.SIGINT

        assert len(subject.run(stop, tell).total_bpd) == 12


def test_classes_are_known_by_their_names(shapes: Path, tmp_path: Path) -> None:
    checkpoint = loaded(tmp_path, **CLASSES)
    dataset = data(shapes, checkpoint)
    assert dataset.class_names == ("circle", "cross", "square", "triangle")
    labels = labels_for(checkpoint, dataset)
    assert labels is not None
    assert [CLASSES["class_names"][i] for i in labels] == [name.split("_")[0] for name in dataset.names]
    assert labels_for(loaded(tmp_path), dataset) is None


def test_classes_that_the_model_does_not_know(shapes: Path, tmp_path: Path) -> None:
    others = loaded(tmp_path, **{**CLASSES, "class_names": ("circle", "cross", "triangle")})
    with pytest.raises(ValueError, match=r"^the data has the class 'square', .*circle, cross, triangle: .*--labels$"):
        labels_for(others, data(shapes, others))


def test_a_model_without_names(shapes: Path, tmp_path: Path) -> None:
    nameless = loaded(tmp_path, class_cond=True, num_classes=4)
    dataset = data(shapes, nameless)
    with pytest.warns(UserWarning, match="the model has no class names: .* 0 being circle"):
        labels = labels_for(nameless, dataset)
    assert labels is not None
    assert labels.tolist() == dataset.labels.tolist()
    few = loaded(tmp_path, class_cond=True, num_classes=3)
    with pytest.raises(
        ValueError, match="the data has the class 3, but the model has the classes 0 to 2: name the images"
    ):
        labels_for(few, dataset)


def test_a_trained_model_knows_its_data_better_than_noise(tmp_path: Path) -> None:
    """Of a model that says 0 the images of one colour are likelier than noise."""
    write_shapes(tmp_path / "shapes", 4, 8, seed=1)
    rng = np.random.default_rng(0)
    (tmp_path / "models").mkdir()
    totals = []
    for pixels in (np.full((4, 8, 8, 3), 127, np.uint8), rng.integers(0, 256, (4, 8, 8, 3), np.uint8)):
        checkpoint = loaded(tmp_path / "models", last=0.0, **SHORT)
        found = data(tmp_path / "shapes", checkpoint)
        dataset = Dataset(pixels, None, (), found.preflight, found.names, "")
        totals.append(evaluated(checkpoint, dataset).total_bpd)
    assert totals[0].max() < totals[1].min()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_samples": 0}, "num_samples must be positive, not 0"),
        ({"num_samples": 10**9}, "num_samples must be at most 100,000,000"),
        ({"batch_size": 0}, "batch_size must be positive, not 0"),
        ({"steps": 0}, "steps must be positive, not 0"),
        ({"steps": 5, "timestep_respacing": "5"}, "give one of them"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"precision": "fp8"}, "precision must be one of"),
    ],
)
def test_settings_that_do_not_hold(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        NllConfig(**settings)
