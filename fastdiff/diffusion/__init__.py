"""The diffusion process. It accepts any model and imports none."""

from collections.abc import Iterable

from fastdiff.config import DiffusionConfig
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.noise import Philox
from fastdiff.diffusion.schedule import get_named_beta_schedule, space_timesteps
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
    return GaussianDiffusion(
        betas=get_named_beta_schedule(config.noise_schedule, config.diffusion_steps),
        model_mean_type=ModelMeanType.START_X if config.predict_xstart else ModelMeanType.EPSILON,
        model_var_type=model_var_type,
        loss_type=loss_type,
        rescale_timesteps=config.rescale_timesteps,
        use_timesteps=timesteps,
        kernels=kernels,
    )
