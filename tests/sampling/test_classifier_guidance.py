"""Classifier guidance: the gradient, its effect with every sampler, and the captured loop."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import DiffusionConfig, GaussianDiffusion, build_diffusion
from fastdiff.checkpoint import ClassifierCheckpoint
from fastdiff.config import SampleConfig, Sampler
from fastdiff.diffusion import Philox
from fastdiff.sampling import Loop
from fastdiff.sampling.guidance import class_gradient, without_class

from ..watch import Watch
from .support import MODEL, UPPER, classifier_of, drawn, loaded, model_of, plan, runtime
from .test_loop import SAMPLERS, STEPS, Batch, Elsewhere, Posing, Recording, batch, config, diffusion, graphs, run

__all__ = ["graphs"]  # a fixture


def test_the_gradient_of_the_log_probability() -> None:
    """Against numeric differentiation of the definition, image by image."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def logits(x: Tensor, timesteps: Tensor) -> Tensor:
        return (x.square() @ weights).float().double() * timesteps[:, None]

    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    timesteps, y = torch.tensor([0.5, 1.0, 2.0, 3.0]), torch.tensor([4, 0, 1, 2])
    found = class_gradient(logits, 2.5)(x, timesteps, y=y, low_res=None)
    logs = (x.square() @ weights) * timesteps[:, None].double()
    chances = logs.softmax(1)
    slopes = weights[:, y].T - chances @ weights.T  # of log p on x^2 / timestep
    expected = 2.5 * timesteps[:, None].double() * slopes * 2 * x
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad
    assert not x.requires_grad


def test_a_small_gradient_does_not_underflow_in_fp16() -> None:
    """Each pixel of a large image has little effect; 2e-9 is below fp16's smallest number."""
    x, y = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])

    def logits(x: Tensor, timesteps: Tensor) -> Tensor:
        return torch.stack([x.half().sum(1), -x.half().sum(1)], 1).float() * 1e-8 + torch.tensor([4.0, -4.0])

    found = class_gradient(logits, 2.0)(x, torch.zeros(2), y=y)
    likeliest = torch.tensor([8.0, -8.0]).sigmoid()
    expected = 2.0 * 2e-8 * torch.stack([1 - likeliest[0], -likeliest[0]])[:, None].expand(2, 3)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("wrong", [None, torch.zeros(()), torch.zeros(3, 1, 8, 8)], ids=str)
def test_a_cond_fn_returns_a_gradient(wrong: Tensor | None) -> None:
    process, (x, noise, conditions) = diffusion(True), batch(0)
    with pytest.raises(ValueError, match=r"^cond_fn must return a gradient of x's shape \(3, 3, 8, 8\), not "):
        process.p_sample(
            GUIDED, x, torch.full((3,), 2), noise=noise, model_kwargs=conditions, cond_fn=lambda *_, **__: wrong
        )


def test_the_prediction_can_be_left_out() -> None:
    process, (x, noise, conditions) = diffusion(True), batch(0)
    t = torch.full((3,), 2)
    for step in (process.p_sample, process.ddim_sample):
        how = {"noise": noise, "model_kwargs": conditions, "cond_fn": class_gradient(logits, 1.0)}
        whole, part = step(GUIDED, x, t, **how), step(GUIDED, x, t, pred_xstart=False, **how)
        assert part.keys() == {"sample"}
        assert torch.equal(part["sample"], whole["sample"])


CENTRES, SPREAD = torch.tensor([-0.5, 0.5], dtype=torch.float64), 0.1


class Mixture:
    """Two normal distributions, one per class: the exact model, which knows no classes, and the exact classifier."""

    def __init__(self, process: GaussianDiffusion) -> None:
        self.process = process

    def parts(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha_bar = torch.from_numpy(self.process.alphas_cumprod)[timesteps.long()][:, None]
        variance = alpha_bar * SPREAD**2 + 1 - alpha_bar  # of x_t, given its class
        return alpha_bar.sqrt(), variance, x - alpha_bar.sqrt() * CENTRES, (1 - alpha_bar).sqrt()

    def logits(self, x: Tensor, timesteps: Tensor) -> Tensor:
        _, variance, apart, _ = self.parts(x, timesteps)
        return -(apart**2) / (2 * variance)

    def model(self, x: Tensor, timesteps: Tensor) -> Tensor:
        alpha, variance, apart, sigma = self.parts(x, timesteps)
        x_start = CENTRES + alpha * SPREAD**2 / variance * apart
        return (x - alpha * (self.logits(x, timesteps).softmax(1) * x_start).sum(1, keepdim=True)) / sigma


@pytest.mark.parametrize("sampler", Sampler)
def test_a_guided_mixture_is_the_distribution_of_the_class(sampler: Sampler) -> None:
    process = build_diffusion(DiffusionConfig(diffusion_steps=100, noise_schedule="cosine", rescale_timesteps=False))
    mixture = Mixture(process)
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(100, 2000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.arange(2000) % 2
    how = SampleConfig(sampler=sampler, clip_denoised=False)

    def drawn(scale: float) -> Tensor:
        loop = Loop(without_class(mixture.model), process, how, cond_fn=class_gradient(mixture.logits, scale))
        return run(loop, x, noise, {"y": y})[:, 0]

    guided, free = drawn(1.0), drawn(0.0)
    for label, centre in enumerate(CENTRES):
        assert abs(guided[y == label].mean() - centre) < 0.02
        assert abs(guided[y == label].std() - SPREAD) < 0.02
        assert abs(free[y == label].mean()) < 0.1  # both classes
        assert free[y == label].std() > 0.4


def logits(x: Tensor, timesteps: Tensor) -> Tensor:
    """Depends on all that it is given, image by image."""
    parts = [x[:, i % 3, i:].sin().mean((1, 2)) for i in range(4)]
    return torch.stack(parts, 1) * (20 + timesteps[:, None] / 100)


def two_models(x: Tensor, t: Tensor) -> Tensor:
    mixed = (0.5 * x.flip(-1) + 0.3 * x.roll(1, 1)).tanh() + (t / 1000).view(-1, 1, 1, 1)
    return torch.cat([mixed, 0.5 * mixed.sin()], dim=1)


GUIDED = without_class(two_models)


def fields_loop(process: GaussianDiffusion, how: SampleConfig, taken: Batch, cond_fn: Callable[..., Tensor]) -> Tensor:
    """The process's own loop of that sampler."""
    x, noise, conditions = taken
    loops = {
        Sampler.DDPM: process.p_sample_loop,
        Sampler.DDIM: process.ddim_sample_loop,
        Sampler.HEUN: process.heun_sample_loop,
    }
    options = {"eta": how.eta} if how.sampler is Sampler.DDIM else {}
    if how.sampler not in loops:
        options = {"solver": how.sampler}
    loop = loops.get(how.sampler, process.multistep_sample_loop)
    return loop(GUIDED, x.shape, noise=x, step_noise=noise, model_kwargs=conditions, cond_fn=cond_fn, **options)


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_a_guided_step_is_one_graph_too(graphs: list[Recording], sampler: Sampler, eta: float) -> None:
    """The loop is the process's own, and its captured step runs no line of the models' Python again."""
    calls = 0

    def counting(x: Tensor, timesteps: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logits(x, timesteps)

    process, how, cond_fn = diffusion(True), config(sampler, eta), class_gradient(counting, 3.0)
    stepped = [run(Loop(GUIDED, process, how, cond_fn=cond_fn), *batch(first)) for first in (0, 3, 6)]
    assert torch.equal(stepped[0], fields_loop(process, how, batch(0), cond_fn))
    assert not torch.equal(stepped[0], run(Loop(GUIDED, process, how), *batch(0)))
    x, noise, conditions = batch(0)
    other = run(Loop(GUIDED, process, how, cond_fn=cond_fn), x, noise, {"y": 3 - conditions["y"]})
    assert not torch.equal(stepped[0], other)
    calls = 0
    loop = Posing(GUIDED, process, how, cond_fn=cond_fn)
    heun = sampler is Sampler.HEUN
    for first, after in ((0, 5 if heun else 2), (3, 6 if heun else 2), (6, 6 if heun else 2)):
        assert torch.equal(run(loop, *batch(first)), stepped[first // 3]), first
        assert calls == after
    assert len(graphs) == 1 + heun


def test_no_guided_step_waits_for_the_device() -> None:
    place = runtime("bf16")
    model = place.prepare(place.cast(model_of(replace(MODEL, learn_sigma=True))), 0)
    guide = class_gradient(place.prepare(place.cast(classifier_of(4)), 0), 2.0)
    loop = Loop(without_class(model), diffusion(True), config(Sampler.DDPM), cond_fn=guide)
    run(loop, *batch(0))  # what is made once may wait
    with Watch() as watch:
        run(loop, *batch(3))
    assert watch.calls > 100 * STEPS
    assert watch.seen == []


def test_no_guided_step_copies_from_the_host() -> None:
    model, guide = (
        model_of(replace(MODEL, learn_sigma=True)).to("meta"),
        class_gradient(classifier_of(4).to("meta"), 2.0),
    )
    process = build_diffusion(
        DiffusionConfig(diffusion_steps=20, noise_schedule="cosine", learn_sigma=True, timestep_respacing=str(STEPS)),
        kernels="torch",
    )
    loop = Loop(without_class(model), process, config(Sampler.DDPM), cond_fn=guide)
    numbers = torch.zeros(3, dtype=torch.int64, device="meta")
    taken = torch.empty(3, 3, 8, 8, device="meta"), Philox(7, numbers), {"y": numbers}
    run(loop, *taken)  # the tables are copied once
    with Elsewhere() as watch:
        run(loop, *taken)
    assert watch.calls > 100 * STEPS
    assert watch.seen == []


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    process, cond_fn = diffusion(True), class_gradient(logits, 3.0)
    whole = run(Loop(GUIDED, process, config(Sampler.DDPM), cond_fn=cond_fn), *batch(0))
    x, noise, conditions = batch(0)
    assert isinstance(noise, Philox)
    alone = run(
        Loop(GUIDED, process, config(Sampler.DDPM), cond_fn=cond_fn),
        x[1:2],
        Philox(noise.seed, noise.samples[1:2]),
        {"y": conditions["y"][1:2]},
    )
    np.testing.assert_allclose(alone[0], whole[1], atol=1e-6)


PROCESS = DiffusionConfig(diffusion_steps=20, noise_schedule="cosine")
NAMES = ("a", "b", "c", "d")
FOUR = {"class_cond": True, "num_classes": 4, "class_names": NAMES}


def checkpoint_of(process: DiffusionConfig | None = PROCESS, **changes: Any) -> ClassifierCheckpoint:
    """A classifier of four classes that decides strongly."""
    model = classifier_of(4)
    settings = {"config": model.config, "class_names": NAMES, "metadata": {"class_counts": [3, 0, 0, 0]}, **changes}
    return ClassifierCheckpoint(model=model, diffusion_config=process, step=9, **settings)


@pytest.mark.slow
def test_an_unconditional_model_draws_the_classifiers_classes(tmp_path: Path) -> None:
    subject = loaded(tmp_path, **PROCESS.to_dict())

    def images(config: SampleConfig, classes: tuple[str, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        job = plan(subject, config, classes=classes, classifier=checkpoint_of())
        labels = job.labels(np.arange(6))
        assert labels is not None
        return drawn(job.engine(runtime(), 6), 6, labels), labels

    config = SampleConfig(num_samples=6, batch_size=4, classifier_scale=3)
    guided, labels = images(config)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    others, named = images(config, ("c", "a"))
    assert named.tolist() == [2, 0, 2, 0, 2, 0]
    same = labels == named
    assert same.any()
    for i, (one, other) in enumerate(zip(guided, others, strict=True)):
        assert (np.abs(one.astype(int) - other).max() <= 1) == same[i]
    assert images(replace(config, class_mix="data"))[1].tolist() == [0] * 6
    # with a scale of 0 the classifier is not asked, and the images are the model's own
    free = drawn(plan(subject, SampleConfig(num_samples=6, batch_size=4)).engine(runtime(), 6), 6)
    assert np.array_equal(images(replace(config, classifier_scale=0))[0], free)
    assert not np.array_equal(guided, free)
    # an image is its number's, whatever the batch
    job = plan(subject, replace(config, batch_size=1), classifier=checkpoint_of())
    alone = next(job.engine(runtime(), 1).draw(np.array([4]), labels[4:5]))[0]
    assert np.abs(alone.astype(int) - guided[4]).max() <= 1
    frames = (
        plan(subject, config, classifier=checkpoint_of())
        .engine(runtime(), 1)
        .trajectories(np.array([0]), labels[:1], 3)
    )
    assert np.abs(frames[0, -1].astype(int) - guided[0]).max() <= 1


def test_a_conditional_model_and_its_classifier_get_the_same_class(tmp_path: Path) -> None:
    subject = loaded(tmp_path, **FOUR, label_dropout=0.1, **PROCESS.to_dict())
    labels = np.array([3, 1, 2])

    def images(**how: Any) -> np.ndarray:
        job = plan(subject, SampleConfig(batch_size=3, steps=5, sampler="ddim", **how), classifier=checkpoint_of())
        return drawn(job.engine(runtime(), 3), 3, labels)

    assert not np.array_equal(images(classifier_scale=0), images(classifier_scale=1))
    assert not np.array_equal(images(guidance_scale=2, classifier_scale=1), images(classifier_scale=1))


@pytest.mark.parametrize(
    ("flags", "changes", "said"),
    [
        ({"image_size": 16}, {}, "classifier: it knows images of 8 pixels, and the model draws 16"),
        (UPPER, {}, "classifier: not with a super-resolution model"),
        ({**FOUR, "num_classes": 5}, {}, "classifier: it has 4 classes, and the model 5"),
        ({**FOUR, "class_names": ("a", "b", "d", "c")}, {}, "classifier: its class 2 is c, and the model's d"),
        ({**FOUR, "class_names": ("a", "b", "c")}, {}, "classifier: its class 3 is d, and the model's absent"),
        ({"diffusion_steps": 30}, {}, "classifier: it was trained with diffusion_steps 20, and the model with 30"),
        ({"noise_schedule": "linear", "diffusion_steps": 40}, {"process": replace(PROCESS, diffusion_steps=40)},
         "classifier: it was trained with noise_schedule cosine, and the model with linear"),
        ({"rescale_timesteps": False}, {}, "classifier: it was trained with rescale_timesteps True"),
        ({}, {"metadata": {"noised": False}}, "classifier: it was trained on clean images (--no-noised)"),
    ],
)  # fmt: skip
def test_a_classifier_of_other_images_is_refused(
    tmp_path: Path, flags: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    subject = loaded(tmp_path, **{**PROCESS.to_dict(), **flags})
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        plan(subject, SampleConfig(), classifier=checkpoint_of(**changes))


def test_what_a_file_does_not_say_is_not_compared(tmp_path: Path) -> None:
    subject = loaded(tmp_path, **FOUR, **{**PROCESS.to_dict(), "diffusion_steps": 30})
    plan(subject, SampleConfig(), classifier=checkpoint_of(process=None, class_names=()))


def test_a_scale_needs_a_classifier(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^classifier_scale 2: name the classifier \(--classifier\)$"):
        plan(loaded(tmp_path), SampleConfig(classifier_scale=2))
    with pytest.raises(ValueError, match=r"^classifier_scale must be between 0 and 1000, not -1"):
        SampleConfig(classifier_scale=-1)
