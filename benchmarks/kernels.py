"""The fused operations one by one: checked against float64, then timed together with their alternatives."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor

from fastdiff.benchmarks.cases import Case, Forward, Inputs
from fastdiff.benchmarks.harness import Timing, graphed, interleaved, peak_bytes, side_stream
from fastdiff.benchmarks.roofline import Roofline
from fastdiff.benchmarks.rows import Row
from fastdiff.kernels import Backend
from fastdiff.runtime.memory import out_of_memory

CACHE_BYTES = 120 * 2**20
"""Total size of the inputs that take turns, twice the L2 cache of an H100: a training step does not find its inputs in
the cache either."""

MAX_SETS = 32


@dataclass(frozen=True, eq=False)
class Measured:
    """One candidate on one case: its time, or the reason why it has none."""

    case: Case
    direction: str
    candidate: str
    timing: Timing | None
    peak_gib: float = math.nan
    reason: Exception | None = None

    @property
    def median(self) -> float:
        """Median seconds of a call; NaN if there is no time."""
        return self.timing.median if self.timing else math.nan

    @property
    def remark(self) -> str:
        """The reason why it has no time."""
        if self.reason is None:
            return ""
        if out_of_memory(self.reason):
            return "out of memory"
        return f"{type(self.reason).__name__}: {' '.join(str(self.reason).splitlines()[:1])[:100]}"

    def row(self, roofline: Roofline) -> Row:
        """The row of this result. One of our candidates without a time has failed, unless it ran out of memory."""
        case, reason = self.case, self.reason
        n_bytes, flops = case.costs[self.direction]
        return Row(
            "kernels",
            f"{case.op} {self.direction}, {case.shape}, {str(case.dtype).removeprefix('torch.')}, {case.layout}",
            self.candidate,
            self.timing,
            flops=flops,
            n_bytes=n_bytes,
            limit_s=roofline.floor(n_bytes, flops),
            peak_gib=self.peak_gib,
            remark=self.remark,
            failed=reason is not None and not out_of_memory(reason) and self.candidate in tuple(Backend),
        )


Expected = tuple[list[Tensor], float]
"""A case's results in float64, and the largest error that a candidate may have."""


def expected(case: Case, inputs: Inputs, direction: str) -> Expected:
    """The error allowed is twice the reference's error in the case's dtype, plus one rounding."""
    wide = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    truth = run_once(case.reference, wide, direction)
    return truth, 2 * _error(run_once(case.reference, inputs, direction), truth) + torch.finfo(case.dtype).eps


def checked(case: Case, direction: str, name: str, inputs: Sequence[Inputs], right: Expected) -> Callable[[], object]:
    """A call of the candidate on each of the inputs; ValueError if its result for the first one is wrong.

    All results are kept until the last call: written to the same memory, they would never leave the cache. A backward
    pass is called without its forward pass.
    """
    candidate, (truth, allowed) = case.candidates[name], right
    error = _error(run_once(candidate, inputs[0], direction), truth)
    if not error <= allowed:
        raise ValueError(f"not timed: error {error:.1e} of the norm, allowed {allowed:.1e}")
    if direction == "forward":

        def run() -> object:
            with torch.no_grad():
                return [_call(candidate, tensors) for tensors in inputs]

    else:
        recorded = [(_call(candidate, tensors), _leaves(tensors), tensors["gradient"]) for tensors in inputs]

        def run() -> object:
            return [torch.autograd.grad(*one, retain_graph=True) for one in recorded]

    run()
    return run


def input_sets(case: Case, direction: str, device: torch.device) -> list[Inputs]:
    """A case's inputs, as many sets as a GPU's cache cannot hold."""
    sets = 1 if device.type == "cpu" else min(MAX_SETS, max(2, math.ceil(CACHE_BYTES / case.costs[direction][0])))
    return [case.inputs(seed, device) for seed in range(sets)]


def measure(case: Case, direction: str, rounds: int, device: torch.device) -> Iterator[Measured]:
    """Time the case's candidates in one direction, "forward" or "backward"; wrong ones are not timed.

    The reference comes first, because the others are compared with it.
    """
    # otherwise a compiled candidate would run eagerly after eight shapes
    torch.compiler.reset()
    names = sorted(case.candidates, key=lambda name: name != Backend.REFERENCE)
    try:
        inputs = input_sets(case, direction, device)
        right = expected(case, inputs[0], direction)
    except Exception as reason:  # without the expected result no candidate can be checked
        yield from (Measured(case, direction, name, None, reason=reason) for name in names)
        return
    ready: dict[str, Callable[[], object]] = {}
    reasons: dict[str, Exception] = {}
    peaks: dict[str, float] = {}
    for name in names:
        try:
            run = checked(case, direction, name, inputs, right)
            peaks[name] = _peak_gib(case.candidates[name], inputs[0], direction, device)
            ready[name] = graphed(run, device)
        except Exception as reason:  # any failure or wrong result becomes its remark
            reasons[name] = reason.with_traceback(None)
    timings = {t.name: t.divided(len(inputs)) for t in interleaved(ready, rounds, 2, device, names[0], reasons)}
    for name in names:
        yield Measured(case, direction, name, timings.get(name), peaks.get(name, math.nan), reasons.get(name))


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Calls can be captured, and backward passes repeated: by default a compiled one may overwrite what it needs."""
    with side_stream(device), torch._functorch.config.patch(donated_buffer=False):
        yield


def measure_all(cases: Iterable[Case], rounds: int, device: torch.device) -> Iterator[list[Measured]]:
    """The rows of each case, direction by direction."""
    with repeatable(device):
        for case in cases:
            for direction in case.directions:
                yield list(measure(case, direction, rounds, device))


def run_once(candidate: Forward, tensors: Inputs, direction: str) -> list[Tensor]:
    """The output or, of a backward pass, which its forward pass precedes, every gradient."""
    if direction == "forward":
        with torch.no_grad():
            return [_call(candidate, tensors)]
    return list(torch.autograd.grad(_call(candidate, tensors), _leaves(tensors), tensors["gradient"]))


def _call(candidate: Forward, tensors: Inputs) -> Tensor:
    return candidate(**{name: tensor for name, tensor in tensors.items() if name != "gradient"})


def _leaves(tensors: Inputs) -> list[Tensor]:
    return [tensor for tensor in tensors.values() if tensor.requires_grad]


def _peak_gib(candidate: Forward, tensors: Inputs, direction: str, device: torch.device) -> float:
    """Peak memory of one call with its inputs; of a backward pass, including its forward pass."""
    held = sum(tensor.nbytes for tensor in tensors.values())
    return (held + peak_bytes(lambda: run_once(candidate, tensors, direction), device)) / 2**30


def _error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest ||found - truth|| / ||truth|| of the tensors; NaN if one is NaN, which Python's max may lose."""
    return float(torch.stack([(f.double() - t).norm() / t.norm() for f, t in zip(found, truth, strict=True)]).max())
