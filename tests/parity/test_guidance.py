"""Guidance by the gradient of a classifier: single steps, and whole loops of a UNet guided by a classifier."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import GaussianDiffusion, ModelVarType, build_diffusion, space_timesteps
from fastdiff.diffusion.schedule import get_named_beta_schedule
from fastdiff.sampling.guidance import class_gradient

from .support import (
    DEVICE,
    ENGINES,
    assert_close,
    diffusion_config,
    float32_limit,
    golden_classifier,
    golden_model,
    golden_names,
    load,
    tensor,
)
from .test_loops import to_uint8

STEPS = load("guided_steps_linear.npz")


def test_every_result_is_compared() -> None:
    results = {
        f"{name}_clip{clip}" for name in ("p_sample", "ddim", "ddim_eta06", "ddim_pred_xstart") for clip in (0, 1)
    }
    inputs = {"diffusion", "x", "t", "model_output", "noise", "gradient", "model_timesteps", "gradient_timesteps"}
    assert set(STEPS) == inputs | results | {f"err32_{name}" for name in results}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("clip", [0, 1])
def test_steps(clip: int, dtype: torch.dtype) -> None:
    flags = STEPS["diffusion"]
    steps = flags["diffusion_steps"]
    process = GaussianDiffusion(
        betas=get_named_beta_schedule(flags["noise_schedule"], steps),
        model_var_type=ModelVarType.LEARNED_RANGE,
        rescale_timesteps=flags["rescale_timesteps"],
        use_timesteps=space_timesteps(steps, flags["timestep_respacing"]),
    )
    x, output, noise, gradient = (tensor(STEPS[key]).to(dtype) for key in ("x", "model_output", "noise", "gradient"))
    given: list[Tensor] = []

    def model(x: Tensor, timesteps: Tensor) -> Tensor:
        given.append(timesteps)
        return output

    def cond_fn(x: Tensor, timesteps: Tensor) -> Tensor:
        given.append(timesteps)
        return gradient

    how: dict[str, Any] = {"clip_denoised": bool(clip), "cond_fn": cond_fn, "noise": noise}
    t = tensor(STEPS["t"])
    found = {"p_sample": process.p_sample(model, x, t, **how)["sample"]}
    ddim = process.ddim_sample(model, x, t, **how)
    found |= {"ddim": ddim["sample"], "ddim_pred_xstart": ddim["pred_xstart"]}
    found["ddim_eta06"] = process.ddim_sample(model, x, t, eta=0.6, **how)["sample"]
    for name, result in found.items():
        key = f"{name}_clip{clip}"
        assert_close(result, STEPS[key], 1e-9 if dtype is torch.float64 else float32_limit(STEPS, key), key)
    for timesteps, key in zip(given, ["model_timesteps", "gradient_timesteps"] * 3, strict=True):
        np.testing.assert_allclose(timesteps.cpu(), STEPS[key], rtol=1e-6)


@pytest.mark.parametrize(
    ("kernels", "memory_format"),
    [
        pytest.param(*engine, marks=[pytest.mark.slow] if engine[0] == "triton" and DEVICE.type == "cpu" else [])
        for engine in ENGINES
    ],
)
@pytest.mark.parametrize("name", golden_names("loop_guided_*.npz"))
def test_loop(name: str, kernels: str, memory_format: str) -> None:
    data = load(name)
    model = golden_model(data["model"], kernels, memory_format).eval()
    classifier = golden_classifier(data["classifier"], kernels, memory_format).eval()
    process = build_diffusion(diffusion_config(data["diffusion"] | {"rescale_learned_sigmas": False}), kernels=kernels)
    loop = process.ddim_sample_loop_progressive if data["ddim"] else process.p_sample_loop_progressive
    steps = loop(
        model,
        data["x_T"].shape,
        noise=tensor(data["x_T"]),
        step_noise=tensor(data["step_noise"]),
        model_kwargs={"y": tensor(data["y"])},
        cond_fn=class_gradient(classifier, data["classifier_scale"]),
    )
    samples = [step["sample"] for step in steps]
    assert len(samples) == len(data["step_noise"])
    assert_close(samples[0], data["first_step"], 1e-4, "the first step")
    assert_close(samples[-1], data["sample"], 1e-2, "the sample")
    levels = np.abs(to_uint8(samples[-1]).astype(int) - data["uint8"].astype(int))
    assert levels.max() <= 1
