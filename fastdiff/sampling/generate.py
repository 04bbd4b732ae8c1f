"""Drawing images batch by batch."""

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
"""From the numbers (n,) of images to something of each, (n, ...)."""


class Stopped(Exception):
    """Raised by ``on_step``: no further step is wanted."""


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
    """Yield batches of images, uint8 (n, H, W, 3), as ``batches`` cuts them.

    ``indices`` (num_samples,) are the images' numbers, by default 0, 1, 2, ...; ``labels`` (num_samples,) the classes
    of a class-conditional model's images; ``low_res`` gives a super-resolution model's inputs (n, 3, h, w) in [-1, 1],
    and ``start`` x_T (n, 3, H, W), where it is not noise. ``on_step`` is told after each step how many images took it,
    and ends the drawing by Stopped, after which the batches that are finished still come; ``watch`` is shown x_T and
    every x_t after it, which the next step writes over. With ``graphs`` a step is one CUDA graph on a GPU.

    The noise of an image is a function of seed and index alone (fastdiff.kernels.philox): the same seed draws the same
    image whatever the batch size. On a GPU a batch is drawn while the pixels of the one before it are on their way.

    ValueError where the model's numbers are not finite.
    """
    numbers = np.arange(config.num_samples) if indices is None else indices
    if config.guidance_scale != 1 and labels is not None:
        model = guided(model, config.guidance_scale)
    loop = Loop(model, diffusion, config, graphs=graphs)
    parts = batches(len(numbers), config.batch_size)
    size = parts[0].stop
    steps = _Steps(on_step or (lambda images: None), device)
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None
    leaving: deque[_Leaving] = deque()
    for part in parts:
        # The last batch is filled up with more of its images: another shape would compile the model again.
        wanted = part.stop - part.start
        mine = numbers[part][np.arange(size) % wanted]
        conditions = {}
        if labels is not None:
            conditions["y"] = on_device(torch.from_numpy(labels[part][np.arange(size) % wanted]), device)
        if low_res is not None:
            try:
                conditions["low_res"] = on_device(low_res(mine), device)
            except Stopped:
                break
        noise = Philox(config.seed, on_device(torch.from_numpy(mine), device))
        shape = (size, 3, image_size, image_size)
        x = noise.of_start(shape, diffusion.kernels) if start is None else on_device(start(mine), device)
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
        while len(leaving) > (copying is not None):  # one batch ahead and no more, though a GPU's host could be
            yield leaving.popleft().arrived(steps)
        if steps.stopped:
            break
    while leaving:
        yield leaving.popleft().arrived(steps)


def batches(count: int, batch_size: int) -> list[slice]:
    """``count`` things in as few parts of at most ``batch_size`` as can be, equal but for the last."""
    size = -(-count // -(-count // batch_size))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _Steps:
    """Tells of the steps that the device has taken, which on a GPU are fewer than the host has asked for."""

    def __init__(self, tell: Callable[[int], None], device: torch.device) -> None:
        self.stopped = False
        self._tell = tell
        self._device = device
        self._pending: deque[tuple[torch.cuda.Event, int]] = deque()

    def taken(self, images: int) -> None:
        """So many images are asked to take a step."""
        if self._device.type == "cuda":
            self._pending.append((torch.cuda.current_stream(self._device).record_event(), images))
            self.look()
        else:
            self._told(images)

    def look(self) -> None:
        """Tell what has come about, without waiting."""
        while self._pending and self._pending[0][0].query():
            self._told(self._pending.popleft()[1])

    def _told(self, images: int) -> None:
        try:
            self._tell(images)
        except Stopped:
            self.stopped = True


class _Leaving:
    """A batch's pixels on their way from the device on a stream of their own, beside what the device does next."""

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
        """The images; ValueError where some are none. Waits for them, and tells of the steps meanwhile."""
        while not self.there:
            steps.look()
            time.sleep(0.002)
        steps.look()
        if not bool(self._finite):
            raise ValueError("the model drew numbers that are not finite: its weights are damaged, or need fp32")
        return self._pixels.numpy()


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; the host does not wait for the copy, nor so for the batch that is still being drawn."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory that is under way on the current stream."""
    # what it is copied from was allocated for another stream, which would take the memory back too early
    tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
