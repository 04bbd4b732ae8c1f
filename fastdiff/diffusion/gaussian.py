"""Sampling from a diffusion process: single steps, and the loops over all timesteps.

Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Dhariwal & Nichol 2021 (guidance), Lu et al. 2022 (DPM-Solver++), Zhao
et al. 2023 (UniPC), Liu et al. 2022 (PNDM), Karras et al. 2022 (Heun).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.config import Sampler as Solver
from fastdiff.diffusion import samplers
from fastdiff.diffusion.noise import Philox
from fastdiff.diffusion.process import Denoised, GaussianProcess, Guidance, Model, ModelKwargs
from fastdiff.kernels import diffusion_step
from fastdiff.kernels.diffusion_step.reference import advance
from fastdiff.kernels.gaussian import Sampler
from fastdiff.kernels.gaussian.reference import Coefficients, Prediction

Noise = Tensor | Philox | None


class GaussianDiffusion(GaussianProcess):
    """A diffusion process over ``betas``, or over the subset ``use_timesteps`` of their timesteps.

    ``kernels`` is the backend (fastdiff.kernels) of the sampling steps and the training objective.

    With ``use_timesteps`` the process has one step per kept timestep, and its betas give the same alphas_cumprod at
    these. The model still receives the timesteps of the original process. With ``rescale_timesteps`` they are scaled to
    0..1000.

    ``loss_weight`` (T,) weights the mean squared error in the training objective, by default by 1. The last beta may be
    1, so that x_T is noise without signal, unless the model predicts epsilon or x_{t-1}. With ModelMeanType.FLOW the
    model predicts epsilon - x_0, of an x_t that is scaled to unit variance like that of every process here.

    The tables (betas, alphas_cumprod, posterior_variance, ...) are float64 arrays of shape (num_timesteps,).
    """

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        noise: Noise = None,
        pred_xstart: bool = True,
        cond_fn: Guidance = None,
    ) -> dict[str, Tensor]:
        """One ancestral step to x_{t-1} (DDPM algorithm 2): a dict with sample and pred_xstart.

        ``noise`` defaults to fresh noise. ``pred_xstart=False`` omits that entry, which saves its memory. ``cond_fn``
        shifts the mean by variance times its gradient (Dhariwal & Nichol 2021, algorithm 1).
        """
        output = self.model_output(model, x, t, model_kwargs)
        if cond_fn is None and denoised_fn is None:
            return self._fused(Sampler.DDPM, x, t, output, clip_denoised, 0.0, noise, pred_xstart)
        at = self._coefficients(x, t)
        p = self._predict(x, output, at, clip_denoised, denoised_fn)
        if cond_fn is not None:
            p = p._replace(mean=p.mean + p.variance * self._gradient(cond_fn, x, t, model_kwargs))
        return self._advanced(Sampler.DDPM, p, x, t, at, 0.0, noise, pred_xstart)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        eta: float = 0.0,
        noise: Noise = None,
        pred_xstart: bool = True,
        cond_fn: Guidance = None,
    ) -> dict[str, Tensor]:
        """One DDIM step to x_{t-1} (Song et al. 2021, equation 12): a dict like p_sample's.

        ``eta`` 0 is deterministic, 1 has the ancestral step's noise. ``cond_fn`` guides by the score (Dhariwal & Nichol
        2021, algorithm 2).
        """
        output = self.model_output(model, x, t, model_kwargs)
        if cond_fn is None and denoised_fn is None:
            return self._fused(Sampler.DDIM, x, t, output, clip_denoised, eta, noise, pred_xstart)
        at = self._coefficients(x, t)
        p = self._predict(x, output, at, clip_denoised, denoised_fn)
        p = p._replace(pred_xstart=self._guided_xstart(p.pred_xstart, cond_fn, x, t, model_kwargs))
        return self._advanced(Sampler.DDIM, p, x, t, at, eta, noise, pred_xstart)

    def _gradient(self, cond_fn: Callable[..., Tensor], x: Tensor, t: Tensor, model_kwargs: ModelKwargs) -> Tensor:
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        if not isinstance(gradient, Tensor) or gradient.shape != x.shape:
            found = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            raise ValueError(f"cond_fn must return a gradient of x's shape {tuple(x.shape)}, not {found}")
        return gradient.to(x.dtype)

    def _guided_xstart(
        self, x_start: Tensor, cond_fn: Guidance, x: Tensor, t: Tensor, model_kwargs: ModelKwargs
    ) -> Tensor:
        """The x_0 that eps - sqrt(1 - alpha_bar) gradient implies (Dhariwal & Nichol 2021, equation 14)."""
        if cond_fn is None:
            return x_start
        alpha_bar = self.table("alphas_cumprod", t, x)
        # without signal, x_0 is not a function of the score
        scale = torch.where(alpha_bar > 0, (1 - alpha_bar) / alpha_bar.sqrt(), 0)
        return x_start + scale * self._gradient(cond_fn, x, t, model_kwargs)

    def _advanced(
        self,
        sampler: Sampler,
        p: Prediction,
        x: Tensor,
        t: Tensor,
        at: Coefficients,
        eta: float,
        noise: Noise,
        pred_xstart: bool,
    ) -> dict[str, Tensor]:
        """A step from a prediction that a function of the caller's has changed, which no kernel can call."""
        if isinstance(noise, Philox):
            noise = noise.of_update(self.num_timesteps - t, x.shape)
        elif noise is None and (sampler is Sampler.DDPM or eta):
            noise = torch.randn_like(x)
        out = {"sample": advance(p, x, t, at, sampler, eta, noise)}
        return out | {"pred_xstart": p.pred_xstart} if pred_xstart else out

    def _fused(
        self,
        sampler: Sampler,
        x: Tensor,
        t: Tensor,
        output: Tensor,
        clip_denoised: bool,
        eta: float,
        noise: Noise,
        pred_xstart: bool,
    ) -> dict[str, Tensor]:
        if noise is None and (sampler is Sampler.DDPM or eta):
            noise = torch.randn_like(x)
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

    def dpm_solver_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        previous: Tensor | None = None,
        sde: bool = False,
        noise: Noise = None,
        cond_fn: Guidance = None,
    ) -> dict[str, Tensor]:
        """One step of DPM-Solver++(2M), or with ``sde`` of its SDE variant, to x_{t-1}: a dict like p_sample's.

        ``previous`` is the previous step's pred_xstart; without it the step is first order: DDIM, with eta 1 for the
        SDE. The SDE's ``noise`` defaults to fresh noise. ``cond_fn`` guides by the score, as in ddim_sample.
        """
        before = () if previous is None else (previous,)
        solver = Solver.DPM_SDE if sde else Solver.DPM
        out = self.multistep_sample(
            model, x, t, clip_denoised, denoised_fn, model_kwargs, before, solver, noise=noise, cond_fn=cond_fn
        )
        return {"sample": out["sample"], "pred_xstart": out["pred_xstart"]}

    def multistep_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        previous: Sequence[Tensor] = (),
        solver: Solver | str = Solver.UNIPC,
        noise: Noise = None,
        cond_fn: Guidance = None,
    ) -> dict[str, Tensor]:
        """One step of a multistep method to x_{t-1}: a dict like p_sample's, with what later steps need as ``kept``.

        ``solver`` is one of samplers.MULTISTEP. ``previous`` holds ``kept`` of the steps before, the last one first, as
        many as there are up to the method's depth; zeros may stand for those before the first step. ``noise`` is
        dpm++-sde's and defaults to fresh noise. ``cond_fn`` guides by the score, as in ddim_sample.
        """
        method = samplers.MULTISTEP[Solver(solver)]
        alpha, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        table = self.cached(solver, x.device, x.dtype, lambda: method.table(alpha, sigma))

        def draw() -> Tensor:
            if isinstance(noise, Philox):
                return noise.of_update(self.num_timesteps - t, x.shape)
            return torch.randn_like(x) if noise is None else noise

        predict = self._predictor(model, clip_denoised, denoised_fn, model_kwargs, cond_fn)
        return method.step(predict, table, x, t, previous, draw)

    def heun_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        last: bool = False,
        cond_fn: Guidance = None,
    ) -> dict[str, Tensor]:
        """One step of Heun's method to x_{t-1}, two model calls: a dict like p_sample's. ``last`` means that t is 0.

        ``cond_fn`` guides both by the score, as in ddim_sample.
        """
        table = self.cached(
            "heun",
            x.device,
            x.dtype,
            lambda: samplers.heun_coefficients(self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod),
        )
        predict = self._predictor(model, clip_denoised, denoised_fn, model_kwargs, cond_fn)
        return samplers.heun_step(predict, table, x, t, last)

    def _predictor(
        self, model: Model, clip: bool, denoised_fn: Denoised, model_kwargs: ModelKwargs, cond_fn: Guidance
    ) -> samplers.PredictXstart:
        def predict_xstart(x: Tensor, t: Tensor) -> Tensor:
            x_start = self.p_mean_variance(model, x, t, clip, denoised_fn, model_kwargs)["pred_xstart"]
            return self._guided_xstart(x_start, cond_fn, x, t, model_kwargs)

        return predict_xstart

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """One step of deterministic DDIM in reverse, to x_{t+1}: a dict with sample and pred_xstart."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self.eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_next = self.table("alphas_cumprod_next", t, x)
        sample = out["pred_xstart"] * alpha_bar_next.sqrt() + torch.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: ModelKwargs = None
    ) -> Tensor:
        """Encode images as the x_T, (N, C, H, W), from which ddim_sample_loop reconstructs them.

        Song et al. 2021, section 4.3. The images are taken as x_0 of the process; the error falls as 1 / T.
        """
        x = x_start
        for step in torch.arange(self.num_timesteps - 1, device=x.device)[:, None].expand(-1, len(x)):
            with torch.no_grad():
                x = self.ddim_reverse_sample(model, x, step, clip_denoised, model_kwargs=model_kwargs)["sample"]
        return x

    # the loops

    def p_sample_loop(self, model: Model, shape: Sequence[int], **kwargs: Any) -> Tensor:
        """Ancestral sampling from noise to images, (N, C, H, W); keywords as in p_sample_loop_progressive."""
        return samplers.last(self.p_sample_loop_progressive(model, shape, pred_xstart=False, **kwargs))

    def ddim_sample_loop(self, model: Model, shape: Sequence[int], eta: float = 0.0, **kwargs: Any) -> Tensor:
        """DDIM sampling from noise to images, (N, C, H, W); keywords as in p_sample_loop_progressive."""
        return samplers.last(self.ddim_sample_loop_progressive(model, shape, eta=eta, pred_xstart=False, **kwargs))

    def p_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each ancestral step's dict (sample, pred_xstart), t = T-1 first.

        Keywords: ``noise`` is x_T (default: fresh), ``step_noise`` one tensor per step in the order of the steps, as a
        stacked tensor or any iterable (default: fresh), ``clip_denoised``, ``denoised_fn``, ``cond_fn``,
        ``model_kwargs``, and ``device`` (default: the noise's, else the model's parameters'). Either noise may be a
        ``Philox``, which is generated where it is used. ``pred_xstart=False`` omits the predicted x_0.
        """
        return self._loop(self.p_sample, model, shape, **kwargs)

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], eta: float = 0.0, **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each DDIM step's dict (sample, pred_xstart), t = T-1 first; keywords: see p_sample_loop_progressive."""
        return self._loop(self.ddim_sample, model, shape, eta=eta, **kwargs)

    def dpm_solver_sample_loop(self, model: Model, shape: Sequence[int], sde: bool = False, **kwargs: Any) -> Tensor:
        """DPM-Solver++(2M) from noise to images, (N, C, H, W); keywords as in dpm_solver_sample_loop_progressive."""
        return samplers.last(self.dpm_solver_sample_loop_progressive(model, shape, sde, pred_xstart=False, **kwargs))

    def dpm_solver_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], sde: bool = False, **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each step's dict (sample, pred_xstart) of DPM-Solver++(2M), t = T-1 first; one model call per step.

        Lu et al. 2022 (arXiv 2211.01095), algorithm 2: second order on the probability-flow ODE, or with ``sde`` on the
        diffusion SDE. For 10 to 30 timesteps (``use_timesteps``). Keywords as in p_sample_loop_progressive;
        ``step_noise`` is the SDE's. A learned variance is not used.
        """
        return self.multistep_sample_loop_progressive(model, shape, Solver.DPM_SDE if sde else Solver.DPM, **kwargs)

    def multistep_sample_loop(
        self, model: Model, shape: Sequence[int], solver: Solver | str = Solver.UNIPC, **kwargs: Any
    ) -> Tensor:
        """A multistep method from noise to images, (N, C, H, W); keywords as in multistep_sample_loop_progressive."""
        return samplers.last(self.multistep_sample_loop_progressive(model, shape, solver, pred_xstart=False, **kwargs))

    def multistep_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], solver: Solver | str = Solver.UNIPC, **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each step's dict (sample, pred_xstart) of a multistep method, t = T-1 first; one model call per step.

        ``solver`` is dpm++, dpm++-sde, dpm++3m (Lu et al. 2022), unipc (Zhao et al. 2023) or ipndm (Liu et al. 2022).
        For 6 to 30 timesteps (``use_timesteps``). Keywords as in p_sample_loop_progressive; ``step_noise`` is
        dpm++-sde's. A learned variance is not used.
        """
        previous: list[Tensor] = []
        depth = samplers.MULTISTEP[Solver(solver)].depth

        def step(model: Model, x: Tensor, t: Tensor, pred_xstart: bool = True, **options: Any) -> dict[str, Tensor]:
            out = self.multistep_sample(model, x, t, previous=previous, solver=solver, **options)
            previous[:] = [out.pop("kept"), *previous][:depth]
            return out if pred_xstart else {"sample": out["sample"]}

        return self._loop(step, model, shape, **kwargs)

    def heun_sample_loop(self, model: Model, shape: Sequence[int], **kwargs: Any) -> Tensor:
        """Heun's method from noise to images, (N, C, H, W); keywords as in heun_sample_loop_progressive."""
        return samplers.last(self.heun_sample_loop_progressive(model, shape, pred_xstart=False, **kwargs))

    def heun_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each step's dict (sample, pred_xstart) of Heun's method, t = T-1 first; two model calls, one at t = 0.

        Karras et al. 2022, algorithm 1: second order on the probability-flow ODE, deterministic. Keywords as in
        p_sample_loop_progressive; ``step_noise`` and a learned variance are not used.
        """
        left = self.num_timesteps

        def step(
            model: Model, x: Tensor, t: Tensor, noise: Any, pred_xstart: bool = True, **options: Any
        ) -> dict[str, Tensor]:
            nonlocal left
            left -= 1
            out = self.heun_sample(model, x, t, last=left == 0, **options)
            return out if pred_xstart else {"sample": out["sample"]}

        return self._loop(step, model, shape, **kwargs)

    def _loop(
        self, step: Callable[..., dict[str, Tensor]], model: Model, shape: Sequence[int], **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        return samplers.progressive(step, model, shape, self.num_timesteps, self.kernels, **kwargs)
