"""A classifier of noisy images: its architecture and its training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastdiff.config.base import Config, option, tuple_of
from fastdiff.config.choices import ClassifierPool, Prediction
from fastdiff.config.job import HOLDOUT, TrainConfig
from fastdiff.config.model import NUM_CLASSES, ModelConfig, multiplier

HEAD_CHANNELS = 64
"""Channels per attention head, fixed in guided-diffusion's classifiers."""

_NAMES = {
    "num_channels": "classifier_width",
    "num_res_blocks": "classifier_depth",
    "attention_resolutions": "classifier_attention_resolutions",
    "num_head_channels": "the head width",
}


@dataclass(frozen=True)
class ClassifierConfig(Config):
    """The architecture of a Classifier: the downsampling half of a UNet, and a pool (Dhariwal & Nichol 2021).

    The defaults are guided-diffusion's. Raises ValueError, naming the field, if the fields do not describe a valid
    model.
    """

    panel = "Classifier"

    image_size: int = option(64, "Side of the square images in pixels.")
    classifier_width: int = option(128, "Base width; every level's width is a multiple of it.")
    classifier_depth: int = option(2, "Residual blocks per level.")
    classifier_attention_resolutions: tuple[int, ...] = option(
        (32, 16, 8), "Feature-map sizes with attention, e.g. 32,16,8."
    )
    classifier_use_scale_shift_norm: bool = option(
        True, "Condition by scaling and shifting the norm's output, not by addition."
    )
    classifier_resblock_updown: bool = option(True, "Halve the feature maps in residual blocks, not in convolutions.")
    classifier_pool: ClassifierPool = option(ClassifierPool.ATTENTION, "How the last feature map becomes logits.")
    channel_mult: tuple[float, ...] | None = option(
        None, "Width multiplier per level, e.g. 1,2,3,4; by default chosen from the image size."
    )
    num_classes: int = option(NUM_CLASSES, "Number of classes; training takes it from the data unless given.")
    use_checkpoint: bool = option(False, "Recompute activations in the backward pass to save memory.")

    def __post_init__(self) -> None:
        name = "classifier_attention_resolutions"
        object.__setattr__(self, name, tuple_of(int, name, getattr(self, name)))
        if self.channel_mult in (None, "", ()):
            object.__setattr__(self, "channel_mult", None)
        else:
            object.__setattr__(self, "channel_mult", tuple_of(multiplier, "channel_mult", self.channel_mult))
        super().__post_init__()

    def check(self) -> None:
        try:
            self.encoder()
        except ValueError as error:
            text = str(error)
            for ours, name in _NAMES.items():
                text = text.replace(ours, name)
            raise ValueError(text) from None

    @property
    def multipliers(self) -> tuple[float, ...]:
        """channel_mult, or its default for the image size."""
        return self.encoder().multipliers

    def encoder(self) -> ModelConfig:
        """The UNet of which a classifier has the downsampling half and the middle block."""
        return ModelConfig(
            image_size=self.image_size,
            num_channels=self.classifier_width,
            num_res_blocks=self.classifier_depth,
            num_head_channels=HEAD_CHANNELS,
            attention_resolutions=self.classifier_attention_resolutions,
            use_scale_shift_norm=self.classifier_use_scale_shift_norm,
            resblock_updown=self.classifier_resblock_updown,
            channel_mult=self.channel_mult,
            num_classes=self.num_classes,
            use_checkpoint=self.use_checkpoint,
        )


C = TypeVar("C", bound=ModelConfig | ClassifierConfig)


def with_multipliers(config: C) -> C:
    """The same model with an explicit channel_mult, so that a saved file does not depend on the default."""
    return replace(config, channel_mult=config.multipliers)


@dataclass(frozen=True)
class ClassifierTrainConfig(TrainConfig):
    """The settings of a classifier's training.

    Learning rate and weight decay are those of guided-diffusion's README, and as there no average of the weights is
    kept. The other defaults are TrainConfig's.
    """

    lr: float = option(3e-4, "Learning rate.")
    weight_decay: float = option(0.05, "Weight decay of AdamW.")
    ema_rate: tuple[float, ...] = option((), "EMA rates of the weights, e.g. 0.9999; by default there is none.")
    preview_interval: int = option(0, "Not for classifiers.")
    noised: bool = option(True, "Train on noisy images, as guidance needs, or with --no-noised on clean ones.")
    holdout: float = option(0.05, HOLDOUT, panel="Data")

    def check(self) -> None:
        super().check()
        self.require(self.preview_interval == 0, "preview_interval", "0 for a classifier")


UNUSED_BY_CLASSIFIERS = frozenset(
    {
        *("label_dropout", "conditioning_noise", "preview_interval", "augment"),
        *("learn_sigma", "sigma_small", "predict_xstart", "use_kl", "rescale_learned_sigmas"),
        *("recipe", "minutes"),
        *("prediction", "weighting", "min_snr_gamma", "sigmoid_bias"),
    }
)
"""Fields of a run's configurations that mean nothing in a classifier's training."""


def used_by_classifiers(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags without those of UNUSED_BY_CLASSIFIERS. A zero-terminal process gets a prediction that it allows."""
    used = {name: value for name, value in flags.items() if name not in UNUSED_BY_CLASSIFIERS}
    return used | ({"prediction": Prediction.X_START} if used.get("zero_terminal_snr") else {})
