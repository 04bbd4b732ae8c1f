"""The timesteps of a job: a named grid, or the one that was tuned for its checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import SampleConfig, Sampler, TimeGrid
from fastdiff.diffusion import build_diffusion
from fastdiff.diffusion.time_grids import grid_timesteps

TUNED = "time_grids"
"""Where a checkpoint's metadata hold the tuned grids, by sampler and number of steps."""


def chosen_grid(checkpoint: Checkpoint, config: SampleConfig) -> tuple[TimeGrid, list[int] | None]:
    """The grid of a job and its timesteps; None for uniform, whose timesteps follow from steps or timestep_respacing.

    ValueError if the checkpoint has no tuned grid, though asked, or fewer timesteps than steps.
    """
    grid, steps = config.time_grid, config.steps
    if steps is None or grid is TimeGrid.UNIFORM:
        return TimeGrid.UNIFORM, None
    if grid not in (None, TimeGrid.TUNED):
        process = build_diffusion(replace(checkpoint.diffusion_config, timestep_respacing=""))
        return grid, grid_timesteps(process.alphas_cumprod, steps, grid)
    tuned = None if config.eta else tuned_timesteps(checkpoint, config.sampler, steps)
    if tuned is not None:
        return TimeGrid.TUNED, tuned
    if grid is TimeGrid.TUNED:
        raise ValueError(
            f"time_grid tuned: this checkpoint has none for {steps} steps of {config.sampler}"
            f"{' with eta' if config.eta else ''}; fastdiff tune-steps finds it"
        )
    return TimeGrid.UNIFORM, None


def tuned_timesteps(checkpoint: Checkpoint, sampler: Sampler, steps: int) -> list[int] | None:
    """The tuned grid that a checkpoint's metadata hold, None without one; ValueError if it is damaged."""
    said: Any = checkpoint.metadata.get(TUNED, {})
    for key in (str(sampler), str(steps), "timesteps"):
        if not isinstance(said, Mapping):
            raise _damaged(sampler, steps)
        if key not in said:
            return None
        said = said[key]
    last = checkpoint.diffusion_config.diffusion_steps - 1
    rising = isinstance(said, list) and all(type(t) is int for t in said) and sorted(set(said)) == said
    if not (rising and len(said) == steps and said[0] >= 0 and said[-1] == last):
        raise _damaged(sampler, steps)
    return said


def _damaged(sampler: Sampler, steps: int) -> ValueError:
    return ValueError(
        f"time_grids: the checkpoint's grid for {steps} steps of {sampler} is damaged: use --time-grid uniform, or "
        "fastdiff tune-steps again"
    )
