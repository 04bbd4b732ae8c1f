"""Sampling loops and the samplers for few steps: linear multistep methods, and Heun's.

The multistep methods are DPM-Solver++(2M), its SDE variant and its third order, UniPC and iPNDM. All are independent of
the process: a step takes a predictor of x_0 and the step's coefficients at every t. Here alpha_t =
sqrt(alphas_cumprod), sigma_t = sqrt(1 - alphas_cumprod) and lambda_t = log(alpha_t / sigma_t). At t = 0 each sampler
returns the prediction itself. alpha may be 0 at t = T-1.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.config import Sampler
from fastdiff.diffusion.noise import Philox, draws_of
from fastdiff.diffusion.schedule import Float64Array
from fastdiff.kernels import Backend

PredictXstart = Callable[[Tensor, Tensor], Tensor]
"""The x_0 (N, C, ...) predicted from x_t (N, C, ...) and t (N,)."""


def progressive(
    step: Callable[..., dict[str, Tensor]],
    model: Callable[..., Tensor],
    shape: Sequence[int],
    num_timesteps: int,
    backend: Backend,
    noise: Tensor | Philox | None = None,
    step_noise: Tensor | Philox | Iterable[Tensor] | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Iterator[dict[str, Tensor]]:
    """Yield the dict of each ``step(model, x, t, noise=..., **kwargs)`` from x_T on; its sample is the next step's x.

    ``backend`` generates a Philox ``noise``; other keywords are those of GaussianDiffusion.p_sample_loop_progressive.
    """
    if isinstance(noise, Philox):
        noise = noise.of_start(shape, backend)
    if device is None:
        device = noise.device if noise is not None else _device_of(model)
    x = torch.randn(*shape, device=device) if noise is None else noise
    if x.shape != tuple(shape):
        raise ValueError(f"noise must have shape {tuple(shape)}, not {tuple(x.shape)}")
    # the same Philox serves every step
    draws = repeat(step_noise) if isinstance(step_noise, Philox) else draws_of(step_noise)
    # every t is on the device before the first step, so that no step waits for a copy
    timesteps = torch.arange(num_timesteps, device=device).flip(0)[:, None].expand(-1, shape[0])
    for t, draw in zip(timesteps, draws):  # noqa: B905  # there may be more noise than steps
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


@dataclass(frozen=True)
class Multistep:
    """A linear multistep method: with P a prediction and P_i the one i steps before, a step to x_{t-1} is

    of_x x_t + of_x_start x_0 + sum_i change_i (P - P_i) + of_noise noise.

    ``coefficients(alpha, sigma)`` is (T, 3 + depth): of_x, of_x_start, of_noise, change_1, change_2, ... P is x_0, or
    with ``of_eps`` the noise that x_t and x_0 imply. change_i is 0 where there are fewer than i steps before.
    """

    depth: int
    coefficients: Callable[[Float64Array, Float64Array], Float64Array]
    noisy: bool = False
    of_eps: bool = False

    def table(self, alpha: Float64Array, sigma: Float64Array) -> Float64Array:
        """(T, 5 + depth): the coefficients and, to get the noise, 1 / sigma_t and alpha_t / sigma_t."""
        return np.column_stack([self.coefficients(alpha, sigma), 1 / sigma, alpha / sigma])

    def step(
        self,
        predict: PredictXstart,
        table: Tensor,
        x: Tensor,
        t: Tensor,
        previous: Sequence[Tensor],
        noise: Callable[[], Tensor],
    ) -> dict[str, Tensor]:
        """One step to x_{t-1}: a dict with sample, pred_xstart and kept, which is P.

        ``previous`` holds P of the steps before, the last one first; missing ones are left out, which is right at the
        first steps, and elsewhere lowers the order.
        """
        x_start = predict(x, t)
        of_x, of_x_start, of_noise, *changes, to_eps, to_eps_start = _columns(table, t, x.ndim)
        kept = to_eps * x - to_eps_start * x_start if self.of_eps else x_start
        sample = of_x * x + of_x_start * x_start
        for change, before in zip(changes, previous, strict=False):
            sample = sample + change * (kept - before)
        if self.noisy:
            sample = sample + of_noise * noise()  # drawn after the model call, whose memory is free again
        return {"sample": sample, "pred_xstart": x_start, "kept": kept}


_LEAST_ALPHA = 1e-10
"""alpha of x_T without any signal, in whose lambda nothing is left to integrate."""

_STEEP = 1.2
"""A step in lambda that is this many times as long as one before it is not extrapolated by a parabola."""

_PLACES, _SHARES = np.polynomial.legendre.leggauss(32)  # exact in float64 for steps in lambda of up to 50


def _lambdas(alpha: Float64Array, sigma: Float64Array) -> Float64Array:
    return np.log(np.maximum(alpha, _LEAST_ALPHA) / sigma)


def _integrals(start: Float64Array, end: Float64Array, nodes: Sequence[Float64Array]) -> list[Float64Array]:
    """The integral of exp(lambda - end) l_i(lambda) from ``start`` to ``end`` for each node i, all (n,).

    l_i is the polynomial that is 1 at node i and 0 at the others (Lagrange).
    """
    length = (end - start)[:, None]
    place = start[:, None] + length * (_PLACES + 1) / 2
    mass = length / 2 * _SHARES * np.exp(place - end[:, None])
    found = []
    for node in nodes:
        others = [other for other in nodes if other is not node]
        of_node = [(place - other[:, None]) / (node - other)[:, None] for other in others]
        found.append((mass * np.prod(of_node, axis=0)).sum(axis=1))
    return found


def _first_order(alpha: Float64Array, sigma: Float64Array, sde: bool = False, depth: int = 1) -> Float64Array:
    """(T, 3 + depth): DDIM, with eta 1 for the SDE, as a multistep method that looks at no step before.

    With h = lambda_{t-1} - lambda_t and k = 1, or 2 for the SDE, the coefficients are, from Lu et al. 2022,
    sigma_{t-1} / sigma_t exp(-(k - 1) h), alpha_{t-1} (1 - exp(-k h)) and sigma_{t-1} sqrt(1 - exp(-2 h)) or 0. At
    t = 0, where h is infinite, these are 0, 1, 0.
    """
    alpha_prev, sigma_prev = np.append(1.0, alpha[:-1]), np.append(0.0, sigma[:-1])
    decay = alpha * sigma_prev / (sigma * alpha_prev)  # exp(-h)
    x = sigma_prev / sigma * (decay if sde else 1.0)
    x_start = alpha_prev * (1 - decay ** (2 if sde else 1))
    noise = sigma_prev * np.sqrt(1 - decay**2) if sde else np.zeros_like(x)
    return np.stack([x, x_start, noise, *np.zeros((depth, len(x)))], axis=1)


def dpm_solver_coefficients(
    alpha: Float64Array, sigma: Float64Array, sde: bool = False, depth: int = 1
) -> Float64Array:
    """(T, 3 + depth): DPM-Solver++(2M), Lu et al. 2022, algorithm 2, or SDE-DPM-Solver++(2M).

    change_1 is of_x_start / 2r with r = h_{t+1} / h_t. r is clamped to at least 1. Steps that are even in t grow in
    lambda towards t = 0, the last ones to several times the previous one, and extrapolating the change of x_0 that far
    overshoots. r tends to 1 as the number of steps grows, so the clamp does not change the order.
    """
    table = _first_order(alpha, sigma, sde, depth)
    steps = -np.diff(_lambdas(alpha, sigma))  # h_t for t = 1, ..., T-1
    table[1:-1, 3] = table[1:-1, 1] / 2 * np.minimum(steps[:-1] / steps[1:], 1.0)
    return table


def dpm_solver_3_coefficients(alpha: Float64Array, sigma: Float64Array) -> Float64Array:
    """(T, 5): DPM-Solver++(3M), the third order of Lu et al. 2022: x_0 is a parabola through three predictions.

    Its integral is exact here. Where a step is longer than those before (see _STEEP) it is that of (2M).
    """
    table, points = dpm_solver_coefficients(alpha, sigma, depth=2), _lambdas(alpha, sigma)
    at = np.arange(1, len(points) - 2)
    at = at[~_steep(points, at)]
    _, *before = _integrals(points[at], points[at - 1], [points[at], points[at + 1], points[at + 2]])
    for i, weight in enumerate(before):
        table[at, 3 + i] = -alpha[at - 1] * weight
    return table


def _steep(points: Float64Array, at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the steps from ``at`` are too much longer than the two before."""
    steps = -np.diff(points, prepend=np.inf)  # h_t
    return steps[at] > _STEEP * np.minimum(steps[at + 1], steps[at + 2])


def unipc_coefficients(alpha: Float64Array, sigma: Float64Array) -> Float64Array:
    """(T, 5): UniPC-2 of x_0 with B(h) = exp(h) - 1 (Zhao et al. 2023, algorithms 1 and 2).

    The predictor is DPM-Solver++(2M). The corrector takes the step to x_t again, with the prediction at x_t as one of
    the nodes, before the next predictor starts from it. Both are linear in the predictions, so that the correction of
    x_t is part of the coefficients of the next step, and the model is called once. The corrector's x_0 is the parabola
    through the predictions at t, t+1 and t+2, or where that does not exist, or a step is longer than the one before
    (_STEEP), the line through two.
    """
    table, points = dpm_solver_coefficients(alpha, sigma, depth=2), _lambdas(alpha, sigma)
    predictor = table.copy()
    at = np.arange(1, len(points) - 1)
    node, before = points[at], points[at + 1]
    line = alpha[at] * _integrals(before, node, [node, before])[0]  # of the prediction at t; the sum of all is known
    first, second = table[at + 1, 1] - line, np.zeros(len(at))
    steps = -np.diff(points, prepend=np.inf)
    curved = at[:-1][steps[at[:-1] + 1] <= _STEEP * steps[at[:-1] + 2]]
    if len(curved):
        bent = _integrals(points[curved + 1], points[curved], [points[curved + i] for i in range(3)])
        first[curved - 1], second[curved - 1] = alpha[curved] * bent[1], alpha[curved] * bent[2]
    # the predictor's weights of the predictions at t+1 and t+2, in whose place these are
    first -= predictor[at + 1, 1] + predictor[at + 1, 3]
    second += predictor[at + 1, 3]
    table[at, 3] -= table[at, 0] * first
    table[at, 4] -= table[at, 0] * second
    return table


def ipndm_coefficients(alpha: Float64Array, sigma: Float64Array) -> Float64Array:
    """(T, 5): iPNDM, DDIM with the noise of a linear multistep method, of third order where steps are even in sigma /
    alpha (Liu et al. 2022, section 3; Zhang & Chen 2023, which starts with the lower orders).

    The published fourth order is less accurate than the third in few steps, which are far from even.
    """
    table = _first_order(alpha, sigma, depth=2)
    weights = np.zeros((len(alpha), 2))  # Adams and Bashforth's, of the noise one and two steps before
    weights[1:-1], weights[1:-2] = (-1 / 2, 0), (-16 / 12, 5 / 12)
    shrunk, sigma_prev = np.append(1.0, alpha[:-1]) / np.maximum(alpha, _LEAST_ALPHA), np.append(0.0, sigma[:-1])
    table[:, 3:] = weights * (shrunk * sigma - sigma_prev)[:, None]
    return table


MULTISTEP = {
    Sampler.DPM: Multistep(1, dpm_solver_coefficients),
    Sampler.DPM_SDE: Multistep(1, partial(dpm_solver_coefficients, sde=True), noisy=True),
    Sampler.DPM_3M: Multistep(2, dpm_solver_3_coefficients),
    Sampler.UNIPC: Multistep(2, unipc_coefficients),
    Sampler.IPNDM: Multistep(2, ipndm_coefficients, of_eps=True),
}
"""The multistep methods."""


def heun_coefficients(alpha: Float64Array, sigma: Float64Array) -> Float64Array:
    """(T, 3): alpha_t, sigma_t and the angle arctan(sigma_t / alpha_t)."""
    return np.stack([alpha, sigma, np.arctan2(sigma, alpha)], axis=1)


def heun_step(predict: PredictXstart, table: Tensor, x: Tensor, t: Tensor, last: bool) -> dict[str, Tensor]:
    """One step to x_{t-1} (Karras et al. 2022, algorithm 1): a dict with sample and pred_xstart, that of x_t.

    ``table`` holds heun_coefficients. The step integrates over the angle: with the paper's s = cos and sigma = tan of
    the angle, x = cos x_0 + sin eps, and its ODE is dx / dangle = (alpha x - x_0) / sigma, bounded at both ends.
    Integration over sigma / alpha, which is in the thousands at the end of a cosine schedule, would make the first of
    few steps very inaccurate. With ``last`` (t = 0) the step returns x_0.
    """
    x_start = predict(x, t)
    if last:
        return {"sample": x_start, "pred_xstart": x_start}
    alpha, sigma, angle = _columns(table, t, x.ndim)
    alpha_prev, sigma_prev, angle_prev = _columns(table, t - 1, x.ndim)
    slope = (alpha * x - x_start) / sigma
    euler = x + (angle_prev - angle) * slope
    slope_prev = (alpha_prev * euler - predict(euler, t - 1)) / sigma_prev
    return {"sample": x + (angle_prev - angle) * (slope + slope_prev) / 2, "pred_xstart": x_start}


def _columns(table: Tensor, t: Tensor, ndim: int) -> list[Tensor]:
    """The table's columns at t, each as (N, 1, ...) of ``ndim`` dimensions."""
    return [column.view(-1, *[1] * (ndim - 1)) for column in table[t].unbind(1)]


def _device_of(model: Callable[..., Tensor]) -> torch.device:
    parameters = getattr(model, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    return first.device if first is not None else torch.device("cpu")
