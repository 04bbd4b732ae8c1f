"""Shared by diffusion_step and diffusion_loss: the Gaussian p(x_{t-1} | x_t) that a model output parameterises.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (improved DDPM). The coefficients of all timesteps are one tensor
``tables`` (T, len(TABLES)) with one row per timestep, so that the coefficients of a sample are adjacent.
"""

from fastdiff.kernels.gaussian.parameterization import TABLES, LossType, ModelMeanType, ModelVarType, Sampler

__all__ = ["TABLES", "LossType", "ModelMeanType", "ModelVarType", "Sampler"]
