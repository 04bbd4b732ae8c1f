"""The architecture of a model."""

import math
from dataclasses import dataclass, replace

from fastdiff.config.base import Config, number, option, tuple_of

NUM_CLASSES = 1000
"""improved-diffusion's fixed number of classes (ImageNet's); training takes the number from the data instead."""

GROUPS = 32
"""Every GroupNorm has 32 groups, so every width must be a multiple of 32."""


@dataclass(frozen=True)
class ModelConfig(Config):
    """The architecture of a UNet, or of a SuperResUNet when ``small_size`` is given.

    Raises ValueError, naming the field, if the fields do not describe a valid model.
    """

    image_size: int = option(64, "Side of the square images in pixels.")
    num_channels: int = option(128, "Base width; every level's width is a multiple of it.")
    num_res_blocks: int = option(2, "Residual blocks per level.")
    num_heads: int = option(4, "Attention heads.")
    num_heads_upsample: int = option(-1, "Attention heads in the upsampling half; -1 means num_heads.")
    attention_resolutions: tuple[int, ...] = option((16, 8), "Feature-map sizes with attention, e.g. 16,8.")
    dropout: float = option(0.0, "Dropout probability in the residual blocks.")
    learn_sigma: bool = option(False, "Predict the variance too (six output channels).")
    class_cond: bool = option(False, "Condition on the class label of each image.")
    num_classes: int = option(NUM_CLASSES, "Number of classes; training takes it from the data unless given.")
    use_checkpoint: bool = option(False, "Recompute activations in the backward pass to save memory.")
    use_scale_shift_norm: bool = option(True, "Condition by scaling and shifting the norm's output, not by addition.")
    channel_mult: tuple[int, ...] | None = option(
        None, "Width multiplier per level, e.g. 1,2,3,4; by default chosen from the image size."
    )
    small_size: int | None = option(None, "Side of the low-resolution input of a super-resolution model.")

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "attention_resolutions", tuple_of(int, "attention_resolutions", self.attention_resolutions)
        )
        if self.channel_mult in (None, "", ()):
            object.__setattr__(self, "channel_mult", None)
        else:
            object.__setattr__(self, "channel_mult", tuple_of(int, "channel_mult", self.channel_mult))
        super().__post_init__()

    def check(self) -> None:
        for name in ("image_size", "num_channels", "num_res_blocks", "num_heads", "num_classes"):
            self.require(getattr(self, name) > 0, name, "positive")
        self.require(
            self.num_channels % GROUPS == 0, "num_channels", f"a multiple of {GROUPS} (the norms have {GROUPS} groups)"
        )
        self.require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1")
        self.require(
            self.num_heads_upsample == -1 or self.num_heads_upsample > 0, "num_heads_upsample", "positive, or -1"
        )
        self.require(
            all(r > 0 for r in self.attention_resolutions), "attention_resolutions", "positive numbers such as 16,8"
        )
        self.require(
            self.channel_mult is None or all(m > 0 for m in self.channel_mult),
            "channel_mult",
            "positive numbers such as 1,2,3,4",
        )
        if self.small_size is not None:
            number(int, "small_size", self.small_size)
            self.require(
                0 < self.small_size <= self.image_size, "small_size", f"between 1 and image_size {self.image_size}"
            )
        self._check_image_size()
        self._check_heads()

    def _check_image_size(self) -> None:
        factor = 2 ** (len(self.multipliers) - 1)
        if self.image_size % factor:
            below = self.image_size // factor * factor
            near = f"{below} or {below + factor}" if below else f"{factor}"
            raise ValueError(
                f"image_size {self.image_size} does not fit the model: its {len(self.multipliers)} levels need a "
                f"multiple of {factor}, such as {near}; or give a shorter channel_mult"
            )

    def _check_heads(self) -> None:
        widths = {self.num_channels * m for level, m in enumerate(self.multipliers) if level in self.attention_levels}
        middle = {self.num_channels * self.multipliers[-1]}  # the middle block always has attention
        for name, heads, attending in (
            ("num_heads", self.num_heads, widths | middle),
            ("num_heads_upsample", self.heads_upsample, widths),
        ):
            for width in sorted(attending):
                if width % heads:
                    raise ValueError(f"{name} {heads} does not divide the {width} channels of a level with attention")

    @property
    def multipliers(self) -> tuple[int, ...]:
        """channel_mult, or the default for this image size."""
        return self.channel_mult or channel_mult_for(self.image_size)

    @property
    def heads_upsample(self) -> int:
        """Attention heads in the upsampling half."""
        return self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample

    @property
    def attention_levels(self) -> frozenset[int]:
        """The levels with attention. Level 0 is full size, each next level half of it.

        A resolution r selects the largest feature map that is at most r pixels wide. If image size and r are powers
        of two, this equals improved-diffusion's ``image_size // r``; at 96 pixels, 16 selects the 12-pixel level.
        """
        sizes = [self.image_size >> level for level in range(len(self.multipliers))]
        chosen = set()
        for r in self.attention_resolutions:
            if r <= self.image_size:
                chosen.update([next((level for level, size in enumerate(sizes) if size <= r), -1)])
        return frozenset(chosen - {-1})

    @property
    def out_channels(self) -> int:
        """Three output channels, or six with a learned variance."""
        return 6 if self.learn_sigma else 3


_CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
"""improved-diffusion's width multipliers by image size (at 128 pixels, those of its fork)."""


def channel_mult_for(image_size: int) -> tuple[int, ...]:
    """The original's multipliers at its four sizes; other sizes get enough levels to reach 4 to 8 pixels."""
    if image_size in _CHANNEL_MULT:
        return _CHANNEL_MULT[image_size]
    halvings = max(2, math.ceil(math.log2(image_size / 8)))
    by_depth = {2: (1, 2, 2), 3: (1, 2, 3, 4), 4: (1, 1, 2, 3, 4)}
    return by_depth.get(halvings, (1,) * (halvings - 3) + (2, 2, 4, 4))


def is_table_size(image_size: int) -> bool:
    """Whether improved-diffusion (or its fork) defines the multipliers for this image size."""
    return image_size in _CHANNEL_MULT


def with_multipliers(config: ModelConfig) -> ModelConfig:
    """The same model with an explicit channel_mult, so that a saved file does not depend on the default."""
    return replace(config, channel_mult=config.multipliers)
