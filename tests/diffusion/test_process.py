"""The process: what golden data leaves open, against formulas written out."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff import DiffusionConfig, build_diffusion
from fastdiff.diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, gaussian, space_timesteps
from fastdiff.kernels.diffusion_loss.reference import discretized_gaussian_log_likelihood, normal_kl

from .support import constant, gather, process, randn

T = torch.tensor([0, 1, 7, 30, 49])
SHAPE = (5, 3, 4, 4)
FLAT = 0.01  # keeps x_0 predictions of noise within [-1, 1]


def log_variances(d: GaussianDiffusion) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped log of the posterior's variance and log beta, from the betas alone."""
    betas = torch.as_tensor(d.betas)
    alpha_bar = torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    posterior = betas * (1 - previous) / (1 - alpha_bar)
    posterior[0] = posterior[1]
    return posterior.log(), betas.log()


# what the output means


@pytest.mark.parametrize("clip", [True, False])
def test_previous_x(clip: bool) -> None:
    d = process(model_mean_type=ModelMeanType.PREVIOUS_X)
    x, output = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    out = d.p_mean_variance(constant(output), x, T, clip_denoised=clip)
    assert torch.equal(out["mean"], output)
    beta, a = gather(d.betas, T), gather(d.alphas_cumprod, T)
    previous = a / (1 - beta)
    # the posterior's mean (DDPM equation 7), solved for x_0
    from_x = (1 - previous) * (1 - beta).sqrt() / (1 - a)
    x_start = (output - from_x * x) * (1 - a) / (beta * previous.sqrt())
    torch.testing.assert_close(out["pred_xstart"], x_start.clamp(-1, 1) if clip else x_start, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
def test_predictions_of_the_same_x_start(clip: bool) -> None:
    x, eps = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    d = process()
    a = gather(d.alphas_cumprod, T)
    x_start = (x - (1 - a).sqrt() * eps) / a.sqrt()
    v = a.sqrt() * eps - (1 - a).sqrt() * x_start
    clipped = x_start.clamp(-1, 1) if clip else x_start
    beta = gather(d.betas, T)
    previous = a / (1 - beta)
    mean = (beta * previous.sqrt() * clipped + (1 - previous) * (1 - beta).sqrt() * x) / (1 - a)
    outputs = {"EPSILON": eps, "START_X": x_start, "V": v, "FLOW": eps - x_start}
    for kind, output in outputs.items():
        d = process(model_mean_type=ModelMeanType[kind])
        out = d.p_mean_variance(constant(output), x, T, clip_denoised=clip)
        torch.testing.assert_close(out["pred_xstart"], clipped, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out["mean"], mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_denoised_fn_comes_before_clipping(mean_type: ModelMeanType) -> None:
    d = process(model_mean_type=mean_type)
    x, output = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    plain = d.p_mean_variance(constant(output), x, T, clip_denoised=False)["pred_xstart"]
    found = d.p_mean_variance(constant(output), x, T, denoised_fn=lambda x_start: 3 * x_start + 1)
    torch.testing.assert_close(found["pred_xstart"], (3 * plain + 1).clamp(-1, 1))


def test_model_kwargs_and_timesteps_reach_the_model() -> None:
    seen: dict[str, Any] = {}

    def model(x: torch.Tensor, timesteps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.update(kwargs, timesteps=timesteps)
        return torch.zeros_like(x)

    betas = np.full(40, 0.02)
    for rescale, expected in ((False, [0.0, 8.0, 39.0]), (True, [0.0, 200.0, 975.0])):
        d = GaussianDiffusion(betas=betas, rescale_timesteps=rescale, use_timesteps=[0, 8, 39])
        for run in (d.p_mean_variance, d.p_sample, d.ddim_sample, d.ddim_reverse_sample):
            seen.clear()
            run(model, randn(3, 3, 2, 2), torch.arange(3), model_kwargs={"y": 5})
            assert seen["y"] == 5
            assert seen["timesteps"].tolist() == expected
            assert seen["timesteps"].dtype == torch.float32


# variances


def test_fixed_variances() -> None:
    x = randn(*SHAPE)
    small, large = (process(model_var_type=kind) for kind in (ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE))
    posterior, log_beta = log_variances(small)
    out = small.p_mean_variance(constant(x), x, T)
    torch.testing.assert_close(out["log_variance"], gather(posterior, T).expand_as(x))
    expected = posterior.exp()
    expected[0] = 0.0  # the posterior of x_0 given x_0; only its log is clipped
    torch.testing.assert_close(out["variance"], gather(expected, T).expand_as(x))
    out = large.p_mean_variance(constant(x), x, T)
    log_beta[0] = posterior[1]  # as the original has it
    torch.testing.assert_close(out["log_variance"], gather(log_beta, T).expand_as(x))
    torch.testing.assert_close(out["variance"], gather(log_beta.exp(), T).expand_as(x))


def test_learned_variance() -> None:
    d = process(model_var_type=ModelVarType.LEARNED)
    x, output = randn(*SHAPE, seed=1), randn(5, 6, 4, 4, seed=2)
    out = d.p_mean_variance(constant(output), x, T)
    assert torch.equal(out["log_variance"], output[:, 3:])
    torch.testing.assert_close(out["variance"], output[:, 3:].exp())
    plain = process().p_mean_variance(constant(output[:, :3]), x, T)
    assert torch.equal(out["mean"], plain["mean"])


@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0, 0.3, 2.0])
def test_learned_range(v: float) -> None:
    d = process(model_var_type=ModelVarType.LEARNED_RANGE)
    x = randn(*SHAPE, seed=1)
    low, high = (gather(table, T) for table in log_variances(d))
    out = d.p_mean_variance(constant(torch.cat([x, torch.full_like(x, v)], 1)), x, T)
    expected = (low + (v + 1) / 2 * (high - low)).expand_as(x)
    torch.testing.assert_close(out["log_variance"], expected)
    torch.testing.assert_close(out["variance"], expected.exp())


# steps


@pytest.mark.parametrize("var_type", ModelVarType)
def test_p_sample_adds_noise_except_at_the_end(var_type: ModelVarType) -> None:
    d = process(model_var_type=var_type)
    x, noise = randn(*SHAPE, seed=1), randn(*SHAPE, seed=3)
    model = constant(randn(5, 6 if var_type.learned else 3, 4, 4, seed=2))
    p = d.p_mean_variance(model, x, T)
    sample = d.p_sample(model, x, T, noise=noise)["sample"]
    assert torch.equal(sample[0], p["mean"][0])
    torch.testing.assert_close((sample - p["mean"])[1:], ((0.5 * p["log_variance"]).exp() * noise)[1:])


def test_fresh_noise_is_drawn_where_none_is_given() -> None:
    d = process()
    x = randn(*SHAPE, seed=1)
    for run in (d.p_sample, lambda *args: d.ddim_sample(*args, eta=1.0)):
        torch.manual_seed(5)
        first, second = run(constant(x), x, T)["sample"], run(constant(x), x, T)["sample"]
        assert torch.equal(first[0], second[0])  # t = 0
        assert not any(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))
        torch.manual_seed(5)
        assert torch.equal(run(constant(x), x, T)["sample"], first)
    deterministic = [d.ddim_sample(constant(x), x, T)["sample"] for _ in range(2)]
    assert torch.equal(*deterministic)


def test_ddim_with_eta_1_is_ancestral_sampling() -> None:
    d = process(model_var_type=ModelVarType.FIXED_SMALL)
    x, output, noise = (randn(*SHAPE, seed=i) for i in (1, 2, 3))
    ancestral = d.p_sample(constant(output), x, T, clip_denoised=False, noise=noise)["sample"]
    ddim = d.ddim_sample(constant(output), x, T, clip_denoised=False, eta=1.0, noise=noise)["sample"]
    torch.testing.assert_close(ddim, ancestral, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddims_variance(eta: float) -> None:
    d = process()
    x, output, noise = (randn(*SHAPE, seed=i) for i in (1, 2, 3))
    with_noise, without = (
        d.ddim_sample(constant(output), x, T, eta=eta, noise=n)["sample"] for n in (noise, torch.zeros_like(noise))
    )
    variance = gather(d.posterior_variance, T)
    torch.testing.assert_close(with_noise - without, eta * variance.sqrt() * noise, rtol=1e-9, atol=1e-9)


def test_ddim_reverse_inverts_ddim_where_the_noise_stays() -> None:
    """With the same prediction on both sides a step there and a step back meet (Song et al. 2021, section 4.3)."""
    d = process()
    t = T[1:]
    x_start, eps = FLAT * randn(4, 3, 4, 4, seed=1), randn(4, 3, 4, 4, seed=2)
    x_before = d.q_sample(x_start, t - 1, eps)
    after = d.ddim_reverse_sample(constant(eps), x_before, t - 1)
    torch.testing.assert_close(after["pred_xstart"], x_start)
    torch.testing.assert_close(after["sample"], d.q_sample(x_start, t, eps))
    torch.testing.assert_close(d.ddim_sample(constant(eps), after["sample"], t)["sample"], x_before)


def test_ddim_reverse_ends_in_pure_noise() -> None:
    d = process()
    t, x, eps = torch.full((5,), 49), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    found = d.ddim_reverse_sample(constant(eps), x, t, clip_denoised=False)["sample"]
    torch.testing.assert_close(found, eps)


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("var_type", ModelVarType)
@pytest.mark.parametrize("loss_type", LossType)
def test_every_combination_runs(mean_type: ModelMeanType, var_type: ModelVarType, loss_type: LossType) -> None:
    d = process(model_mean_type=mean_type, model_var_type=var_type, loss_type=loss_type)
    output = randn(5, 6 if var_type.learned else 3, 4, 4, seed=2).requires_grad_()
    terms = d.training_losses(constant(output), FLAT * randn(*SHAPE), T, noise=randn(*SHAPE, seed=3))
    names = {"loss"} if loss_type.is_vb else {"loss", "mse", "vb"} if var_type.learned else {"loss", "mse"}
    assert set(terms) == names
    assert all(term.shape == (5,) and torch.isfinite(term).all() for term in terms.values())
    (gradient,) = torch.autograd.grad(terms["loss"].sum(), output)
    assert torch.isfinite(gradient).all()
    assert gradient.flatten(1).any(1).all()


# losses


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_mse_of_every_parameterisation(mean_type: ModelMeanType) -> None:
    d = process(model_mean_type=mean_type)
    x_start, noise, output = (randn(*SHAPE, seed=i) for i in (1, 2, 3))
    x_t = d.q_sample(x_start, T, noise)
    target = {
        ModelMeanType.EPSILON: noise,
        ModelMeanType.START_X: x_start,
        ModelMeanType.PREVIOUS_X: d.q_posterior_mean_variance(x_start, x_t, T)[0],
        ModelMeanType.V: gather(d.sqrt_alphas_cumprod, T) * noise
        - gather(d.sqrt_one_minus_alphas_cumprod, T) * x_start,
        ModelMeanType.FLOW: noise - x_start,
    }[mean_type]
    found = d.training_losses(constant(output), x_start, T, noise=noise)["loss"]
    torch.testing.assert_close(found, ((output - target) ** 2).mean((1, 2, 3)))


@pytest.mark.parametrize(("loss_type", "factor"), [(LossType.MSE, 1.0), (LossType.RESCALED_MSE, 0.05)])
@pytest.mark.parametrize("var_type", [ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE])
def test_the_hybrid_loss(var_type: ModelVarType, loss_type: LossType, factor: float) -> None:
    """The bound (in bits) is weighed by T / 1000 = 0.05 and teaches the variance alone."""
    d = process(model_var_type=var_type, loss_type=loss_type)
    x_start, noise, output = FLAT * randn(*SHAPE, seed=1), randn(*SHAPE, seed=2), randn(5, 6, 4, 4, seed=3)
    output.requires_grad_()
    x_t = d.q_sample(x_start, T, noise)
    terms = d.training_losses(constant(output), x_start, T, noise=noise)
    bound = d.vb_terms_bpd(constant(output), x_start, x_t, T, clip_denoised=False)["output"]
    torch.testing.assert_close(terms["vb"], factor * bound)
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    assert not gradient[:, :3].any()
    assert gradient[:, 3:].flatten(1).any(1).all()
    (gradient,) = torch.autograd.grad(terms["mse"].sum(), output)
    assert not gradient[:, 3:].any()


@pytest.mark.parametrize(("loss_type", "factor"), [(LossType.KL, 1), (LossType.RESCALED_KL, 50)])
def test_the_bound_as_loss(loss_type: LossType, factor: int) -> None:
    d = process(loss_type=loss_type, model_mean_type=ModelMeanType.PREVIOUS_X, model_var_type=ModelVarType.LEARNED)
    x_start, noise, output = 0.3 * randn(*SHAPE, seed=1), randn(*SHAPE, seed=2), randn(5, 6, 4, 4, seed=3)
    x_t = d.q_sample(x_start, T, noise)
    mean, _, log_variance = d.q_posterior_mean_variance(x_start, x_t, T)
    ours, ours_log = output[:, :3], output[:, 3:]
    kl = 0.5 * (ours_log - log_variance + ((log_variance.exp() + (mean - ours) ** 2) / ours_log.exp()) - 1)
    nll = -discretized_gaussian_log_likelihood(x_start, ours, 0.5 * ours_log)
    bits = torch.where(T == 0, nll.mean((1, 2, 3)), kl.mean((1, 2, 3))) / math.log(2)
    found = d.training_losses(constant(output), x_start, T, noise=noise)
    torch.testing.assert_close(found["loss"], factor * bits)


def test_kl_and_likelihood() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    mean, logvar = torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([0.0, 1.0, -2.0]).double()
    assert not normal_kl(mean, logvar, mean, logvar).any()
    p, q = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((mean, logvar), (zero, zero)))
    torch.testing.assert_close(normal_kl(mean, logvar, zero, zero), torch.distributions.kl_divergence(p, q))
    # all 256 levels together have probability 1, whatever the Gaussian
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for m, log_scale in ((0.0, -1.0), (0.9, -3.0), (-0.99, 0.0)):
        log_p = discretized_gaussian_log_likelihood(levels, torch.full_like(levels, m), torch.tensor(log_scale))
        assert abs(float(log_p.exp().sum()) - 1) < 1e-6


def test_a_perfect_model_has_no_kl() -> None:
    d = process(model_var_type=ModelVarType.FIXED_SMALL)
    x_start, noise = 0.3 * randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    x_t = d.q_sample(x_start, T, noise)
    terms = d.vb_terms_bpd(constant(noise), x_start, x_t, T, clip_denoised=False)
    torch.testing.assert_close(terms["pred_xstart"], x_start)
    assert terms["output"][1:].abs().max() < 1e-9


def test_calc_bpd_loop_is_the_sum_of_its_terms() -> None:
    d = process(21, model_var_type=ModelVarType.FIXED_SMALL)
    x_start, step_noise = 0.3 * randn(2, 3, 4, 4), randn(21, 2, 3, 4, 4, seed=1)
    model = constant(randn(2, 3, 4, 4, seed=2))
    found = d.calc_bpd_loop(model, x_start, step_noise=step_noise)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        **dict.fromkeys(("total_bpd", "prior_bpd"), (2,)),
        **dict.fromkeys(("vb", "xstart_mse", "mse"), (2, 21)),
    }
    torch.testing.assert_close(found["total_bpd"], found["vb"].sum(1) + d.prior_bpd(x_start))
    for column, (step, noise) in enumerate(zip(reversed(range(21)), step_noise, strict=True)):
        t = torch.full((2,), step)
        x_t = d.q_sample(x_start, t, noise)
        term = d.vb_terms_bpd(model, x_start, x_t, t)
        torch.testing.assert_close(found["vb"][:, column], term["output"])
        squared = ((term["pred_xstart"] - x_start) ** 2).mean((1, 2, 3))
        torch.testing.assert_close(found["xstart_mse"][:, column], squared)
        eps = (x_t - gather(d.alphas_cumprod, t).sqrt() * term["pred_xstart"]) / (
            1 - gather(d.alphas_cumprod, t)
        ).sqrt()
        torch.testing.assert_close(found["mse"][:, column], ((eps - noise) ** 2).mean((1, 2, 3)))
    again = d.calc_bpd_loop(model, x_start, step_noise=(noise for noise in step_noise))
    assert torch.equal(again["vb"], found["vb"])


# q


def test_q_identities() -> None:
    d = process()
    x_start, noise = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    a = gather(np.cumprod(1 - d.betas), T)
    mean, variance, log_variance = d.q_mean_variance(x_start, T)
    torch.testing.assert_close(mean, a.sqrt() * x_start)
    torch.testing.assert_close(variance, (1 - a).expand_as(x_start))
    torch.testing.assert_close(log_variance, variance.log())
    x_t = d.q_sample(x_start, T, noise)
    torch.testing.assert_close(x_t, mean + variance.sqrt() * noise)
    torch.testing.assert_close(d.eps_from_xstart(x_t, T, x_start), noise)
    torch.manual_seed(0)
    assert not torch.equal(d.q_sample(x_start, T), d.q_sample(x_start, T))


def test_posterior_by_bayes() -> None:
    """q(x_{t-1} | x_t, x_0) from the product of the two Gaussians q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    d = process()
    t = T[1:]
    x_start, x_t = randn(4, 3, 4, 4, seed=1), randn(4, 3, 4, 4, seed=2)
    beta, previous = gather(d.betas, t), gather(d.alphas_cumprod, t - 1)
    precision = (1 - beta) / beta + 1 / (1 - previous)
    mean = ((1 - beta).sqrt() * x_t / beta + previous.sqrt() * x_start / (1 - previous)) / precision
    found_mean, variance, log_variance = d.q_posterior_mean_variance(x_start, x_t, t)
    torch.testing.assert_close(found_mean, mean)
    torch.testing.assert_close(variance, (1 / precision).expand_as(x_t))
    torch.testing.assert_close(log_variance, -precision.log().expand_as(x_t))
    first = d.q_posterior_mean_variance(x_start, x_t, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(first[0], x_start)
    assert not first[1].any()
    assert torch.isfinite(first[2]).all()


def test_two_steps_of_q_are_one() -> None:
    """Marginal of x_t through x_s: sqrt(a_t / a_s) scales, 1 - a_t / a_s adds."""
    d = process()
    a = d.alphas_cumprod
    for s, t in ((0, 1), (3, 30), (30, 49)):
        ratio = np.prod(1 - d.betas[s + 1 : t + 1])
        assert ratio * a[s] == pytest.approx(a[t], rel=1e-12)
        assert ratio * (1 - a[s]) + (1 - ratio) == pytest.approx(1 - a[t], rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules(schedule: str) -> None:
    for steps in (21, 100, 1000, 4000):
        d = process(steps, schedule)
        assert d.betas.shape == (steps,)
        assert ((d.betas > 0) & (d.betas < 1)).all()
        assert (np.diff(d.alphas_cumprod) < 0).all()
        assert d.alphas_cumprod[0] > 0.9
        assert d.alphas_cumprod[-1] < 1e-4
    if schedule == "linear":
        assert process(1000).betas[[0, -1]] == pytest.approx([1e-4, 0.02])
    else:
        half = process(1000, "cosine").alphas_cumprod[499]
        exact = (math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
        assert half == pytest.approx(exact, rel=1e-9)


# respacing


@given(st.integers(1, 300), st.data())
def test_counts_per_section(total: int, data: st.DataObject) -> None:
    sections = data.draw(st.integers(1, min(4, total)))
    bounds = np.cumsum([0] + [total // sections + (i < total % sections) for i in range(sections)])
    counts = [data.draw(st.integers(1, int(end - begin))) for begin, end in pairwise(bounds)]
    kept = space_timesteps(total, ",".join(map(str, counts)))
    assert kept == space_timesteps(total, counts)
    assert len(kept) == sum(counts)
    assert all(isinstance(step, int) for step in kept)
    for (begin, end), count in zip(pairwise(bounds), counts, strict=True):
        section = sorted(step for step in kept if begin <= step < end)
        assert len(section) == count
        assert section[0] == begin
        if count > 1:
            assert section[-1] == end - 1
            gaps = np.diff(section)
            assert gaps.min() >= 1
            assert gaps.max() - gaps.min() <= 2


@given(st.integers(1, 300), st.integers(1, 300))
def test_ddim_strides(total: int, stride: int) -> None:
    wanted = range(0, total, stride)
    kept = sorted(space_timesteps(total, f"ddim{len(wanted)}"))
    assert len(kept) == len(wanted)
    assert kept[0] == 0
    assert len(set(np.diff(kept))) <= 1


@pytest.mark.parametrize("spec", ["", "x", "10,", "-5", "ddim", "ddimx", "1001", "ddim999", "0", "500,501", "2.5"])
def test_bad_specs_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="timestep_respacing"):
        space_timesteps(1000, spec)
    if spec:
        with pytest.raises(ValueError, match="timestep_respacing"):
            build_diffusion(DiffusionConfig(timestep_respacing=spec))


@given(st.sets(st.integers(0, 99), min_size=1), st.sampled_from(["linear", "cosine"]))
def test_a_respaced_process_passes_the_same_points(steps: set[int], schedule: str) -> None:
    whole, kept = process(100, schedule), process(100, schedule, use_timesteps=steps)
    places = sorted(steps)
    assert kept.num_timesteps == len(places)
    assert kept.original_num_steps == 100
    assert kept.timestep_map.tolist() == places
    np.testing.assert_allclose(kept.alphas_cumprod, whole.alphas_cumprod[places], rtol=1e-9)
    assert ((kept.betas > 0) & (kept.betas < 1)).all()
    for name in ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped", "log_betas"):
        assert np.isfinite(getattr(kept, name)).all()


def test_keeping_every_step_changes_nothing() -> None:
    np.testing.assert_allclose(process(use_timesteps=range(50)).betas, process().betas, rtol=1e-9)


@pytest.mark.parametrize("var_type", ModelVarType)
@pytest.mark.parametrize("kept", [0, 999])
def test_a_process_of_one_step(kept: int, var_type: ModelVarType) -> None:
    d = process(1000, use_timesteps=[kept], model_var_type=var_type, loss_type=LossType.RESCALED_MSE)
    output = randn(2, 6 if var_type.learned else 3, 4, 4, seed=1).requires_grad_()
    x, t = randn(2, 3, 4, 4, seed=2), torch.zeros(2, dtype=torch.int64)
    results = [
        *d.p_mean_variance(constant(output), x, t).values(),
        d.p_sample_loop(constant(output), x.shape, noise=x),
        d.ddim_sample_loop(constant(output), x.shape, noise=x, eta=1.0),
        d.ddim_reverse_sample(constant(output), x, t)["sample"],
        *d.training_losses(constant(output), x.clamp(-1, 1), t).values(),
        *d.calc_bpd_loop(constant(output), x.clamp(-1, 1)).values(),
    ]
    results += torch.autograd.grad(d.training_losses(constant(output), x.clamp(-1, 1), t)["loss"].sum(), output)
    assert all(torch.isfinite(result).all() for result in results)
    # the only step goes straight to the predicted x_0
    torch.testing.assert_close(results[4], results[3])


# arguments


@pytest.mark.parametrize("betas", [[], [[0.1, 0.2]], [0.0, 0.1], [0.1, 1.0], [0.1, -0.1], [0.1, math.nan]], ids=str)
def test_bad_betas_are_refused(betas: Any) -> None:
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(betas=betas)


@pytest.mark.parametrize("steps", [[], [-1, 3], [50], [0, 3, 1000]], ids=str)
def test_bad_use_timesteps_are_refused(steps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"use_timesteps .*0\.\.49"):
        process(use_timesteps=steps)


@pytest.mark.parametrize(
    ("config", "mean", "var", "loss"),
    [
        ({}, "EPSILON", "FIXED_LARGE", "RESCALED_MSE"),
        ({"sigma_small": True}, "EPSILON", "FIXED_SMALL", "RESCALED_MSE"),
        ({"learn_sigma": True, "sigma_small": True}, "EPSILON", "LEARNED_RANGE", "RESCALED_MSE"),
        ({"predict_xstart": True}, "START_X", "FIXED_LARGE", "RESCALED_MSE"),
        ({"prediction": "x_start"}, "START_X", "FIXED_LARGE", "RESCALED_MSE"),
        ({"prediction": "v", "learn_sigma": True}, "V", "LEARNED_RANGE", "RESCALED_MSE"),
        ({"prediction": "flow"}, "FLOW", "FIXED_LARGE", "RESCALED_MSE"),
        ({"rescale_learned_sigmas": False}, "EPSILON", "FIXED_LARGE", "MSE"),
        ({"use_kl": True, "rescale_learned_sigmas": False}, "EPSILON", "FIXED_LARGE", "RESCALED_KL"),
    ],
)
def test_build_diffusion(config: dict[str, Any], mean: str, var: str, loss: str) -> None:
    d = build_diffusion(DiffusionConfig(**config))
    assert (d.model_mean_type.name, d.model_var_type.name, d.loss_type.name) == (mean, var, loss)
    assert d.rescale_timesteps is True
    assert d.num_timesteps == 1000
    respaced = build_diffusion(DiffusionConfig(**config, timestep_respacing="ddim10", rescale_timesteps=False))
    assert respaced.num_timesteps == 10
    assert respaced.rescale_timesteps is False


WRONG = [("LEARNED_RANGE", 3), ("LEARNED", 3), ("FIXED_LARGE", 6), ("FIXED_SMALL", 1), ("LEARNED", 7)]


@pytest.mark.parametrize(("var_type", "channels"), WRONG)
def test_a_model_with_other_channels_is_refused(var_type: str, channels: int) -> None:
    d = process(model_var_type=ModelVarType[var_type])
    x, model = randn(*SHAPE), constant(randn(5, channels, 4, 4))
    for run in (d.p_mean_variance, d.p_sample, d.ddim_sample, d.ddim_reverse_sample):
        with pytest.raises(ValueError, match=rf"model returned \(5, {channels}, 4, 4\), but a "):
            run(model, x, T)
    with pytest.raises(ValueError, match="model returned"):
        d.vb_terms_bpd(model, x, x, T)


@pytest.mark.parametrize(
    ("var_type", "channels", "images"),
    [
        ("LEARNED_RANGE", 3, 3),
        pytest.param("FIXED_LARGE", 6, 3),
        pytest.param("FIXED_LARGE", 1, 3),
        pytest.param("FIXED_LARGE", 2, 1),
    ],
)
def test_training_refuses_a_model_with_other_channels(var_type: str, channels: int, images: int) -> None:
    d = process(model_var_type=ModelVarType[var_type])
    with pytest.raises(ValueError, match="model returned"):
        d.training_losses(constant(randn(5, channels, 4, 4)), randn(5, images, 4, 4), T)


# dtypes and tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tables_are_at_least_float32(dtype: torch.dtype) -> None:
    d = process()
    values = d.table("alphas_cumprod", T, torch.zeros(5, 3, 2, 2, dtype=dtype))
    assert values.dtype == torch.float32
    assert values.shape == (5, 1, 1, 1)
    np.testing.assert_allclose(values.flatten().numpy(), d.alphas_cumprod[T], rtol=1e-7)
    assert d.table("betas", T, torch.zeros(5, 7)).shape == (5, 1)


def test_tables_move_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    d = process(model_var_type=ModelVarType.LEARNED_RANGE, loss_type=LossType.RESCALED_MSE)
    x, output = randn(*SHAPE), randn(5, 6, 4, 4)

    def everything(t: torch.Tensor) -> None:
        d.p_sample(constant(output), x, t)
        d.ddim_sample(constant(output), x, t)
        d.ddim_reverse_sample(constant(output), x, t)
        d.training_losses(constant(output), x, t)
        d.prior_bpd(x)

    everything(T)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("a table was built a second time")

    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(gaussian.torch, name, again)
    everything(T.flip(0))
    with pytest.raises(AssertionError, match="second time"):
        d.q_sample(x.float(), T)


def test_tables_are_float64_and_of_the_process_length() -> None:
    d = process(use_timesteps=[0, 10, 49])
    tables = {
        name: value for name, value in vars(d).items() if isinstance(value, np.ndarray) and name != "timestep_map"
    }
    assert {"betas", "alphas_cumprod", "posterior_variance", "posterior_mean_coef1"} <= set(tables)
    for name, value in tables.items():
        assert value.dtype == np.float64, name
        assert value.shape == (3,), name


def test_the_callers_betas_are_left_alone() -> None:
    betas = np.linspace(1e-4, 0.02, 50)
    before = betas.copy()
    d = GaussianDiffusion(betas=betas, use_timesteps=[0, 20])
    d.p_sample(constant(randn(2, 3, 2, 2)), randn(2, 3, 2, 2), torch.tensor([0, 1]))
    np.testing.assert_array_equal(betas, before)
