"""The loop over the bound's terms: noise by number, step by step."""

from collections.abc import Iterator

import pytest
import torch

from fastdiff import DiffusionConfig, GaussianDiffusion, build_diffusion
from fastdiff.diffusion import Philox

from ..watch import Watch

SHAPE = (3, 3, 4, 4)
STEPS = 6
NUMBERS = torch.tensor([5, 2**40, 7])


@pytest.fixture
def diffusion() -> GaussianDiffusion:
    return build_diffusion(DiffusionConfig(diffusion_steps=STEPS, noise_schedule="cosine", learn_sigma=True))


def model(x: torch.Tensor, timesteps: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """Depends on both, and on a further argument."""
    return torch.cat([x.sin() + timesteps[:, None, None, None] / 1000 + shift, x.cos()], dim=1)


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


def tensors(diffusion: GaussianDiffusion) -> Iterator[torch.Tensor]:
    """The same noise, of sampling's update 1, 2, ..., as tensors."""
    for step in range(1, STEPS + 1):
        yield Philox(3, NUMBERS).of_update(torch.full((3,), step), SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_philox_is_the_noise_of_its_numbers(diffusion: GaussianDiffusion, dtype: torch.dtype) -> None:
    x = images(dtype)
    found = diffusion.calc_bpd_loop(model, x, step_noise=Philox(3, NUMBERS))
    expected = diffusion.calc_bpd_loop(model, x, step_noise=tensors(diffusion))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert found[name].dtype is dtype
    other = diffusion.calc_bpd_loop(model, x, step_noise=Philox(4, NUMBERS))
    assert not torch.equal(other["vb"], found["vb"])


def test_an_image_does_not_see_its_batch(diffusion: GaussianDiffusion) -> None:
    x = images(torch.float64)
    whole = diffusion.calc_bpd_loop(model, x, step_noise=Philox(3, NUMBERS))
    for i in range(3):
        alone = diffusion.calc_bpd_loop(model, x[i : i + 1], step_noise=Philox(3, NUMBERS[i : i + 1]))
        for name, value in alone.items():
            torch.testing.assert_close(value, whole[name][i : i + 1])


def test_step_by_step_is_the_whole(diffusion: GaussianDiffusion) -> None:
    x = images()
    options = {"clip_denoised": False, "model_kwargs": {"shift": 0.3}, "step_noise": Philox(3, NUMBERS)}
    whole = diffusion.calc_bpd_loop(model, x, **options)
    steps = list(diffusion.calc_bpd_loop_progressive(model, x, **options))
    assert len(steps) == STEPS
    for name in ("vb", "mse", "xstart_mse"):
        assert torch.equal(torch.stack([step[name] for step in steps], dim=1), whole[name])
    clipped = diffusion.calc_bpd_loop(model, x, model_kwargs={"shift": 0.3}, step_noise=Philox(3, NUMBERS))
    assert not torch.equal(clipped["vb"], whole["vb"])


def test_no_gradient_is_kept_and_none_is_stopped(diffusion: GaussianDiffusion) -> None:
    weight = torch.ones((), requires_grad=True)
    for step in diffusion.calc_bpd_loop_progressive(lambda x, t: model(x, t) * weight, images()):
        assert not any(value.requires_grad for value in step.values())
        assert torch.is_grad_enabled()


def test_no_step_waits_for_the_device(diffusion: GaussianDiffusion) -> None:
    steps = diffusion.calc_bpd_loop_progressive(model, images(), step_noise=Philox(3, NUMBERS))
    next(steps)  # what is made once may wait
    with Watch() as watch:
        for _ in steps:
            pass
    assert watch.calls > 100
    assert watch.seen == []
