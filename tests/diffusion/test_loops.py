"""The sampling loops: replay, and Gaussian data, where the right answer is known."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.diffusion import GaussianDiffusion, ModelVarType

from .support import gaussian_eps, process, randn

SHAPE = (2, 3, 4, 4)
MEAN, STD = 0.4, 0.5


def loops(d: GaussianDiffusion) -> dict[str, Callable[..., Tensor]]:
    return {
        "ancestral": d.p_sample_loop,
        "ddim": d.ddim_sample_loop,
        "ddim eta 1": lambda *a, **k: d.ddim_sample_loop(*a, eta=1.0, **k),
    }


LOOPS = list(loops(process()))


@pytest.mark.parametrize("name", LOOPS)
def test_step_noise_as_tensor_list_or_generator(name: str) -> None:
    d = process(25)
    model, loop = gaussian_eps(d, MEAN, STD), loops(d)[name]
    x, step_noise = randn(*SHAPE, seed=1), randn(25, *SHAPE, seed=2)
    results = [
        loop(model, SHAPE, noise=x, step_noise=given) for given in (step_noise, list(step_noise), iter(step_noise))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    other = loop(model, SHAPE, noise=x, step_noise=step_noise.flip(0))
    assert torch.equal(other, results[0]) == (name == "ddim")


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_its_steps(name: str) -> None:
    d = process(25, use_timesteps=[0, 3, 9, 24])
    model = gaussian_eps(d, MEAN, STD)
    x, step_noise = randn(*SHAPE, seed=1), randn(4, *SHAPE, seed=2)
    expected = x
    for step, noise in zip((3, 2, 1, 0), step_noise, strict=True):
        t = torch.full((2,), step)
        if name == "ancestral":
            expected = d.p_sample(model, expected, t, noise=noise)["sample"]
        else:
            expected = d.ddim_sample(model, expected, t, eta=float(name == "ddim eta 1"), noise=noise)["sample"]
    assert torch.equal(loops(d)[name](model, SHAPE, noise=x, step_noise=step_noise), expected)


def test_progressive_loops_yield_every_step() -> None:
    d = process(25)
    model, x, step_noise = gaussian_eps(d, MEAN, STD), randn(*SHAPE, seed=1), randn(25, *SHAPE, seed=2)
    for progressive, loop in (
        (d.p_sample_loop_progressive, d.p_sample_loop),
        (d.ddim_sample_loop_progressive, d.ddim_sample_loop),
    ):
        steps = list(progressive(model, SHAPE, noise=x, step_noise=step_noise))
        assert len(steps) == 25
        assert all({"sample", "pred_xstart"} <= set(step) for step in steps)
        assert torch.equal(steps[-1]["sample"], loop(model, SHAPE, noise=x, step_noise=step_noise))
        torch.testing.assert_close(steps[-1]["sample"], steps[-1]["pred_xstart"])


@pytest.mark.parametrize("name", LOOPS)
def test_a_seed_repeats_a_loop(name: str) -> None:
    d = process(25)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(loops(d)[name](lambda x, t: 0.1 * x, SHAPE))
    assert results[0].dtype == torch.float32
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_no_gradients_in_a_loop_but_in_a_step() -> None:
    d = process(25)
    weight = torch.ones((), requires_grad=True)
    assert not d.p_sample_loop(lambda x, t: weight * x, SHAPE).requires_grad
    assert d.p_sample(lambda x, t: weight * x, randn(*SHAPE), torch.tensor([3, 4]))["sample"].requires_grad


def test_the_callers_noise_is_left_alone() -> None:
    d = process(25)
    x, step_noise = randn(*SHAPE, seed=1), randn(25, *SHAPE, seed=2)
    before = x.clone(), step_noise.clone()
    d.p_sample_loop(lambda x, t: x, SHAPE, noise=x, step_noise=step_noise)
    assert torch.equal(x, before[0])
    assert torch.equal(step_noise, before[1])


@pytest.mark.parametrize("name", LOOPS)
def test_loops_pass_their_keywords_on(name: str) -> None:
    d = process(25)
    seen: list[Any] = []

    def model(x: Tensor, timesteps: Tensor, y: int) -> Tensor:
        seen.append((float(timesteps[0]), y))
        return torch.zeros_like(x)

    out = loops(d)[name](model, SHAPE, model_kwargs={"y": 7}, denoised_fn=lambda x: x * 0 + 5, clip_denoised=False)
    assert seen == [(float(step), 7) for step in reversed(range(25))]
    torch.testing.assert_close(out, torch.full(SHAPE, 5.0))
    clipped = loops(d)[name](model, SHAPE, model_kwargs={"y": 7}, denoised_fn=lambda x: x * 0 + 5)
    torch.testing.assert_close(clipped, torch.ones(SHAPE))


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop", "calc_bpd_loop"])
def test_too_little_step_noise_is_refused(loop: str) -> None:
    d = process(25)
    x, step_noise = randn(*SHAPE), randn(24, *SHAPE)
    first = x if loop == "calc_bpd_loop" else SHAPE
    with pytest.raises(ValueError, match="step_noise"):
        getattr(d, loop)(lambda x, t: x, first, step_noise=step_noise)


# Gaussian data: N(MEAN, STD^2) in every pixel


def within_five_sigma(samples: Tensor, mean: float, std: float) -> None:
    n = samples.numel()
    assert abs(float(samples.mean()) - mean) < 5 * std / math.sqrt(n)
    assert abs(float(samples.std()) - std) < 5 * std / math.sqrt(2 * n)


def x_at_the_end(d: GaussianDiffusion) -> Tensor:
    """Exact draws of x_T, (N, 1, 1, 1) as one image, so that the prior's own error does not count."""
    a = d.alphas_cumprod[-1]
    return math.sqrt(a) * MEAN + math.sqrt(a * STD**2 + 1 - a) * randn(1, 1, 200, 200, seed=11)


@pytest.mark.parametrize("steps", [[0, 19], list(range(0, 100, 7)), list(range(100))], ids=len)
def test_ancestral_sampling_with_the_exact_variance(steps: list[int]) -> None:
    """With Gaussian data p(x_{t-1} | x_t) is Gaussian: the exact mean and variance give exact samples in any number of
    steps, up to the last one, which returns E[x_0 | x_1]."""
    d = process(100, "cosine", use_timesteps=steps, model_var_type=ModelVarType.LEARNED)
    eps = gaussian_eps(d, MEAN, STD)
    a, coef1 = d.alphas_cumprod, d.posterior_mean_coef1
    of_x_start = STD**2 * (1 - a) / (a * STD**2 + 1 - a)  # Var(x_0 | x_t)
    log_variance = np.log(d.posterior_variance + coef1**2 * of_x_start)

    def model(x: Tensor, timesteps: Tensor) -> Tensor:
        place = steps.index(int(timesteps[0]))
        return torch.cat([eps(x, timesteps), torch.full_like(x, log_variance[place])], dim=1)

    x = x_at_the_end(d)
    noise = (randn(*x.shape, seed=100 + i) for i in range(len(steps)))
    samples = d.p_sample_loop(model, x.shape, noise=x, step_noise=noise, clip_denoised=False)
    within_five_sigma(samples, MEAN, math.sqrt(STD**2 - of_x_start[0]))


@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
def test_ancestral_sampling_with_a_fixed_variance(var_type: ModelVarType) -> None:
    """x_{t-1} is linear in x_t here, so the samples' exact mean and variance follow by recursion."""
    d = process(60, model_var_type=var_type)
    eps = gaussian_eps(d, MEAN, STD)
    a, b1, b2 = d.alphas_cumprod, d.posterior_mean_coef1, d.posterior_mean_coef2
    mean, variance = math.sqrt(a[-1]) * MEAN, a[-1] * STD**2 + 1 - a[-1]
    for t in reversed(range(60)):
        gain = STD**2 * math.sqrt(a[t]) / (a[t] * STD**2 + 1 - a[t])  # of E[x_0 | x_t] in x_t
        mean = (b1[t] * gain + b2[t]) * mean + b1[t] * (1 - gain * math.sqrt(a[t])) * MEAN
        added = d.posterior_variance[t] if var_type is ModelVarType.FIXED_SMALL else d.betas[t]
        variance = (b1[t] * gain + b2[t]) ** 2 * variance + (added if t else 0.0)
    assert mean == pytest.approx(MEAN)
    assert math.sqrt(variance) == pytest.approx(STD, rel=0.1)
    x = x_at_the_end(d)
    noise = (randn(*x.shape, seed=100 + i) for i in range(60))
    samples = d.p_sample_loop(eps, x.shape, noise=x, step_noise=noise, clip_denoised=False)
    within_five_sigma(samples, mean, math.sqrt(variance))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_converges_to_the_exact_flow(schedule: str) -> None:
    """The probability flow takes x_T to the data's quantile of the same rank; DDIM's error falls as 1 / T."""
    errors = []
    for steps in (100, 200, 400):
        d = process(steps, schedule)
        a = d.alphas_cumprod[-1]
        z = torch.linspace(-2, 2, 32, dtype=torch.float64).view(1, 1, 4, 8)
        x = math.sqrt(a) * MEAN + math.sqrt(a * STD**2 + 1 - a) * z
        found = d.ddim_sample_loop(gaussian_eps(d, MEAN, STD), x.shape, noise=x, clip_denoised=False)
        errors.append(float((found - (MEAN + STD * z)).abs().max()))
    assert errors[-1] < 0.01
    assert all(coarse / fine > 1.6 for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_there_and_back(schedule: str) -> None:
    """Reverse DDIM from the data to x_T and DDIM back come home, the nearer the more steps."""
    errors = []
    for steps in (50, 100, 200):
        d = process(steps, schedule)
        model = gaussian_eps(d, MEAN, STD)
        start = x = MEAN + STD * torch.linspace(-2, 2, 32, dtype=torch.float64).view(1, 1, 4, 8)
        for step in range(steps - 1):
            x = d.ddim_reverse_sample(model, x, torch.tensor([step]), clip_denoised=False)["sample"]
        a = d.alphas_cumprod[-1]
        latent = (x - math.sqrt(a) * MEAN) / math.sqrt(a * STD**2 + 1 - a)
        assert float(latent.abs().max()) == pytest.approx(2, rel=0.15)  # it did go to the noise
        for step in reversed(range(1, steps)):
            x = d.ddim_sample(model, x, torch.tensor([step]), clip_denoised=False)["sample"]
        errors.append(float((x - start).abs().max()))
    assert errors[-1] < 0.04
    assert all(coarse / fine > 1.5 for coarse, fine in pairwise(errors))
