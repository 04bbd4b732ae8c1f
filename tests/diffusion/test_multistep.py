"""The multistep methods' coefficients: what they integrate exactly, the first steps, and both ends."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.config import DiffusionConfig, Sampler, TimeGrid
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.samplers import MULTISTEP
from fastdiff.diffusion.schedule import betas_of
from fastdiff.diffusion.time_grids import grid_timesteps

from .support import process, randn
from .test_solvers import MEAN, START_X, STD, Z, evenly_in_lambda, gaussian_x_start, last, on_the_flow

DETERMINISTIC = [name for name in Sampler if not name.stochastic]


def drawn_from(name: Sampler, alpha: NDArray[np.float64], x_start: Callable[[int], float], x: float) -> float:
    """x at t = 0, before the last step, if the model says ``x_start`` of t."""
    method, sigma = MULTISTEP[name], np.sqrt(1 - alpha**2)
    table = torch.from_numpy(method.table(alpha, sigma))
    sample, previous = torch.full((1, 1), x, dtype=torch.float64), []
    for step in range(len(alpha) - 1, 0, -1):
        t, said = torch.tensor([step]), torch.full((1, 1), x_start(step), dtype=torch.float64)
        out = method.step(lambda *_, said=said: said, table, sample, t, previous, lambda: torch.zeros(1, 1))
        sample, previous = out["sample"], [out["kept"], *previous][: method.depth]
    return float(sample)


def of_steps(steps: list[float], first: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """alpha_t and lambda_t of a process whose steps from t = T-1 on are so long in lambda."""
    lambdas = np.flip(np.cumsum([first, *steps]))
    return 1 / np.sqrt(1 + np.exp(-2 * lambdas)), lambdas


@pytest.mark.parametrize(("name", "degree"), [(Sampler.DPM_3M, 2), (Sampler.UNIPC, 2), (Sampler.UNIPC, 1)])
def test_a_polynomial_in_lambda_is_integrated_exactly(name: Sampler, degree: int) -> None:
    """By each third-order step, and by UniPC's corrector, whose share of a step is what DPM-Solver++(2M) lacks."""
    alpha, lambdas = of_steps([0.3, 0.3, 0.3, 0.31, 0.29, 0.32, 0.25, 0.3], -1.0)
    sigma = np.sqrt(1 - alpha**2)
    top = len(alpha) - 1
    method = MULTISTEP[name]
    table = method.table(alpha, sigma)
    x_start = (lambdas - lambdas[top]) ** degree
    fine = np.linspace(0, 1, 200_001)
    for t in range(top - 2, 0, -1):
        if name is Sampler.UNIPC:
            # x_t as the predictor of the second order left it, from the exact x_{t+1}: the corrector mends it
            start, rule = t + 1, MULTISTEP[Sampler.DPM].table(alpha, sigma)[t + 1]
            before = 0.7
            predicted = rule[0] * before + rule[1] * x_start[start] + rule[3] * (x_start[start] - x_start[start + 1])
            plain = MULTISTEP[Sampler.DPM].table(alpha, sigma)[t]
            found = table[t, 0] * predicted + table[t, 1] * x_start[t]
            found += sum(table[t, 2 + i] * (x_start[t] - x_start[t + i]) for i in (1, 2))
            found -= plain[1] * x_start[t] + plain[3] * (x_start[t] - x_start[t + 1])
            found /= table[t, 0]
            end = t
        else:
            start, end, before = t, t - 1, 0.7
            found = table[t, 0] * before + table[t, 1] * x_start[t]
            found += sum(table[t, 2 + i] * (x_start[t] - x_start[t + i]) for i in (1, 2))
        place = lambdas[start] + fine * (lambdas[end] - lambdas[start])
        integral = np.trapezoid(np.exp(place - lambdas[end]) * (place - lambdas[top]) ** degree, place)
        exact = sigma[end] / sigma[start] * before + alpha[end] * integral
        assert found == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("name", [name for name, method in MULTISTEP.items() if not method.noisy])
def test_a_constant_prediction_is_kept_by_any_steps(name: Sampler) -> None:
    alpha, _ = of_steps([3.0, 0.1, 0.5, 0.6, 0.05, 2.0, 1.0], -4.0)
    sigma = np.sqrt(1 - alpha**2)
    found = drawn_from(name, alpha, lambda t: 0.6, 1.3)
    assert found == pytest.approx(sigma[0] / sigma[-1] * (1.3 - alpha[-1] * 0.6) + alpha[0] * 0.6, abs=1e-12)


@pytest.mark.parametrize("name", MULTISTEP)
def test_the_first_steps_give_no_weight_to_what_is_not_there(name: Sampler) -> None:
    d = process(50, use_timesteps=[0, 3, 9, 20, 30, 49])
    method = MULTISTEP[name]
    table = method.table(d.sqrt_alphas_cumprod, d.sqrt_one_minus_alphas_cumprod)
    changes = table[:, 3 : 3 + method.depth]
    assert table.shape == (6, 5 + method.depth)
    assert not changes[5].any()
    assert changes[4, 0] != 0
    assert not changes[4, 1:].any()
    # and the last one returns the prediction
    assert table[0, :3].tolist() == [0, 1, 0]
    assert not changes[0].any()


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MULTISTEP)
def test_few_timesteps(name: Sampler, steps: int) -> None:
    d = process(50, use_timesteps=[0, 3, 9, 49][-steps:])
    table = MULTISTEP[name].table(d.sqrt_alphas_cumprod, d.sqrt_one_minus_alphas_cumprod)
    assert len(table) == steps
    assert np.isfinite(table).all()


@pytest.mark.parametrize("name", MULTISTEP)
def test_noise_without_any_signal(name: Sampler) -> None:
    """A process with zero terminal SNR (Lin et al. 2024): alpha_T is 0, where lambda is -inf."""
    alpha = np.sqrt(np.array([0.999, 0.9, 0.5, 0.2, 0.01, 0.0]))
    sigma = np.sqrt(1 - alpha**2)
    with warnings.catch_warnings(action="error"):
        table = MULTISTEP[name].table(alpha, sigma)
    assert np.isfinite(table).all()
    if not MULTISTEP[name].noisy:
        assert table[-1, :2] == pytest.approx([sigma[-2], alpha[-2]], abs=1e-9)  # x_T is the noise
    # in which predictions near 1 stay there; fp32 suffices
    assert np.abs(table[:, : 3 + MULTISTEP[name].depth]).max() < 20
    found = drawn_from(name, alpha, lambda t: 0.9 + 0.1 * t / 5, 1.0)
    assert 0.8 < found < 1.1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gaussian_data_keep_mean_and_variance(name: Sampler, schedule: str) -> None:
    """A sample is a linear function of x_T here: two of them say its mean and its standard deviation."""
    d = evenly_in_lambda(100, schedule, **START_X)
    a, model = d.alphas_cumprod, gaussian_x_start(d)
    found = last(name, d, model, Z.shape, noise=on_the_flow(d, -1), clip_denoised=False)
    std, mean = np.polyfit(Z.flatten().numpy(), found.flatten().numpy(), 1)
    # E[x_0 | x_t] at the last t varies less than x_0, by Var(x_0 | x_t)
    exact = STD * math.sqrt(a[0] * STD**2 / (a[0] * STD**2 + 1 - a[0]))
    tolerance = 0.01 if name is Sampler.DDIM else 1e-4
    assert mean == pytest.approx(MEAN, abs=tolerance)
    assert std**2 == pytest.approx(exact**2, abs=tolerance)


@pytest.mark.parametrize("grid", [grid for grid in TimeGrid if grid is not TimeGrid.TUNED])
@pytest.mark.parametrize(
    "config",
    [
        DiffusionConfig(zero_terminal_snr=True, prediction="v"),
        DiffusionConfig(zero_terminal_snr=True, prediction="v", noise_schedule="cosine"),
        DiffusionConfig(prediction="flow"),
    ],
    ids=["linear", "cosine", "flow"],
)
@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name not in (Sampler.DDIM, Sampler.HEUN)])
def test_from_pure_noise_on_every_grid(name: Sampler, config: DiffusionConfig, grid: TimeGrid) -> None:
    """Mean and variance, of a process whose alpha_T is 0."""
    betas = betas_of(config)
    kept = grid_timesteps(np.cumprod(1 - betas), 60, grid)
    d = GaussianDiffusion(betas=betas, use_timesteps=kept, **START_X)
    assert d.alphas_cumprod[-1] == 0
    found = last(name, d, gaussian_x_start_of_any(d), Z.shape, noise=Z, clip_denoised=False)
    std, mean = np.polyfit(Z.flatten().numpy(), found.flatten().numpy(), 1)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert std == pytest.approx(STD, abs=0.02)


def gaussian_x_start_of_any(d: GaussianDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_0 | x_t] for data N(MEAN, STD^2), also where alpha is 0."""
    place = {float(step): i for i, step in enumerate(d.timestep_map)}

    def model(x: Tensor, timesteps: Tensor) -> Tensor:
        a = torch.as_tensor(d.alphas_cumprod)[[place[float(step)] for step in timesteps]].view(-1, 1, 1, 1)
        return MEAN + a.sqrt() * STD**2 * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)

    return model


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_call_without_history_is_ddim(name: Sampler) -> None:
    d = process(25, use_timesteps=[0, 3, 9, 24])
    x, noise, output = randn(4, 3, 4, 4, seed=1), randn(4, 3, 4, 4, seed=2), randn(4, 3, 4, 4, seed=3)
    t = torch.arange(4)
    found = d.multistep_sample(lambda *_: output, x, t, solver=name, noise=noise)
    expected = d.ddim_sample(lambda *_: output, x, t, eta=float(name is Sampler.DPM_SDE), noise=noise)
    torch.testing.assert_close(found["sample"], expected["sample"])
    torch.testing.assert_close(found["pred_xstart"], expected["pred_xstart"])
    eps = d.eps_from_xstart(x, t, expected["pred_xstart"])
    torch.testing.assert_close(found["kept"], eps if name is Sampler.IPNDM else expected["pred_xstart"])


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="dpm\\+\\+4m"):
        process(25).multistep_sample_loop(lambda x, t: x, (1, 3, 4, 4), "dpm++4m")
