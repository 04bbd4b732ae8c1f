"""Predictions, weightings and schedules beyond improved-diffusion's: what they mean, and that sampling agrees."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.config import DiffusionConfig
from fastdiff.diffusion import GaussianDiffusion, ModelMeanType, build_diffusion
from fastdiff.diffusion.schedule import cosine_betas, flow_betas, linear_betas, shifted, zero_terminal

from .support import constant, randn

PREDICTIONS = ["epsilon", "x_start", "v", "flow"]
MEAN, STD = 0.3, 0.4


def output_of(d: GaussianDiffusion, x: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
    """What a model says that predicts ``x_start`` at x_t."""
    alpha, sigma = (d.table(f"sqrt_{name}alphas_cumprod", t, x) for name in ("", "one_minus_"))
    eps = (x - alpha * x_start) / sigma
    kinds = {"epsilon": eps, "start_x": x_start, "v": alpha * eps - sigma * x_start, "flow": eps - x_start}
    return kinds[d.model_mean_type]


def gaussian_model(d: GaussianDiffusion) -> Any:
    """The optimal model of pixels that are N(MEAN, STD^2), independently of each other."""

    def model(x: Tensor, timesteps: Tensor) -> Tensor:
        t = torch.searchsorted(torch.as_tensor(d.timestep_map * (1000 / d.original_num_steps)).to(x), timesteps.to(x))
        alpha, sigma = (d.table(f"sqrt_{name}alphas_cumprod", t, x) for name in ("", "one_minus_"))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return output_of(d, x, t, MEAN + gain * (x - alpha * MEAN))

    return model


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop", "dpm_solver_sample_loop", "heun_sample_loop"])
@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "epsilon", "noise_schedule": "cosine"},
        {"prediction": "x_start", "zero_terminal_snr": True},
        {"prediction": "v", "noise_schedule": "cosine", "noise_shift": 2.0, "zero_terminal_snr": True},
        {"prediction": "flow"},
        {"prediction": "flow", "noise_shift": 3.0},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_sampling_a_gaussian(settings: dict[str, Any], loop: str) -> None:
    """Its mean and standard deviation, to the error of 4,096 draws and of the steps."""
    if loop == "p_sample_loop" and settings["prediction"] == "flow":
        pytest.skip("a flow has no ancestral steps")
    steps = 1000 if loop == "p_sample_loop" else 100  # the ancestral steps' error falls slowly
    d = build_diffusion(DiffusionConfig(**settings, timestep_respacing=str(steps), sigma_small=True), "reference")
    start, generator = randn(4, 1, 32, 32, seed=1), torch.Generator().manual_seed(2)
    draws = (torch.randn(start.shape, generator=generator, dtype=torch.float64) for _ in range(steps))
    kwargs = {"step_noise": draws} if loop == "p_sample_loop" else {}
    drawn = getattr(d, loop)(gaussian_model(d), start.shape, noise=start, clip_denoised=False, **kwargs)
    assert torch.isfinite(drawn).all()
    assert drawn.mean() == pytest.approx(MEAN, abs=0.03)
    assert drawn.std() == pytest.approx(STD, rel=0.07)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_the_error_of_x_start(prediction: str) -> None:
    """By min(SNR, gamma) at every noise level, whatever is predicted (Hang et al. 2023, equation 8)."""
    d = build_diffusion(
        DiffusionConfig(prediction=prediction, weighting="min-snr", min_snr_gamma=3.0, timestep_respacing="9"),
    )
    t = torch.arange(9)
    x_start, error, noise = (randn(9, 3, 4, 4, seed=seed) for seed in (1, 2, 3))
    x_t = d.q_sample(x_start, t, noise)
    output = output_of(d, x_t, t, x_start + error)
    if prediction == "flow":  # x_T has no signal: x_0 is what it is without x_t
        output[-1] = noise[-1] - x_start[-1] - error[-1]
    found = d.training_losses(constant(output), x_start, t, noise=noise)
    snr = torch.tensor(d.alphas_cumprod / (1 - d.alphas_cumprod))
    torch.testing.assert_close(found["loss"], snr.clamp(max=3.0) * (error**2).mean((1, 2, 3)), rtol=1e-7, atol=1e-12)
    assert snr.max() > 3 > snr.min()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("bias", [-2.0, 1.0])
def test_sigmoid_weights_the_error_of_epsilon(prediction: str, bias: float) -> None:
    """By -dlambda/ds sigmoid(bias - lambda) (Kingma & Gao 2023); of a flow and of the cosine path it is known."""
    path = {} if prediction == "flow" else {"noise_schedule": "cosine"}
    config = DiffusionConfig(prediction=prediction, weighting="sigmoid", sigmoid_bias=bias, **path)
    d = build_diffusion(config)
    t = torch.arange(50, 900, 50)
    x_start, error, noise = (randn(len(t), 3, 4, 4, seed=seed) for seed in (1, 2, 3))
    x_t = d.q_sample(x_start, t, noise)
    found = d.training_losses(constant(output_of(d, x_t, t, x_start + error)), x_start, t, noise=noise)["loss"]
    snr = torch.tensor(d.alphas_cumprod / (1 - d.alphas_cumprod))[t]
    s = (t + 1) / 1000
    if prediction == "flow":
        falls = 2 / (s * (1 - s))  # lambda = 2 log((1 - s) / s)
    else:
        angle = (s.double() + 0.008) / 1.008 * math.pi / 2  # alphas_cumprod is a multiple of cos(angle)^2
        falls = math.pi / 1.008 * angle.tan() * (1 + snr)
    expected = torch.sigmoid(bias - snr.log()) * falls * snr * (error**2).mean((1, 2, 3))
    torch.testing.assert_close(found, expected.to(found), rtol=2e-4, atol=0)


@pytest.mark.parametrize(
    "path",
    [{"prediction": "flow"}, {"prediction": "v", "noise_schedule": "cosine", "zero_terminal_snr": True}],
    ids=str,
)
def test_sigmoid_before_a_last_step_without_signal(path: dict[str, Any]) -> None:
    """alpha falls in a line to 0 there, and its log-SNR by 2 / (1 - s)."""
    d = build_diffusion(DiffusionConfig(weighting="sigmoid", **path))
    snr = d.alphas_cumprod / (1 - d.alphas_cumprod)
    assert d.loss_weight[-2] / snr[-2] == pytest.approx(2000, rel=0.05)
    assert d.loss_weight[-1] < 1e-9


def test_the_weight_enters_the_loss_and_its_gradient() -> None:
    weights = np.linspace(0, 2, 40)
    betas = linear_betas(40)
    plain, weighted = GaussianDiffusion(betas=betas), GaussianDiffusion(betas=betas, loss_weight=weights)
    t = torch.tensor([0, 13, 39])
    x_start, noise = randn(3, 3, 4, 4, seed=1), randn(3, 3, 4, 4, seed=2)
    found = {}
    for name, d in (("plain", plain), ("weighted", weighted)):
        output = randn(3, 3, 4, 4, seed=3).requires_grad_()
        terms = d.training_losses(constant(output), x_start, t, noise=noise)
        found[name] = (terms, *torch.autograd.grad(terms["loss"].sum(), output))
    by = torch.tensor(weights)[t]
    torch.testing.assert_close(found["weighted"][0]["loss"], by * found["plain"][0]["loss"])
    assert torch.equal(found["weighted"][0]["mse"], found["plain"][0]["mse"])
    torch.testing.assert_close(found["weighted"][1], by[:, None, None, None] * found["plain"][1])
    kept = GaussianDiffusion(betas=betas, loss_weight=weights, use_timesteps=[3, 9, 39])
    assert np.array_equal(kept.loss_weight, weights[[3, 9, 39]])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0]], ids=str)
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="loss_weight must be 3 numbers"):
        GaussianDiffusion(betas=[0.1, 0.2, 0.3], loss_weight=weights)


# schedules


def alpha_bar(betas: Any) -> Any:
    return np.cumprod(1 - betas)


@pytest.mark.parametrize(
    "betas", [linear_betas(1000), cosine_betas(1000), flow_betas(1000)], ids=["lin", "cos", "flow"]
)
def test_a_shift_divides_the_signal_to_noise_ratio(betas: Any) -> None:
    """By its square: the log falls by 2 log(shift) (Hoogeboom et al. 2023, equation 4)."""
    before, after = (alpha_bar(b)[:-1] for b in (betas, shifted(betas, 4.0)))
    np.testing.assert_allclose(after / (1 - after), before / (1 - before) / 16, rtol=1e-7)
    np.testing.assert_allclose(shifted(betas, 1.0), betas, rtol=1e-9)


@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(4000)], ids=["linear", "cosine"])
def test_zero_terminal_snr(betas: Any) -> None:
    """The first step stays and the last has no signal (Lin et al. 2024, algorithm 1)."""
    before, after = alpha_bar(betas), alpha_bar(zero_terminal(betas))
    assert after[-1] == 0
    assert after[0] == pytest.approx(before[0], rel=1e-12)
    # linear in the signal
    ratio = (np.sqrt(before[1:-1]) - np.sqrt(before[-1])) / np.sqrt(after[1:-1])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-7)
    with pytest.raises(ValueError, match="at least two timesteps"):
        zero_terminal(betas[:1])


def test_the_flows_path_is_straight() -> None:
    """x_t is a multiple of (1 - s) x_0 + s epsilon, at s = 1/T, ..., 1."""
    d = build_diffusion(DiffusionConfig(prediction="flow", diffusion_steps=8))
    s = np.arange(1, 9) / 8
    np.testing.assert_allclose(d.sqrt_one_minus_alphas_cumprod * (1 - s), d.sqrt_alphas_cumprod * s, atol=1e-12)
    assert d.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("settings", [{}, {"prediction": "v", "diffusion_steps": 1000}], ids=str)
def test_signal_at_the_end_where_nothing_is_said(settings: dict[str, Any]) -> None:
    assert build_diffusion(DiffusionConfig(**settings)).alphas_cumprod[-1] > 0


@pytest.mark.parametrize("mean_type", [ModelMeanType.EPSILON, ModelMeanType.PREVIOUS_X])
def test_no_signal_needs_another_prediction(mean_type: ModelMeanType) -> None:
    with pytest.raises(ValueError, match="the last may be 1 if the model predicts x_0, v or a flow"):
        GaussianDiffusion(betas=[0.1, 1.0], model_mean_type=mean_type)
    with pytest.raises(ValueError, match="betas must be"):
        GaussianDiffusion(betas=[1.0, 0.1], model_mean_type=ModelMeanType.V)


def test_a_classifier_does_not_guide_where_there_is_no_signal() -> None:
    d = build_diffusion(DiffusionConfig(prediction="v", zero_terminal_snr=True, timestep_respacing="5"))
    x = randn(2, 3, 4, 4, seed=1)
    for step, moved in ((4, False), (2, True)):
        t = torch.full((2,), step)
        plain, guided = (
            d.ddim_sample(constant(randn(2, 3, 4, 4, seed=2)), x, t, clip_denoised=False, cond_fn=guide)["sample"]
            for guide in (None, lambda x, t: torch.ones_like(x))
        )
        assert torch.isfinite(guided).all()
        assert torch.equal(plain, guided) != moved


# the configuration


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prediction": "v", "predict_xstart": True}, "prediction v contradicts predict_xstart"),
        ({"prediction": "flow", "learn_sigma": True}, "prediction flow has no learn_sigma"),
        ({"prediction": "flow", "use_kl": True}, "prediction flow has no use_kl"),
        ({"prediction": "flow", "noise_schedule": "cosine"}, "noise_schedule cosine: prediction flow has its own"),
        ({"weighting": "min-snr", "use_kl": True}, "weighting min-snr weights the squared error"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr: the noise says nothing"),
        (
            {"weighting": "sigmoid", "prediction": "flow", "diffusion_steps": 2},
            "weighting sigmoid is a slope over the timesteps: diffusion_steps must be at least 3, not 2",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_contradictions_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DiffusionConfig(**settings)


def test_predict_xstart_is_an_alias() -> None:
    assert DiffusionConfig(predict_xstart=True) == DiffusionConfig(prediction="x_start")
    assert DiffusionConfig(prediction="x_start").predict_xstart
    assert DiffusionConfig.from_dict({"predict_xstart": True}).prediction == "x_start"  # an older run's


@pytest.mark.parametrize(
    ("base", "flags", "prediction"),
    [
        ({}, {"predict_xstart": True}, "x_start"),
        ({}, {"prediction": "v"}, "v"),
        ({"predict_xstart": True}, {"prediction": "v"}, "v"),
        ({"predict_xstart": True}, {"predict_xstart": False}, "epsilon"),
        ({"predict_xstart": True}, {}, "x_start"),
        ({"prediction": "v"}, {"predict_xstart": False}, "v"),
        ({"prediction": "v"}, {"predict_xstart": True}, "x_start"),
        ({"prediction": "v"}, {"prediction": "x_start", "predict_xstart": True}, "x_start"),
    ],
    ids=str,
)
def test_either_flag_takes_the_place_of_the_other(base: Any, flags: Any, prediction: str) -> None:
    assert DiffusionConfig.from_flags(flags, base=DiffusionConfig(**base)).prediction == prediction


@pytest.mark.parametrize(
    "flags", [{"prediction": "v", "predict_xstart": True}, {"prediction": "x_start", "predict_xstart": False}], ids=str
)
def test_contradicting_flags_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="contradicts"):
        DiffusionConfig.from_flags(flags)
