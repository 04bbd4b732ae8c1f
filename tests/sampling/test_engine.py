"""A checkpoint made ready to draw."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdiff import SampleConfig, space_timesteps
from fastdiff.data import normalised, to_uint8
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.kernels import philox_normal
from fastdiff.sampling import Engine, generate
from fastdiff.sampling.engine import SUPER_RES_KEY

from ..diffusion.support import gaussian_eps, process
from .support import CLASSES, CPU, SMOOTH, UPPER, drawn, loaded, runtime


def engine(tmp_path: Path, precision: str = "fp32", images: int = 4, **flags: Any) -> Engine:
    """``flags`` are those of the model, and, in ``how``, the fields of SampleConfig."""
    how = SampleConfig(**flags.pop("how", {}))
    return Engine(loaded(tmp_path, **flags), how, runtime(precision), images)


HEADS: dict[str, Any] = {"num_heads": 2, "num_res_blocks": 2}
LEVELS: dict[str, Any] = {**CLASSES, "learn_sigma": True, "channel_mult": (1, 2), "attention_resolutions": "4"}
UNSCALED: dict[str, Any] = {"use_scale_shift_norm": False, **CLASSES}
GUIDED: dict[str, Any] = {**LEVELS, "num_head_channels": 16, "resblock_updown": True, "use_new_attention_order": True}


# every model and every precision, but not in all pairs: what is cast does not depend on what it is cast to
@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        *((HEADS, "bf16"), (LEVELS, "fp16"), (UNSCALED, "bf16"), (UPPER, "fp16"), (GUIDED, "bf16")),
        *(pytest.param(f, "fp16", marks=pytest.mark.slow) for f in (HEADS, UNSCALED)),
        *(pytest.param(f, "bf16", marks=pytest.mark.slow) for f in (LEVELS, UPPER)),
    ],
)
def test_weights_cast_once_draw_what_autocast_does(tmp_path: Path, precision: str, flags: dict[str, Any]) -> None:
    """Bit for bit, x_t after every step."""
    subject = loaded(tmp_path, **flags)
    size = subject.model_config.image_size
    labels = np.array([0, 1, 2]) if "class_cond" in flags else None
    place = runtime(precision)
    small = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    low_res = (lambda numbers: small[numbers]) if size == 16 else None
    how = SampleConfig(num_samples=3, batch_size=3, steps=3)
    expected: list[Tensor] = []
    found: list[Tensor] = []

    def keep(where: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda x: where.append(x.clone())

    subject_engine = Engine(loaded(tmp_path, **flags), how, place, 3)
    more: dict[str, Any] = {"labels": labels, "low_res": low_res}
    for _ in generate(
        place.eager(subject.model),
        subject_engine.diffusion,
        subject_engine.config,
        image_size=size,
        device=CPU,
        watch=keep(expected),
        **more,
    ):
        pass
    inputs = subject_engine._inputs(np.arange(3), labels, low_res)
    for _ in generate(
        subject_engine._model, subject_engine.diffusion, subject_engine.config, watch=keep(found), **inputs
    ):
        pass
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert len(found) == 4
    exact = list(
        generate(subject.model, subject_engine.diffusion, subject_engine.config, image_size=size, device=CPU, **more)
    )
    assert not np.array_equal(exact[0], to_uint8(found[-1]).numpy())  # lower precision was at work at all

    kinds = {module for module in subject_engine._module.modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {p.dtype for module in kinds for p in module.parameters()} == {wanted}
    others = set(subject_engine._module.parameters()) - {p for module in kinds for p in module.parameters()}
    assert torch.float32 in {p.dtype for p in others}


def test_in_fp32_nothing_is_cast(tmp_path: Path) -> None:
    subject = engine(tmp_path)
    assert {p.dtype for p in subject._module.parameters()} == {torch.float32}


def test_a_super_resolution_models_noise_is_its_own(tmp_path: Path) -> None:
    """Of the same seed, its x_T would hold the base image's noise once more, element by element."""
    subject = engine(tmp_path, **UPPER, how={"seed": 2**64 - 5, "steps": 2})
    assert subject.config.seed == (2**64 - 5 + SUPER_RES_KEY) % 2**64 == SUPER_RES_KEY - 5
    seen: list[Tensor] = []
    small = torch.zeros(1, 3, 8, 8)
    indices = np.array([4])
    watch: Any = lambda x: seen.append(x.clone())  # noqa: E731
    inputs = subject._inputs(indices, None, lambda _: small)
    list(generate(subject._model, subject.diffusion, subject.config, watch=watch, **inputs))
    assert torch.equal(seen[0], philox_normal(SUPER_RES_KEY - 5, torch.tensor([4]), 0, (3, 16, 16)))
    base = engine(tmp_path, how={"seed": 2**64 - 5})
    assert base.config.seed == 2**64 - 5
    flat = seen[0].flatten()[: 3 * 64], base.noise_of(2**64 - 5).flatten()
    assert abs(float(torch.corrcoef(torch.stack(flat))[0, 1])) < 0.2


@pytest.mark.parametrize(("how", "steps"), [({}, 20), ({"steps": 7}, 7), ({"timestep_respacing": "3,2"}, 5)])
def test_the_timesteps_are_those_asked_for(tmp_path: Path, how: dict[str, Any], steps: int) -> None:
    subject = engine(tmp_path, how=how | {"batch_size": 2}, images=5)
    assert subject.steps == subject.diffusion.num_timesteps == steps
    assert subject.calls == 3 * steps
    assert engine(tmp_path, how=how | {"sampler": "heun"}, images=0).calls == 0


def test_more_timesteps_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"21 of 20 timesteps"):
        engine(tmp_path, how={"steps": 21})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, number: float) -> None:
    subject = loaded(tmp_path)
    with torch.no_grad():
        subject.model.out[2].bias[1] = number
    # clipped, infinity is a number; without clipping nothing hides it
    how = SampleConfig(steps=3, clip_denoised=False)
    with pytest.raises(ValueError, match=r"^the model drew numbers that are not finite: .*damaged.*fp32$"):
        drawn(Engine(subject, how, runtime(), 2), 2)


def round_trip(diffusion: GaussianDiffusion, model: Callable[..., Tensor], x: Tensor) -> Tensor:
    latent = diffusion.ddim_reverse_sample_loop(model, x, clip_denoised=False)
    return diffusion.ddim_sample_loop(model, x.shape, noise=latent, clip_denoised=False)


def test_encoded_and_drawn_again_an_image_is_itself() -> None:
    """With the exact model of Gaussian data: the error falls as 1 / T, and x_T is what the data's noise looks like."""
    mean, std = 0.3, 0.4
    x = mean + std * torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for steps in (25, 50, 100, 200):
        diffusion = process(1000, use_timesteps=space_timesteps(1000, str(steps)))
        assert diffusion.num_timesteps == steps
        model = gaussian_eps(diffusion, mean, std)
        errors.append(float((round_trip(diffusion, model, x) - x).pow(2).mean().sqrt()))
    ratios = [before / after for before, after in pairwise(errors)]
    assert all(1.7 < ratio < 2.4 for ratio in ratios), (errors, ratios)
    assert errors[-1] < 0.02
    latent = diffusion.ddim_reverse_sample_loop(model, x, clip_denoised=False)
    # the map is linear: what lies s standard deviations from the mean is encoded as s
    torch.testing.assert_close(latent, (x - mean) / std, rtol=0, atol=0.08)


@pytest.mark.parametrize("flags", [{}, {**CLASSES, "learn_sigma": True}])
def test_the_engine_encodes(tmp_path: Path, flags: dict[str, Any]) -> None:
    """With a net, too, an image comes back the better the more steps it takes; and by its class."""
    labels = np.array([2, 0]) if flags else None
    images = np.random.default_rng(0).integers(50, 200, (2, 8, 8, 3), dtype=np.uint8)
    errors = []
    for steps in (5, 20, 80):
        how = {"sampler": "ddim", "steps": steps, "clip_denoised": False}
        subject = engine(tmp_path, how=how, **SMOOTH, **flags)
        latent = subject.encode(images, labels)
        assert (latent.shape, latent.dtype) == ((2, 3, 8, 8), torch.float32)
        subject.start = lambda numbers, latent=latent: latent[numbers]
        again = drawn(subject, 2, labels)
        errors.append(float(np.abs(again.astype(int) - images).mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors
    assert errors[2] < 1
    if labels is not None:
        other = subject.encode(images, labels[::-1].copy())
        assert (other - latent).abs().max() > 1e-3


def test_the_noise_of_a_seed_is_its_first_images(tmp_path: Path) -> None:
    subject = engine(tmp_path, how={"seed": 3})
    assert torch.equal(subject.noise_of(11), philox_normal(11, torch.tensor([0]), 0, (3, 8, 8)))
    other = engine(tmp_path, how={"seed": 11, "sampler": "ddim"})
    noise = subject.noise_of(11)
    alone = drawn(other, 1)
    other.start = lambda numbers: noise[numbers]
    assert np.array_equal(alone, drawn(other, 1))


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "heun"])
@pytest.mark.parametrize(("most", "frames"), [(99, 7), (7, 7), (4, 4), (2, 2), (1, 1)])
def test_a_trajectory_ends_with_the_image(tmp_path: Path, sampler: str, most: int, frames: int) -> None:
    subject = engine(tmp_path, **CLASSES, how={"sampler": sampler, "steps": 6, "seed": 5})
    (shown,) = subject.trajectories(np.array([3]), np.array([2]), most)
    assert (shown.shape, shown.dtype) == ((frames, 8, 8, 3), np.uint8)
    image = np.concatenate(list(subject.draw(np.array([3]), np.array([2]))))[0]
    assert np.array_equal(shown[-1], image)
    if frames > 1:
        noise = to_uint8(philox_normal(5, torch.tensor([3]), 0, (3, 8, 8)))[0].numpy()
        assert np.array_equal(shown[0], noise)
        assert len({frame.tobytes() for frame in shown}) == frames
    several = subject.trajectories(np.array([0, 3, 7]), np.array([1, 2, 0]), most)
    assert several.shape == (3, frames, 8, 8, 3)
    assert np.abs(several[1].astype(int) - shown).max() <= 1


def test_pixels_and_numbers_are_each_others_inverse() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert (to_uint8(normalised(images)).int() - images.int()).abs().max() <= 1
