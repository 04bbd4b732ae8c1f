"""Between what is stored and what a model sees."""

import numpy as np
import torch

from fastdiff.data import normalised, to_uint8

EVERY = torch.arange(256, dtype=torch.uint8).view(2, 8, 16, 1).expand(2, 8, 16, 3)


def test_normalised() -> None:
    images = torch.tensor([[[[0, 51, 102], [153, 204, 255]]]], dtype=torch.uint8)  # (1, 1, 2, 3)
    result = normalised(images)
    assert (result.shape, result.dtype) == ((1, 3, 1, 2), torch.float32)
    expected = torch.tensor([[-1.0, 0.2], [-0.6, 0.6], [-0.2, 1.0]]).view(1, 3, 1, 2)
    torch.testing.assert_close(result, expected)
    assert (result.min(), result.max()) == (-1, 1)


def test_to_uint8_rounds_towards_zero() -> None:
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 0, 127, 254, 255, 255]


def test_to_uint8_is_ready_to_be_copied() -> None:
    rgb = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = to_uint8(rgb.expand(2, 3, 4, 5).contiguous(memory_format=memory_format))
        assert (images.shape, images.dtype) == ((2, 4, 5, 3), torch.uint8)
        assert images.is_contiguous()
        assert np.unique(images.numpy().reshape(-1, 3), axis=0).tolist() == [[0, 127, 255]]


def test_there_and_back_is_within_one_level() -> None:
    """Not always the same: fp32 may put a pixel just below its level, which rounding towards zero then leaves."""
    back = to_uint8(normalised(EVERY)).int()
    assert (back - EVERY.int()).abs().max() <= 1
    assert torch.equal(to_uint8(normalised(EVERY) + 1e-3), EVERY)
