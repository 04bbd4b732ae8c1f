"""The Gaussian diffusion process: q (adding noise), p (taking it away), and the loops over all timesteps.

Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021 (improved DDPM). x is (N, C, H, W) in [-1, 1],
t is (N,) int64 in 0..T-1. A model is any callable ``model(x, timesteps, **model_kwargs)`` that returns (N, C, H, W), or
(N, 2C, H, W) where the variance is learned.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.diffusion import likelihood, loops, losses, solvers
from fastdiff.diffusion.noise import Philox
from fastdiff.diffusion.parameterization import LossType, ModelMeanType, ModelVarType
from fastdiff.diffusion.schedule import Float64Array
from fastdiff.kernels import Backend, diffusion_step
from fastdiff.kernels.diffusion_step.reference import advance
from fastdiff.kernels.gaussian import TABLES, Sampler
from fastdiff.kernels.gaussian.reference import Coefficients, Prediction, coefficients, eps_from_xstart, predict

Model = Callable[..., Tensor]
ModelKwargs = Mapping[str, Any] | None
Denoised = Callable[[Tensor], Tensor] | None


class GaussianDiffusion:
    """A diffusion process over ``betas``, or over the timesteps ``use_timesteps`` of them.

    ``kernels`` is the backend (fastdiff.kernels) of the sampling steps and the training objective.

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
        kernels: Backend | str = Backend.AUTO,
    ) -> None:
        beta: Float64Array = np.asarray(betas, dtype=np.float64)
        if beta.ndim != 1 or not len(beta) or not ((beta > 0) & (beta < 1)).all():
            raise ValueError("betas must be one dimension of numbers above 0 and below 1")
        self.model_mean_type = ModelMeanType(model_mean_type)
        self.model_var_type = ModelVarType(model_var_type)
        self.loss_type = LossType(loss_type)
        self.rescale_timesteps = rescale_timesteps
        self.kernels = Backend(kernels)
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
        self.one_minus_alphas_cumprod_prev = 1 - self.alphas_cumprod_prev
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

    def on_device(
        self, name: str, device: torch.device, dtype: torch.dtype, values: Callable[[], NDArray[Any]]
    ) -> Tensor:
        """The table ``name``, which ``values`` computes, in ``dtype`` but at least fp32; it moves to a device once."""
        key = (name, device, torch.promote_types(dtype, torch.float32))
        if key not in self._device_tables:
            self._device_tables[key] = torch.tensor(values(), dtype=key[2], device=device)
        return self._device_tables[key]

    def table(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Table ``name`` at t as (N, 1, ...), in like's dtype but at least fp32."""
        values = self.on_device(name, like.device, like.dtype, lambda: getattr(self, name))
        return values[t].view(-1, *[1] * (like.ndim - 1))

    def step_tables(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tables of diffusion_step and diffusion_loss, (T, len(TABLES)), in ``dtype`` but at least fp32."""
        return self.on_device(
            "step_tables", device, dtype, lambda: np.stack([getattr(self, name) for name in TABLES], axis=1)
        )

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps that the model is given for t: those of the long process, scaled if so configured. (N,) fp32"""
        scale = 1000 / self.original_num_steps if self.rescale_timesteps else 1.0
        return self.on_device("model_timesteps", t.device, torch.float32, lambda: self.timestep_map * scale)[t]

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
        output = self.model_output(model, x, t, model_kwargs)
        return self._predict(x, output, self._coefficients(x, t), clip_denoised, denoised_fn)._asdict()

    def model_output(self, model: Model, x: Tensor, t: Tensor, model_kwargs: ModelKwargs) -> Tensor:
        """What the model says at x_t: (N, C, ...), or (N, 2C, ...) where the variance is learned."""
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        expected = (x.shape[0], x.shape[1] * (2 if self.model_var_type.learned else 1), *x.shape[2:])
        if output.shape != expected:
            kind = "learned" if self.model_var_type.learned else "fixed"
            raise ValueError(f"the model returned {tuple(output.shape)}, a {kind} variance asks for {expected}")
        return output

    def _coefficients(self, x: Tensor, t: Tensor) -> Coefficients:
        return coefficients(self.step_tables(x.device, x.dtype), t, x.ndim)

    def _predict(self, x: Tensor, output: Tensor, at: Coefficients, clip: bool, denoised_fn: Denoised) -> Prediction:
        return predict(x, output, at, self.model_mean_type, self.model_var_type, clip, denoised_fn)

    def eps_from_xstart(self, x: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise that x_t and x_0 imply."""
        return eps_from_xstart(x, pred_xstart, self._coefficients(x, t))

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | Philox | None = None,
        pred_xstart: bool = True,
    ) -> dict[str, Tensor]:
        """One ancestral step to x_{t-1} (DDPM algorithm 2): a dict with sample and pred_xstart.

        ``noise`` is drawn afresh unless it is given. ``pred_xstart=False`` leaves that out, which saves its memory.
        """
        return self._step(Sampler.DDPM, model, x, t, clip_denoised, denoised_fn, model_kwargs, 0.0, noise, pred_xstart)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        eta: float = 0.0,
        noise: Tensor | Philox | None = None,
        pred_xstart: bool = True,
    ) -> dict[str, Tensor]:
        """One DDIM step to x_{t-1} (Song et al. 2021, equation 12): a dict as p_sample's.

        ``eta`` 0 is deterministic, 1 has the ancestral step's noise.
        """
        return self._step(Sampler.DDIM, model, x, t, clip_denoised, denoised_fn, model_kwargs, eta, noise, pred_xstart)

    def _step(
        self,
        sampler: Sampler,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: Denoised,
        model_kwargs: ModelKwargs,
        eta: float,
        noise: Tensor | Philox | None,
        pred_xstart: bool,
    ) -> dict[str, Tensor]:
        output = self.model_output(model, x, t, model_kwargs)
        if noise is None and (sampler is Sampler.DDPM or eta):
            noise = torch.randn_like(x)
        if denoised_fn is not None:
            # no kernel can call a function of the caller's
            at = self._coefficients(x, t)
            p = self._predict(x, output, at, clip_denoised, denoised_fn)
            given = noise.of_update(self.num_timesteps - t, x.shape) if isinstance(noise, Philox) else noise
            sample = advance(p, x, t, at, sampler, eta, given)
            return {"sample": sample, "pred_xstart": p.pred_xstart}
        philox = noise if isinstance(noise, Philox) else None
        step = diffusion_step(
            x,
            output,
            t,
            self.step_tables(x.device, x.dtype),
            mean_type=self.model_mean_type,
            var_type=self.model_var_type,
            sampler=sampler,
            eta=eta,
            clip=clip_denoised,
            noise=None if isinstance(noise, Philox) else noise,
            seed=philox.seed if philox else None,
            samples=philox.samples if philox else None,
            pred_xstart=pred_xstart,
            backend=self.kernels,
        )
        out = {"sample": step.sample}
        return out if step.pred_xstart is None else out | {"pred_xstart": step.pred_xstart}

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

    def ddim_reverse_sample_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: ModelKwargs = None
    ) -> Tensor:
        """The x_T, (N, C, H, W), from which ddim_sample_loop comes back to the images: they are encoded.

        Song et al. 2021, section 4.3. The images are taken for x_0 of the process; the error falls as 1 / T.
        """
        x = x_start
        for step in torch.arange(self.num_timesteps - 1, device=x.device)[:, None].expand(-1, len(x)):
            with torch.no_grad():
                x = self.ddim_reverse_sample(model, x, step, clip_denoised, model_kwargs=model_kwargs)["sample"]
        return x

    # the loops

    def p_sample_loop(self, model: Model, shape: Sequence[int], **kwargs: Any) -> Tensor:
        """Ancestral sampling from noise to images, (N, C, H, W); keywords as in p_sample_loop_progressive."""
        return loops.last(self.p_sample_loop_progressive(model, shape, pred_xstart=False, **kwargs))

    def ddim_sample_loop(self, model: Model, shape: Sequence[int], eta: float = 0.0, **kwargs: Any) -> Tensor:
        """DDIM sampling from noise to images, (N, C, H, W); keywords as in p_sample_loop_progressive."""
        return loops.last(self.ddim_sample_loop_progressive(model, shape, eta=eta, pred_xstart=False, **kwargs))

    def p_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each ancestral step's dict (sample, pred_xstart), t = T-1 first.

        Keywords: ``noise`` is x_T (default: fresh), ``step_noise`` one tensor a step in the order of the steps, as a
        stacked tensor or any iterable (default: fresh), ``clip_denoised``, ``denoised_fn``, ``model_kwargs``, and
        ``device`` (default: the noise's, else the model's parameters'). Either noise may be a ``Philox``, which draws
        it where it is used. ``pred_xstart=False`` leaves the predicted x_0 out.
        """
        return loops.progressive(self, self.p_sample, model, shape, **kwargs)

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], eta: float = 0.0, **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each DDIM step's dict (sample, pred_xstart), t = T-1 first; keywords as p_sample_loop_progressive."""
        return loops.progressive(self, self.ddim_sample, model, shape, eta=eta, **kwargs)

    def dpm_solver_sample_loop(self, model: Model, shape: Sequence[int], sde: bool = False, **kwargs: Any) -> Tensor:
        """DPM-Solver++(2M) from noise to images, (N, C, H, W); keywords as dpm_solver_sample_loop_progressive."""
        return loops.last(self.dpm_solver_sample_loop_progressive(model, shape, sde, pred_xstart=False, **kwargs))

    def dpm_solver_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], sde: bool = False, **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each step's dict (sample, pred_xstart) of DPM-Solver++(2M), t = T-1 first; one model call a step.

        Lu et al. 2022 (arXiv 2211.01095), algorithm 2: second order on the probability-flow ODE, or with ``sde`` on the
        diffusion SDE. For 10 to 30 timesteps (``use_timesteps``). Keywords as p_sample_loop_progressive;
        ``step_noise`` is the SDE's. A learned variance is not used.
        """
        return solvers.dpm_solver_loop(self, model, shape, sde, **kwargs)

    def heun_sample_loop(self, model: Model, shape: Sequence[int], **kwargs: Any) -> Tensor:
        """Heun's method from noise to images, (N, C, H, W); keywords as heun_sample_loop_progressive."""
        return loops.last(self.heun_sample_loop_progressive(model, shape, pred_xstart=False, **kwargs))

    def heun_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each step's dict (sample, pred_xstart) of Heun's method, t = T-1 first; two model calls but for t = 0.

        Karras et al. 2022, algorithm 1: second order on the probability-flow ODE, deterministic. Keywords as
        p_sample_loop_progressive; ``step_noise`` and a learned variance are not used.
        """
        return solvers.heun_loop(self, model, shape, **kwargs)

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
        step_noise: Tensor | Philox | Iterable[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The whole variational bound: a dict with total_bpd and prior_bpd (N,), vb, xstart_mse and mse (N, T).

        Columns are in the order in which the steps run, t = T-1 first. ``step_noise`` is one tensor a step in that
        order, or a ``Philox``, which draws it where it is used (default: fresh).
        """
        return likelihood.calc_bpd_loop(self, model, x_start, clip_denoised, model_kwargs, step_noise)

    def calc_bpd_loop_progressive(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
        step_noise: Tensor | Philox | Iterable[Tensor] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each step's part of the bound, t = T-1 first: a dict with vb, xstart_mse and mse, each (N,).

        ``vb`` is in bits per dimension, the others are the mean squared errors of the predicted x_0 and of the noise
        that it implies. Arguments as calc_bpd_loop's.
        """
        return likelihood.calc_bpd_loop_progressive(self, model, x_start, clip_denoised, model_kwargs, step_noise)
