"""The averages of the weights, against the formula in float64."""

import numpy as np
import pytest
import torch

from fastdiff.training import EMA


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
