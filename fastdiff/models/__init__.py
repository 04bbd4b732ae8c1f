"""The models: plain PyTorch modules whose norms and attention come from fastdiff.kernels."""

import torch

from fastdiff.config import ClassifierConfig, Kernels, MemoryFormat, ModelConfig
from fastdiff.models.classifier import Classifier
from fastdiff.models.super_res import SuperResUNet
from fastdiff.models.unet import NULL_CLASS, Encoder, UNet

__all__ = ["NULL_CLASS", "Classifier", "SuperResUNet", "UNet", "build_classifier", "build_model", "forward_flops"]


def build_model(
    config: ModelConfig,
    kernels: Kernels | str = Kernels.AUTO,
    memory_format: MemoryFormat | str = MemoryFormat.CONTIGUOUS,
) -> UNet:
    """The model that the configuration describes, with fresh weights; a SuperResUNet if it has a small_size.

    Convolutions are faster in the format channels_last, in which fastdiff trains and samples; other code may need
    contiguous weights, such as safetensors' save_file. ``lay_out`` changes it.
    """
    return (SuperResUNet if config.small_size else UNet)(config, kernels, memory_format)


def build_classifier(
    config: ClassifierConfig,
    kernels: Kernels | str = Kernels.AUTO,
    memory_format: MemoryFormat | str = MemoryFormat.CONTIGUOUS,
) -> Classifier:
    """The classifier of noisy images that the configuration describes, with fresh weights."""
    return Classifier(config, kernels, memory_format)


def forward_flops(config: ModelConfig | ClassifierConfig) -> float:
    """FLOPs of one image's forward pass, counted without running it; a training step takes three times as many.

    Counts convolutions and matrix products, two FLOPs per multiply-add, whichever kernels run them. Does not count the
    recomputation by use_checkpoint.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model: Encoder
        x, timesteps = torch.empty(1, 3, config.image_size, config.image_size), torch.empty(1)
        conditions = {}
        if isinstance(config, ClassifierConfig):
            model = build_classifier(config, Kernels.REFERENCE)
        else:
            model = build_model(config, Kernels.REFERENCE)
            if config.class_cond:
                conditions["y"] = torch.empty(1, dtype=torch.int64)
            if config.small_size:
                conditions["low_res"] = torch.empty(1, 3, config.small_size, config.small_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, timesteps, **conditions)
    return float(counter.get_total_flops())
