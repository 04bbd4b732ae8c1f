"""Distances between two sets of images, by their features, in float64.

Features are float32 (N, D) and may be memory-mapped: every function reads them block by block.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Features = NDArray[np.float32]
Float64Array = NDArray[np.float64]

NEAREST = 3
"""Neighbours that span the balls of precision and recall, as in the paper's code."""

NEAREST_OF_DENSITY = 5
"""Neighbours that span the balls of density and coverage, as in the paper's code."""

SPLITS = 10
"""Parts of the samples over which the Inception score is averaged, as in the paper's code."""

_BLOCK = 1024  # rows in float64 at a time
_SLACK = 1e-9  # relative, of squared distances

_Device = torch.device | str
OnProgress = Callable[[int, int], None]
"""Called with the number of blocks done and their total."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """The mean (D,) and covariance (D, D) of ``count`` feature vectors, in float64; 0 if their number is unknown."""

    mean: Float64Array
    covariance: Float64Array
    count: int = 0


def statistics_of(features: Features, device: _Device = "cpu") -> Statistics:
    """The mean and the unbiased covariance of at least two feature vectors (N, D)."""
    count, size = features.shape
    total = torch.zeros(size, dtype=torch.float64, device=device)
    for block in _blocks(features, device):
        total += block.sum(0)
    mean = total / count
    scatter = torch.zeros(size, size, dtype=torch.float64, device=device)
    for block in _blocks(features, device):
        block -= mean
        scatter.addmm_(block.T, block)
    return Statistics(mean.cpu().numpy(), (scatter / (count - 1)).cpu().numpy(), count)


def frechet_distance(one: Statistics, other: Statistics, device: _Device = "cpu") -> float:
    """The squared Fréchet distance of the Gaussians with these statistics (Heusel et al. 2017, equation 6).

    The trace of the root of the product of two covariances is the sum of the singular values of the product of their
    roots, which keeps the precision that the root of a product with many zero eigenvalues loses.
    """
    means, roots, traces = [], [], 0.0
    for statistics in (one, other):
        covariance = torch.tensor(statistics.covariance, device=device)
        values, vectors = torch.linalg.eigh(covariance)
        rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]  # zeros come out as large as this
        roots.append(vectors * torch.where(values > rounding, values, 0).sqrt())  # root @ root.T is the covariance
        means.append(torch.tensor(statistics.mean, device=device))
        traces += float(covariance.trace())
    shared = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return float((means[0] - means[1]).square().sum() - 2 * shared) + traces


@dataclass(frozen=True)
class KernelDistance:
    """The mean of a kernel distance over ``subsets`` pairs of subsets of ``size`` vectors, and its deviation."""

    mean: float
    deviation: float
    subsets: int
    size: int


def kernel_distance(
    samples: Features, reference: Features, seed: int = 0, subsets: int = 100, size: int = 1000, device: _Device = "cpu"
) -> KernelDistance:
    """The unbiased squared MMD with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018, section 4).

    It is averaged over random subsets of both sets. They have ``size`` vectors, but at most half of the smaller set:
    with all of it in every subset there would be no deviation.
    """
    size = max(min(size, min(len(samples), len(reference)) // 2), 2)
    random = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        x, y = (_rows(part, random.choice(len(part), size, replace=False), device) for part in (samples, reference))
        found.append(squared_mmd(x, y))
    with np.errstate(over="ignore", invalid="ignore"):  # of huge features it is not finite
        return KernelDistance(float(np.mean(found)), float(np.std(found)), subsets, size)


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased squared MMD of x and y, float64 (n, D), with the kernel (x·y / D + 1)³."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)  # (n, n)

    def within(a: Tensor) -> Tensor:
        pairs = kernel(a, a)
        return (pairs.sum() - pairs.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


@dataclass(frozen=True)
class Neighbourhoods:
    """Shares of one set inside the balls around the other's vectors.

    precision and recall: of the samples inside a ball of the reference, and of the reference inside a ball of the
    samples (Kynkäänniemi et al. 2019). density and coverage: the number of the reference's balls that hold a sample,
    over the number expected, and the share of the reference's balls that hold a sample (Naeem et al. 2020).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(
    samples: Features,
    reference: Features,
    device: _Device = "cpu",
    on_progress: OnProgress | None = None,
    radii: Tensor | None = None,
) -> Neighbourhoods:
    """Precision, recall, density and coverage of the samples; each set has more than NEAREST_OF_DENSITY vectors.

    A ball reaches to the NEAREST-th (density and coverage: NEAREST_OF_DENSITY-th) nearest other vector of its own set;
    precision and recall count its surface, as their paper does, density and coverage its interior. ``radii`` are the
    reference's nearest_distances of NEAREST_OF_DENSITY, if they are known.
    """
    theirs, ours = (-(-len(part) // _BLOCK) for part in (reference, samples))
    done, total = 0, theirs**2 * (radii is None) + ours**2 + ours * theirs

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    if radii is None:
        radii = nearest_distances(reference, NEAREST_OF_DENSITY, device, advance)  # (R, 5), squared
    # A vector on a ball's surface must not count as rounding has it, which differs between processors.
    around, within = radii[:, NEAREST - 1] * (1 + _SLACK), radii[:, NEAREST_OF_DENSITY - 1] * (1 - _SLACK)
    around_samples = nearest_distances(samples, NEAREST, device, advance)[:, NEAREST - 1] * (1 + _SLACK)
    precise, density = 0, 0
    recalled, covered = (torch.zeros(len(reference), dtype=torch.bool, device=device) for _ in range(2))
    for first, x in _numbered(samples, device):
        inside = torch.zeros(len(x), dtype=torch.bool, device=device)
        reach = around_samples[first : first + len(x), None]
        for start, y in _numbered(reference, device):
            span = slice(start, start + len(y))
            distances = squared_distances(x, y)  # (n, m)
            inside |= (distances <= around[span]).any(1)
            recalled[span] |= (distances <= reach).any(0)
            interior = distances < within[span]
            density += int(interior.sum())
            covered[span] |= interior.any(0)
            advance()
        precise += int(inside.sum())
    expected = NEAREST_OF_DENSITY * len(samples)
    shares = (float(found.double().mean()) for found in (recalled, covered))
    recall, coverage = shares
    return Neighbourhoods(precise / len(samples), recall, density / expected, coverage)


def nearest_distances(
    features: Features, count: int, device: _Device = "cpu", advance: Callable[[], None] | None = None
) -> Tensor:
    """The squared distances from each vector to the ``count`` nearest others of its set, (N, count), rising."""
    found = []
    for first, x in _numbered(features, device):
        nearest = x.new_full((len(x), count), math.inf)
        for start, y in _numbered(features, device):
            distances = squared_distances(x, y)
            if start == first:
                distances.fill_diagonal_(math.inf)  # a vector is no neighbour of its own
            nearest = torch.cat([nearest, distances], 1).topk(count, dim=1, largest=False).values
            if advance is not None:
                advance()
        found.append(nearest)
    return torch.cat(found)


def nearest_in(samples: Features, reference: Features, count: int, device: _Device = "cpu") -> tuple[Tensor, Tensor]:
    """The squared distances to the ``count`` nearest vectors of the reference and their rows: (N, count), rising."""
    values, places = [], []
    for _, x in _numbered(samples, device):
        nearest = x.new_full((len(x), count), math.inf)
        rows = torch.zeros(len(x), count, dtype=torch.int64, device=device)
        for start, y in _numbered(reference, device):
            distances = torch.cat([nearest, squared_distances(x, y)], 1)
            numbers = torch.arange(start, start + len(y), device=device).expand(len(x), -1)
            nearest, chosen = distances.topk(count, dim=1, largest=False)
            rows = torch.cat([rows, numbers], 1).gather(1, chosen)
        values.append(nearest)
        places.append(rows)
    return torch.cat(values), torch.cat(places)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """The squared distances of x (n, D) and y (m, D), float64 (n, m): exactly 0 for equal vectors.

    They are x² + y² - 2xy; what is below its rounding counts as 0.
    """
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = squares - 2 * (x @ y.T)
    return distances.masked_fill_(distances <= 1e-13 * squares, 0)


def inception_score(probabilities: Features, seed: int = 0, splits: int = SPLITS) -> tuple[float, float]:
    """The Inception score and its deviation over ``splits`` parts (Salimans et al. 2016); probabilities (N, K).

    The samples are shuffled first, because a folder of them may be sorted by class. The mean divergence of a part from
    its marginal is the marginal's entropy less the mean entropy.
    """

    def entropy(p: Float64Array) -> Float64Array:
        return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)

    scores = []
    for part in np.array_split(np.random.default_rng(seed).permutation(len(probabilities)), splits):
        marginal, total = np.zeros(probabilities.shape[1]), 0.0
        for rows in np.split(part, range(_BLOCK, len(part), _BLOCK)):
            p = np.asarray(probabilities[np.sort(rows)], np.float64)
            marginal += p.sum(0)
            total += entropy(p).sum()
        if len(part):
            scores.append(math.exp(float(entropy(marginal / len(part))) - total / len(part)))
    return float(np.mean(scores)), float(np.std(scores))


def _numbered(features: Features, device: _Device) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows in float64, each with the number of its first row."""
    return ((i * _BLOCK, block) for i, block in enumerate(_blocks(features, device)))


def _blocks(features: Features, device: _Device) -> Iterator[Tensor]:
    for start in range(0, len(features), _BLOCK):
        yield torch.from_numpy(np.array(features[start : start + _BLOCK])).to(device).double()


def _rows(features: Features, numbers: NDArray[np.int64], device: _Device) -> Tensor:
    return torch.from_numpy(features[np.sort(numbers)]).to(device).double()
