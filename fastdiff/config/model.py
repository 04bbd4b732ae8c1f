"""The architecture of a model."""

import math
from dataclasses import dataclass

from fastdiff.config.base import Config, number, option, tuple_of

NUM_CLASSES = 1000
"""improved-diffusion's fixed number of classes (ImageNet's); training takes the number from the data instead."""

MOST_CHANNELS = 2**20
"""Maximum width of a level, far above any model's: a damaged configuration must not reach PyTorch's own limits."""

MOST_PATCH_SIZE = math.isqrt(MOST_CHANNELS // 6)
"""Maximum side of a patch: with a learned variance each of its pixels has six output channels."""

MOST_CLASSES = 10**6
"""Maximum number of classes: a model has an embedding for each."""

AUGMENT_DIM = 9
"""Numbers that describe the augmentation of an image (fastdiff/training/augmentation.py)."""

GROUPS = 32
"""Every GroupNorm has 32 groups, so every width must be a multiple of 32."""


@dataclass(frozen=True)
class ModelConfig(Config):
    """The architecture of a UNet, or of a SuperResUNet when ``small_size`` is given.

    Raises ValueError, naming the field, if the fields do not describe a valid model.
    """

    panel = "Model"

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
    channel_mult: tuple[float, ...] | None = option(
        None, "Width multiplier per level, e.g. 1,2,3,4 or 0.5,1,2; by default chosen from the first level's size."
    )
    small_size: int | None = option(None, "Side of the low-resolution input of a super-resolution model.")
    num_head_channels: int = option(-1, "Channels per attention head, instead of num_heads; -1 means num_heads.")
    resblock_updown: bool = option(False, "Resize in residual blocks (guided-diffusion), not in convolutions.")
    use_new_attention_order: bool = option(
        False, "Order of the qkv rows in the weights: q, k, v outermost (guided-diffusion), not heads."
    )
    patch_size: int = option(
        1, "Side of the square patches that the first level sees as one pixel, with all their values as channels."
    )
    augment_dim: int = option(
        0, f"Numbers that tell the model of an image's augmentation: --augment sets {AUGMENT_DIM}."
    )

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "attention_resolutions", tuple_of(int, "attention_resolutions", self.attention_resolutions)
        )
        if self.channel_mult in (None, "", ()):
            object.__setattr__(self, "channel_mult", None)
        else:
            object.__setattr__(self, "channel_mult", tuple_of(multiplier, "channel_mult", self.channel_mult))
        super().__post_init__()

    def check(self) -> None:
        for name in ("image_size", "num_channels", "num_res_blocks", "num_heads", "num_classes", "patch_size"):
            self.require(getattr(self, name) > 0, name, "positive")
        self.require(self.patch_size <= self.image_size, "patch_size", f"at most image_size {self.image_size}")
        self.require(self.patch_size <= MOST_PATCH_SIZE, "patch_size", f"at most {MOST_PATCH_SIZE}")
        self.require(self.num_classes <= MOST_CLASSES, "num_classes", f"at most {MOST_CLASSES:,}")
        self.require(
            self.num_channels % GROUPS == 0, "num_channels", f"a multiple of {GROUPS} (the norms have {GROUPS} groups)"
        )
        self.require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1")
        self.require(
            self.num_heads_upsample == -1 or self.num_heads_upsample > 0, "num_heads_upsample", "positive, or -1"
        )
        self.require(self.num_head_channels == -1 or self.num_head_channels > 0, "num_head_channels", "positive, or -1")
        self.require(
            all(r > 0 for r in self.attention_resolutions), "attention_resolutions", "positive numbers such as 16,8"
        )
        self.require(
            self.channel_mult is None or all(0 < m < math.inf for m in self.channel_mult),
            "channel_mult",
            "positive numbers such as 1,2,3,4",
        )
        for mult, width in zip(self.multipliers, self.widths, strict=True):
            if width > MOST_CHANNELS:
                raise ValueError(f"channel_mult {mult} gives a level more than {MOST_CHANNELS:,} channels")
            if width == 0 or width % GROUPS:
                raise ValueError(
                    f"channel_mult {mult} gives a level {mult * self.num_channels:g} channels: every width must be a "
                    f"multiple of {GROUPS}"
                )
        if self.small_size is not None:
            number(int, "small_size", self.small_size)
            self.require(
                0 < self.small_size <= self.image_size, "small_size", f"between 1 and image_size {self.image_size}"
            )
        self.require(self.augment_dim in (0, AUGMENT_DIM), "augment_dim", f"0 or {AUGMENT_DIM}")
        self._check_image_size()
        self._check_heads()

    def _check_image_size(self) -> None:
        factor = self.patch_size * 2 ** (len(self.multipliers) - 1)
        if self.image_size % factor:
            below = self.image_size // factor * factor
            near = f"{below} or {below + factor}" if below else f"{factor}"
            patches = f" of patches of {self.patch_size} pixels" if self.patch_size > 1 else ""
            raise ValueError(
                f"image_size {self.image_size} does not fit the model: its {len(self.multipliers)} levels{patches} "
                f"need a multiple of {factor}, such as {near}; or give a shorter channel_mult"
            )

    def _check_heads(self) -> None:
        attending = {self.widths[level] for level in self.attention_levels}
        middle = {self.widths[-1]}  # the middle block always has attention
        divisors = {
            "num_heads": (self.num_heads, attending | middle),
            "num_heads_upsample": (self.heads_upsample, attending),
        }
        if self.num_head_channels != -1:
            divisors = {"num_head_channels": (self.num_head_channels, attending | middle)}
        for name, (divisor, widths) in divisors.items():
            for width in sorted(widths):
                if width % divisor:
                    raise ValueError(f"{name} {divisor} does not divide the {width} channels of a level with attention")

    @property
    def grid_size(self) -> int:
        """The side of the first level's feature maps: that of the image, in patches."""
        return self.image_size // self.patch_size

    @property
    def multipliers(self) -> tuple[float, ...]:
        """channel_mult, or the default for this size of the first level."""
        return self.channel_mult or channel_mult_for(
            self.grid_size, self.num_channels, super_resolution=self.small_size is not None
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level."""
        # rounded down, but 5 / 3 * 96 is 160
        return tuple(int(mult * self.num_channels + 1e-6) for mult in self.multipliers)

    @property
    def heads_upsample(self) -> int:
        """Attention heads in the upsampling half, unless num_head_channels is given."""
        return self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample

    def heads_of(self, width: int, *, upsample: bool = False) -> int:
        """Attention heads of a block of ``width`` channels, in the upsampling half or before it."""
        if self.num_head_channels != -1:
            return width // self.num_head_channels
        return self.heads_upsample if upsample else self.num_heads

    @property
    def attention_heads(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The heads at the levels with attention and in the middle block, and at these levels of the upsampling half.

        It is the meaning of num_heads, num_heads_upsample and num_head_channels together.
        """
        down = [self.widths[level] for level in sorted(self.attention_levels)]
        middle = self.widths[-1]
        return (
            tuple(self.heads_of(width) for width in (*down, middle)),
            tuple(self.heads_of(width, upsample=True) for width in down),
        )

    @property
    def attention_levels(self) -> frozenset[int]:
        """The levels with attention. Level 0 has a pixel per patch, each next level half the size.

        A resolution r selects the largest feature map that is at most r pixels wide. If image size and r are powers
        of two, this equals improved-diffusion's ``image_size // r``; at 96 pixels, 16 selects the 12-pixel level.
        """
        sizes = [self.grid_size >> level for level in range(len(self.multipliers))]
        chosen = set()
        for r in self.attention_resolutions:
            if r <= self.grid_size:
                chosen.update([next((level for level, size in enumerate(sizes) if size <= r), -1)])
        return frozenset(chosen - {-1})

    @property
    def out_channels(self) -> int:
        """Three output channels, or six with a learned variance."""
        return 6 if self.learn_sigma else 3


def multiplier(value: str | float) -> float:
    """A width multiplier; whole ones are integers, as improved-diffusion writes them."""
    number = float(value)
    return int(number) if number.is_integer() else number


_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
"""The originals' width multipliers by image size: 128 pixels are from improved-diffusion's fork and guided-diffusion,
512 from guided-diffusion."""


def channel_mult_for(size: int, num_channels: int = 2 * GROUPS, *, super_resolution: bool = False) -> tuple[float, ...]:
    """The originals' multipliers at their five sizes; other sizes get enough levels to reach 4 to 8 pixels.

    At 512 pixels the first level has half of ``num_channels``, or all of it where half is no multiple of 32. A
    super-resolution model to 512 pixels has the multipliers of 256 pixels, as in guided-diffusion.
    """
    if super_resolution and size == 512:
        return _CHANNEL_MULT[256]
    if size == 512 and num_channels % (2 * GROUPS):
        return (1, *_CHANNEL_MULT[512][1:])
    if size in _CHANNEL_MULT:
        return _CHANNEL_MULT[size]
    halvings = max(2, math.ceil(math.log2(size / 8)))
    by_depth = {2: (1, 2, 2), 3: (1, 2, 3, 4), 4: (1, 1, 2, 3, 4)}
    return by_depth.get(halvings, (1,) * (halvings - 3) + (2, 2, 4, 4))


def is_table_size(size: int) -> bool:
    """Whether improved-diffusion, its fork or guided-diffusion defines the multipliers for this size."""
    return size in _CHANNEL_MULT
