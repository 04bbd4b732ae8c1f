"""A model with what it begins from: small images, another model, or the way between two ends."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import SampleConfig
from fastdiff.data import normalised
from fastdiff.diffusion import build_diffusion
from fastdiff.kernels import philox_normal
from fastdiff.sampling import Engine, generate, save_npz, slerp
from fastdiff.sampling.engine import SUPER_RES_KEY

from .support import CLASSES, CPU, NAMES, SMOOTH, UPPER, drawn, loaded, plan, runtime

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 0])


@pytest.fixture
def base_samples(tmp_path: Path) -> Path:
    save_npz(tmp_path / "base.npz", [IMAGES], IMAGES.shape, arr_1=LABELS, class_names=NAMES)
    return tmp_path / "base.npz"


@pytest.mark.parametrize("flags", [{}, CLASSES])
@pytest.mark.parametrize("batch_size", [5, 2])
def test_base_samples_are_enlarged(tmp_path: Path, base_samples: Path, flags: dict[str, Any], batch_size: int) -> None:
    """As generate does with these very inputs."""
    config = SampleConfig(steps=4, batch_size=batch_size, seed=3)
    subject = plan(loaded(tmp_path, **UPPER, **flags), config, base_samples=base_samples)
    numbers = np.arange(subject.config.num_samples)
    assert len(numbers) == 5
    labels = subject.labels(numbers)
    assert labels is None if not flags else labels is not None and labels.tolist() == LABELS.tolist()
    engine = subject.engine(runtime(), 5)
    assert engine.steps == 4
    found = drawn(engine, 5, labels)
    assert found.shape == (5, 16, 16, 3)
    model = loaded(tmp_path, **UPPER, **flags)
    expected = generate(
        model.model,
        build_diffusion(
            model.diffusion_config.from_dict(model.diffusion_config.to_dict() | {"timestep_respacing": "4"})
        ),
        SampleConfig(num_samples=5, batch_size=batch_size, seed=3 + SUPER_RES_KEY),
        image_size=16,
        device=CPU,
        labels=labels,
        low_res=lambda numbers: normalised(torch.from_numpy(IMAGES[numbers])),
    )
    assert np.array_equal(found, np.concatenate(list(expected)))


def test_more_images_than_base_samples_begin_again_with_other_noise(tmp_path: Path, base_samples: Path) -> None:
    subject = plan(
        loaded(tmp_path, **UPPER, **CLASSES), SampleConfig(steps=3), base_samples=base_samples, num_samples=12
    )
    labels = subject.labels(np.arange(12))
    assert labels is not None
    assert labels.tolist() == [*LABELS, *LABELS, *LABELS[:2]]
    images = drawn(subject.engine(runtime(), 12), 12, labels)
    assert len(np.unique(images.reshape(12, -1), axis=0)) == 12


@pytest.mark.parametrize("batch_size", [5, 2])
@pytest.mark.parametrize("upper_classes", [True, False])
def test_a_cascade_is_one_command_after_the_other(tmp_path: Path, batch_size: int, upper_classes: bool) -> None:
    """Bit for bit, the small images being uint8 in between, and the labels carried along."""
    config = SampleConfig(steps=4, batch_size=batch_size, seed=9)
    flags = {**UPPER, **(CLASSES if upper_classes else {})}
    numbers = np.arange(5)
    first = plan(loaded(tmp_path, **CLASSES), config, num_samples=5)
    labels = first.labels(numbers)
    assert labels is not None
    small = drawn(first.engine(runtime(), 5), 5, labels)
    save_npz(tmp_path / "small.npz", [small], small.shape, arr_1=labels, class_names=NAMES)
    second = plan(loaded(tmp_path, **flags), config, base_samples=tmp_path / "small.npz")
    apart = drawn(second.engine(runtime(), 5), 5, second.labels(numbers))

    cascade = plan(loaded(tmp_path, **CLASSES), config, super_res=loaded(tmp_path, **flags), num_samples=5)
    assert cascade.image_size == 16
    assert np.array_equal(cascade.labels(numbers), labels)
    engine = cascade.engine(runtime(), 5)
    assert engine.steps == 8
    told: list[int] = []
    together = drawn(engine, 5, labels, on_step=told.append)
    assert np.array_equal(together, apart)
    assert sum(told) == 5 * 8  # each image takes the steps of both
    # and so does one image of it, and a trajectory
    (alone,) = np.concatenate(list(engine.draw(np.array([3]), labels[3:4])))
    assert np.abs(alone.astype(int) - apart[3]).max() <= 1  # elsewhere in the batch it may round otherwise
    (shown,) = engine.trajectories(np.array([3]), labels[3:4], 3)
    assert shown.shape == (3, 16, 16, 3)
    assert np.abs(shown[-1].astype(int) - apart[3]).max() <= 1


def test_a_trajectory_of_enlarging(tmp_path: Path, base_samples: Path) -> None:
    subject = plan(loaded(tmp_path, **UPPER), SampleConfig(steps=4), base_samples=base_samples)
    engine = subject.engine(runtime(), 5)
    (shown,) = engine.trajectories(np.array([3]), None, 99)
    assert shown.shape == (5, 16, 16, 3)
    assert np.abs(shown[-1].astype(int) - drawn(engine, 5)[3]).max() <= 1


def between(tmp_path: Path, *ends: str, num_samples: int | None = 5, **how: Any) -> np.ndarray:
    flags: dict[str, Any] = how.pop("flags", {})
    classes = how.pop("classes", ())
    config = SampleConfig(**{"sampler": "ddim", **how})
    subject = plan(loaded(tmp_path, **flags), config, ends=ends, num_samples=num_samples, classes=classes)
    count = subject.config.num_samples
    return drawn(subject.engine(runtime(), count), count, subject.labels(np.arange(count)))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "heun"])
def test_the_way_between_two_seeds_ends_in_their_images(tmp_path: Path, sampler: str) -> None:
    how: dict[str, Any] = {"sampler": sampler, "steps": 10}
    way = between(tmp_path, "3", "8", **how, batch_size=2)
    for frame, seed in ((way[0], 3), (way[-1], 8)):
        engine = Engine(loaded(tmp_path), SampleConfig(**how, seed=seed), runtime(), 1)
        assert np.abs(drawn(engine, 1)[0].astype(int) - frame).max() <= 1
    steps = np.abs(np.diff(way.astype(int), axis=0)).mean((1, 2, 3))
    assert steps.min() > 0.5  # it goes on all the way, and nowhere jumps
    assert steps.max() < np.abs(way[0].astype(int) - way[-1]).mean()


def test_the_way_between_two_images(tmp_path: Path) -> None:
    """They are encoded, with their class, and the ends of the way come near them."""
    images = np.random.default_rng(0).integers(50, 200, (2, 8, 8, 3), dtype=np.uint8)
    first, second = (str(tmp_path / f"{name}.png") for name in ("first", "second"))
    for path, image in zip((first, second), images, strict=True):
        Image.fromarray(image).save(path)
    more: dict[str, Any] = {"flags": {**CLASSES, **SMOOTH}, "clip_denoised": False, "classes": ("dog",), "steps": 40}
    way = between(tmp_path, first, second, **more)
    for frame, image in ((way[0], images[0]), (way[-1], images[1])):
        assert np.abs(frame.astype(int) - image).mean() < 1
    mixed = between(tmp_path, "4", second, **more)
    assert np.array_equal(mixed[-1], way[-1])
    one = between(tmp_path, "4", second, num_samples=1, **more)
    assert np.array_equal(one[0], mixed[0])


def test_a_part_of_the_way_is_what_all_of_it_holds(tmp_path: Path) -> None:
    config = SampleConfig(sampler="ddim", steps=5)
    subject = plan(loaded(tmp_path), config, ends=("1", "2"), num_samples=7)
    engine = subject.engine(runtime(), 7)
    whole = drawn(engine, 7)
    part = np.concatenate(list(engine.draw(np.array([5, 2]))))
    assert np.abs(part.astype(int) - whole[[5, 2]]).max() <= 1


def test_slerp_stays_on_the_sphere() -> None:
    first, second = (philox_normal(seed, torch.tensor([0]), 0, (3, 16, 16)) for seed in (1, 2))
    weights = torch.linspace(0, 1, 9)
    way = slerp(first, second, weights)
    assert way.shape == (9, 3, 16, 16)
    torch.testing.assert_close(way[:1], first, rtol=0, atol=1e-6)
    torch.testing.assert_close(way[-1:], second, rtol=0, atol=1e-6)
    norms = way.flatten(1).norm(dim=1)
    straight = torch.lerp(first, second, weights.view(-1, 1, 1, 1)).flatten(1).norm(dim=1)
    lengths = torch.lerp(first.norm(), second.norm(), weights)
    assert ((norms / lengths - 1).abs() < 0.01).all()
    assert float(straight[4] / lengths[4]) < 0.75
    # steps of equal angle
    unit = way.flatten(1) / norms[:, None]
    angles = torch.arccos((unit[1:] * unit[:-1]).sum(1))
    assert float(angles.max() / angles.min()) < 1.1


def test_slerp_between_what_is_the_same() -> None:
    noise = philox_normal(1, torch.tensor([0]), 0, (3, 8, 8))
    way = slerp(noise, noise.clone(), torch.linspace(0, 1, 3))
    torch.testing.assert_close(way, noise.expand(3, -1, -1, -1))
