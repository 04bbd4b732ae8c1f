"""Finds the time grid of few steps that is best for one checkpoint and sampler.

As in Watson et al. 2021 and Xue et al. 2024 the timesteps are the variables of a search, here with the error of whole
images as its objective: their distance from the solution in many steps of the same probability-flow ODE from the same
noise. The objective needs no data and no gradient, and is what a sampler of few steps is to make small.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import SampleConfig, Sampler, TimeGrid, TuneConfig
from fastdiff.diffusion import Philox, build_diffusion
from fastdiff.diffusion.time_grids import grid_timesteps
from fastdiff.runtime.device import Runtime
from fastdiff.sampling.classes import Classes, labels_of
from fastdiff.sampling.loop import Loop, StopSampling, batch_slices, to_device
from fastdiff.sampling.time_grids import tuned_timesteps

_LEVELS = 127.5
"""Levels of 0 to 255 per unit of an image in [-1, 1]."""

Grid = tuple[int, ...]


@dataclass
class Tuned:
    """The errors of the grids that were tried: the RMS, in levels of 0 to 255, from the exact solution."""

    named: dict[TimeGrid, Grid] = field(default_factory=dict)
    """Those that the search starts from."""
    errors: dict[Grid, float] = field(default_factory=dict)

    @property
    def best(self) -> Grid:
        """The grid with the least error; ValueError if none was tried."""
        return min(self.errors, key=lambda grid: self.errors[grid])


class Tuning:
    """The search for a checkpoint's grid; it takes ownership of the model. ValueError if it cannot be searched for.

    ``found`` holds what was tried so far. ``model_calls`` and ``images`` are the most calls of the model, and the most
    images that go through it.
    """

    def __init__(self, checkpoint: Checkpoint, config: TuneConfig, runtime: Runtime) -> None:
        if small := checkpoint.model_config.small_size:
            raise ValueError(f"this model enlarges images of {small} pixels: tune the model that draws them")
        self.config = config
        self.found = Tuned()
        self._runtime = runtime
        self._process = replace(checkpoint.diffusion_config, timestep_respacing="")
        self._alphas_cumprod = build_diffusion(self._process).alphas_cumprod
        for grid in TimeGrid:
            if grid is not TimeGrid.TUNED:
                self.found.named[grid] = tuple(grid_timesteps(self._alphas_cumprod, config.steps, grid))
        with suppress(ValueError):  # a damaged one is replaced
            if (stored := tuned_timesteps(checkpoint, config.sampler, config.steps)) is not None:
                self.found.named[TimeGrid.TUNED] = tuple(stored)
        self._reference = min(config.reference_steps, self._process.diffusion_steps)
        heun = config.sampler is Sampler.HEUN
        # the number of batches decides whether compilation pays
        batches = batch_slices(config.num_samples, config.batch_size)
        steps = self._reference + (config.trials + len(self.found.named)) * config.steps * (2 if heun else 1)
        self.model_calls = steps * len(batches)
        self.images = self.model_calls * batches[0].stop  # whole batches
        self._model = runtime.prepare(runtime.cast(checkpoint.model.for_inference()), self.model_calls)
        self._shape = (batches[0].stop, 3, *[checkpoint.model_config.image_size] * 2)
        numbers = np.arange(len(batches) * batches[0].stop)  # whole batches: another shape would be compiled again
        labels = labels_of(Classes.of(checkpoint), numbers, (), seed=config.seed)
        self._batches: list[tuple[Philox, Mapping[str, Tensor]]] = []
        for part in np.split(numbers, len(batches)):
            conditions = {} if labels is None else {"y": to_device(torch.from_numpy(labels[part]), runtime.device)}
            self._batches.append((Philox(config.seed, to_device(torch.from_numpy(part), runtime.device)), conditions))

    @property
    def cost(self) -> str:
        """The work ahead, for the log."""
        config = self.config
        return (
            f"{len(self._batches) * self._shape[0]} images: {self._reference} steps that count as exact, then at most "
            f"{config.trials + len(self.found.named)} grids of {config.steps} {config.sampler} steps; {self.images:,} "
            "images through the model"
        )

    def run(self, on_trial: Callable[[int, int, str], None], stopped: Callable[[], bool]) -> bool:
        """Search; False if ``stopped`` said so before the end. Then the best grid so far is in ``found``.

        ``on_trial`` is called after each grid with the number of grids tried, the most there may be, and a note.
        """
        found, config = self.found, self.config
        total = config.trials + len(found.named)

        def error(grid: Grid) -> float:
            if grid not in found.errors:
                drawn = self._drawn(config.sampler, grid, stopped)
                distance = (drawn - exact).square().mean().sqrt().item() * _LEVELS
                found.errors[grid] = distance if np.isfinite(distance) else np.inf
                on_trial(len(found.errors), total, f"best error {found.errors[found.best]:.2f}")
            return found.errors[grid]

        try:
            quadratic = grid_timesteps(self._alphas_cumprod, self._reference, TimeGrid.QUADRATIC)
            exact = self._drawn(Sampler.UNIPC, tuple(quadratic), stopped)
            if not exact.isfinite().all():
                raise ValueError("the model drew numbers that are not finite: its weights are damaged, or need fp32")
            for grid in found.named.values():
                error(grid)
            for grid in neighbours(found.best, error):
                if len(found.errors) >= total:
                    break
                error(grid)
        except StopSampling:
            return False
        return True

    @torch.no_grad()
    def _drawn(self, sampler: Sampler, grid: Grid, stopped: Callable[[], bool]) -> Tensor:
        """The images, fp32 (n, 3, H, W) before they are rounded; StopSampling if ``stopped`` says so."""
        process = build_diffusion(self._process, self._runtime.kernels, grid)
        how = SampleConfig(sampler=sampler, clip_denoised=self.config.clip_denoised)
        loop = Loop(self._model, process, how, graphs=False)  # a graph would serve a few steps
        images = []
        for noise, conditions in self._batches:
            loop.begin(noise.of_start(self._shape, process.kernels), noise, conditions)
            while loop.left:
                loop.step()
                if stopped():
                    raise StopSampling
            images.append(loop.x.clone())
        return torch.cat(images)


def neighbours(start: Grid, error: Callable[[Grid], float]) -> Iterator[Grid]:
    """Yield the grids to try next, until none that differs from the best one in a single timestep is better.

    A pattern search (Hooke & Jeeves 1961) along the timesteps but the last one, which is x_T's: each moves by a share
    of the gap to the next one, at first half of it, while that lowers the ``error``. If no timestep's move does, the
    share is halved, down to a move by one.
    """
    best, share = start, 0.5
    ways = [1] * len(start)  # in which each one moved last
    while True:
        improved, moved = False, 0
        for i in range(len(best) - 1):
            for way in (ways[i], -ways[i]):
                below = best[i - 1] if i else -1
                gap = best[i + 1] - best[i] if way > 0 else best[i] - below
                move = max(1, round(share * gap))
                if move >= gap:
                    continue
                moved = max(moved, move)
                grid = (*best[:i], best[i] + way * move, *best[i + 1 :])
                yield grid
                if error(grid) < error(best):
                    best, ways[i], improved = grid, way, True
                    break
        if not improved:
            if moved <= 1:
                return
            share /= 2
