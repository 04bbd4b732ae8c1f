"""What a model's output stands for, and what it is trained on: the closed choices of a diffusion process."""

from fastdiff.kernels.gaussian import LossType, ModelMeanType, ModelVarType

__all__ = ["LossType", "ModelMeanType", "ModelVarType"]
