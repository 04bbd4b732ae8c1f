"""Draws images batch by batch."""

import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.config import SampleConfig
from fastdiff.data import to_uint8
from fastdiff.diffusion import GaussianDiffusion, Philox
from fastdiff.sampling.guidance import guided
from fastdiff.sampling.loop import Loop
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
    on_step: Callable[[int], None] | None = None,
    watch: Callable[[Tensor], None] | None = None,
    graphs: bool = False,
) -> Iterator[Uint8Array]:
    """Yield batches of images, uint8 (n, H, W, 3), of the sizes that ``batches`` chooses.

    ``indices`` (num_samples,) are the image numbers, by default 0, 1, 2, ... ``labels`` (num_samples,) are the class
    labels for a class-conditional model. ``low_res`` gives the inputs (n, 3, h, w) in [-1, 1] of a super-resolution
    model, and ``start`` gives x_T (n, 3, H, W) if it is not noise. ``on_step`` is called after each step with the
    number of images that took it. It may raise StopSampling to end the sampling; finished batches are still yielded.
    ``watch`` is called with x_T and every later x_t, a buffer that the next step overwrites. With ``graphs`` a step is
    one CUDA graph on a GPU.

    The noise of an image is a function of seed and index alone (fastdiff.kernels.philox): the same seed draws the same
    image for every batch size. On a GPU a batch is drawn while the pixels of the previous one are copied to the host.

    ValueError if the images are not finite.
    """
    numbers = np.arange(config.num_samples) if indices is None else indices
    if config.guidance_scale != 1 and labels is not None:
        model = guided(model, config.guidance_scale)
    loop = Loop(model, diffusion, config, graphs=graphs)
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
