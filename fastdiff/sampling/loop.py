"""The sampling loop: noise; for each step guidance, model, update; then the pixels, batch by batch.

A step works on tensors that stay where they are, so that a GPU replays it as one CUDA graph.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.config import SampleConfig, Sampler
from fastdiff.data import to_uint8
from fastdiff.diffusion import GaussianDiffusion, Philox
from fastdiff.diffusion.process import Guidance
from fastdiff.diffusion.samplers import MULTISTEP
from fastdiff.sampling.guidance import guided, guided_steps, in_turn, no_gradient
from fastdiff.sampling.output import Uint8Array

Int64Array = NDArray[np.int64]
OfImages = Callable[[Int64Array], Tensor]
"""Maps image numbers (n,) to per-image tensors (n, ...)."""


class StopSampling(Exception):
    """Raised by ``on_step`` to end the sampling."""


def generate(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    config: SampleConfig,
    *,
    image_size: int,
    device: torch.device,
    indices: Int64Array | None = None,
    labels: Int64Array | None = None,
    low_res: OfImages | None = None,
    start: OfImages | None = None,
    cond_fn: Guidance = None,
    guide: Callable[..., Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
    watch: Callable[[Tensor], None] | None = None,
    graphs: bool = False,
) -> Iterator[Uint8Array]:
    """Yield batches of images, uint8 (n, H, W, 3), of the sizes that ``batch_slices`` chooses.

    ``indices`` (num_samples,) are the image numbers, by default 0, 1, 2, ... ``labels`` (num_samples,) are the class
    labels for a class-conditional model. ``low_res`` gives the inputs (n, 3, h, w) in [-1, 1] of a super-resolution
    model, and ``start`` gives x_T (n, 3, H, W) if it is not noise. ``cond_fn`` guides every step (GaussianDiffusion's
    argument), with the labels as ``y``; ``guide`` is a worse model with the model's arguments, away from which it is
    guided. Both act in config.guidance_interval only. ``on_step`` is called after each step with the number of images
    that took it. It may raise StopSampling to end the sampling; finished batches are still yielded.
    ``watch`` is called with x_T and every later x_t, a buffer that the next step overwrites. With ``graphs`` a step is
    one CUDA graph on a GPU.

    The noise of an image is a function of seed and index alone (fastdiff.kernels.philox): the same seed draws the same
    image for every batch size. On a GPU a batch is drawn while the pixels of the previous one are copied to the host.

    ValueError if the images are not finite.
    """
    numbers = np.arange(config.num_samples) if indices is None else indices
    better = model
    if config.guidance_scale != 1 and (guide is not None or labels is not None):
        better = guided(model, config.guidance_scale, guide)
    loop = Loop(better, diffusion, config, unguided=model, cond_fn=cond_fn, graphs=graphs)
    parts = batch_slices(len(numbers), config.batch_size)
    size = parts[0].stop
    steps = _Steps(on_step or (lambda images: None), device)
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None
    leaving: deque[_Leaving] = deque()
    for part in parts:
        # The last batch is padded with copies of its images: another shape would recompile the model.
        wanted = part.stop - part.start
        mine = numbers[part][np.arange(size) % wanted]
        conditions = {}
        if labels is not None:
            conditions["y"] = to_device(torch.from_numpy(labels[part][np.arange(size) % wanted]), device)
        if low_res is not None:
            try:
                conditions["low_res"] = to_device(low_res(mine), device)
            except StopSampling:
                break
        noise = Philox(config.seed, to_device(torch.from_numpy(mine), device))
        shape = (size, 3, image_size, image_size)
        x = noise.of_start(shape, diffusion.kernels) if start is None else to_device(start(mine), device)
        loop.begin(x, noise, conditions)
        if watch is not None:
            watch(loop.x)
        while loop.left and not steps.stopped:
            loop.step()
            steps.taken(wanted)
            if watch is not None:
                watch(loop.x)
            if leaving and leaving[0].there:
                yield leaving.popleft().arrived(steps)
        if loop.left:
            break
        leaving.append(_Leaving(loop.x, wanted, copying))
        while len(leaving) > (copying is not None):  # at most one batch ahead, though a GPU's host could run further
            yield leaving.popleft().arrived(steps)
        if steps.stopped:
            break
    while leaving:
        yield leaving.popleft().arrived(steps)


@dataclass(frozen=True)
class _Buffers:
    """The buffers of a step: x_t, t, what a multistep method keeps of the steps before (the last one first), the noise,
    the model's conditions.
    """

    x: Tensor
    t: Tensor
    previous: tuple[Tensor, ...]
    noise: Philox | Tensor
    conditions: Mapping[str, Tensor]


class Loop:
    """Samples batches of one shape: ``begin`` a batch at x_T, then call ``step`` while steps are ``left``.

    Outside of config.guidance_interval ``unguided`` takes the place of ``model``, and ``cond_fn`` is not called.

    A batch's tensors are copied into buffers on the device. The first step of each kind (guided or not; Heun's last
    step is its own) runs without a CUDA graph and triggers compilation. With ``graphs``, every further step on a GPU is
    one launch of a CUDA graph. No step causes a host sync.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        diffusion: GaussianDiffusion,
        config: SampleConfig,
        *,
        unguided: Callable[..., Tensor] | None = None,
        cond_fn: Guidance = None,
        graphs: bool = True,
    ) -> None:
        self.left = 0
        self._graphs_wanted = graphs
        self._capturing = False
        self._model = model
        self._unguided = model if unguided is None else unguided
        self._cond_fn = cond_fn
        self._guided = guided_steps(diffusion, config.guidance_interval)
        self._diffusion = diffusion
        self._config = config
        self._buffers: _Buffers | None = None
        self._graphs: dict[tuple[bool, ...], torch.cuda.CUDAGraph | None] = {}

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
            method = MULTISTEP.get(self._config.sampler)
            previous = tuple(torch.empty_like(x) for _ in range(method.depth if method else 0))
            given = {name: value.clone() for name, value in conditions.items()}
            copied = replace(noise, samples=noise.samples.clone()) if isinstance(noise, Philox) else noise.clone()
            self._buffers = _Buffers(x.clone(), t, previous, copied, given)
        held = self._held
        held.x.copy_(x)
        held.t.fill_(self._diffusion.num_timesteps - 1)
        for before in held.previous:
            before.zero_()  # the first steps give it no weight
        _numbers(held.noise).copy_(_numbers(noise))
        for name, value in conditions.items():
            held.conditions[name].copy_(value)
        self.left = self._diffusion.num_timesteps

    @torch.no_grad()
    def step(self) -> None:
        """Replace x_t by x_{t-1}: noise, model, update."""
        process, config, held = self._diffusion, self._config, self._held
        self.left -= 1
        calls = [self.left]  # the t of each call of the model; Heun's last step has no second one
        if config.sampler is Sampler.HEUN and self.left:
            calls.append(self.left - 1)
        kind = tuple(self._guided[t] for t in calls)
        if self._replayed(kind):
            return
        model = in_turn([self._model if guides else self._unguided for guides in kind])
        gradient = self._cond_fn if any(kind) else None
        cond_fn = None if gradient is None else in_turn([gradient if guides else no_gradient for guides in kind])
        x, t, noise = held.x, held.t, held.noise
        if isinstance(noise, Tensor):
            noise = noise.index_select(0, process.num_timesteps - 1 - t[:1])[0]
        options: dict[str, Any] = {
            "clip_denoised": config.clip_denoised,
            "model_kwargs": held.conditions,
            "cond_fn": cond_fn,
        }
        match config.sampler:
            case Sampler.DDPM:
                out = process.p_sample(model, x, t, noise=noise, pred_xstart=False, **options)
            case Sampler.DDIM:
                out = process.ddim_sample(model, x, t, eta=config.eta, noise=noise, pred_xstart=False, **options)
            case Sampler.HEUN:
                out = process.heun_sample(model, x, t, last=len(kind) == 1, **options)
            case solver:
                options |= {"previous": held.previous, "noise": noise}
                out = process.multistep_sample(model, x, t, solver=solver, **options)
        x.copy_(out["sample"])
        for before, later in reversed(list(pairwise(held.previous))):
            later.copy_(before)
        if held.previous:
            held.previous[0].copy_(out["kept"])
        t.sub_(1)

    def _replayed(self, kind: tuple[bool, ...]) -> bool:
        """Launch the CUDA graph of the kind of step, captured before its first launch.

        False if the step must run eagerly: on a CPU, the first time (which compiles the model), and during the capture.
        """
        if not self._graphs_wanted or self._capturing or self.x.device.type != "cuda":
            return False
        if kind not in self._graphs:
            self._graphs[kind] = None
            return False
        if (graph := self._graphs[kind]) is None:
            self._graphs[kind] = graph = self._captured()
        graph.replay()
        return True

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The graph of a step; the state of the loop does not change."""
        graph, left = torch.cuda.CUDAGraph(), self.left
        self._capturing, self.left = True, left + 1
        # The graphs run one after the other and share one memory pool. PyTorch's default capture stream belongs to the
        # device of the first capture, so each graph has a new stream. Other host threads must not end a capture.
        pool = next((other.pool() for other in self._graphs.values() if other is not None), None)
        stream = torch.cuda.Stream(self.x.device)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.step()
        finally:
            self._capturing, self.left = False, left
        return graph


def _numbers(noise: Philox | Tensor) -> Tensor:
    """The part of the noise that changes from batch to batch."""
    return noise.samples if isinstance(noise, Philox) else noise


def batch_slices(count: int, batch_size: int) -> list[slice]:
    """Split ``count`` items into the fewest slices of at most ``batch_size``, all equal except for the last."""
    size = -(-count // -(-count // batch_size))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _Steps:
    """Reports the steps that the device has completed; on a GPU they lag behind the steps that the host launched."""

    def __init__(self, tell: Callable[[int], None], device: torch.device) -> None:
        self.stopped = False
        self._tell = tell
        self._device = device
        self._pending: deque[tuple[torch.cuda.Event, int]] = deque()

    def taken(self, images: int) -> None:
        """Record that a step of ``images`` images was launched."""
        if self._device.type == "cuda":
            self._pending.append((torch.cuda.current_stream(self._device).record_event(), images))
            self.look()
        else:
            self._told(images)

    def look(self) -> None:
        """Report the completed steps without waiting for the device."""
        while self._pending and self._pending[0][0].query():
            self._told(self._pending.popleft()[1])

    def _told(self, images: int) -> None:
        try:
            self._tell(images)
        except StopSampling:
            self.stopped = True


class _Leaving:
    """A batch's pixels, copied to the host on a separate stream while the device computes the next batch."""

    def __init__(self, x: Tensor, wanted: int, copying: "torch.cuda.Stream | None") -> None:
        self._pixels, self._finite = to_uint8(x)[:wanted], x.isfinite().all()
        self._copied: torch.cuda.Event | None = None
        if copying is not None:
            copying.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(copying):
                self._pixels, self._finite = _on_host(self._pixels), _on_host(self._finite)
                self._copied = copying.record_event()

    @property
    def there(self) -> bool:
        """Whether the pixels have arrived."""
        return self._copied is None or self._copied.query()

    def arrived(self, steps: _Steps) -> Uint8Array:
        """Wait for the images, reporting steps meanwhile, and return them; ValueError if they are not finite."""
        while not self.there:
            steps.look()
            time.sleep(0.002)
        steps.look()
        if not bool(self._finite):
            raise ValueError("the model drew numbers that are not finite: its weights are damaged, or need fp32")
        return self._pixels.numpy()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without a host sync, which would also wait for the batch being drawn."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _on_host(tensor: Tensor) -> Tensor:
    """Start a copy to pinned memory on the current stream and return its target."""
    # the source was allocated on another stream, which would otherwise reuse its memory too early
    tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
