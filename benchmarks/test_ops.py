"""The fused operations under pytest-benchmark: ``pytest benchmarks``, on the GPU if there is one."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastdiff.benchmarks.cases import Case, cases
from fastdiff.benchmarks.kernels import checked, expected

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


RUNS = [
    pytest.param(p, direction, name, id=f"{p.op}-{direction}-{p.shape}-{p.layout}-{name}".replace(" ", "_"))
    for p in cases(DEVICE)
    for direction in p.directions
    for name in p.candidates
]


@pytest.mark.parametrize(("case", "direction", "name"), RUNS)
def test_speed(benchmark: BenchmarkFixture, case: Case, direction: str, name: str) -> None:
    """The candidate is checked first: a wrong one fails here and is not timed."""
    inputs = [case.inputs(0, DEVICE)]
    run = checked(case, direction, name, inputs, expected(case, inputs[0], direction))

    def wait() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(wait)
