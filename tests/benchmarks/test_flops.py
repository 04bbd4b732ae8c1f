"""Flops counted on paper: against sums made by hand, and against PyTorch's own counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.benchmarks.flops import BYTES_OF_UPDATE, Convolution, Flops
from fastdiff.config import ModelConfig
from fastdiff.models import build_model, forward_flops

CONFIG = ModelConfig(image_size=16, num_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(8,))
SHAPE = ModelConfig(image_size=8)


class Two(nn.Module):
    """A 3x3 convolution of 3 to 5 channels, and a matrix product of every pixel's 5 numbers to 7."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1, device="meta")
        self.linear = nn.Linear(5, 7, bias=False, device="meta")

    def forward(self, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).permute(0, 2, 3, 1).reshape(-1, 5))


def test_a_forward_pass_by_hand() -> None:
    two = Two()
    work = Flops.of_module(two, two, SHAPE, 4, training=False)
    pixels = 4 * 8 * 8
    assert work.conv_flops == 2 * 9 * 3 * 5 * pixels
    assert work.matmul_flops == 2 * 5 * 7 * pixels
    conv, linear = 3 * pixels + 9 * 3 * 5 + 5 + 5 * pixels, 5 * pixels + 5 * 7 + 7 * pixels
    assert work.numbers == conv + linear
    assert work.n_bytes(torch.bfloat16) == 2 * work.numbers
    assert work.convolutions == {Convolution(4, 3, 5, 8): 1}
    assert next(iter(work.convolutions)).flops == work.conv_flops


def test_an_update_by_hand() -> None:
    two = Two()
    work = Flops.of_module(two, two, SHAPE, 4, training=True)
    pixels = 4 * 8 * 8
    assert work.conv_flops == 2 * (2 * 9 * 3 * 5 * pixels)  # the images have no gradient
    assert work.matmul_flops == 3 * (2 * 5 * 7 * pixels)
    parameters = 9 * 3 * 5 + 5 + 5 * 7
    assert work.fp32_bytes == BYTES_OF_UPDATE * parameters
    assert work.n_bytes(torch.float32) == 4 * work.numbers + BYTES_OF_UPDATE * parameters


@pytest.mark.parametrize("extra", [{}, {"class_cond": True}, {"small_size": 4}, {"use_checkpoint": True}])
def test_our_model_as_pytorch_counts_it(extra: dict[str, object]) -> None:
    config = ModelConfig.from_dict(CONFIG.to_dict() | extra)
    work = Flops.of(config, 3, training=False)
    assert work.flops == 3 * forward_flops(config)
    assert 0 < work.matmul_flops < work.conv_flops
    update = Flops.of(config, 3, training=True)
    assert 2.8 * work.flops < update.flops <= 3 * work.flops
    assert update.convolutions == work.convolutions


def test_the_backward_pass_as_pytorch_counts_it() -> None:
    model = build_model(CONFIG, "reference")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 16, 16), torch.zeros(2)).sum().backward()
    assert Flops.of(CONFIG, 2, training=True).flops == counter.get_total_flops()


def test_several_times() -> None:
    work = Flops(1, 2, 3, 4, {Convolution(1, 2, 3, 4): 5})
    assert work.times(10) == Flops(10, 20, 30, 40, work.convolutions)
    assert work.flops == 3
