"""The bound of a data set by the process's own functions, an image at a time."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import Checkpoint
from fastdiff.data import Dataset, normalised
from fastdiff.evaluation.nll import TERMS, Bound
from fastdiff.kernels import philox_normal
from fastdiff.models import UNet

from ..numerics import assert_equal_but_for_rounding


@dataclass(frozen=True)
class ByHand:
    """The prior (N,) and the terms (T, 3, N) of a data set's first images."""

    priors: Tensor
    terms: Tensor
    images: int

    def bound(self, count: int) -> Bound:
        """That of the first ``count``."""
        priors, terms = (values[..., :count].double().numpy() for values in (self.priors, self.terms))
        means = dict(zip(TERMS, terms.mean(-1).T, strict=True))
        return Bound(priors + terms[:, 0].sum(0), priors, means, self.images)


def by_hand(
    checkpoint: Checkpoint, dataset: Dataset, count: int, *, seed: int = 0, labels: Sequence[int] | None, double: bool
) -> ByHand:
    """``count`` images: in fp32 one after the other, or together in float64, from the same pixels and noise."""
    net = deepcopy(checkpoint.model).eval().to(torch.float64 if double else torch.float32)
    numbers = torch.arange(count)
    parts = [_by_hand(checkpoint, net, dataset, part, seed, labels) for part in numbers.split(count if double else 1)]
    return ByHand(*(torch.cat(values, dim=-1) for values in zip(*parts, strict=True)), len(dataset.images))


def _by_hand(
    checkpoint: Checkpoint, net: UNet, dataset: Dataset, numbers: Tensor, seed: int, labels: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """The prior (N,) and the terms (T, 3, N) of these images."""
    process, dtype = checkpoint.diffusion, net.out[2].weight.dtype
    places = numbers % len(dataset.images)
    x = normalised(torch.from_numpy(dataset.images[places.numpy()])).to(dtype)
    kwargs: dict[str, Tensor] = {}
    if labels is not None:
        kwargs["y"] = torch.tensor(labels)[places]
    if checkpoint.model_config.small_size:
        kwargs["low_res"] = F.avg_pool2d(x, 2)
    columns = []
    for t in range(process.num_timesteps - 1, -1, -1):
        noise = philox_normal(seed, numbers, process.num_timesteps - t, x.shape[1:]).to(dtype)
        steps = torch.full((len(x),), t)
        x_t = process.q_sample(x, steps, noise)
        with torch.no_grad():
            out = process.vb_terms_bpd(net, x, x_t, steps, model_kwargs=kwargs)
        eps = process.eps_from_xstart(x_t, steps, out["pred_xstart"])
        squares = ((eps - noise).square(), (out["pred_xstart"] - x).square())
        columns.append(torch.stack([out["output"], *(square.mean((1, 2, 3)) for square in squares)]))
    return process.prior_bpd(x), torch.stack(columns)


def assert_same_bound(found: Bound, reference: Bound, truth: Bound) -> None:
    """Equal but for rounding; the terms relative to their step, since those near t = 0 are larger by orders.

    The bound's last term, t = 0, is held by the total alone: its logarithm of a difference of two nearly equal numbers
    loses half of fp32's digits, and in one norm with the others that would hide whatever else is wrong.
    """
    for name in ("total_bpd", "prior_bpd"):
        assert_equal_but_for_rounding(*(getattr(bound, name) for bound in (found, reference, truth)), what=name)
    for name in TERMS:
        step_sizes = truth.terms[name]
        steps = slice(-1) if name == "vb" else slice(None)
        parts = ((bound.terms[name] / step_sizes)[steps] for bound in (found, reference, truth))
        assert_equal_but_for_rounding(*parts, what=name)
