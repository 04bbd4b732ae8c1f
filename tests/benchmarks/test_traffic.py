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


def test_the_concatenation_is_not_written() -> None:
    """It would be read and written, and the gradients of its parts be views that a convolution copies."""

    def run(joined: bool) -> dict[str, int]:
        x, second, weight, bias = images(), images(), weights(128), weights(128)

        def both() -> None:
            inputs = (x * 2, second * 2)
            if joined:
                y = group_norm_silu(inputs[0], weight, bias, second=inputs[1], backend="triton")
            else:
                y = group_norm_silu(torch.cat(inputs, 1), weight, bias, backend="triton")
            y.backward(torch.empty_like(y))

        return dict(counted(both))

    apart, found = run(False), run(True)
    assert apart.pop("cat") == 4 * IMAGE
    assert found == apart


def test_a_product_that_is_added_to_another_reads_and_writes_it() -> None:
    x, y = torch.empty(8, 4, device="meta"), torch.empty(8, 8, device="meta")
    assert counted(lambda: y.addmm_(x, x.T)) == {"product added to another": 2 * 8 * 8 * 4}


def test_the_gradient_of_a_slice_is_copied() -> None:
    x, weight = images(), weights(64, 64, 3, 3)
    y = F.conv2d(x, weight, padding=1)
    gradient = torch.empty(2, 128, 8, 8, dtype=torch.bfloat16, device="meta")[:, :64]
    assert counted(lambda: y.backward(gradient)) == {"copy of a gradient": 2 * IMAGE}


def test_the_documents_figure() -> None:
    model = PRESETS["imagenet64_cond"].config(ModelConfig)
    apart, found = (sum(traffic(model, 64, beside).values()) / 1e9 for beside in (False, True))
    text = (Path(__file__).parents[2] / "docs/kernels.md").read_text(encoding="utf-8")
    assert f"images moves {found:.1f} GB beside its products instead of {apart:.1f}" in " ".join(text.split())
