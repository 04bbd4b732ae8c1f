"""Whole sampling loops, from given weights, x_T and noise to the pixels."""

import numpy as np
import pytest
import torch

from fastdiff import SampleConfig, build_diffusion
from fastdiff.config import Sampler
from fastdiff.sampling import Loop

from .support import DEVICE, ENGINES, diffusion_config, golden_model, golden_names, load, tensor


def to_uint8(sample: torch.Tensor) -> np.ndarray:
    """[-1, 1] (N, C, H, W) -> 0..255 (N, H, W, C), as the original's scripts do it."""
    return ((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@pytest.mark.parametrize(("kernels", "memory_format"), ENGINES, ids=lambda value: value)
@pytest.mark.parametrize("name", golden_names("loop_*.npz"))
def test_sample_loop(name: str, kernels: str, memory_format: str) -> None:
    """By the engine's loop, which a GPU replays as graphs, and by the process's own."""
    data = load(name)
    assert set(data) == {"flags", "sampler", "x_T", "step_noise", "sample", "uint8"}
    model = golden_model(data["flags"], kernels, memory_format).eval()
    diffusion = build_diffusion(diffusion_config(data["flags"]), kernels=kernels)
    noise = {key: tensor(data[source]) for key, source in (("noise", "x_T"), ("step_noise", "step_noise"))}
    shape = data["x_T"].shape
    sampler, eta = Sampler.DDIM if data["sampler"]["ddim"] else Sampler.DDPM, data["sampler"]["eta"]
    loop = Loop(model, diffusion, SampleConfig(sampler=sampler, eta=eta))
    loop.begin(noise["noise"], noise["step_noise"], {})
    while loop.left:
        loop.step()
    close(loop.x, data)
    if kernels == "triton" and DEVICE.type == "cpu":
        return  # interpreted, once takes long enough

    with torch.no_grad():
        if data["sampler"]["ddim"]:
            sample = diffusion.ddim_sample_loop(model, shape, eta=eta, **noise)
        else:
            sample = diffusion.p_sample_loop(model, shape, **noise)
    close(sample, data)
    if DEVICE.type == "cpu":
        assert torch.equal(loop.x, sample)


def close(sample: torch.Tensor, data: dict[str, np.ndarray]) -> None:
    levels = np.abs(to_uint8(sample).astype(int) - data["uint8"].astype(int))
    assert levels.max() <= 1
    np.testing.assert_allclose(sample.cpu().numpy(), data["sample"], rtol=0, atol=1 / 127.5)
    # A level off should be a matter of rounding at the border of two levels.
    assert np.mean(levels > 0) < 1e-3
