"""The fused operations under pytest-benchmark: ``pytest benchmarks``, on the GPU if there is one."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastdiff.benchmarks.kernels import Expected, checked
from fastdiff.benchmarks.problems import Problem, problems

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cases() -> list[object]:
    """Every problem's candidates in every direction."""
    return [
        pytest.param(p, direction, name, id=f"{p.op}-{direction}-{p.shape}-{p.layout}-{name}".replace(" ", "_"))
        for p in problems(DEVICE)
        for direction in p.directions
        for name in p.candidates
    ]


@pytest.mark.parametrize(("problem", "direction", "name"), cases())
def test_speed(benchmark: BenchmarkFixture, problem: Problem, direction: str, name: str) -> None:
    """The candidate is checked first: a wrong one fails here and is not timed."""
    inputs = [problem.inputs(0, DEVICE)]
    run = checked(problem, direction, name, inputs, Expected.of(problem, inputs[0], direction))

    def wait() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(wait)
