"""Guidance away from a worse model: of a Gaussian, the exact result; of networks, what is drawn and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import Checkpoint, DiffusionConfig, SampleConfig, build_diffusion
from fastdiff.checkpoint import ClassifierCheckpoint
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.sampling import Engine, Loop
from fastdiff.sampling.guidance import guided
from fastdiff.sampling.shards import parts_of

from ..support import inputs
from .support import CLASSES, MODEL, NOISE, PROCESS, UPPER, classifier_of, command, drawn, loaded, plan, runtime, saved
from .test_guidance import Counting
from .test_replay import Died

GAUSSIAN = build_diffusion(DiffusionConfig(diffusion_steps=1000, noise_schedule="cosine"))
SIGMA = GAUSSIAN.sqrt_recipm1_alphas_cumprod


class Exact:
    """The noise that a normal distribution of that standard deviation implies."""

    def __init__(self, process: GaussianDiffusion, deviation: float) -> None:
        self.alpha_bar = torch.from_numpy(process.alphas_cumprod)
        self.variance = deviation**2

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        alpha_bar = self.alpha_bar[timesteps.long()].view(-1, 1)
        return (1 - alpha_bar).sqrt() / (alpha_bar * self.variance + 1 - alpha_bar) * x


@pytest.mark.parametrize("interval", [None, (0.2, 3.0)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 2.0])
def test_the_flow_is_the_exact_one(scale: float, interval: tuple[float, float] | None) -> None:
    """With D(x; sigma) = s^2 x / (s^2 + sigma^2) and dx / dsigma = (x - D) / sigma (Karras et al. 2022, equations 1 and
    3), x is proportional to sqrt(s^2 + sigma^2), and with guidance to that of the model to the power of the scale times
    that of the guide to the power of 1 - scale.
    """
    good, bad = 0.5, 0.9

    def growth(low: float, high: float, scale: float) -> float:
        of_each = [np.sqrt((s**2 + low**2) / (s**2 + high**2)) for s in (good, bad)]
        return float(of_each[0] ** scale * of_each[1] ** (1 - scale))

    low, high = interval or (0.0, SIGMA[-1])
    expected = growth(0.0, low, 1.0) * growth(low, high, scale) * growth(high, SIGMA[-1], 1.0)
    how = SampleConfig(sampler="heun", clip_denoised=False, guidance_interval=interval)
    model = Exact(GAUSSIAN, good)
    loop = Loop(guided(model, scale, Exact(GAUSSIAN, bad)), GAUSSIAN, how, unguided=model)
    x = torch.ones(1, 1, dtype=torch.float64)
    loop.begin(x, torch.zeros(1000, 1, 1, dtype=torch.float64), {})
    while loop.left:
        loop.step()
    found = float(loop.x) * GAUSSIAN.sqrt_alphas_cumprod[-1]  # x is scaled by alpha, which was tiny at the beginning
    assert found == pytest.approx(expected, rel=0.01 if interval else 2e-3)
    if scale not in (0.0, 1.0):
        assert abs(growth(low, high, scale) / growth(low, high, 1.0) - 1) > 0.1


@pytest.mark.parametrize("flags", [{}, CLASSES], ids=["unconditional", "classes"])
@pytest.mark.parametrize(("learned", "theirs"), [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_it_is_the_way_from_the_guide_to_the_model(
    tmp_path: Path, scale: float, learned: bool, theirs: bool, flags: dict[str, Any]
) -> None:
    """A learned variance is the model's, whether the guide has one or not."""
    model = Counting(loaded(tmp_path, **flags, learn_sigma=learned).model)
    guide = Counting(loaded(tmp_path, **flags, learn_sigma=theirs, seed=5).model)
    given = {**inputs(model.module, 3), "timesteps": torch.tensor([3.0, 500.0, 999.0])}
    found = guided(model, scale, guide)(**given)
    assert model.sizes == guide.sizes == [3]
    better, worse = model(**given), guide(**given)
    expected = scale * better[:, :3] + (1 - scale) * worse[:, :3]
    torch.testing.assert_close(found[:, :3], expected, rtol=0, atol=2e-5)
    assert (better[:, :3] - worse[:, :3]).abs().max() > 0.01
    assert torch.equal(found[:, 3:], better[:, 3:])
    if scale == 1:
        assert torch.equal(found, better)


def engine_of(subject: Checkpoint, guide: Checkpoint | None, **how: Any) -> tuple[Engine, Counting, Counting | None]:
    how = {"sampler": "ddim", "steps": 5, "batch_size": 4, "guidance_scale": 2.0, **how}
    engine = plan(subject, SampleConfig(**how), guide=guide).engine(runtime(), 4)
    engine._model = model = Counting(engine._module)
    worse = None
    if engine._guide is not None:
        engine._worse = worse = Counting(engine._guide)
    return engine, model, worse


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "heun"])
@pytest.mark.parametrize("labels", [None, np.array([0, 1, 2, 1])], ids=["unconditional", "classes"])
def test_the_engines_images(tmp_path: Path, sampler: str, labels: np.ndarray | None) -> None:
    flags = {} if labels is None else CLASSES
    subject, guide = loaded(tmp_path, **flags), loaded(tmp_path, **flags, seed=5)
    calls = [4] * (9 if sampler == "heun" else 5)

    engine, model, worse = engine_of(subject, guide, sampler=sampler)
    strong = drawn(engine, 4, labels)
    assert worse is not None
    assert model.sizes == worse.sizes == calls
    engine, *_ = engine_of(subject, None, sampler=sampler, guidance_scale=1.0)
    plain = drawn(engine, 4, labels)
    assert np.abs(strong.astype(int) - plain).max() > 5

    # a guide of equal weights changes nothing, and at scale 1 none is asked
    engine, *_ = engine_of(subject, loaded(tmp_path, **flags), sampler=sampler)
    assert np.array_equal(drawn(engine, 4, labels), plain)
    engine, model, worse = engine_of(subject, guide, sampler=sampler, guidance_scale=1.0)
    assert np.array_equal(drawn(engine, 4, labels), plain)
    assert worse is None


def test_only_within_the_interval(tmp_path: Path) -> None:
    subject, guide = loaded(tmp_path), loaded(tmp_path, seed=5)
    sigma = engine_of(subject, None, guidance_scale=1.0)[0].diffusion.sqrt_recipm1_alphas_cumprod
    engine, model, worse = engine_of(subject, guide, guidance_interval=(sigma[1], sigma[3]))
    drawn(engine, 4)
    assert worse is not None
    assert (model.sizes, worse.sizes) == ([4] * 5, [4] * 2)


def test_a_smaller_guide_and_a_classifier_go_together(tmp_path: Path) -> None:
    """The classifier's classes are the images': neither the model nor its guide knows any."""
    guide = loaded(tmp_path, num_channels=64, num_res_blocks=2, seed=5)
    classifier = classifier_of(3)
    judge = ClassifierCheckpoint(classifier, classifier.config, PROCESS, 0, CLASSES["class_names"], {})
    subject = loaded(tmp_path)

    def images(scale: float, strength: float) -> np.ndarray:
        how = SampleConfig(steps=5, guidance_scale=scale, classifier_scale=strength)
        return drawn(plan(subject, how, classifier=judge, guide=guide).engine(runtime(), 2), 2, np.array([0, 2]))

    for one, other in (((2, 1), (1, 1)), ((2, 1), (2, 0))):
        assert not np.array_equal(images(*one), images(*other))


def test_a_cascades_guide_is_the_bases(tmp_path: Path) -> None:
    base, guide = loaded(tmp_path, **CLASSES), loaded(tmp_path, **CLASSES, seed=5)
    upper = loaded(tmp_path, **CLASSES, **UPPER, label_dropout=0.1)
    how = SampleConfig(guidance_scale=2.0, guidance_interval=(0.1, 5))
    engine = plan(base, how, guide=guide, super_res=upper).engine(runtime(), 1)
    assert (engine.config.guidance_scale, engine.config.guidance_interval) == (1.0, None)
    assert engine._guide is None
    assert isinstance(engine.base, Engine)
    assert (engine.base.config.guidance_scale, engine.base.config.guidance_interval) == (2.0, (0.1, 5.0))
    assert engine.base._guide is not None


def test_an_animation_and_an_interpolation_are_guided(tmp_path: Path) -> None:
    subject, guide = loaded(tmp_path), loaded(tmp_path, seed=5)
    frames = [engine_of(subject, other)[0].trajectories(np.arange(2), None, 3) for other in (guide, loaded(tmp_path))]
    assert not np.array_equal(*frames)
    assert np.array_equal(frames[0][:, -1], drawn(engine_of(subject, guide)[0], 2))
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    codes = [engine_of(subject, other)[0].encode(image) for other in (guide, loaded(tmp_path))]
    assert not torch.equal(*codes)


THREE = replace(PROCESS, diffusion_steps=30)


@pytest.mark.parametrize(
    ("flags", "guide", "said"),
    [
        ({}, {"image_size": 16}, r"it draws images of 16 pixels, and the model 8"),
        ({}, UPPER, r"not with a super-resolution model"),
        (CLASSES, {}, r"it was trained without classes \(class_cond\), and the model with"),
        ({}, CLASSES, r"it was trained with classes \(class_cond\), and the model without"),
        (CLASSES, {**CLASSES, "num_classes": 4}, r"it has 4 classes, and the model 3"),
        (CLASSES, {**CLASSES, "class_names": ("cat", "eel", "zebra")}, r"its class 1 is eel, and the model's dog"),
        ({}, NOISE, r"it predicts epsilon, and the model start_x"),
        ({}, {"diffusion_steps": 30}, r"its diffusion process \(diffusion_steps 30\) is not the model's \(diffusion_"),
        (
            {"diffusion_steps": 30},
            {"diffusion_steps": 30, "noise_schedule": "linear", "learn_sigma": True},
            r"its diffusion process \(noise_schedule linear\) is not the model's \(noise_schedule cosine\): train",
        ),
        (
            {},
            {"rescale_timesteps": False, "noise_shift": 2.0},
            r"its .* \(noise_shift 2.0, rescale_timesteps False\) .* \(noise_shift 1.0, rescale_timesteps True\)",
        ),
    ],
)  # fmt: skip
def test_a_guide_of_something_else_is_refused(
    tmp_path: Path, flags: dict[str, Any], guide: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=f"^guide: {said}"):
        plan(loaded(tmp_path, **flags), SampleConfig(guidance_scale=2), guide=loaded(tmp_path, **guide))


def test_what_does_not_matter_may_differ(tmp_path: Path) -> None:
    subject = loaded(tmp_path, learn_sigma=True, use_kl=True, timestep_respacing="10")
    plan(subject, SampleConfig(guidance_scale=2), guide=loaded(tmp_path, sigma_small=True, num_res_blocks=2))


HOW = ("--steps", 4, "--sampler", "ddpm", "--precision", "fp32", "--compile", "off", "--device", "cpu")


def test_a_job_is_resumed_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "model.safetensors")
    guides = [saved(tmp_path / f"guide{seed}.safetensors", seed=seed) for seed in (5, 6)]
    flags = ("sample", model, *HOW, "--guidance-scale", 2, "--guidance-interval", "0.1,1")

    def of(path: Path) -> tuple[object, ...]:
        return (*flags, "--guide", path)

    whole, part, out = (tmp_path / f"{name}.npz" for name in ("whole", "part", "out"))
    command(*of(guides[0]), "--num-samples", 9, "--out", whole)
    command(*of(guides[0]), "--indices", "7,2", "--out", part)
    real, taken = Loop.step, 0

    def step(self: Loop) -> None:
        nonlocal taken
        real(self)
        taken += 1
        if taken == 2 * 4 + 1:
            raise Died

    with monkeypatch.context() as harmed:
        harmed.setattr(Loop, "step", step)
        with pytest.raises(Died):
            command(*of(guides[0]), "--num-samples", 9, "--batch-size", 3, "--out", out)
    assert parts_of(out).is_dir()
    for other, name in ((of(guides[1]), "guide"), (flags[:-2] + of(guides[0])[-2:], "guidance_interval")):
        with pytest.raises(ValueError, match=f"unfinished job with another {name}"):
            command(*other, "--num-samples", 9, "--batch-size", 3, "--out", out)
    command(*of(guides[0]), "--num-samples", 9, "--batch-size", 3, "--out", out)
    with np.load(whole) as all_of_them, np.load(out) as resumed, np.load(part) as two:
        assert np.abs(resumed["arr_0"].astype(int) - all_of_them["arr_0"]).max() <= 2
        assert np.abs(two["arr_0"].astype(int) - all_of_them["arr_0"][[7, 2]]).max() <= 2
        assert "guide5.safetensors" in str(resumed["settings"])


def test_in_python_and_on_the_command_line(tmp_path: Path) -> None:
    model, guide = saved(tmp_path / "model.safetensors"), saved(tmp_path / "guide.safetensors", seed=5)
    how: dict[str, Any] = {"steps": 4, "precision": "fp32", "compile": "off", "device": "cpu"}
    images = fastdiff.sample(model, 2, guide=guide, guidance_scale=2, **how)
    command(
        "sample", model, *HOW, "--num-samples", 2, "--guide", guide, "--guidance-scale", 2, "--out", tmp_path / "a.npz"
    )
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], images)
    with pytest.raises(ValueError, match=r"^guide: say by how much it guides, such as guidance_scale=2$"):
        fastdiff.sample(model, 2, guide=guide, **how)
    with pytest.raises(ValueError, match=r"^guide: say by how much it guides, such as --guidance-scale 2$"):
        command("sample", model, "--guide", guide)
    with pytest.raises(ValueError, match=r"^guide .*model\.safetensors: it is the model itself; name an earlier step"):
        command("sample", model, "--guide", model, "--guidance-scale", 2)
    assert MODEL.class_cond is False  # and no label dropout was needed
