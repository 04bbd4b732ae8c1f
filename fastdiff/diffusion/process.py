"""The Gaussian diffusion process: q (adding noise), p (the model's denoising), the training objective and the bound.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (improved DDPM). x is (N, C, H, W) in [-1, 1], t is (N,) int64 in 0..T-1.
A model is any callable ``model(x, timesteps, **model_kwargs)`` that returns (N, C, H, W), or (N, 2C, H, W) if the
variance is learned.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion.noise import Philox, draws_of
from fastdiff.diffusion.schedule import Float64Array, Tables
from fastdiff.kernels import Backend, diffusion_loss, philox_normal
from fastdiff.kernels.diffusion_loss.reference import bound, mean_flat, normal_kl
from fastdiff.kernels.gaussian import LossType, ModelMeanType, ModelVarType
from fastdiff.kernels.gaussian.reference import Coefficients, Prediction, coefficients, eps_from_xstart, predict

Model = Callable[..., Tensor]
ModelKwargs = Mapping[str, Any] | None
Denoised = Callable[[Tensor], Tensor] | None
Guidance = Callable[..., Tensor] | None
"""``cond_fn(x, timesteps, **model_kwargs)``: the gradient on x_t of log p(y | x_t), of x's shape, at the timesteps that
the model receives."""


_WITHOUT_SIGNAL = (ModelMeanType.START_X, ModelMeanType.V, ModelMeanType.FLOW)
"""The predictions that x_t without any signal allows: epsilon would say nothing of x_0 there."""


class GaussianProcess(Tables):
    """A diffusion process without the sampling loops; GaussianDiffusion documents the arguments."""

    def __init__(
        self,
        *,
        betas: Float64Array | Sequence[float],
        model_mean_type: ModelMeanType = ModelMeanType.EPSILON,
        model_var_type: ModelVarType = ModelVarType.FIXED_LARGE,
        loss_type: LossType = LossType.MSE,
        rescale_timesteps: bool = False,
        use_timesteps: Iterable[int] | None = None,
        kernels: Backend | str = Backend.AUTO,
        loss_weight: Float64Array | Sequence[float] | None = None,
    ) -> None:
        beta: Float64Array = np.asarray(betas, dtype=np.float64)
        self.model_mean_type = ModelMeanType(model_mean_type)
        last = 1 if self.model_mean_type in _WITHOUT_SIGNAL else math.nextafter(1, 0)
        if beta.ndim != 1 or not len(beta) or not ((beta > 0) & (beta < 1))[:-1].all() or not 0 < beta[-1] <= last:
            raise ValueError(
                "betas must be a one-dimensional array of numbers above 0 and below 1; the last may be 1 if the model "
                "predicts x_0, v or a flow"
            )
        weights = np.ones_like(beta) if loss_weight is None else np.asarray(loss_weight, dtype=np.float64)
        if weights.shape != beta.shape or not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError(f"loss_weight must be {len(beta)} numbers, none of them negative")
        self.model_var_type = ModelVarType(model_var_type)
        self.loss_type = LossType(loss_type)
        self.rescale_timesteps = rescale_timesteps
        self.kernels = Backend(kernels)
        self.original_num_steps = len(beta)
        self.timestep_map = np.arange(len(beta))
        if use_timesteps is not None:
            self.timestep_map = np.array(sorted(set(use_timesteps)), dtype=np.int64)
            if not len(self.timestep_map) or self.timestep_map[0] < 0 or self.timestep_map[-1] >= len(beta):
                raise ValueError(f"use_timesteps must be a non-empty subset of 0..{len(beta) - 1}")
            kept = np.cumprod(1 - beta)[self.timestep_map]
            beta = 1 - kept / np.append(1.0, kept[:-1])
        self.num_timesteps = len(beta)
        super().__init__(beta)
        self.loss_weight = weights[self.timestep_map]

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps that the model receives for t: the original process's, scaled if configured. (N,) fp32"""
        scale = 1000 / self.original_num_steps if self.rescale_timesteps else 1.0
        return self.cached("model_timesteps", t.device, torch.float32, lambda: self.timestep_map * scale)[t]

    # q: from data to noise

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0) (DDPM equation 4), each of x_start's shape."""
        mean = self.table("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = 1 - self.table("alphas_cumprod", t, x_start)
        log_variance = self.table("log_one_minus_alphas_cumprod", t, x_start)
        return mean, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Sample x_t from q(x_t | x_0) with the given standard normal noise, or fresh noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        mean_scale = self.table("sqrt_alphas_cumprod", t, x_start)
        return mean_scale * x_start + self.table("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (DDPM equations 6 and 7)."""
        mean = self.table("posterior_mean_coef1", t, x_t) * x_start + self.table("posterior_mean_coef2", t, x_t) * x_t
        variance = self.table("posterior_variance", t, x_t).expand_as(x_t)
        return mean, variance, self.table("posterior_log_variance_clipped", t, x_t).expand_as(x_t)

    # p: one step from noise to data

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t): a dict with mean, variance, log_variance and pred_xstart, each of x's shape.

        ``denoised_fn`` is applied to the predicted x_0 before it is clipped to [-1, 1].
        """
        output = self.model_output(model, x, t, model_kwargs)
        return self._predict(x, output, self._coefficients(x, t), clip_denoised, denoised_fn)._asdict()

    def model_output(self, model: Model, x: Tensor, t: Tensor, model_kwargs: ModelKwargs) -> Tensor:
        """The model's output at x_t: (N, C, ...), or (N, 2C, ...) if the variance is learned."""
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        expected = (x.shape[0], x.shape[1] * (2 if self.model_var_type.learned else 1), *x.shape[2:])
        if output.shape != expected:
            kind = "learned" if self.model_var_type.learned else "fixed"
            raise ValueError(f"the model returned {tuple(output.shape)}, but a {kind} variance needs {expected}")
        return output

    def _coefficients(self, x: Tensor, t: Tensor) -> Coefficients:
        return coefficients(self.step_tables(x.device, x.dtype), t, x.ndim)

    def _predict(self, x: Tensor, output: Tensor, at: Coefficients, clip: bool, denoised_fn: Denoised) -> Prediction:
        return predict(x, output, at, self.model_mean_type, self.model_var_type, clip, denoised_fn)

    def eps_from_xstart(self, x: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise that x_t and x_0 imply."""
        return eps_from_xstart(x, pred_xstart, self._coefficients(x, t))

    # the training objective, and the likelihood

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The configured objective at t: a dict with loss and, if they are part of it, mse and vb, each (N,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        terms = diffusion_loss(
            self.model_output(model, x_t, t, model_kwargs),
            x_start,
            x_t,
            noise,
            t,
            self.step_tables(x_t.device, x_t.dtype),
            mean_type=self.model_mean_type,
            var_type=self.model_var_type,
            loss_type=self.loss_type,
            backend=self.kernels,
        )
        if self.loss_type.is_vb:
            return {"loss": terms.loss}
        return {name: value for name, value in terms._asdict().items() if value is not None}

    def vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """The term of the variational bound at t in bits per dimension: a dict with output (N,) and pred_xstart.

        DDPM equation 5: the KL divergence of the posterior from p, and at t = 0 the likelihood of the pixels.
        """
        p = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        terms = bound(p["mean"], p["log_variance"], x_start, x_t, t, self._coefficients(x_t, t))
        return {"output": terms, "pred_xstart": p["pred_xstart"]}

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, (N,)."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros((), dtype=mean.dtype, device=mean.device)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
        step_noise: Tensor | Philox | Iterable[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The complete variational bound: a dict with total_bpd and prior_bpd (N,), vb, xstart_mse and mse (N, T).

        Columns are in the order in which the steps run, t = T-1 first. ``step_noise`` is one tensor per step in that
        order, or a ``Philox``, which is generated where it is used (default: fresh).
        """
        steps = list(self.calc_bpd_loop_progressive(model, x_start, clip_denoised, model_kwargs, step_noise))
        terms = {name: torch.stack([step[name] for step in steps], dim=1) for name in steps[0]}  # (N, T)
        with torch.no_grad():
            prior = self.prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}

    def calc_bpd_loop_progressive(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
        step_noise: Tensor | Philox | Iterable[Tensor] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each step's part of the bound, t = T-1 first: a dict with vb, xstart_mse and mse, each (N,).

        ``vb`` is in bits per dimension; the others are the mean squared errors of the predicted x_0 and of the noise
        that it implies. The arguments are calc_bpd_loop's.
        """
        draws = self._bound_noise(step_noise, x_start.shape)
        for step in reversed(range(self.num_timesteps)):
            given = next(draws)
            with torch.no_grad():
                t = torch.full((x_start.shape[0],), step, device=x_start.device)
                noise = torch.randn_like(x_start) if given is None else given
                x_t = self.q_sample(x_start, t, noise)
                out = self.vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
                eps = self.eps_from_xstart(x_t, t, out["pred_xstart"])
                terms = {
                    "vb": out["output"],
                    "xstart_mse": mean_flat((out["pred_xstart"] - x_start) ** 2),
                    "mse": mean_flat((eps - noise) ** 2),
                }
            yield terms

    def _bound_noise(
        self, step_noise: Tensor | Philox | Iterable[Tensor] | None, shape: Sequence[int]
    ) -> Iterator[Tensor | None]:
        if not isinstance(step_noise, Philox):
            return draws_of(step_noise)
        # numbered like the updates of a sampling loop
        return (
            philox_normal(step_noise.seed, step_noise.samples, step, shape[1:], backend=self.kernels)
            for step in range(1, self.num_timesteps + 1)
        )
