"""The models: plain PyTorch modules whose norms and attention come from fastdiff.kernels."""

from fastdiff.config import Kernels, MemoryFormat, ModelConfig
from fastdiff.models.super_res import SuperResUNet
from fastdiff.models.unet import UNet

__all__ = ["SuperResUNet", "UNet", "build_model"]


def build_model(
    config: ModelConfig,
    kernels: Kernels | str = Kernels.AUTO,
    memory_format: MemoryFormat | str = MemoryFormat.CHANNELS_LAST,
) -> UNet:
    """The model that the configuration describes, with fresh weights: a SuperResUNet where it has a small_size."""
    return (SuperResUNet if config.small_size else UNet)(config, kernels, memory_format)
