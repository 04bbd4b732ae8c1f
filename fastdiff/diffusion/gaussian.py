"""The Gaussian diffusion process: q (adding noise), p (taking it away), and the loops over all timesteps.

Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021 (improved DDPM). x is (N, C, H, W) in [-1, 1],
t is (N,) int64 in 0..T-1. A model is any callable ``model(x, timesteps, **model_kwargs)`` that returns (N, C, H, W), or
(N, 2C, H, W) where the variance is learned.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion import likelihood, losses
from fastdiff.diffusion.noise import draws_of
from fastdiff.diffusion.parameterization import LossType, ModelMeanType, ModelVarType
from fastdiff.diffusion.schedule import Float64Array

Model = Callable[..., Tensor]
ModelKwargs = Mapping[str, Any] | None
Denoised = Callable[[Tensor], Tensor] | None


class GaussianDiffusion:
    """A diffusion process over ``betas``, or over the timesteps ``use_timesteps`` of them.

    With ``use_timesteps`` the process has as many steps as there are timesteps kept, its betas are those that give the
    same alphas_cumprod at these, and the model is still given the timesteps of the long process. With
    ``rescale_timesteps`` the model is given them scaled to 0..1000.

    The tables (betas, alphas_cumprod, posterior_variance, ...) are float64 arrays of shape (num_timesteps,).
    """

    def __init__(
        self,
        *,
        betas: Float64Array | Sequence[float],
        model_mean_type: ModelMeanType = ModelMeanType.EPSILON,
        model_var_type: ModelVarType = ModelVarType.FIXED_LARGE,
        loss_type: LossType = LossType.MSE,
        rescale_timesteps: bool = False,
        use_timesteps: Iterable[int] | None = None,
    ) -> None:
        beta: Float64Array = np.asarray(betas, dtype=np.float64)
        if beta.ndim != 1 or not len(beta) or not ((beta > 0) & (beta < 1)).all():
            raise ValueError("betas must be one dimension of numbers above 0 and below 1")
        self.model_mean_type = ModelMeanType(model_mean_type)
        self.model_var_type = ModelVarType(model_var_type)
        self.loss_type = LossType(loss_type)
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = len(beta)
        self.timestep_map = np.arange(len(beta))
        if use_timesteps is not None:
            self.timestep_map = np.array(sorted(set(use_timesteps)), dtype=np.int64)
            if not len(self.timestep_map) or self.timestep_map[0] < 0 or self.timestep_map[-1] >= len(beta):
                raise ValueError(f"use_timesteps must be some of 0..{len(beta) - 1}")
            kept = np.cumprod(1 - beta)[self.timestep_map]
            beta = 1 - kept / np.append(1.0, kept[:-1])
        self.num_timesteps = len(beta)
        self._set_tables(beta)
        self._device_tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def _set_tables(self, betas: Float64Array) -> None:
        self.betas = betas
        alphas = 1 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        # q(x_t | x_0) and its inverses
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        # q(x_{t-1} | x_t, x_0), DDPM equation 7
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)
        # The posterior's variance is 0 at t = 0, where its log would be -inf: take that of t = 1 there, and beta in
        # a process of a single step.
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.log_betas = np.log(betas)
        self.fixed_large_variance = np.append(first, betas[1:])
        self.fixed_large_log_variance = np.log(self.fixed_large_variance)

    def table(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Table ``name`` at t as (N, 1, ...), in like's dtype but at least fp32; it moves to a device once."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (name, like.device, dtype)
        if key not in self._device_tables:
            self._device_tables[key] = torch.tensor(getattr(self, name), dtype=dtype, device=like.device)
        return self._device_tables[key][t].view(-1, *[1] * (like.ndim - 1))

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps that the model is given for t: those of the long process, scaled if so configured. (N,) fp32"""
        key = ("model_timesteps", t.device, torch.float32)
        if key not in self._device_tables:
            scale = 1000 / self.original_num_steps if self.rescale_timesteps else 1.0
            self._device_tables[key] = torch.tensor(self.timestep_map * scale, dtype=torch.float32, device=t.device)
        return self._device_tables[key][t]

    # q: from data to noise

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0) (DDPM equation 4), each of x_start's shape."""
        mean = self.table("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = 1 - self.table("alphas_cumprod", t, x_start)
        log_variance = self.table("log_one_minus_alphas_cumprod", t, x_start)
        return mean, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw of x_t from q(x_t | x_0) with the given standard normal noise, or fresh noise."""
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
        output, var_values = self.model_output(model, x, t, model_kwargs)
        variance, log_variance = self._variance(var_values, t, x)

        def process(x_start: Tensor) -> Tensor:
            x_start = denoised_fn(x_start) if denoised_fn is not None else x_start
            return x_start.clamp(-1, 1) if clip_denoised else x_start

        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            pred_xstart, mean = process(self._xstart_from_xprev(x, t, output)), output
        else:
            predicts_eps = self.model_mean_type is ModelMeanType.EPSILON
            pred_xstart = process(self._xstart_from_eps(x, t, output) if predicts_eps else output)
            mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def model_output(self, model: Model, x: Tensor, t: Tensor, model_kwargs: ModelKwargs) -> tuple[Tensor, Tensor]:
        """What the model says of mean and variance at x_t, (N, C, ...) each; the latter has no channels if fixed."""
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        channels = x.shape[1]
        expected = (x.shape[0], channels * (2 if self.model_var_type.learned else 1), *x.shape[2:])
        if output.shape != expected:
            kind = "learned" if self.model_var_type.learned else "fixed"
            raise ValueError(f"the model returned {tuple(output.shape)}, a {kind} variance asks for {expected}")
        return output[:, :channels], output[:, channels:]

    def _variance(self, var_values: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        match self.model_var_type:
            case ModelVarType.LEARNED:
                log_variance = var_values
            case ModelVarType.LEARNED_RANGE:
                # improved DDPM equation 15, the model's v in [-1, 1]
                low = self.table("posterior_log_variance_clipped", t, x)
                high = self.table("log_betas", t, x)
                fraction = (var_values + 1) / 2
                log_variance = fraction * high + (1 - fraction) * low
            case ModelVarType.FIXED_LARGE:
                fixed = self.table("fixed_large_variance", t, x), self.table("fixed_large_log_variance", t, x)
                return fixed[0].expand_as(x), fixed[1].expand_as(x)
            case ModelVarType.FIXED_SMALL:
                fixed = self.table("posterior_variance", t, x), self.table("posterior_log_variance_clipped", t, x)
                return fixed[0].expand_as(x), fixed[1].expand_as(x)
        return log_variance.exp(), log_variance

    def _xstart_from_eps(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        scale = self.table("sqrt_recip_alphas_cumprod", t, x)
        return scale * x - self.table("sqrt_recipm1_alphas_cumprod", t, x) * eps

    def _xstart_from_xprev(self, x: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        coef1, coef2 = self.table("posterior_mean_coef1", t, x), self.table("posterior_mean_coef2", t, x)
        return xprev / coef1 - coef2 / coef1 * x

    def eps_from_xstart(self, x: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise that x_t and x_0 imply."""
        scale = self.table("sqrt_recip_alphas_cumprod", t, x)
        return (scale * x - pred_xstart) / self.table("sqrt_recipm1_alphas_cumprod", t, x)

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One ancestral step to x_{t-1} (DDPM algorithm 2): a dict with sample and pred_xstart."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x) if noise is None else noise
        sample = out["mean"] + _unless_first(t, x) * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One DDIM step to x_{t-1} (Song et al. 2021, equation 12): a dict with sample and pred_xstart.

        ``eta`` 0 is deterministic, 1 has the ancestral step's noise.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self.eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar = self.table("alphas_cumprod", t, x)
        alpha_bar_prev = self.table("alphas_cumprod_prev", t, x)
        sigma = eta * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
        sample = out["pred_xstart"] * alpha_bar_prev.sqrt() + torch.sqrt(1 - alpha_bar_prev - sigma**2) * eps
        if eta:
            noise = torch.randn_like(x) if noise is None else noise
            sample = sample + _unless_first(t, x) * sigma * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """One step of the deterministic DDIM path backwards, to x_{t+1}: a dict with sample and pred_xstart."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self.eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_next = self.table("alphas_cumprod_next", t, x)
        sample = out["pred_xstart"] * alpha_bar_next.sqrt() + torch.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    # the loops

    def p_sample_loop(self, model: Model, shape: Sequence[int], **kwargs: Any) -> Tensor:
        """Ancestral sampling from noise to images, (N, C, H, W); keywords as in p_sample_loop_progressive."""
        return _last(self.p_sample_loop_progressive(model, shape, **kwargs))

    def ddim_sample_loop(self, model: Model, shape: Sequence[int], eta: float = 0.0, **kwargs: Any) -> Tensor:
        """DDIM sampling from noise to images, (N, C, H, W); keywords as in p_sample_loop_progressive."""
        return _last(self.ddim_sample_loop_progressive(model, shape, eta=eta, **kwargs))

    def p_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each ancestral step's dict (sample, pred_xstart), t = T-1 first.

        Keywords: ``noise`` is x_T (default: fresh), ``step_noise`` one tensor a step in the order of the steps, as a
        stacked tensor or any iterable (default: fresh), ``clip_denoised``, ``denoised_fn``, ``model_kwargs``, and
        ``device`` (default: the noise's, else the model's parameters').
        """
        return self._loop(self.p_sample, model, shape, **kwargs)

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], eta: float = 0.0, **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each DDIM step's dict (sample, pred_xstart), t = T-1 first; keywords as p_sample_loop_progressive."""
        return self._loop(self.ddim_sample, model, shape, eta=eta, **kwargs)

    def _loop(
        self,
        step: Callable[..., dict[str, Tensor]],
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        step_noise: Tensor | Iterable[Tensor] | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Iterator[dict[str, Tensor]]:
        if device is None:
            device = noise.device if noise is not None else _device_of(model)
        x = torch.randn(*shape, device=device) if noise is None else noise
        if x.shape != tuple(shape):
            raise ValueError(f"noise must be of the shape {tuple(shape)}, not {tuple(x.shape)}")
        draws = draws_of(step_noise)
        # every t is on the device before the first step, so that no step waits for a copy
        timesteps = torch.arange(self.num_timesteps, device=device).flip(0)[:, None].expand(-1, shape[0])
        for t in timesteps:
            with torch.no_grad():
                out = step(model, x, t, noise=next(draws), **kwargs)
            yield out
            x = out["sample"]

    # losses and likelihood

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The configured objective at t: a dict with loss and, where they are part of it, mse and vb, each (N,)."""
        return losses.training_losses(self, model, x_start, t, model_kwargs, noise)

    def vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """The term of the variational bound at t in bits per dimension: a dict with output (N,) and pred_xstart."""
        return losses.vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised, model_kwargs)

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, (N,)."""
        return likelihood.prior_bpd(self, x_start)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
        step_noise: Tensor | Iterable[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The whole variational bound: a dict with total_bpd and prior_bpd (N,), vb, xstart_mse and mse (N, T).

        Columns are in the order in which the steps run, t = T-1 first.
        """
        return likelihood.calc_bpd_loop(self, model, x_start, clip_denoised, model_kwargs, step_noise)


def _unless_first(t: Tensor, x: Tensor) -> Tensor:
    """1 where t > 0 and 0 where t = 0, as (N, 1, ...): the last step adds no noise."""
    return (t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _device_of(model: Model) -> torch.device:
    parameters = getattr(model, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    return first.device if first is not None else torch.device("cpu")


def _last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    out: dict[str, Tensor] = {}
    for out in steps:  # noqa: B007  # only the last one counts
        pass
    return out["sample"]
