"""A sampling loop over fixed buffers, so that a GPU replays each step as one CUDA graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.config import SampleConfig, Sampler
from fastdiff.diffusion import GaussianDiffusion, Philox

_MULTISTEP = (Sampler.DPM, Sampler.DPM_SDE)


@dataclass(frozen=True)
class _Buffers:
    """The buffers of a step: x_t, t, the previous step's prediction of x_0, the noise, the model's conditions."""

    x: Tensor
    t: Tensor
    previous: Tensor | None
    noise: Philox | Tensor
    conditions: Mapping[str, Tensor]


class Loop:
    """Samples batches of one shape: ``begin`` a batch at x_T, then call ``step`` while steps are ``left``.

    A batch's tensors are copied into buffers on the device. The very first step runs without a CUDA graph and triggers
    compilation. With ``graphs``, every further step on a GPU is one launch of a CUDA graph. No step causes a host sync.
    """

    def __init__(
        self, model: Callable[..., Tensor], diffusion: GaussianDiffusion, config: SampleConfig, *, graphs: bool = True
    ) -> None:
        self.left = 0
        self._capturing = graphs
        self._model = model
        self._diffusion = diffusion
        self._config = config
        self._buffers: _Buffers | None = None
        self._graphs: dict[bool, torch.cuda.CUDAGraph | None] = {}

    @property
    def x(self) -> Tensor:
        """x_t (N, 3, H, W), after the last step the images; the next ``begin`` overwrites it."""
        return self._held.x

    @property
    def _held(self) -> _Buffers:
        assert self._buffers is not None, "call begin first"
        return self._buffers

    def begin(self, x: Tensor, noise: Philox | Tensor, conditions: Mapping[str, Tensor]) -> None:
        """Start a batch with the shapes of the first one: x_T (N, 3, H, W) and the model's other arguments (N, ...).

        ``noise`` for the updates is a Philox with the first batch's seed, or a tensor (T, N, 3, H, W), t = T-1 first.
        """
        if self._buffers is None:
            t = torch.empty(len(x), dtype=torch.int64, device=x.device)
            previous = torch.empty_like(x) if self._config.sampler in _MULTISTEP else None
            given = {name: value.clone() for name, value in conditions.items()}
            self._buffers = _Buffers(x.clone(), t, previous, _copy_of(noise), given)
        held = self._held
        held.x.copy_(x)
        held.t.fill_(self._diffusion.num_timesteps - 1)
        if held.previous is not None:
            held.previous.zero_()  # the first step gives it no weight
        _numbers(held.noise).copy_(_numbers(noise))
        for name, value in conditions.items():
            held.conditions[name].copy_(value)
        self.left = self._diffusion.num_timesteps

    def step(self) -> None:
        """Replace x_t by x_{t-1}."""
        last = self.left == 1 and self._config.sampler is Sampler.HEUN  # Heun's last step has no second half
        self.left -= 1
        if self.x.device.type != "cuda" or not self._capturing or last not in self._graphs:
            self._advance(last)
            self._graphs[last] = None
            return
        if (graph := self._graphs[last]) is None:
            self._graphs[last] = graph = self._captured(last)
        graph.replay()

    def _captured(self, last: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # The graphs run one after the other and share one memory pool. PyTorch's default capture stream belongs to the
        # device of the first capture, so each graph has a new stream. Other host threads must not end a capture.
        pool = next((other.pool() for other in self._graphs.values() if other is not None), None)
        stream = torch.cuda.Stream(self.x.device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._advance(last)
        return graph

    @torch.no_grad()
    def _advance(self, last: bool) -> None:
        held = self._held
        out = self._updated(last)
        held.x.copy_(out["sample"])
        if held.previous is not None:
            held.previous.copy_(out["pred_xstart"])
        held.t.sub_(1)

    def _updated(self, last: bool) -> dict[str, Tensor]:
        process, config, model, held = self._diffusion, self._config, self._model, self._held
        noise = held.noise
        if isinstance(noise, Tensor):
            noise = noise.index_select(0, process.num_timesteps - 1 - held.t[:1])[0]
        options: dict[str, Any] = {"clip_denoised": config.clip_denoised, "model_kwargs": held.conditions}
        x, t = held.x, held.t
        match config.sampler:
            case Sampler.DDPM:
                return process.p_sample(model, x, t, noise=noise, pred_xstart=False, **options)
            case Sampler.DDIM:
                return process.ddim_sample(model, x, t, eta=config.eta, noise=noise, pred_xstart=False, **options)
            case Sampler.DPM | Sampler.DPM_SDE:
                sde = config.sampler is Sampler.DPM_SDE
                return process.dpm_solver_sample(model, x, t, previous=held.previous, sde=sde, noise=noise, **options)
            case Sampler.HEUN:
                return process.heun_sample(model, x, t, last=last, **options)


def _numbers(noise: Philox | Tensor) -> Tensor:
    """The part of the noise that changes from batch to batch."""
    return noise.samples if isinstance(noise, Philox) else noise


def _copy_of(noise: Philox | Tensor) -> Philox | Tensor:
    return replace(noise, samples=noise.samples.clone()) if isinstance(noise, Philox) else noise.clone()
