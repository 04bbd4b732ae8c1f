"""What a run trains: the model, and the losses of a batch of images. Here a diffusion model, by denoising."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastdiff.checkpoint import model_metadata
from fastdiff.config import ModelConfig, RunConfig, TrainConfig
from fastdiff.data import normalised
from fastdiff.diffusion import build_diffusion
from fastdiff.kernels import philox_normal, philox_uint32
from fastdiff.models import NULL_CLASS, build_model
from fastdiff.models.super_res import low_resolution
from fastdiff.models.unet import Encoder
from fastdiff.runtime.device import Runtime
from fastdiff.training.augmentation import augmented, whole
from fastdiff.training.metrics import COLUMNS, TERMS

NOISE_STREAM, TIMESTEP_STREAM, LABEL_STREAM = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
LOW_RES_STREAM, LOW_RES_LEVEL_STREAM = 0xFFFFFFFC, 0xFFFFFFFB
HELD_OUT_NOISE_STREAM, HELD_OUT_TIMESTEP_STREAM = 0xFFFFFFFA, 0xFFFFFFF9
"""The Philox steps that training uses; sampling counts its steps from 0."""


class Objective(ABC):
    """The model of a run and its losses.

    ``terms`` are the names of the losses, of which "loss" is minimised, and ``columns`` those of progress.csv. ``kind``
    is the kind of the checkpoint's files. Training draws timesteps below ``num_timesteps``.
    """

    kind: ClassVar[str]
    terms: ClassVar[tuple[str, ...]]
    columns: ClassVar[tuple[str, ...]]

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        self.train, self.data, self.size = config.train, config.data, config.model.image_size
        self.told = isinstance(config.model, ModelConfig) and config.model.augment_dim > 0
        self.diffusion = build_diffusion(config.diffusion, runtime.kernels)
        self.num_timesteps = self.diffusion.num_timesteps

    @abstractmethod
    def build(self, runtime: Runtime) -> Encoder:
        """The model, with fresh weights."""

    def inputs(self, images: Tensor, labels: Tensor | None, numbers: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Images uint8 (N, H, W, 3) as x_start (N, 3, size, size) in [-1, 1], and what ``losses`` needs besides them.

        labels: int64 (N,), or None if the run has no classes. numbers: those of the images in the run, (N,), or None
        for images that are only measured: they are not cropped or augmented, their labels are not dropped, and no noise
        is added to their conditions. If the model is told of augmentation, the conditions include ``augment``.
        """
        x_start, told = normalised(images), dict[str, Tensor]()
        if numbers is None:
            x_start = whole(x_start, self.size)
        elif self.told or self.data.random_crop < 1:
            how = {"crop": self.data.random_crop, "probability": self.data.augment}
            x_start, augment = augmented(x_start, self.size, self.train.seed, numbers, **how)
            # a model that is told of it has zeros without it, too: DDP waits for the gradient of every parameter
            told = {"augment": augment} if self.told else {}
        return x_start, {**self.conditions(x_start, labels, numbers), **told}

    @abstractmethod
    def conditions(self, x_start: Tensor, labels: Tensor | None, numbers: Tensor | None) -> dict[str, Tensor]:
        """What ``losses`` needs besides x_start, each with a row for every image; the arguments are those of inputs."""

    @abstractmethod
    def losses(
        self,
        forward: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """The terms of every image at timesteps t (N,), each (N,); ``forward`` is the model as a function."""

    @abstractmethod
    def metadata(self, config: RunConfig, step: int) -> dict[str, Any]:
        """The metadata of the run's weights after ``step`` updates, as JSON-compatible values."""


class Denoising(Objective):
    """Trains a diffusion model by the objective of its process."""

    kind = "model"
    terms = TERMS
    columns = COLUMNS

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        assert isinstance(config.model, ModelConfig)
        self.model = config.model

    def build(self, runtime: Runtime) -> Encoder:
        return build_model(self.model, runtime.kernels, runtime.memory_format)

    def conditions(self, x_start: Tensor, labels: Tensor | None, numbers: Tensor | None) -> dict[str, Tensor]:
        """The model's inputs besides x_t and t: class labels ``y``, and ``low_res`` images for super-resolution."""
        train, conditions = self.train, dict[str, Tensor]()
        if labels is not None:
            if train.label_dropout and numbers is not None:
                labels = with_null_class(train, labels, numbers)
            conditions["y"] = labels
        if self.model.small_size is not None:
            low_res = low_resolution(x_start, self.model.small_size)
            if train.conditioning_noise and numbers is not None:
                low_res = with_conditioning_noise(train, low_res, numbers)
            conditions["low_res"] = low_res
        return conditions

    def losses(
        self,
        forward: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        noise: Tensor,
    ) -> dict[str, Tensor]:
        return self.diffusion.training_losses(forward, x_start, t, conditions, noise)

    def metadata(self, config: RunConfig, step: int) -> dict[str, Any]:
        return model_metadata(
            self.model,
            config.diffusion,
            step,
            config.class_names,
            class_counts=list(config.class_counts),
            label_dropout=config.train.label_dropout,
            run_config=config.to_dict(),
        )


def with_null_class(config: TrainConfig, labels: Tensor, numbers: Tensor) -> Tensor:
    """The labels (N,) of the samples ``numbers`` (N,), each replaced by NULL_CLASS with probability label_dropout.

    Ho & Salimans 2022, algorithm 1. The choice is a function of seed and sample.
    """
    words = philox_uint32(config.seed, numbers, LABEL_STREAM, 1)[:, 0]
    return labels.masked_fill(words < round(config.label_dropout * 2**32), NULL_CLASS)


def with_conditioning_noise(config: TrainConfig, low_res: Tensor, numbers: Tensor) -> Tensor:
    """Add Gaussian noise to low_res (N, 3, h, w) of the samples ``numbers`` (N,), std up to conditioning_noise.

    Conditioning augmentation (Ho et al. 2022, Cascaded Diffusion Models, section 4): it makes the model robust to
    errors of the base model. The noise level is a function of seed and sample; the model does not receive it.
    """
    level = philox_uint32(config.seed, numbers, LOW_RES_LEVEL_STREAM, 1) * (config.conditioning_noise / 2**32)  # (N, 1)
    noise = philox_normal(config.seed, numbers, LOW_RES_STREAM, low_res.shape[1:])
    return low_res + level.to(low_res.dtype)[:, :, None, None] * noise
