"""The layers that do not only wrap one of PyTorch's."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.models import layers
from fastdiff.models.blocks import ResBlock
from fastdiff.models.layers import Conv1x1, repeat_pixels

from ..support import inputs, randomise
from .support import small_model

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("second", [0, 24])
def test_conv1x1_of_two_inputs(second: int, layout: str, precision: str) -> None:
    """Beside the convolution of their concatenation in float64: values, gradients and strides."""
    memory_format, dtype = LAYOUTS[layout], torch.float32 if precision == "fp32" else torch.bfloat16
    torch.manual_seed(0)
    conv = Conv1x1(40 + second, 32).to(memory_format=memory_format)
    other = torch.nn.Parameter(torch.randn(32))
    if precision == "bf16":
        conv, other = conv.to(dtype), torch.nn.Parameter(other.detach().to(dtype))
    maps = [
        torch.randn(3, channels, 6, 5).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        for channels in (40, second)
        if channels
    ]
    upstream = torch.randn(3, 32, 6, 5).to(dtype).contiguous(memory_format=memory_format)
    leaves = [*maps, conv.weight, conv.bias, other]
    with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
        y = conv(*maps, other_bias=other)
    gradients = torch.autograd.grad(y, leaves, upstream)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.conv2d(torch.cat(wide[:-3], dim=1), wide[-3], wide[-2] + wide[-1])
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    tolerance = 1e-5 if precision == "fp32" else 0.02
    for found, right in zip((y, *gradients), (expected, *wanted), strict=True):
        assert (found.double() - right).abs().max() <= tolerance * right.abs().max()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.stride() == leaf.stride()


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_the_last_cast_writes_the_layout_of_x(memory_format: str) -> None:
    model = small_model("torch", memory_format).eval()
    given = inputs(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(**given)
        last = model(**{**given, "x": given["x"].contiguous(memory_format=torch.channels_last)})
    assert output.dtype == last.dtype == torch.float32
    assert output.is_contiguous()
    assert last.is_contiguous(memory_format=LAYOUTS[memory_format])
    torch.testing.assert_close(output, last, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_a_skip_connection_of_another_dtype(x_dtype: torch.dtype) -> None:
    """Autocast leaves some operations' results in fp32: the two are promoted, as a concatenation promotes them."""
    block = randomise(ResBlock(96, 64, 32, 0.0, True, False, "triton").to(memory_format=torch.channels_last), seed=0)
    x, skip, emb = torch.randn(2, 64, 4, 4), torch.randn(2, 32, 4, 4), torch.randn(2, 32)
    x, skip = (each.contiguous(memory_format=torch.channels_last) for each in (x, skip))
    expected = block(x, emb, skip)
    with torch.autocast("cpu", torch.bfloat16):
        found = block(x.to(x_dtype), emb, skip.bfloat16())
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_repeated_pixels_keep_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's autocast, but not a CPU's, would make them fp32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, device=device)
    run, cast = F.interpolate, []

    def interpolate(*args: Any, **kwargs: Any) -> Tensor:
        cast.append(torch.is_autocast_enabled(device))
        return run(*args, **kwargs)

    monkeypatch.setattr(layers.F, "interpolate", interpolate)
    with torch.autocast(device, torch.bfloat16):
        y = repeat_pixels(x)
    assert cast == [False]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[..., 1::2, ::2], x)
