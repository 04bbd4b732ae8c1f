"""The fused operations one by one: checked against float64 first, then timed beside what else computes the same."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor

from fastdiff.benchmarks.harness import graphed, interleaved, side_stream
from fastdiff.benchmarks.problems import Forward, Inputs, Problem
from fastdiff.benchmarks.roofs import Roofs

CACHE_BYTES = 120 * 2**20
"""Inputs take turns until they are larger than this, twice the L2 cache of an H100: what a training step finds there
is not what it needs."""

MAX_SETS = 32


@dataclass(frozen=True, eq=False)
class Row:
    """One candidate on one problem: its time, or why it has none."""

    problem: Problem
    direction: str
    candidate: str
    seconds: Sequence[float]
    remark: str = ""

    @property
    def median(self) -> float:
        """Seconds of a typical call; not a number where there is none."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    def as_dict(self, roofs: Roofs) -> dict[str, object]:
        """The columns of a CSV row."""
        n_bytes, flops = self.problem.cost(self.direction)
        ordered = sorted(self.seconds)
        p20, p80 = (ordered[int(share * (len(ordered) - 1))] if ordered else math.nan for share in (0.2, 0.8))
        return {
            "op": self.problem.op,
            "direction": self.direction,
            "shape": self.problem.shape,
            "dtype": str(self.problem.dtype).removeprefix("torch."),
            "layout": self.problem.layout,
            "candidate": self.candidate,
            "median_us": _rounded(self.median * 1e6),
            "p20_us": _rounded(p20 * 1e6),
            "p80_us": _rounded(p80 * 1e6),
            "gb_per_s": _rounded(n_bytes / self.median / 1e9),
            "tflop_per_s": _rounded(flops / self.median / 1e12),
            "share_of_roof": _rounded(roofs.floor(n_bytes, flops) / self.median),
            "megabytes": _rounded(n_bytes / 1e6),
            "copy_gb_per_s": _rounded(roofs.bytes_per_s / 1e9),
            "matmul_tflop_per_s": _rounded(roofs.flops_per_s / 1e12),
            "remark": self.remark,
        }


@dataclass(frozen=True)
class Expected:
    """What a problem's results are in float64, and how far off a candidate may be."""

    results: Sequence[Tensor]
    error: float

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs, direction: str) -> Self:
        """Twice the reference's own error in the problem's dtype, and a rounding."""
        truth = _results(problem.reference, problem.widened(inputs), direction)
        own = _error(_results(problem.reference, inputs, direction), truth)
        return cls(truth, 2 * own + torch.finfo(problem.dtype).eps)


def checked(
    problem: Problem, direction: str, name: str, inputs: Sequence[Inputs], expected: Expected
) -> Callable[[], object]:
    """A call of the candidate on each of the inputs; ValueError where what it computes from the first is wrong."""
    candidate = problem.candidates[name]
    error = _error(_results(candidate, inputs[0], direction), expected.results)
    if not error <= expected.error:
        raise ValueError(f"not timed: error {error:.1e} of the norm, allowed {expected.error:.1e}")
    return _over_all_sets(candidate, inputs, direction)


def measure(problem: Problem, direction: str, rounds: int, device: torch.device) -> Iterator[Row]:
    """Time the problem's candidates in one direction, "forward" or "backward"; those that are wrong are not timed."""
    # a compiled candidate would otherwise become an eager one after eight shapes
    torch._dynamo.reset()
    n_bytes, _ = problem.cost(direction)
    sets = 1 if device.type == "cpu" else min(MAX_SETS, max(2, math.ceil(CACHE_BYTES / n_bytes)))
    inputs = [problem.inputs(seed, device) for seed in range(sets)]
    expected = Expected.of(problem, inputs[0], direction)
    ready: dict[str, Callable[[], object]] = {}
    remarks: dict[str, str] = {}
    for name in problem.candidates:
        try:
            ready[name] = graphed(checked(problem, direction, name, inputs, expected), device)
        except Exception as reason:  # whatever keeps a candidate from running or being right is its remark
            remarks[name] = f"{type(reason).__name__}: {str(reason).splitlines()[0][:100]}"
    timings = {t.name: t for t in interleaved(ready, rounds, 2, device)} if ready else {}
    for name in problem.candidates:
        seconds = [s / sets for s in timings[name].seconds] if name in timings else []
        yield Row(problem, direction, name, seconds, remarks.get(name, ""))


def measure_all(problems: Iterable[Problem], rounds: int, device: torch.device) -> Iterator[list[Row]]:
    """The rows of each problem, direction by direction."""
    # the default would let a compiled backward pass overwrite what its second call needs
    with side_stream(device), torch._functorch.config.patch(donated_buffer=False):
        for problem, direction in itertools.product(problems, ("forward", "backward")):
            if direction in problem.directions:
                yield list(measure(problem, direction, rounds, device))


def _over_all_sets(candidate: Forward, inputs: Sequence[Inputs], direction: str) -> Callable[[], object]:
    """One call for each set of inputs; of a backward pass, without the forward pass before it.

    The results of all are kept until the last: written to the same memory, they would never leave the cache.
    """
    if direction == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [candidate(**_arguments(tensors)) for tensors in inputs]

        forward()
        return forward
    recorded = [(candidate(**_arguments(tensors)), *_leaves_and_gradient(tensors)) for tensors in inputs]

    def backward() -> list[tuple[Tensor, ...]]:
        return [torch.autograd.grad(y, leaves, gradient, retain_graph=True) for y, leaves, gradient in recorded]

    backward()
    return backward


def _results(candidate: Forward, tensors: Inputs, direction: str) -> list[Tensor]:
    """The output, or every gradient."""
    if direction == "forward":
        with torch.no_grad():
            return [candidate(**_arguments(tensors))]
    leaves, gradient = _leaves_and_gradient(tensors)
    return list(torch.autograd.grad(candidate(**_arguments(tensors)), leaves, gradient))


def _arguments(tensors: Inputs) -> dict[str, Tensor | None]:
    return {name: tensor for name, tensor in tensors.items() if name != "gradient"}


def _leaves_and_gradient(tensors: Inputs) -> tuple[list[Tensor], Tensor]:
    gradient = tensors["gradient"]
    assert gradient is not None
    return [t for t in tensors.values() if t is not None and t.requires_grad], gradient


def _error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest over the tensors of ||found - truth|| / ||truth||."""
    return max(float((f.double() - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
