"""The few-step samplers on Gaussian data, where flow and score are known, and the conventions of every loop."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.diffusion import GaussianDiffusion, ModelMeanType, ModelVarType, Philox, space_timesteps
from fastdiff.diffusion.samplers import MULTISTEP

from .support import gather, gaussian_eps, process, randn

SHAPE = (2, 3, 4, 4)
MEAN, STD = 0.4, 0.5
Z = torch.linspace(-2, 2, 32, dtype=torch.float64).view(1, 1, 4, 8)
START_X = {"model_mean_type": ModelMeanType.START_X}


def loops(d: GaussianDiffusion) -> dict[str, Callable[..., Iterator[dict[str, Tensor]]]]:
    return {
        "ddim": d.ddim_sample_loop_progressive,
        "dpm++": d.dpm_solver_sample_loop_progressive,
        "dpm++-sde": lambda *a, **k: d.dpm_solver_sample_loop_progressive(*a, sde=True, **k),
        "heun": d.heun_sample_loop_progressive,
        **{name: partial(d.multistep_sample_loop_progressive, solver=name) for name in ("dpm++3m", "unipc", "ipndm")},
    }


SOLVERS = list(loops(process()))[1:]


def last(name: str, d: GaussianDiffusion, *args: Any, **kwargs: Any) -> Tensor:
    return list(loops(d)[name](*args, **kwargs))[-1]["sample"]


def gaussian_x_start(d: GaussianDiffusion, std: float = STD) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_0 | x_t]: what a perfect model of x_0 returns."""
    eps, place = gaussian_eps(d, MEAN, std), {float(step): i for i, step in enumerate(d.timestep_map)}

    def model(x: Tensor, timesteps: Tensor) -> Tensor:
        a = gather(d.alphas_cumprod, torch.tensor([place[float(step)] for step in timesteps]))
        return ((x - (1 - a).sqrt() * eps(x, timesteps)) / a.sqrt()).to(x.dtype)

    return model


def on_the_flow(d: GaussianDiffusion, place: int, std: float = STD) -> Tensor:
    """x_t of the probability flow, which keeps each standardised value."""
    a = d.alphas_cumprod[place]
    return math.sqrt(a) * MEAN + math.sqrt(a * std**2 + 1 - a) * Z


def evenly_in_lambda(steps: int, schedule: str, first: float = -2, last: float = 3, **kwargs: Any) -> GaussianDiffusion:
    """A process whose steps are equally long in lambda."""
    fine = process(50_000, schedule)
    lambdas = np.log(fine.alphas_cumprod / (1 - fine.alphas_cumprod)) / 2
    kept = [int(np.abs(lambdas - wanted).argmin()) for wanted in np.linspace(first, last, steps)]
    return process(50_000, schedule, use_timesteps=kept, **kwargs)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("dpm++", 2), ("heun", 2), ("dpm++3m", 3), ("unipc", 3), ("ipndm", 2)]
)
def test_the_error_falls_with_the_order(name: str, order: int, schedule: str) -> None:
    third = name == "dpm++3m"  # its first two steps are of lower order: they are taken where x_0 hardly changes
    counts, errors = (32, 64, 128) if third else (8, 16, 32, 64), []
    for steps in counts:
        d = evenly_in_lambda(steps, schedule, *((-4.5, 2) if third else (-2, 3)), **START_X)
        model, x = gaussian_x_start(d), on_the_flow(d, -1)
        # the last step returns E[x_0 | x_t] by definition: what the solver answers for is the flow up to there
        exact = model(on_the_flow(d, 0), torch.tensor(d.timestep_map[:1]))
        errors.append(float((last(name, d, model, x.shape, noise=x, clip_denoised=False) - exact).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.4 if third else 0.25)


@pytest.mark.parametrize(("std", "times"), [(0.1, 1.2), (0.5, 8)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["dpm++", "heun", "dpm++3m", "unipc", "ipndm"])
def test_twenty_even_steps_in_t_are_better_than_ddims(name: str, schedule: str, std: float, times: float) -> None:
    """As --steps 20 takes them: the last steps in lambda are several times as long as those before."""
    d = process(1000, schedule, use_timesteps=space_timesteps(1000, "20"), **START_X)
    x, model = on_the_flow(d, -1, std), gaussian_x_start(d, std)

    def error(of: str) -> float:
        found = last(of, d, model, x.shape, noise=x, clip_denoised=False)
        return float((found - (MEAN + std * Z)).abs().max())

    assert times * error(name) < error("ddim")


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_sde_solver_draws_the_datas_mean_and_variance(schedule: str) -> None:
    d = evenly_in_lambda(200, schedule, **START_X)
    a = d.alphas_cumprod
    x = math.sqrt(a[-1]) * MEAN + math.sqrt(a[-1] * STD**2 + 1 - a[-1]) * randn(1, 1, 200, 200, seed=11)
    noise = (randn(*x.shape, seed=100 + i) for i in range(200))
    samples = last("dpm++-sde", d, gaussian_x_start(d), x.shape, noise=x, step_noise=noise, clip_denoised=False)
    # E[x_0 | x_t] at the last t varies less than x_0, by Var(x_0 | x_t)
    std = math.sqrt(STD**2 - STD**2 * (1 - a[0]) / (a[0] * STD**2 + 1 - a[0]))
    assert abs(float(samples.mean()) - MEAN) < 5 * std / math.sqrt(samples.numel())
    assert abs(float(samples.std()) - std) < 5 * std / math.sqrt(2 * samples.numel())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_sde_solvers_variance_converges_with_its_order(schedule: str) -> None:
    """A sample is linear in x_T and in every step's noise here: one element feels x_T alone, each other one draw."""
    errors = {}
    for steps in (16, 64):
        d = evenly_in_lambda(steps, schedule, **START_X)
        a, model, shape = d.alphas_cumprod, gaussian_x_start(d), (1, 1, 1, steps + 2)
        draws = torch.eye(steps + 2, dtype=torch.float64)[: steps + 1].view(-1, *shape)
        x = math.sqrt(a[-1]) * MEAN + math.sqrt(a[-1] * STD**2 + 1 - a[-1]) * draws[0]
        found = last("dpm++-sde", d, model, shape, noise=x, step_noise=draws[1:], clip_denoised=False).flatten()
        assert float(found[-1]) == pytest.approx(MEAN)  # the one that feels none
        variance = float((found[:-1] - found[-1]).square().sum())
        errors[steps] = abs(variance - (STD**2 - STD**2 * (1 - a[0]) / (a[0] * STD**2 + 1 - a[0])))
    assert errors[16] / errors[64] > 12  # 16 by the order


@pytest.mark.parametrize("sde", [False, True])
def test_without_a_step_before_it_is_ddim(sde: bool) -> None:
    d = process(25, use_timesteps=[0, 3, 9, 24])
    x, noise, output = randn(4, 3, 4, 4, seed=1), randn(4, 3, 4, 4, seed=2), randn(4, 3, 4, 4, seed=3)
    t = torch.arange(4)
    found = d.dpm_solver_sample(lambda *_: output, x, t, sde=sde, noise=noise)
    expected = d.ddim_sample(lambda *_: output, x, t, eta=float(sde), noise=noise)
    torch.testing.assert_close(found["sample"], expected["sample"])
    torch.testing.assert_close(found["pred_xstart"], expected["pred_xstart"])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.LEARNED_RANGE])
def test_the_parametrisations_agree(name: str, var_type: ModelVarType) -> None:
    kept = space_timesteps(100, "8")
    x, step_noise = randn(*SHAPE, seed=1), randn(8, *SHAPE, seed=2)
    found = {}
    for mean_type in ModelMeanType:
        d = process(100, use_timesteps=kept, model_mean_type=mean_type, model_var_type=var_type)
        place, x_start = {float(step): i for i, step in enumerate(d.timestep_map)}, gaussian_x_start(d)

        def model(
            x: Tensor,
            timesteps: Tensor,
            d: GaussianDiffusion = d,
            place: dict[float, int] = place,
            x_start: Callable[[Tensor, Tensor], Tensor] = x_start,
        ) -> Tensor:
            predicted, t = x_start(x, timesteps), torch.tensor([place[float(step)] for step in timesteps])
            eps, alpha = d.eps_from_xstart(x, t, predicted), d.table("sqrt_alphas_cumprod", t, x)
            sigma = d.table("sqrt_one_minus_alphas_cumprod", t, x)
            output = {
                ModelMeanType.START_X: predicted,
                ModelMeanType.EPSILON: eps,
                ModelMeanType.PREVIOUS_X: d.q_posterior_mean_variance(predicted, x, t)[0],
                ModelMeanType.V: alpha * eps - sigma * predicted,
                ModelMeanType.FLOW: eps - predicted,
            }[d.model_mean_type]
            return torch.cat([output, 100 * x], dim=1) if d.model_var_type.learned else output

        found[mean_type] = last(name, d, model, SHAPE, noise=x, step_noise=step_noise, clip_denoised=False)
    assert found[ModelMeanType.START_X].std() > 0.1
    for mean_type in ModelMeanType:
        torch.testing.assert_close(found[mean_type], found[ModelMeanType.START_X])


@pytest.mark.parametrize("name", SOLVERS)
def test_fp32_is_enough(name: str) -> None:
    d = process(4000, "cosine", use_timesteps=space_timesteps(4000, "20"), **START_X)
    x, step_noise = randn(*SHAPE, seed=1), randn(20, *SHAPE, seed=2)
    wide = last(name, d, gaussian_x_start(d), SHAPE, noise=x, step_noise=step_noise)
    narrow = last(name, d, gaussian_x_start(d), SHAPE, noise=x.float(), step_noise=step_noise.float())
    assert (wide.dtype, narrow.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_clipping_and_the_callers_function(name: str) -> None:
    d = process(25, **START_X)
    steps = list(loops(d)[name](lambda x, t: 3 * x, SHAPE, noise=randn(*SHAPE)))
    assert all(float(step["pred_xstart"].abs().max()) <= 1 for step in steps)
    seen = last(name, d, lambda x, t: x, SHAPE, denoised_fn=lambda x: x * 0 + 5, clip_denoised=False)
    torch.testing.assert_close(seen, torch.full(SHAPE, 5.0))
    clipped = last(name, d, lambda x, t: x, SHAPE, denoised_fn=lambda x: x * 0 + 5)
    torch.testing.assert_close(clipped, torch.ones(SHAPE))


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("name", SOLVERS)
def test_which_timesteps_the_model_is_called_at(name: str, steps: int) -> None:
    d = process(25, use_timesteps=space_timesteps(25, str(steps)), **START_X)
    seen: list[float] = []

    def model(x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        seen.append(float(timesteps[0]))
        assert x.shape == SHAPE
        assert timesteps.shape == (2,)
        return y.view(-1, 1, 1, 1) / 10 + 0 * x

    kwargs: dict[str, Any] = {"noise": randn(*SHAPE), "model_kwargs": {"y": torch.tensor([3, 7])}}
    out = list(loops(d)[name](model, SHAPE, **kwargs))
    kept = [float(step) for step in d.timestep_map[::-1]]
    # Heun's looks ahead, but from t = 0
    expected = [t for pair in pairwise(kept) for t in pair] + kept[-1:] if name == "heun" else kept
    assert seen == expected
    assert len(out) == steps
    torch.testing.assert_close(out[-1]["sample"], torch.tensor([0.3, 0.7]).double().view(-1, 1, 1, 1).expand(SHAPE))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_loop_is_its_last_step_without_gradients(name: str) -> None:
    d = process(25)
    weight = torch.full((), 0.1, requires_grad=True)
    args: dict[str, Any] = {"noise": randn(*SHAPE, seed=1), "step_noise": randn(25, *SHAPE, seed=2)}
    steps = list(loops(d)[name](lambda x, t: weight * x, SHAPE, **args))
    bare = list(loops(d)[name](lambda x, t: weight * x, SHAPE, pred_xstart=False, **args))
    assert [set(step) for step in steps] == [{"sample", "pred_xstart"}] * 25
    assert [set(step) for step in bare] == [{"sample"}] * 25
    assert not any(step["sample"].requires_grad for step in steps)
    if name == "heun":
        whole = d.heun_sample_loop(lambda x, t: weight * x, SHAPE, **args)
    elif name in MULTISTEP:
        whole = d.multistep_sample_loop(lambda x, t: weight * x, SHAPE, name, **args)
    else:
        whole = d.dpm_solver_sample_loop(lambda x, t: weight * x, SHAPE, sde=name == "dpm++-sde", **args)
    assert torch.equal(whole, steps[-1]["sample"])
    assert torch.equal(whole, bare[-1]["sample"])
    other = last(name, d, lambda x, t: weight * x, SHAPE, noise=args["noise"], step_noise=args["step_noise"].flip(0))
    assert torch.equal(other, whole) == (name != "dpm++-sde")


def test_too_little_step_noise_is_refused() -> None:
    d = process(25)
    with pytest.raises(ValueError, match="step_noise"):
        d.dpm_solver_sample_loop(lambda x, t: x, SHAPE, sde=True, step_noise=randn(24, *SHAPE))


@pytest.mark.parametrize("name", SOLVERS)
def test_noise_by_image_number_replays_an_image_in_any_batch(name: str) -> None:
    d = process(25, use_timesteps=space_timesteps(25, "6"))

    def drawn(numbers: list[int], seed: int = 3) -> Tensor:
        philox, shape = Philox(seed, torch.tensor(numbers)), (len(numbers), *SHAPE[1:])
        return last(name, d, lambda x, t: x.tanh(), shape, noise=philox, step_noise=philox)

    whole = drawn([0, 1, 2, 3, 4])
    assert torch.equal(drawn([0, 1, 2, 3, 4]), whole)
    assert torch.equal(drawn([4, 1]), whole[[4, 1]])
    assert not torch.equal(drawn([4, 1], seed=4), whole[[4, 1]])


def test_the_sde_solver_takes_the_noise_of_ancestral_steps() -> None:
    """Step 0 drew x_T, step k is the k-th update."""
    d = process(25, use_timesteps=space_timesteps(25, "6"))
    philox = Philox(7, torch.tensor([5, 2]))
    draws = [philox.of_update(torch.full((2,), step), SHAPE) for step in range(1, 7)]
    results = [
        last("dpm++-sde", d, lambda x, t: x.tanh(), SHAPE, noise=philox, step_noise=given) for given in (philox, draws)
    ]
    assert torch.equal(*results)
