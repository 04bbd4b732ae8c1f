"""The diffusion process. It accepts any model and imports none."""

from collections.abc import Iterable

from fastdiff.config import DiffusionConfig, Prediction
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.noise import Philox
from fastdiff.diffusion.schedule import betas_of, get_named_beta_schedule, loss_weights, space_timesteps
from fastdiff.diffusion.timestep_sampler import LossSecondMomentSampler, UniformSampler
from fastdiff.kernels import Backend
from fastdiff.kernels.gaussian import LossType, ModelMeanType, ModelVarType

__all__ = [
    "GaussianDiffusion",
    "LossSecondMomentSampler",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "Philox",
    "UniformSampler",
    "build_diffusion",
    "get_named_beta_schedule",
    "space_timesteps",
]


_MEAN_TYPES = {
    Prediction.EPSILON: ModelMeanType.EPSILON,
    Prediction.X_START: ModelMeanType.START_X,
    Prediction.V: ModelMeanType.V,
    Prediction.FLOW: ModelMeanType.FLOW,
}


def build_diffusion(
    config: DiffusionConfig, kernels: Backend | str = Backend.AUTO, timesteps: Iterable[int] | None = None
) -> GaussianDiffusion:
    """The process that the configuration describes; ValueError if its timestep_respacing is invalid.

    ``kernels`` is the backend (fastdiff.kernels) of the sampling steps and the training objective. ``timesteps`` are
    those to use, instead of the timestep_respacing's.
    """
    if config.use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if config.rescale_learned_sigmas else LossType.MSE
    if config.learn_sigma:
        model_var_type = ModelVarType.LEARNED_RANGE
    else:
        model_var_type = ModelVarType.FIXED_SMALL if config.sigma_small else ModelVarType.FIXED_LARGE
    if timesteps is None and config.timestep_respacing:
        timesteps = space_timesteps(config.diffusion_steps, config.timestep_respacing)
    betas, mean_type = betas_of(config), _MEAN_TYPES[config.prediction]
    return GaussianDiffusion(
        betas=betas,
        model_mean_type=mean_type,
        model_var_type=model_var_type,
        loss_type=loss_type,
        rescale_timesteps=config.rescale_timesteps,
        use_timesteps=timesteps,
        kernels=kernels,
        loss_weight=loss_weights(betas, mean_type, config),
    )
