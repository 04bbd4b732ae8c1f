"""Whole sampling loops, from given weights, x_T and noise to the pixels."""

import numpy as np
import pytest
import torch

from fastdiff import build_diffusion

from .support import ENGINES, diffusion_config, golden_model, golden_names, load, tensor


def to_uint8(sample: torch.Tensor) -> np.ndarray:
    """[-1, 1] (N, C, H, W) -> 0..255 (N, H, W, C), as the original's scripts do it."""
    return ((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@pytest.mark.parametrize(("kernels", "memory_format"), ENGINES, ids=lambda value: value)
@pytest.mark.parametrize("name", golden_names("loop_*.npz"))
def test_sample_loop(name: str, kernels: str, memory_format: str) -> None:
    data = load(name)
    assert set(data) == {"flags", "sampler", "x_T", "step_noise", "sample", "uint8"}
    model = golden_model(data["flags"], kernels, memory_format).eval()
    diffusion = build_diffusion(diffusion_config(data["flags"]), kernels=kernels)
    noise = {key: tensor(data[source]) for key, source in (("noise", "x_T"), ("step_noise", "step_noise"))}
    shape = data["x_T"].shape
    with torch.no_grad():
        if data["sampler"]["ddim"]:
            sample = diffusion.ddim_sample_loop(model, shape, eta=data["sampler"]["eta"], **noise)
        else:
            assert data["sampler"]["eta"] == 0
            sample = diffusion.p_sample_loop(model, shape, **noise)

    levels = np.abs(to_uint8(sample).astype(int) - data["uint8"].astype(int))
    assert levels.max() <= 1
    np.testing.assert_allclose(sample.cpu().numpy(), data["sample"], rtol=0, atol=1 / 127.5)
    # A level off should be a matter of rounding at the border of two levels.
    assert np.mean(levels > 0) < 1e-3
