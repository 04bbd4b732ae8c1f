"""The schedules' tables, and every function of the process for given inputs and a given model output."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from .support import assert_close, float32_limit, golden_diffusion, golden_names, load

FILES = golden_names("diffusion_*.npz")

TABLES = [
    "betas",
    "alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


class Process:
    """One golden process, its inputs in ``dtype``, and a model that returns the golden output."""

    def __init__(self, data: dict[str, Any], dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype
        self.diffusion = golden_diffusion(data["config"])
        self.t = torch.from_numpy(data["t"])
        self.x_start, self.noise, self.x_t = (self.input(key) for key in ("x_start", "noise", "x_t_input"))
        self.model_output = self.input("model_output").requires_grad_()
        self.timesteps: torch.Tensor | None = None

    def input(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.data[key]).to(self.dtype)

    def model(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        assert x.shape == self.x_t.shape
        self.timesteps = timesteps
        return self.model_output

    def q_posterior(self, part: int) -> torch.Tensor:
        return self.diffusion.q_posterior_mean_variance(self.x_start, self.x_t, self.t)[part]

    def p(self, name: str, clip: bool) -> torch.Tensor:
        return self.diffusion.p_mean_variance(self.model, self.x_t, self.t, clip_denoised=clip)[name]

    def ddim(self, eta: float) -> torch.Tensor:
        noise = self.input(f"ddim_noise_eta{eta}")
        return self.diffusion.ddim_sample(self.model, self.x_t, self.t, eta=eta, noise=noise)["sample"]

    def losses(self) -> dict[str, torch.Tensor]:
        return self.diffusion.training_losses(self.model, self.x_start, self.t, noise=self.noise)

    def loss_gradient(self) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(self.losses()["loss"].sum(), self.model_output)
        return gradient


RESULTS: dict[str, Callable[[Process], torch.Tensor]] = {
    "x_t": lambda p: p.diffusion.q_sample(p.x_start, p.t, noise=p.noise),
    "q_posterior_mean": lambda p: p.q_posterior(0),
    "q_posterior_log_variance": lambda p: p.q_posterior(2).expand_as(p.x_t),
    "p_mean_clip1": lambda p: p.p("mean", True),
    "p_mean_clip0": lambda p: p.p("mean", False),
    "p_variance_clip1": lambda p: p.p("variance", True).expand_as(p.x_t),
    "p_variance_clip0": lambda p: p.p("variance", False).expand_as(p.x_t),
    "p_log_variance_clip1": lambda p: p.p("log_variance", True).expand_as(p.x_t),
    "p_log_variance_clip0": lambda p: p.p("log_variance", False).expand_as(p.x_t),
    "p_pred_xstart_clip1": lambda p: p.p("pred_xstart", True),
    "p_pred_xstart_clip0": lambda p: p.p("pred_xstart", False),
    "p_sample": lambda p: p.diffusion.p_sample(p.model, p.x_t, p.t, noise=p.input("p_sample_noise"))["sample"],
    "ddim_sample_eta0.0": lambda p: p.ddim(0.0),
    "ddim_sample_eta0.7": lambda p: p.ddim(0.7),
    "ddim_reverse": lambda p: p.diffusion.ddim_reverse_sample(p.model, p.x_t, p.t)["sample"],
    "loss": lambda p: p.losses()["loss"],
    "loss_mse": lambda p: p.losses()["mse"],
    "loss_vb": lambda p: p.losses()["vb"],
    "loss_grad_model_output": lambda p: p.loss_gradient(),
    "vb_terms_bpd": lambda p: p.diffusion.vb_terms_bpd(p.model, p.x_start, p.x_t, p.t)["output"],
    "prior_bpd": lambda p: p.diffusion.prior_bpd(p.x_start),
}

INPUTS = {"config", "t", "x_start", "noise", "x_t_input", "model_output", "p_sample_noise"}
INPUTS |= {"ddim_noise_eta0.0", "ddim_noise_eta0.7"}

CASES = [(name, key) for name in FILES for key in load(name) if "err32_" + key in load(name)]


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_looked_at(name: str) -> None:
    results = {key for file, key in CASES if file == name}
    assert results <= set(RESULTS)
    known = INPUTS | results | {"err32_" + key for key in results} | {*TABLES, "timestep_map", "model_timesteps"}
    assert set(load(name)) == known


@pytest.mark.parametrize("name", FILES)
def test_tables(name: str) -> None:
    data = load(name)
    diffusion = golden_diffusion(data["config"])
    for table in TABLES:
        found = getattr(diffusion, table)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, data[table], rtol=1e-10, atol=0, err_msg=table)
    np.testing.assert_array_equal(np.asarray(diffusion.timestep_map), data["timestep_map"])


@pytest.mark.parametrize(("name", "key"), CASES)
def test_float32(name: str, key: str) -> None:
    data = load(name)
    result = RESULTS[key](Process(data, torch.float32))
    assert result.dtype == torch.float32
    assert_close(result, data[key], float32_limit(data, key), key)


@pytest.mark.parametrize(("name", "key"), CASES)
def test_float64(name: str, key: str) -> None:
    data = load(name)
    result = RESULTS[key](Process(data, torch.float64))
    assert result.dtype == torch.float64
    # Where float32 cancels, float64 does too, with 29 bits more to spare.
    assert_close(result, data[key], np.maximum(1e-11, 1e-7 * data["err32_" + key]), key)


@pytest.mark.parametrize("name", FILES)
def test_timesteps_that_the_model_is_given(name: str) -> None:
    data = load(name)
    process = Process(data, torch.float32)
    for run in ("p_sample", "ddim_sample_eta0.0", "ddim_reverse", "loss", "vb_terms_bpd"):
        process.timesteps = None
        RESULTS[run](process)
        assert process.timesteps is not None
        assert process.timesteps.shape == process.t.shape
        np.testing.assert_allclose(process.timesteps.double().numpy(), data["model_timesteps"], rtol=1e-6)
