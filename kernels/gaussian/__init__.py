"""What diffusion_step and diffusion_loss share: the Gaussian p(x_{t-1} | x_t) that a model's output stands for.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (improved DDPM). The coefficients of all timesteps are one tensor
``tables`` (T, len(TABLES)), a row a timestep, so that what one sample needs lies side by side.
"""

from fastdiff.kernels.gaussian.parameterization import TABLES, LossType, ModelMeanType, ModelVarType, Sampler

__all__ = ["TABLES", "LossType", "ModelMeanType", "ModelVarType", "Sampler"]
