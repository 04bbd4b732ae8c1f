"""Every setting, declared and described once: frozen dataclasses that fail when they are made.

The command line is derived from these fields (``cli/options.py``): a field's name is the flag, its ``help`` the flag's
text, its default the flag's default. Names and defaults are improved-diffusion's wherever it has them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Self

NUM_CLASSES = 1000
"""improved-diffusion's fixed number of classes (ImageNet's); training takes the number from the data instead."""

GROUPS = 32
"""Every GroupNorm of the family has 32 groups, so every width must be a multiple of it."""


class NoiseSchedule(StrEnum):
    """How the betas grow: linear (Ho et al. 2020) or cosine (Nichol & Dhariwal 2021, section 3.2)."""

    LINEAR = "linear"
    COSINE = "cosine"


class Labels(StrEnum):
    """Where an image's class comes from: the file name up to its first underscore, or the sub-folder it lies in."""

    PREFIX = "prefix"
    FOLDER = "folder"


class Cache(StrEnum):
    """Where decoded images are kept: in memory, in a memory-mapped file, or in memory if they fit."""

    AUTO = "auto"
    MEMORY = "memory"
    DISK = "disk"


class ScheduleSampler(StrEnum):
    """How training draws timesteps (Nichol & Dhariwal 2021, section 3.3)."""

    UNIFORM = "uniform"
    LOSS_SECOND_MOMENT = "loss-second-moment"


class Sampler(StrEnum):
    """How images are drawn: ancestral (DDPM, Ho et al. 2020) or DDIM (Song et al. 2021)."""

    DDPM = "ddpm"
    DDIM = "ddim"


class Precision(StrEnum):
    """The arithmetic of the model's forward and backward; parameters and their updates are always fp32.

    tf32 is fp32 whose matrix products and convolutions round their inputs to 10 bits, on GPUs that have it.
    """

    AUTO = "auto"
    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"


class Parallel(StrEnum):
    """What several processes share: ddp keeps the whole model on each, fsdp a part of it (FSDP2, fully_shard)."""

    DDP = "ddp"
    FSDP = "fsdp"


class Tracker(StrEnum):
    """A service that the log goes to besides the files: Weights & Biases, or trackio."""

    NONE = "none"
    WANDB = "wandb"
    TRACKIO = "trackio"


class Compile(StrEnum):
    """Whether the model goes through torch.compile; auto compiles when the job is long enough to repay it."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Kernels(StrEnum):
    """Which implementation of the fused operations runs (``fastdiff.kernels``)."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"
    REFERENCE = "reference"


class MemoryFormat(StrEnum):
    """How feature maps lie in memory."""

    CHANNELS_LAST = "channels_last"
    CONTIGUOUS = "contiguous"


def option(default: Any, help: str) -> Any:
    """A dataclass field with the text that the command line shows for it."""
    return field(default=default, metadata={"help": help})


class Config:
    """What the configurations share: coercion of enums and tuples, checks that name field and value, JSON both ways."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, f.name)
            if isinstance(f.type, type) and issubclass(f.type, StrEnum):
                object.__setattr__(self, f.name, _member(f.type, f.name, value))
            elif f.type is bool and not isinstance(value, bool):
                raise ValueError(f"{f.name} must be true or false, not {value!r}")
            elif f.type is str and not isinstance(value, str):
                raise ValueError(f"{f.name} must be text, not {value!r}")
            elif f.type in (int, float):
                object.__setattr__(self, f.name, _number(f.type, f.name, value))
        self.check()

    def check(self) -> None:
        """Raise ValueError, naming field and value, if the fields do not go together."""

    def require(self, holds: bool, name: str, what: str) -> None:
        """Raise ValueError about field ``name``, whose value must be ``what``, unless ``holds``."""
        if not holds:
            raise ValueError(f"{name} must be {what}, not {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v
            for f in fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict; unknown names are an error, missing ones take the default."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
        return cls(**values)


def _member(enum: type[StrEnum], name: str, value: Any) -> StrEnum:
    try:
        return enum(value)
    except ValueError:
        raise ValueError(f"{name} must be one of {', '.join(enum)}, not {value!r}") from None


def _number(kind: type, name: str, value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ValueError(f"{name} must be {'a whole number' if kind is int else 'a number'}, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value!r}")
    return kind(value)


def _tuple_of(kind: type, name: str, value: object) -> tuple[Any, ...]:
    """The tuple in '16,8', 16, [16, 8] or (16, 8)."""
    parts: list[Any]
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
    elif isinstance(value, (int, float)):
        parts = [value]
    elif isinstance(value, Iterable):
        parts = list(value)
    else:
        raise ValueError(f"{name} must be numbers separated by commas, not {value!r}")
    try:
        numbers = tuple(kind(part) for part in parts)
        if any(isinstance(part, float) and number != part for number, part in zip(numbers, parts, strict=True)):
            raise ValueError  # 1.5 where whole numbers are meant
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers separated by commas, not {value!r}") from None
    return numbers


@dataclass(frozen=True)
class ModelConfig(Config):
    """The architecture of a UNet, or of a SuperResUNet when ``small_size`` is given.

    Raises ValueError, naming the field, where the fields do not make a model.
    """

    image_size: int = option(64, "Side of the square images in pixels.")
    num_channels: int = option(128, "Base width; every level's width is a multiple of it.")
    num_res_blocks: int = option(2, "Residual blocks per level.")
    num_heads: int = option(4, "Attention heads.")
    num_heads_upsample: int = option(-1, "Attention heads on the way up; -1 means as on the way down.")
    attention_resolutions: tuple[int, ...] = option((16, 8), "Feature-map sizes with attention, e.g. 16,8.")
    dropout: float = option(0.0, "Dropout probability in the residual blocks.")
    learn_sigma: bool = option(False, "Predict the variance too (six output channels).")
    class_cond: bool = option(False, "Condition on the class of each image.")
    num_classes: int = option(NUM_CLASSES, "Number of classes; training takes it from the data unless given.")
    use_checkpoint: bool = option(False, "Recompute activations in the backward pass to save memory.")
    use_scale_shift_norm: bool = option(True, "Condition by scale and shift of the norm instead of by addition.")
    channel_mult: tuple[int, ...] | None = option(
        None, "Width multiplier per level, e.g. 1,2,3,4; by default from the image size."
    )
    small_size: int | None = option(None, "Side of the low-resolution input of a super-resolution model.")

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "attention_resolutions", _tuple_of(int, "attention_resolutions", self.attention_resolutions)
        )
        if self.channel_mult in (None, "", ()):
            object.__setattr__(self, "channel_mult", None)
        else:
            object.__setattr__(self, "channel_mult", _tuple_of(int, "channel_mult", self.channel_mult))
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
            _number(int, "small_size", self.small_size)
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
        middle = {self.num_channels * self.multipliers[-1]}  # always attends
        for name, heads, attending in (
            ("num_heads", self.num_heads, widths | middle),
            ("num_heads_upsample", self.heads_upsample, widths),
        ):
            for width in sorted(attending):
                if width % heads:
                    raise ValueError(f"{name} {heads} does not divide the {width} channels of a level with attention")

    @property
    def multipliers(self) -> tuple[int, ...]:
        """channel_mult, or the one for this image size."""
        return self.channel_mult or channel_mult_for(self.image_size)

    @property
    def heads_upsample(self) -> int:
        """Attention heads on the way up."""
        return self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample

    @property
    def attention_levels(self) -> frozenset[int]:
        """The levels (0: full size, each next one half of it) that attend.

        A resolution r asks for the largest feature map that is at most r pixels wide. Where image size and r are
        powers of two this is improved-diffusion's ``image_size // r``; at 96 pixels 16 means the 12-pixel level.
        """
        sizes = [self.image_size >> level for level in range(len(self.multipliers))]
        chosen = set()
        for r in self.attention_resolutions:
            if r <= self.image_size:
                chosen.update([next((level for level, size in enumerate(sizes) if size <= r), -1)])
        return frozenset(chosen - {-1})

    @property
    def out_channels(self) -> int:
        """Three, or six with a learned variance."""
        return 6 if self.learn_sigma else 3


_CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
"""improved-diffusion's widths by image size (its fork's at 128 pixels)."""


def channel_mult_for(image_size: int) -> tuple[int, ...]:
    """The original's widths at its four sizes; elsewhere as many levels as bring an image down to 4 to 8 pixels."""
    if image_size in _CHANNEL_MULT:
        return _CHANNEL_MULT[image_size]
    halvings = max(2, math.ceil(math.log2(image_size / 8)))
    by_depth = {2: (1, 2, 2), 3: (1, 2, 3, 4), 4: (1, 1, 2, 3, 4)}
    return by_depth.get(halvings, (1,) * (halvings - 3) + (2, 2, 4, 4))


def is_table_size(image_size: int) -> bool:
    """Whether improved-diffusion (or its fork) defines the widths for this image size."""
    return image_size in _CHANNEL_MULT


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """The diffusion process: noise schedule, what the model predicts, and the loss."""

    diffusion_steps: int = option(1000, "Timesteps of the process.")
    noise_schedule: NoiseSchedule = option(NoiseSchedule.LINEAR, "How the noise grows.")
    timestep_respacing: str = option("", "Use fewer timesteps: a count (250), counts per section (10,15,20) or ddimN.")
    learn_sigma: bool = option(False, "Predict the variance too (six output channels).")
    sigma_small: bool = option(False, "Fixed variance: the posterior's instead of beta.")
    predict_xstart: bool = option(False, "The model predicts x_0 instead of the noise.")
    use_kl: bool = option(False, "Train on the variational bound instead of the mean squared error.")
    rescale_timesteps: bool = option(True, "Give the model timesteps scaled to 0..1000.")
    rescale_learned_sigmas: bool = option(True, "Weigh the variance's loss by steps / 1000.")

    def check(self) -> None:
        self.require(self.diffusion_steps > 0, "diffusion_steps", "positive")
        if self.noise_schedule is NoiseSchedule.LINEAR and self.diffusion_steps <= 20:
            raise ValueError(
                f"diffusion_steps {self.diffusion_steps} is too short for a linear schedule (a beta would reach 1): "
                "use at least 21, or noise_schedule cosine; for fewer steps when sampling use timestep_respacing"
            )


@dataclass(frozen=True)
class DataConfig(Config):
    """A folder of images and how it is read."""

    data_dir: str = option("", "Folder of images, searched with all its sub-folders.")
    labels: Labels = option(Labels.PREFIX, "Class of an image: file name up to the first '_', or its sub-folder.")
    flip: bool = option(False, "Mirror each image left to right half of the time.")
    strict: bool = option(False, "Refuse a folder with unreadable images instead of skipping them.")
    cache: Cache = option(Cache.AUTO, "Keep decoded images in memory or in a memory-mapped file.")
    cache_dir: str = option("", "Folder for the memory-mapped file; by default the user's cache folder.")


@dataclass(frozen=True)
class TrainConfig(Config):
    """The optimisation. A step is one update of the weights."""

    steps: int = option(200_000, "Updates in total; without it --lr-anneal-steps is the total.")
    batch_size: int = option(16, "Images per update, over all processes.")
    microbatch: int | str = option(
        -1, "Images per forward pass of a process, to save memory; -1 means all of them, auto as many as fit."
    )
    lr: float = option(1e-4, "Learning rate.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    lr_anneal_steps: int = option(0, "Let the learning rate fall linearly to 0 over this many updates; 0 means never.")
    lr_warmup_steps: int = option(0, "Let the learning rate rise linearly over this many updates.")
    grad_clip: float = option(0.0, "Clip the gradient to this norm; 0 means never.")
    ema_rate: tuple[float, ...] = option((0.9999,), "Rates of the weight averages, e.g. 0.9999,0.999.")
    ema_warmup: bool = option(True, "Let the averages forget the initial weights early: rate (1 + step) / (10 + step).")
    schedule_sampler: ScheduleSampler = option(ScheduleSampler.UNIFORM, "How timesteps are drawn.")
    seed: int = option(0, "Seed of the initial weights, the order of the images and the noise.")
    log_interval: int = option(10, "Updates between two lines of the log.")
    save_interval: int = option(10_000, "Updates between two checkpoints; the last update is always saved.")
    keep_last: int = option(0, "Keep only this many of the newest checkpoints; 0 keeps all.")
    keep_every: int = option(0, "Never delete the checkpoints of every so many updates; 0 means none is spared.")
    preview_interval: int = option(1000, "Updates between two preview grids; 0 means none.")
    tensorboard: bool = option(False, "Write TensorBoard event files too (extra 'tensorboard').")
    tracker: Tracker = option(Tracker.NONE, "Send the log to wandb or trackio too (extra of that name).")
    spike_guard: float = option(
        0.0, "Skip an update whose loss is more than so many times the mean of those before it; 0 means never."
    )
    parallel: Parallel = option(
        Parallel.DDP, "What several processes share: ddp the work, fsdp the model too, where it does not fit."
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "ema_rate", _tuple_of(float, "ema_rate", self.ema_rate))
        if isinstance(self.microbatch, str) and self.microbatch.removeprefix("-").isdecimal():
            object.__setattr__(self, "microbatch", int(self.microbatch))
        super().__post_init__()

    def check(self) -> None:
        for name in ("steps", "batch_size", "log_interval", "save_interval"):
            self.require(getattr(self, name) > 0, name, "positive")
        for name in (
            "weight_decay",
            "lr_anneal_steps",
            "lr_warmup_steps",
            "grad_clip",
            "keep_last",
            "keep_every",
            "preview_interval",
            "spike_guard",
        ):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require(self.lr > 0, "lr", "positive")
        self.require(0 <= self.seed < 2**32, "seed", "at least 0 and below 2^32")
        self.require(
            self.microbatch in (-1, "auto") or (type(self.microbatch) is int and self.microbatch > 0),
            "microbatch",
            "positive, -1 for the whole batch, or auto",
        )
        self.require(all(0 <= rate < 1 for rate in self.ema_rate), "ema_rate", "at least 0 and below 1")
        self.require(len(set(self.ema_rate)) == len(self.ema_rate), "ema_rate", "different rates")


@dataclass(frozen=True)
class SampleConfig(Config):
    """How images are drawn from a trained model."""

    num_samples: int = option(16, "Images to draw.")
    batch_size: int = option(16, "Images drawn together.")
    sampler: Sampler = option(Sampler.DDPM, "Ancestral sampling or DDIM.")
    steps: int | None = option(None, "Evenly spaced timesteps to use; by default all of the process.")
    timestep_respacing: str | None = option(
        None, "Timesteps to use: a count (250), counts per section (10,15,20) or ddimN."
    )
    eta: float = option(0.0, "Noise of DDIM: 0 is deterministic, 1 as much as ancestral sampling.")
    clip_denoised: bool = option(True, "Clip the predicted x_0 to [-1, 1] in every step.")
    seed: int = option(0, "Seed of the noise; the same seed draws the same images.")

    def check(self) -> None:
        for name in ("num_samples", "batch_size"):
            self.require(getattr(self, name) > 0, name, "positive")
        self.require(0 <= self.eta <= 1, "eta", "between 0 and 1")
        self.require(0 <= self.seed < 2**64, "seed", "at least 0 and below 2^64")
        if self.steps is not None:
            self.require(_number(int, "steps", self.steps) > 0, "steps", "positive")
            if self.timestep_respacing:
                raise ValueError("steps and timestep_respacing both choose the timesteps: give one of them")

    @property
    def respacing(self) -> str | None:
        """The timesteps to use as a respacing spec, or None for those of the checkpoint."""
        return str(self.steps) if self.steps is not None else self.timestep_respacing


@dataclass(frozen=True)
class RuntimeConfig(Config):
    """Where and how the model runs; but for the precision, never what it computes."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: Precision = option(Precision.AUTO, "Arithmetic of the model; auto is bf16 where the device has it.")
    compile: Compile = option(Compile.AUTO, "torch.compile the model; auto does so when the job is long enough.")
    kernels: Kernels = option(Kernels.AUTO, "Implementation of the fused operations.")
    memory_format: MemoryFormat = option(MemoryFormat.CHANNELS_LAST, "Layout of the feature maps.")


def with_multipliers(config: ModelConfig) -> ModelConfig:
    """The same model with its channel_mult written out, so that a file does not depend on a rule."""
    return replace(config, channel_mult=config.multipliers)
