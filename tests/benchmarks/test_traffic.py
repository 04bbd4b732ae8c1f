"""The bytes that a training step moves, counted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.benchmarks.traffic import counted, traffic
from fastdiff.config import ModelConfig
from fastdiff.kernels import group_norm_silu
from fastdiff.presets import PRESETS

IMAGE = 2 * 64 * 8 * 8 * 2  # bytes of x


def images(size: int = 8) -> Tensor:
    return torch.empty(2, 64, size, size, dtype=torch.bfloat16, device="meta", requires_grad=True)


def weights(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: (x + 1).view(2, -1), {"add": 2 * IMAGE}),
        (lambda x: torch.cat([x, x], 1), {"cat": 3 * IMAGE}),  # the same tensor is read once
        (lambda x: F.conv2d(x, weights(64, 64, 3, 3), weights(64), padding=1), {"bias of a convolution": 2 * IMAGE}),
        (lambda x: F.conv2d(x, weights(64, 64, 3, 3), padding=1), {}),
        (lambda x: torch.bmm(x.flatten(2).mT, x.flatten(2)), {}),
    ],
)
def test_operations(run: Callable[[Tensor], Tensor], expected: dict[str, int]) -> None:
    with torch.no_grad():
        assert counted(lambda: run(images())) == expected


def test_the_gradient_of_a_bias_is_a_pass() -> None:
    x, weight, bias = images(), weights(64, 64, 3, 3), weights(64)
    y = F.conv2d(x, weight, bias, padding=1)
    gradient = torch.empty_like(y)
    assert counted(lambda: y.backward(gradient)) == {"gradient of a bias": IMAGE}


def test_the_input_beside_the_norm_saves_two_passes() -> None:
    """Of the three in which autograd adds the gradients, the kernel needs one."""

    def run(with_input: bool) -> int:
        x, weight, bias = images(), weights(64), weights(64)
        y = group_norm_silu(x, weight, bias, backend="triton", with_input=with_input)
        y, x = y if with_input else (y, x)
        out = torch.empty_like(x)
        return sum(counted(lambda: torch.autograd.backward([y, x * 2], [out, out])).values())

    assert run(False) - run(True) == 2 * IMAGE


def test_the_documents_figure() -> None:
    found = sum(traffic(PRESETS["imagenet64_cond"].config(ModelConfig), 64).values())
    text = (Path(__file__).parents[2] / "docs/kernels.md").read_text(encoding="utf-8")
    assert f"images moves {found / 1e9:.1f} GB instead of 57.9" in " ".join(text.split())
