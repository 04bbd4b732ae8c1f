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


INTERPRETED = {"model": 1, "step": 2}
"""Calls that Triton's interpreter takes in the place of ten, the last ones: a minute for each loop is too long.

The last step but one is the last that adds noise. A model's call is compared by itself in test_unet.py, too.
"""


@pytest.mark.parametrize(
    ("kernels", "memory_format"),
    [
        pytest.param(*engine, marks=[pytest.mark.slow] if engine[0] == "triton" and DEVICE.type == "cpu" else [])
        for engine in ENGINES
    ],
)
@pytest.mark.parametrize("name", golden_names("loop_dd*.npz"))
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
    with torch.no_grad():
        if data["sampler"]["ddim"]:
            sample = diffusion.ddim_sample_loop(model, shape, eta=eta, **noise)
        else:
            sample = diffusion.p_sample_loop(model, shape, **noise)
    close(sample, data)
    if DEVICE.type == "cpu":
        assert torch.equal(loop.x, sample)


@pytest.mark.parametrize(
    "name",
    # one whole loop's end; each sampler's kernel has tests of its own
    [pytest.param(n, marks=[pytest.mark.slow] if "ddim" in n else []) for n in golden_names("loop_dd*.npz")],
)
def test_the_kernels_take_the_last_steps(name: str) -> None:
    """What they make of the last steps decides each pixel; the steps before are taken by PyTorch's operations."""
    data = load(name)
    x, step_noise = tensor(data["x_T"]), tensor(data["step_noise"])
    engines = "torch", "triton"
    models = {kernels: golden_model(data["flags"], kernels, "channels_last").eval() for kernels in engines}
    processes = {kernels: build_diffusion(diffusion_config(data["flags"]), kernels=kernels) for kernels in engines}
    with torch.no_grad():
        for i in range(10):
            left = 10 - i
            model = models["triton" if left <= INTERPRETED["model"] else "torch"]
            diffusion = processes["triton" if left <= INTERPRETED["step"] else "torch"]
            t = torch.full((len(x),), 9 - i, device=DEVICE)
            if data["sampler"]["ddim"]:
                eta = data["sampler"]["eta"]
                x = diffusion.ddim_sample(model, x, t, noise=step_noise[i], eta=eta)["sample"]
            else:
                x = diffusion.p_sample(model, x, t, noise=step_noise[i])["sample"]
    close(x, data)


def close(sample: torch.Tensor, data: dict[str, np.ndarray]) -> None:
    levels = np.abs(to_uint8(sample).astype(int) - data["uint8"].astype(int))
    assert levels.max() <= 1
    np.testing.assert_allclose(sample.cpu().numpy(), data["sample"], rtol=0, atol=1 / 127.5)
    # A level off should be a matter of rounding at the border of two levels.
    assert np.mean(levels > 0) < 1e-3
