"""One sampling step, from x_t and the model output to x_{t-1}."""

from fastdiff.kernels.diffusion_step.op import Step, diffusion_step

__all__ = ["Step", "diffusion_step"]
