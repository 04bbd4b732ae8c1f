"""Time grids: which timesteps of a process a sampler of few steps visits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import TimeGrid
from fastdiff.diffusion.schedule import space_timesteps

_RHO = 7
_MOST_NOISE = 80.0
"""The largest sigma among which log-snr and karras spread the steps, Karras et al. 2022's. Beyond it, where a cosine
schedule or one that ends in pure noise spends half of log-SNR, images in [-1, 1] cannot be seen; x_T is the exception.
"""


def grid_timesteps(alphas_cumprod: NDArray[np.floating[Any]], steps: int, grid: TimeGrid) -> list[int]:
    """``steps`` distinct timesteps of a process with these alphas_cumprod (T,), rising, the last one T-1.

    uniform is even in t (space_timesteps); log-snr in log(alpha / sigma) (Lu et al. 2022); karras in sigma^(1/7) with
    sigma = sqrt(1 - alpha_bar) / sqrt(alpha_bar) (Karras et al. 2022, equation 5); quadratic in the square root of t
    (Song et al. 2021, appendix D.2). A timestep that is taken already gives way to the next one that is free. A single
    step is that at T-1, or with uniform at 0.

    ValueError if the process has fewer timesteps, or the grid is tuned, which only a checkpoint knows.
    """
    count = len(alphas_cumprod)
    if steps > count:
        raise ValueError(f"steps {steps}: the process has {count} timesteps")
    if grid is TimeGrid.UNIFORM:
        return sorted(space_timesteps(count, str(steps)))
    places = np.linspace(0, 1, steps) if steps > 1 else np.ones(1)
    sigma = np.sqrt((1 - alphas_cumprod) / np.maximum(alphas_cumprod, 1e-20))  # rising
    least, most = sigma[0], max(sigma[0], min(sigma[-1], _MOST_NOISE))
    match grid:
        case TimeGrid.QUADRATIC:
            wanted = np.round(places**2 * (count - 1)).astype(np.int64)
        case TimeGrid.LOG_SNR:
            wanted = _nearest(np.log(sigma), np.log(least) + places * np.log(most / least))
        case TimeGrid.KARRAS:
            root = least ** (1 / _RHO) + places * (most ** (1 / _RHO) - least ** (1 / _RHO))
            wanted = _nearest(np.log(sigma), _RHO * np.log(root))
        case _:
            raise ValueError(f"time_grid {grid}: it is stored in a checkpoint, and follows from no schedule")
    return distinct(wanted, count)


def _nearest(rising: NDArray[np.floating[Any]], wanted: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """The index of the value of ``rising`` (T,) that is nearest to each one of ``wanted`` (n,)."""
    above = np.clip(np.searchsorted(rising, wanted), 1, max(len(rising) - 1, 1))
    below = above - 1
    above = np.minimum(above, len(rising) - 1)
    return np.where(wanted - rising[below] <= rising[above] - wanted, below, above)


def distinct(wanted: NDArray[np.int64], count: int) -> list[int]:
    """The nearest rising timesteps in 0..count-1, the last one count-1."""
    found = wanted.tolist()
    found[-1] = count - 1
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + 1)
    found[-1] = count - 1
    for i in reversed(range(len(found) - 1)):
        found[i] = min(found[i], found[i + 1] - 1)
    return found
