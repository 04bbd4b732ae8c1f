"""What a model's parts are on one process; test_distributed.py has several."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdiff.config import Parallel
from fastdiff.training.parallel import accumulating, own_part, part_of, total_norm, whole_of

from .support import trainer


@pytest.mark.parametrize("parameter", [nn.Parameter(torch.randn(3, 2)), torch.ones(()), torch.zeros(2, 4).T])
def test_a_plain_tensor_is_its_own_part_and_whole(parameter: torch.Tensor) -> None:
    other = torch.full_like(parameter, 5.0)
    assert own_part(parameter) is parameter
    assert part_of(other, parameter) is other
    assert whole_of(other, parameter) is other


@pytest.mark.parametrize("values", [[3.0, 4.0], [0.0, 0.0], [1e30, 1e30], [math.nan, 1.0], [math.inf, 1.0]])
def test_the_norm_is_pytorchs(values: list[float]) -> None:
    gradients = [torch.tensor(values), torch.full((2, 3), values[0])]
    norm = total_norm(gradients, [torch.zeros(2), torch.zeros(2, 3)])
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(gradients), equal_nan=True, rtol=0, atol=0)
    if values[0] == 3:
        assert float(norm) == pytest.approx(math.sqrt(3**2 + 4**2 + 6 * 3**2))


def test_gradients_of_a_plain_module_accumulate_as_ever() -> None:
    module = nn.Linear(2, 1, bias=False)
    with accumulating(module):
        module(torch.ones(1, 2)).sum().backward()
    with accumulating(module):
        module(2 * torch.ones(1, 2)).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[3, 3]]


@pytest.mark.parametrize("parallel", list(Parallel))
def test_one_process_needs_no_wrapper(tmp_path: Path, shapes: Path, parallel: Parallel) -> None:
    subject = trainer(tmp_path, shapes, parallel=parallel)
    assert subject.module is subject.model
    assert all(p is held for p, held in zip(subject.state.parameters, subject.state.held, strict=True))
    assert all(p is held for p, held in zip(subject.state.parameters, subject.state.held, strict=True))
