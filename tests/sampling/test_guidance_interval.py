"""Guidance in an interval of noise levels: exactly there, and no second call of a model elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import DiffusionConfig, SampleConfig, build_diffusion
from fastdiff.config import Sampler
from fastdiff.sampling import Engine, Loop
from fastdiff.sampling.guidance import guided, guided_steps

from .support import CLASSES, drawn, loaded, plan, runtime
from .test_guidance import Counting
from .test_loop import (
    SAMPLERS,
    Batch,
    Posing,
    Recording,
    batch,
    config,
    diffusion,
    fields_loop,
    graphs,
    learned,
    mixing,
    run,
)

__all__ = ["graphs"]  # a fixture

SCALE = 3.0
PROCESS = diffusion(learned=True)  # t = 0 to 3
SIGMA = np.sqrt(1 - PROCESS.alphas_cumprod) / np.sqrt(PROCESS.alphas_cumprod)
BETWEEN = (SIGMA[1:] + SIGMA[:-1]) / 2
INTERVALS = [(0.0, 1e9), (BETWEEN[0], BETWEEN[2]), (BETWEEN[2], 1e9), (0.0, BETWEEN[0])]
"""All steps, the middle two, the first one of the way to the image, and its last one."""


def inside(interval: tuple[float, float]) -> list[bool]:
    return [bool(interval[0] < sigma <= interval[1]) for sigma in SIGMA]


def test_the_steps_are_those_whose_noise_level_is_within() -> None:
    assert [inside(interval) for interval in INTERVALS] == [
        [True, True, True, True],
        [False, True, True, False],
        [False, False, False, True],
        [True, False, False, False],
    ]
    for interval in INTERVALS:
        assert guided_steps(PROCESS, interval) == inside(interval)
    assert guided_steps(PROCESS, None) == [True] * 4
    table = PROCESS.sqrt_recipm1_alphas_cumprod
    assert guided_steps(PROCESS, (table[0], table[2])) == [False, True, True, False]  # open below, closed above
    whole = build_diffusion(DiffusionConfig(diffusion_steps=20, noise_schedule="cosine"))
    # a level is a property of the noise, whichever steps are taken
    assert np.array(guided_steps(whole, INTERVALS[1]))[PROCESS.timestep_map].tolist() == inside(INTERVALS[1])


def test_an_interval_between_two_steps_is_refused() -> None:
    between = (float(SIGMA[0]), float(SIGMA[1]) * 0.999)
    with pytest.raises(ValueError, match=r"^guidance_interval .*: no step is within; the noise levels of these 4 ste"):
        guided_steps(PROCESS, between)


def doubled(taken: Batch) -> Batch:
    """In float64, which only rounds."""
    assert isinstance(taken[1], Tensor)
    return taken[0].double(), taken[1].double(), taken[2]


def by_level(within: Callable[..., Tensor], without: Callable[..., Tensor], interval: Any) -> Callable[..., Tensor]:
    """The one function or the other, by the timesteps that they are given."""
    when = dict(zip(PROCESS.model_timesteps(torch.arange(4)).tolist(), inside(interval), strict=True))
    return lambda x, t, **more: (within if when[float(t[0])] else without)(x, t, **more)


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_within_it_guides_and_elsewhere_the_model_is_alone(
    sampler: Sampler, eta: float, interval: tuple[float, float]
) -> None:
    """Without a classifier, against the sampler's own loop with a model that looks at its timesteps."""
    sizes: list[int] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return learned(x, t, y)

    how = SampleConfig(sampler=sampler, eta=eta, guidance_interval=interval)
    taken = doubled(batch(0, given=True))
    images = run(Loop(guided(model, SCALE), PROCESS, how, unguided=model), *taken)
    called = [t for step in (3, 2, 1, 0) for t in ((step, step - 1) if sampler is Sampler.HEUN and step else (step,))]
    assert sizes == [6 if inside(interval)[t] else 3 for t in called]
    expected = fields_loop(PROCESS, by_level(guided(learned, SCALE), learned, interval), how, taken)
    assert torch.equal(images, expected)
    everywhere = run(Loop(guided(learned, SCALE), PROCESS, config(sampler, eta)), *taken)
    assert torch.equal(images, everywhere) == all(inside(interval))


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_a_classifier_guides_there_too(sampler: Sampler, eta: float, interval: tuple[float, float]) -> None:
    calls = 0

    def gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return mixing(x, t, y) + 1

    def nothing(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)

    how = SampleConfig(sampler=sampler, eta=eta, guidance_interval=interval, clip_denoised=False)
    taken = doubled(batch(0, given=True))
    images = run(Loop(learned, PROCESS, how, cond_fn=gradient), *taken)
    halves = [inside(interval)[t] for t in ((3, 2, 2, 1, 1, 0, 0) if sampler is Sampler.HEUN else range(4))]
    assert calls == sum(halves)
    cond_fn = by_level(gradient, nothing, interval)
    expected = fields_loop(PROCESS, learned, how, taken, cond_fn=cond_fn, clip_denoised=False)
    torch.testing.assert_close(images, expected, rtol=1e-7, atol=1e-7)  # a step without a gradient is another kernel's


@pytest.mark.parametrize(("sampler", "kinds"), [(Sampler.DDPM, 2), (Sampler.DPM, 2), (Sampler.HEUN, 4)])
def test_each_kind_of_step_is_a_graph_of_its_own(graphs: list[Recording], sampler: Sampler, kinds: int) -> None:
    """Guided or not; Heun's in both halves, in the first, in the second, or last."""
    calls = 0

    def model(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return learned(*args, **kwargs)

    how = SampleConfig(sampler=sampler, guidance_interval=INTERVALS[1])
    stepped = [
        run(Loop(guided(learned, SCALE), PROCESS, how, unguided=learned), *batch(first)) for first in (0, 3, 6, 9)
    ]
    loop = Posing(guided(model, SCALE), PROCESS, how, unguided=model)
    for i in range(4):
        if i == 3:
            calls = 0
        assert torch.equal(run(loop, *batch(3 * i)), stepped[i])
    assert calls == 0  # all is replayed
    assert len(graphs) == kinds


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "heun"])
def test_an_engine_pays_for_the_guided_steps_only(tmp_path: Path, sampler: str) -> None:
    subject = loaded(tmp_path, **CLASSES, label_dropout=0.1)
    labels = np.array([0, 1, 2, 1])

    def images(**more: Any) -> tuple[np.ndarray, list[int]]:
        how = SampleConfig(sampler=sampler, steps=5, batch_size=4, **more)
        engine = Engine(subject, how, runtime(), 4)
        engine._model = model = Counting(engine._module)
        return drawn(engine, 4, labels), model.sizes

    sigma = Engine(subject, SampleConfig(steps=5), runtime(), 4).diffusion.sqrt_recipm1_alphas_cumprod
    some, sizes = images(guidance_scale=SCALE, guidance_interval=(sigma[1], sigma[3]))
    assert sizes == ([4, 8, 8, 8, 8, 4, 4, 4, 4] if sampler == "heun" else [4, 8, 8, 4, 4])
    for other in (images()[0], images(guidance_scale=SCALE)[0]):
        assert np.abs(some.astype(int) - other).max() > 5


def test_an_image_is_encoded_as_it_is_decoded(tmp_path: Path) -> None:
    """The steps of reverse DDIM are guided where DDIM's are."""
    subject = loaded(tmp_path, **CLASSES, label_dropout=0.1)
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)

    def encoded(**more: Any) -> Tensor:
        return Engine(subject, SampleConfig(sampler="ddim", steps=5, **more), runtime(), 1).encode(
            image, np.zeros(1, int)
        )

    sigma = Engine(subject, SampleConfig(steps=5), runtime(), 1).diffusion.sqrt_recipm1_alphas_cumprod
    plain, whole = encoded(), encoded(guidance_scale=SCALE)
    # the last step back starts at t = 3: t = 4 is only arrived at
    assert torch.equal(encoded(guidance_scale=SCALE, guidance_interval=(sigma[3], 1e9)), plain)
    assert torch.equal(encoded(guidance_scale=SCALE, guidance_interval=(0, sigma[3])), whole)
    assert not torch.equal(encoded(guidance_scale=SCALE, guidance_interval=(0, sigma[1])), whole)


@pytest.mark.parametrize("value", ["0.3", "5,0.3", "1,1", "-1,2", (0.3, float("inf")), "0,1,2", "a,b"])
def test_what_is_no_interval(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^guidance_interval must be "):
        SampleConfig(guidance_interval=value)


def test_an_interval_needs_a_guide(tmp_path: Path) -> None:
    how = SampleConfig(guidance_interval=(0.3, 5))
    with pytest.raises(ValueError, match=r"^guidance_interval: nothing guides these images; give --guidance-scale"):
        plan(loaded(tmp_path), how)
