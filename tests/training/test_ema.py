"""The averages of the weights, against the formula in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.runtime.distributed import World
from fastdiff.training import EMA
from fastdiff.training.ema import _owners


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9999])
def test_the_formula(rate: float, warmup: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((40, 3))
    parameter = torch.nn.Parameter(torch.from_numpy(values[0]).float())
    ema = EMA([parameter], rate, warmup)
    expected = values[0]
    for s, value in enumerate(values[1:]):
        parameter.data.copy_(torch.from_numpy(value))
        ema.update()
        r = min(rate, (1 + s) / (10 + s)) if warmup else rate
        expected = r * expected + (1 - r) * value
    np.testing.assert_allclose(ema.tensors()[0].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert ema.updates == 39


def test_warmup_forgets_the_initial_weights() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    warm, cold = EMA([parameter], 0.9999, warmup=True), EMA([parameter], 0.9999, warmup=False)
    parameter.data.zero_()
    for _ in range(200):
        warm.update()
        cold.update()
    assert float(warm.tensors()[0]) < 1e-6
    assert float(cold.tensors()[0]) == pytest.approx(0.9999**200, rel=1e-4)


def test_averages_are_fp32_whatever_the_parameters_are() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    ema = EMA([parameter], 0.999, warmup=False)
    parameter.data.fill_(1)
    for _ in range(100):
        ema.update()
    assert ema.tensors()[0].dtype == torch.float32
    # in bf16 an average of 0.1 could not take in a thousandth of the difference
    assert float(ema.tensors()[0]) == pytest.approx(1 - 0.999**100, rel=1e-3)


def test_averages_are_no_views_and_load_goes_on() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    ema = EMA([parameter], 0.5, warmup=True)
    parameter.data.fill_(3)
    assert ema.tensors()[0].tolist() == [1, 1]
    ema.update()
    other = EMA([parameter], 0.5, warmup=True)
    other.load([t.clone() for t in ema.tensors()], ema.updates)
    parameter.data.fill_(-2)
    ema.update()
    other.update()
    assert torch.equal(ema.tensors()[0], other.tensors()[0])
    assert not ema.tensors()[0].requires_grad


# Several processes that hold equal parameters


SHAPES = [(5, 3), (2,), (), (4, 2, 2), (7,), (1, 1), (0,), (9,)]


def everybodys(emas: list[EMA], monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """What each process gets when all of them ask. First each sends what is its own, then each receives."""
    sent: dict[int, Tensor] = {}

    def broadcast(rank: int, receiving: bool) -> Any:
        def call(flat: Tensor, src: int) -> None:
            if src == rank and not receiving:
                sent[src] = flat.clone()
            elif src != rank and receiving:
                flat.copy_(sent[src])

        return call

    found = []
    for receiving in (False, True):
        found = []
        for rank, ema in enumerate(emas):
            monkeypatch.setattr("torch.distributed.broadcast", broadcast(rank, receiving))
            found.append(ema.tensors())
    return found


def walk(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 20])
def test_many_processes_keep_one_average_together(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    parameters[3].data = parameters[3].data.bfloat16()
    parameters[0].data = torch.zeros(3, 5).T  # not contiguous, like a convolution's in channels_last
    walk(parameters, 0)
    alone = EMA(parameters, 0.9)
    emas = [EMA(parameters, 0.9, world=World(rank, processes)) for rank in range(processes)]
    for seed in range(1, 6):
        walk(parameters, seed)
        for ema in (alone, *emas):
            ema.update()
    found = everybodys(emas, monkeypatch)
    for tensors in found:
        assert len(tensors) == len(parameters)
        for ours, expected in zip(tensors, alone.tensors(), strict=True):
            assert ours.dtype is torch.float32
            assert torch.equal(ours, expected)
    # each keeps a part, and no more than that
    assert sum(a.numel() for ema in emas for a in ema._averages) == sum(p.numel() for p in parameters)


@pytest.mark.parametrize("processes", [2, 5])
def test_many_processes_load_one_average(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    emas = [EMA(parameters, 0.5, world=World(rank, processes)) for rank in range(processes)]
    saved = [torch.full(shape, 7.0 + i) for i, shape in enumerate(SHAPES)]
    for ema in emas:
        ema.load(iter(saved), 41)
    for tensors in everybodys(emas, monkeypatch):
        assert all(torch.equal(ours, expected) for ours, expected in zip(tensors, saved, strict=True))
    assert {ema.updates for ema in emas} == {41}
    walk(parameters, 1)
    for ema in emas:
        ema.update()
    expected = [0.5 * (7.0 + i) + 0.5 * p.detach() for i, p in enumerate(parameters)]
    for tensors in everybodys(emas, monkeypatch):
        for ours, value in zip(tensors, expected, strict=True):
            torch.testing.assert_close(ours, value)


@given(sizes=st.lists(st.integers(0, 10**7), min_size=1, max_size=60), processes=st.integers(1, 40))
def test_the_parts_are_neighbours_and_about_equal(sizes: list[int], processes: int) -> None:
    owners = _owners(sizes, processes)
    assert len(owners) == len(sizes)
    assert owners == sorted(owners)
    assert set(owners) <= set(range(processes))
    loads = [0] * processes
    for size, owner in zip(sizes, owners, strict=True):
        loads[owner] += size
    # no better than the largest one, which cannot be cut, and the rounding of each half of one
    assert max(loads) <= sum(sizes) / processes + max(sizes) + 2
    if min(sizes) == max(sizes) > 1 and len(sizes) >= processes:
        assert min(loads) > 0


def test_a_large_one_goes_where_the_middle_of_it_lies() -> None:
    assert _owners([1, 100], 2) == [0, 1]
    assert _owners([100, 1, 1], 2) == [0, 1, 1]
    assert _owners([0, 0], 3) == [0, 0]
