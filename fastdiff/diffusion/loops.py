"""From noise to images: what every sampling loop begins with, and the loop over steps that need no memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.diffusion.noise import Philox, draws_of

if TYPE_CHECKING:
    from fastdiff.diffusion.gaussian import GaussianDiffusion


def begin(
    diffusion: "GaussianDiffusion",
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | Philox | None = None,
    step_noise: Tensor | Philox | Iterable[Tensor] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor | Philox | None]]]:
    """x_T, and for each step t (N,) with the noise of its update, t = T-1 first.

    The keywords are those of GaussianDiffusion.p_sample_loop_progressive.
    """
    if isinstance(noise, Philox):
        noise = noise.of_start(shape, diffusion.kernels)
    if device is None:
        device = noise.device if noise is not None else _device_of(model)
    x = torch.randn(*shape, device=device) if noise is None else noise
    if x.shape != tuple(shape):
        raise ValueError(f"noise must be of the shape {tuple(shape)}, not {tuple(x.shape)}")
    # a Philox serves every step
    draws = repeat(step_noise) if isinstance(step_noise, Philox) else draws_of(step_noise)
    # every t is on the device before the first step, so that no step waits for a copy
    timesteps = torch.arange(diffusion.num_timesteps, device=device).flip(0)[:, None].expand(-1, shape[0])
    return x, zip(timesteps, draws)  # noqa: B905  # there may be more noise than steps


def progressive(
    diffusion: "GaussianDiffusion",
    step: Callable[..., dict[str, Tensor]],
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | Philox | None = None,
    step_noise: Tensor | Philox | Iterable[Tensor] | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Iterator[dict[str, Tensor]]:
    """Yield the dict of each ``step(model, x, t, noise=..., **kwargs)``, whose sample is the next one's x."""
    x, steps = begin(diffusion, model, shape, noise, step_noise, device)
    for t, draw in steps:
        with torch.no_grad():
            out = step(model, x, t, noise=draw, **kwargs)
        yield out
        x = out["sample"]


def last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    """The last step's sample."""
    out: dict[str, Tensor] = {}
    for out in steps:  # noqa: B007  # only the last one counts
        pass
    return out["sample"]


def _device_of(model: Callable[..., Tensor]) -> torch.device:
    parameters = getattr(model, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    return first.device if first is not None else torch.device("cpu")
