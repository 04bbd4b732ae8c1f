"""The training objectives of improved-diffusion, one value per sample."""

from fastdiff.kernels.diffusion_loss.op import Losses, diffusion_loss

__all__ = ["Losses", "diffusion_loss"]
