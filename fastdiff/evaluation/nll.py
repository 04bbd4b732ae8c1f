"""Bits per dimension of a data set's images under a model: the variational bound, term by term."""

import itertools
import math
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import NllConfig, Prediction
from fastdiff.data import Dataset, normalised, prefetch_to_device
from fastdiff.data.batches import Batch
from fastdiff.data.classes import renumbered
from fastdiff.diffusion import Philox, build_diffusion
from fastdiff.models.super_res import low_resolution
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.distributed import Agreement, World
from fastdiff.runtime.signals import StopRequest
from fastdiff.runtime.words import duration

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]

TERMS = ("vb", "mse", "xstart_mse")
"""The terms of every timestep, named as in improved-diffusion."""

OnProgress = Callable[[int, int, str], None]
"""Called with the number of image steps done, their total, and the results so far as text."""


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound of the images 0, 1, 2, ...: ``total_bpd`` and its part ``prior_bpd``, in bits per dimension (N,).

    The data set has ``distinct`` images: if it is repeated, image i is another draw of its image i mod distinct.
    ``terms`` are means over the images, (T,) each, t = T-1 first: vb (bits per dimension), mse (of the noise)
    and xstart_mse.
    """

    total_bpd: Float64Array
    prior_bpd: Float64Array
    terms: dict[str, Float64Array]
    distinct: int

    def figures(self) -> dict[str, float]:
        """Means over the images, and the standard error of the first; NaN if it is undefined.

        Repeated draws of an image tell less than new images, so the standard error counts only their mean.
        """
        numbers = np.arange(len(self.total_bpd)) % self.distinct
        with np.errstate(invalid="ignore"):  # infinite values have no standard error
            each = np.bincount(numbers, self.total_bpd) / np.bincount(numbers)
            deviation = float(each.std(ddof=1)) if len(each) > 1 else math.nan
            return {
                "bits_per_dim": float(self.total_bpd.mean()),
                "standard_error": deviation / math.sqrt(len(each)),
                "prior_bits_per_dim": float(self.prior_bpd.mean()),
            }


class Stopped(Exception):
    """A signal ended the evaluation after ``images`` images, of ``total_bpd`` bits per dimension on average."""

    def __init__(self, signal: int, images: int, total_bpd: float) -> None:
        super().__init__(signal, images, total_bpd)
        self.signal, self.images, self.total_bpd = signal, images, total_bpd


class Nll:
    """Evaluates a data set under a checkpoint's model. It takes ownership of the model and casts its weights.

    The noise is a function of seed, image number and step, so the batch size and the number of processes only affect
    rounding inside the model. ValueError if ``config`` asks for timesteps that the diffusion process does not have, or
    the data has classes that the model does not know.
    """

    def __init__(
        self, checkpoint: Checkpoint, dataset: Dataset, config: NllConfig, runtime: Runtime, world: World
    ) -> None:
        process = checkpoint.diffusion_config
        if process.prediction is Prediction.FLOW:
            raise ValueError("prediction flow has no variational bound: evaluate nll needs another prediction")
        if config.respacing is not None:
            process = replace(process, timestep_respacing=config.respacing)
        self.diffusion = build_diffusion(process, runtime.kernels)
        self.count = config.num_samples or len(dataset.images)
        self._small_size = checkpoint.model_config.small_size
        self._labels = labels_for(checkpoint, dataset)
        self._dataset, self._config, self._runtime, self._world = dataset, config, runtime, world
        shares = [self.count * rank // world.size for rank in range(world.size + 1)]
        first, last = shares[world.rank : world.rank + 2]
        # The fewest batches, all of one size: another size would recompile the model. Every process runs the same
        # number of rounds, or one would wait for a complete batch of the others.
        self._rounds = max(-(-(end - begin) // config.batch_size) for begin, end in itertools.pairwise(shares))
        parts = min(self._rounds, last - first)
        self._size = -(-(last - first) // max(parts, 1))
        self._last = last
        self._starts = range(first, last, self._size or 1)
        self.calls = parts * self.diffusion.num_timesteps
        self._model = runtime.prepare(runtime.cast(checkpoint.model.for_inference()), self.calls)

    def run(self, stop: StopRequest, on_progress: OnProgress) -> Bound:
        """Compute the bound of all images and return it on every process.

        Collective. Raises Stopped if a process received a signal before the end; the others finish their batch.
        """
        steps = self.diffusion.num_timesteps
        meter = _NllProgress(on_progress, self.count, steps, self._world.size)
        totals, priors = [np.empty(0)], [np.empty(0)]
        sums = np.zeros((len(TERMS), steps))  # fp32 numbers, summed in fp64: nearly exact in any order

        failure: list[ValueError | OSError] = []
        agreement = Agreement(self._world)
        with closing(self._batches(stop, meter)) as batches:
            for _ in range(self._rounds):  # a process may have one batch less
                try:
                    batch = next(batches, None)
                except (ValueError, OSError) as error:
                    failure.append(error)
                    batch = None
                if batch is not None:
                    terms, prior = batch
                    totals.append(prior + terms[0].sum(axis=1))
                    priors.append(prior)
                    sums += terms.sum(axis=1)
                    meter.evaluated(totals[-1])
                # every process learns one batch later what ended another
                if any(agreement.exchange(int(stop.received or 0), len(failure))):
                    break
            agreement.settle()

        def told() -> None:
            if failure:
                raise failure[0]

        self._world.on_all(told)
        signal = max(self._world.all_gather_object(int(stop.received or 0)))
        parts = self._world.all_gather_object((np.concatenate(totals), np.concatenate(priors), sums))
        total, prior = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        if len(total) < self.count:
            raise Stopped(signal, len(total), float(total.mean()) if len(total) else math.nan)
        means = np.sum([part[2] for part in parts], axis=0) / self.count
        return Bound(total, prior, dict(zip(TERMS, means, strict=True)), len(self._dataset.images))

    def _batches(
        self, stop: StopRequest, meter: "_NllProgress"
    ) -> Generator[tuple[Float64Array, Float64Array], None, None]:
        """Yield each batch's terms (3, n, T) and prior (n,) until a signal arrives."""
        device, steps = self._runtime.device, self.diffusion.num_timesteps
        with closing(prefetch_to_device(self._loaded(), device)) as loaded, ExitStack() as until_first_step:
            until_first_step.enter_context(stop.at_once())  # it may compile for minutes, and nothing is lost
            for start, (images, labels) in zip(self._starts, loaded, strict=True):
                x_start = normalised(images).contiguous()
                noise = Philox(self._config.seed, torch.arange(start, start + self._size, device=device))
                conditions = {} if labels is None else {"y": labels}
                if self._small_size is not None:
                    conditions["low_res"] = low_resolution(x_start, self._small_size)
                wanted = min(self._size, self._last - start)
                columns: list[Tensor] = []
                for terms in self.diffusion.calc_bpd_loop_progressive(
                    self._model, x_start, self._config.clip_denoised, conditions, noise
                ):
                    columns.append(torch.stack([terms[name] for name in TERMS]))
                    until_first_step.close()
                    if len(columns) < steps:
                        meter.step(wanted)
                        if stop.received is not None:
                            return  # the unfinished batch is dropped
                prior = self.diffusion.prior_bpd(x_start)
                found = torch.stack(columns, dim=2).cpu()  # (3, N, T): the one host sync
                yield found[:, :wanted].double().numpy(), prior[:wanted].cpu().double().numpy()

    def _loaded(self) -> Generator[Batch, None, None]:
        """The batches of this process; the last one is padded with the images that follow."""

        def ready(values: NDArray[Any]) -> Tensor:
            tensor = torch.from_numpy(np.asarray(values))
            return tensor.pin_memory() if self._runtime.device.type == "cuda" else tensor

        for start in self._starts:
            self._dataset.check()
            places = np.arange(start, start + self._size) % len(self._dataset.images)
            yield ready(self._dataset.images[places]), None if self._labels is None else ready(self._labels[places])


def labels_for(checkpoint: Checkpoint, dataset: Dataset) -> Int64Array | None:
    """The checkpoint's class index for each image, int64 (N,); None for an unconditional model.

    Classes are matched by name, or by number with a warning if the data or the checkpoint has no names. ValueError if
    the data has no classes, or one that the model does not know.
    """
    config = checkpoint.model_config
    if not config.class_cond:
        return None
    if dataset.labels is None:
        raise ValueError("the model has classes, but the data has none")
    names = dataset.class_names if dataset.named else None
    remedy = "name the images as in its training data, or use its --labels"
    npz = "npz" in dataset.preflight.counts
    return renumbered(dataset.labels, names, checkpoint.class_names, config.num_classes, "the data", remedy, npz)


class _NllProgress:
    """Reports progress: on the first of several processes, as if the others were equally far."""

    def __init__(self, tell: OnProgress, images: int, steps: int, processes: int) -> None:
        self._tell = tell
        self._images, self._steps, self._processes = images, steps, processes
        self._steps_done = self._images_done = 0
        self._bpd = 0.0
        self._began = time.perf_counter()

    def step(self, images: int) -> None:
        """Count one more step of ``images`` images."""
        total = self._images * self._steps
        self._steps_done = min(self._steps_done + images * self._processes, total)
        left = (time.perf_counter() - self._began) / self._steps_done * (total - self._steps_done)
        done = min(self._images_done * self._processes, self._images)
        mean = f", {self._bpd / self._images_done:.2f} bits/dim" if done else ""
        note = f"{done} of {self._images} images{mean}, {duration(left)} left"
        self._tell(self._steps_done, total, note)

    def evaluated(self, total_bpd: Float64Array) -> None:
        """Count the last step of the images with these totals."""
        self._images_done += len(total_bpd)
        self._bpd += float(total_bpd.sum())
        self.step(len(total_bpd))
