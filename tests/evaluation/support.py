"""The bound of a data set by the process's own functions, an image at a time."""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import Checkpoint
from fastdiff.data import Dataset, normalised
from fastdiff.evaluation.nll import TERMS, Bound
from fastdiff.kernels import philox_normal

from ..numerics import assert_equal_but_for_rounding


def by_hand(
    checkpoint: Checkpoint, dataset: Dataset, count: int, *, seed: int = 0, labels: Sequence[int] | None, double: bool
) -> Bound:
    """``count`` images, in fp32 or in float64, where the images and the noise are the same numbers."""
    dtype = torch.float64 if double else torch.float32
    process, net = checkpoint.diffusion, deepcopy(checkpoint.model).eval().to(dtype)
    steps = process.num_timesteps
    priors, terms = [], np.zeros((len(TERMS), count, steps))
    for i in range(count):
        place = i % len(dataset.images)
        x = normalised(torch.from_numpy(dataset.images[place : place + 1])).to(dtype)
        kwargs: dict[str, Tensor] = {}
        if labels is not None:
            kwargs["y"] = torch.tensor([labels[place]])
        if checkpoint.model_config.small_size:
            kwargs["low_res"] = F.avg_pool2d(x, 2)
        priors.append(float(process.prior_bpd(x)))
        for column, t in enumerate(range(steps - 1, -1, -1)):
            noise = philox_normal(seed, torch.tensor([i]), steps - t, x.shape[1:]).to(dtype)
            step = torch.tensor([t])
            x_t = process.q_sample(x, step, noise)
            with torch.no_grad():
                out = process.vb_terms_bpd(net, x, x_t, step, model_kwargs=kwargs)
            eps = process.eps_from_xstart(x_t, step, out["pred_xstart"])
            terms[:, i, column] = [
                float(out["output"]),
                float((eps - noise).square().mean()),
                float((out["pred_xstart"] - x).square().mean()),
            ]
    prior = np.array(priors)
    return Bound(prior + terms[0].sum(1), prior, dict(zip(TERMS, terms.mean(1), strict=True)), len(dataset.images))


def assert_same_bound(found: Bound, reference: Bound, truth: Bound) -> None:
    """Equal but for rounding; the terms relative to their step, since those near t = 0 are larger by orders."""
    for name in ("total_bpd", "prior_bpd"):
        assert_equal_but_for_rounding(*(getattr(bound, name) for bound in (found, reference, truth)), what=name)
    for name in TERMS:
        step_sizes = truth.terms[name]
        parts = (bound.terms[name] / step_sizes for bound in (found, reference, truth))
        assert_equal_but_for_rounding(*parts, what=name)
