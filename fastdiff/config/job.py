"""The settings of a job: diffusion process, data, training, sampling and runtime."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fastdiff.config.base import Config, number, option, tuple_of
from fastdiff.config.choices import (
    Cache,
    ClassMix,
    Compile,
    Kernels,
    Labels,
    MemoryFormat,
    NoiseSchedule,
    Parallel,
    Precision,
    Prediction,
    Sampler,
    ScheduleSampler,
    TimeGrid,
    Tracker,
    Weighting,
)

MOST_TIMESTEPS = 10**6
"""Maximum number of timesteps: a process holds a dozen float64 tables of this length."""


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """The diffusion process: noise schedule, what the model predicts, and the loss."""

    panel = "Diffusion process"

    diffusion_steps: int = option(1000, "Timesteps of the process.")
    noise_schedule: NoiseSchedule = option(NoiseSchedule.LINEAR, "Noise schedule: how the betas grow over time.")
    timestep_respacing: str = option("", "Use fewer timesteps: a count (250), counts per section (10,15,20) or ddimN.")
    learn_sigma: bool = option(False, "Predict the variance too (six output channels).")
    sigma_small: bool = option(False, "Use the posterior variance instead of beta as the fixed variance.")
    prediction: Prediction = option(
        Prediction.EPSILON,
        "What the model predicts: the noise (epsilon), x_0, v, or the velocity of a rectified flow, which has its own "
        "noise schedule.",
    )
    predict_xstart: bool = option(False, "Predict x_0 instead of the noise: --prediction x_start.")
    weighting: Weighting = option(Weighting.NONE, "Weight of the squared error over the noise levels.")
    min_snr_gamma: float = option(5.0, "Largest signal-to-noise ratio that weighs more (weighting min-snr).")
    sigmoid_bias: float = option(0.0, "Log signal-to-noise ratio above which the weight falls (weighting sigmoid).")
    noise_shift: float = option(
        1.0, "Multiply sigma / alpha at every timestep, e.g. by image size / 64: large images need more noise."
    )
    zero_terminal_snr: bool = option(False, "Let x_T be pure noise in training, too; not with epsilon.")
    use_kl: bool = option(False, "Train on the variational bound instead of the mean squared error.")
    rescale_timesteps: bool = option(True, "Give the model timesteps scaled to 0..1000.")
    rescale_learned_sigmas: bool = option(True, "Scale the loss of the learned variance by steps / 1000.")

    def __post_init__(self) -> None:
        if self.predict_xstart and self.prediction == Prediction.EPSILON:
            object.__setattr__(self, "prediction", Prediction.X_START)
        super().__post_init__()
        of_xstart = self.prediction is Prediction.X_START
        if self.predict_xstart and not of_xstart:
            raise ValueError(f"prediction {self.prediction} contradicts predict_xstart: give one of them")
        object.__setattr__(self, "predict_xstart", of_xstart)

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], base: Self | None = None) -> Self:
        """As Config.from_flags; prediction and predict_xstart take the place of each other of ``base``."""
        given = dict(flags)
        if "prediction" in given:
            of_xstart = given["prediction"] == Prediction.X_START
            if bool(given.setdefault("predict_xstart", of_xstart)) != of_xstart:
                other = "no-predict-xstart" if of_xstart else "predict_xstart"
                raise ValueError(f"prediction {given['prediction']} contradicts {other}: give one of them")
        elif given.get("predict_xstart") or (base is not None and base.predict_xstart and "predict_xstart" in given):
            given["prediction"] = Prediction.X_START if given["predict_xstart"] else Prediction.EPSILON
        return super().from_flags(given, base)

    def check(self) -> None:
        self.require(self.diffusion_steps > 0, "diffusion_steps", "positive")
        self.require(self.diffusion_steps <= MOST_TIMESTEPS, "diffusion_steps", f"at most {MOST_TIMESTEPS:,}")
        for name in ("min_snr_gamma", "noise_shift"):
            self.require(0 < getattr(self, name) <= 1000, name, "above 0 and at most 1000")
        self.require(-40 <= self.sigmoid_bias <= 40, "sigmoid_bias", "between -40 and 40")
        if self.weighting is not Weighting.NONE and self.use_kl:
            raise ValueError(f"weighting {self.weighting} weights the squared error: not with use_kl")
        if self.weighting is Weighting.SIGMOID and self.diffusion_steps < 3:
            raise ValueError(
                "weighting sigmoid is a slope over the timesteps: diffusion_steps must be at least 3, "
                f"not {self.diffusion_steps}"
            )
        if self.zero_terminal_snr and self.prediction is Prediction.EPSILON:
            raise ValueError(
                "zero_terminal_snr: the noise says nothing of an image without signal; use prediction v or x_start"
            )
        if self.prediction is Prediction.FLOW:
            for name in ("learn_sigma", "use_kl"):
                if getattr(self, name):
                    raise ValueError(f"prediction flow has no {name}: leave it out, or use prediction v")
            if self.noise_schedule is not NoiseSchedule.LINEAR:
                raise ValueError(
                    f"noise_schedule {self.noise_schedule}: prediction flow has its own, the straight path; leave it "
                    "out, or use noise_shift"
                )
        elif self.noise_schedule is NoiseSchedule.LINEAR and self.diffusion_steps <= 20:
            raise ValueError(
                f"diffusion_steps {self.diffusion_steps} is too short for a linear schedule (a beta would reach 1): "
                "use at least 21, or noise_schedule cosine; for fewer steps when sampling use timestep_respacing"
            )


@dataclass(frozen=True)
class ImagesConfig(Config):
    """A set of images and how it is read."""

    panel = "Data"

    data_dir: str = option(
        "",
        "Folder of images, including sub-folders, or a .zip or .npz of images. Required, unless --resume.",
        path=True,
    )
    labels: Labels = option(
        Labels.PREFIX,
        "Class of an image: file name up to the first '_' (prefix), its sub-folder (folder), or whichever fits the "
        "files (auto); prefix for a released model (preset).",
        shown=Labels.AUTO,
    )
    label_file: str = option(
        "", "CSV or JSON file with the class of each image, instead of --labels; or its name in the data.", path=True
    )
    max_pixels: int = option(2**26, "Leave out images with more pixels than this (decompression bombs).")
    window: tuple[float, float] | None = option(
        None, "Values of 16-bit grey images that become black and white, e.g. 0,4095; by default 0 and 65535."
    )
    cache: Cache = option(Cache.AUTO, "Keep decoded images in memory or in a memory-mapped file.")
    cache_dir: str = option("", "Folder for the memory-mapped file; by default the user's cache folder.", path=True)

    def __post_init__(self) -> None:
        if self.window is not None:
            object.__setattr__(self, "window", tuple_of(float, "window", self.window))
        super().__post_init__()

    def check(self) -> None:
        self.require(self.max_pixels > 0, "max_pixels", "positive")
        if self.window is not None:
            rising = len(self.window) == 2 and all(map(math.isfinite, self.window)) and self.window[0] < self.window[1]
            self.require(rising, "window", "two numbers, black and white, such as 0,4095")

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], base: Self | None = None) -> Self:
        """As Config.from_flags; --labels without --label-file takes the place of a label file of ``base``."""
        return super().from_flags({"label_file": "", **flags} if "labels" in flags else flags, base)


@dataclass(frozen=True)
class DataConfig(ImagesConfig):
    """The images that a model is trained on, and how they are read."""

    flip: bool = option(False, "Mirror each image left to right with probability 1/2.")
    random_crop: float = option(
        1.0, "Crop each image at random to at least this share of its side, e.g. 0.8; 1 crops none."
    )
    augment: float = option(
        0.0,
        "For few images: probability of each geometric augmentation, e.g. 0.12. The model is told of it, so that its "
        "samples show none.",
    )
    strict: bool = option(False, "Refuse a folder with unreadable images instead of skipping them.")

    def check(self) -> None:
        super().check()
        self.require(0.25 <= self.random_crop <= 1, "random_crop", "between 0.25 and 1")
        self.require(0 <= self.augment <= 1, "augment", "between 0 and 1")

    def decoded_size(self, image_size: int) -> int:
        """The side of the decoded images: the smallest random crop still has as many pixels as the model takes."""
        return math.ceil(image_size / self.random_crop)


HOLDOUT = "Share of the images, chosen by a hash of their names, to measure on and not to train on; 0 for none."


@dataclass(frozen=True)
class TrainConfig(Config):
    """The settings of training. A step is one update of the weights."""

    panel = "Training"

    steps: int = option(200_000, "Total number of updates; if not given, --lr-anneal-steps sets it.")
    batch_size: int = option(16, "Images per update, over all processes.")
    microbatch: int | str = option(
        -1, "Micro-batch: images per forward pass and process, to save memory; -1 is all of them, auto as many as fit."
    )
    lr: float = option(1e-4, "Learning rate.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    lr_anneal_steps: int = option(0, "Anneal the learning rate linearly to 0 over this many updates; 0 disables it.")
    lr_warmup_steps: int = option(0, "Warm the learning rate up linearly over this many updates.")
    grad_clip: float = option(0.0, "Clip the gradient norm to this value; 0 disables it.")
    ema_rate: tuple[float, ...] = option((0.9999,), "EMA rates of the weights, e.g. 0.9999,0.999.")
    ema_warmup: bool = option(True, "Forget the initial weights early: EMA rate at most (1 + step) / (10 + step).")
    ema_lengths: tuple[float, ...] = option(
        (),
        "Lengths (sigma_rel) of power-function averages, e.g. 0.05,0.1, from which --ema-length gets others after "
        "training; by default there is none.",
    )
    ema_snapshots: float = option(
        2.0, "Disk space for the snapshots of --ema-lengths, in sizes of the model; 0 for none.", panel="Output"
    )
    schedule_sampler: ScheduleSampler = option(ScheduleSampler.UNIFORM, "How training draws timesteps.")
    label_dropout: float = option(
        0.0, "Fraction of images to train without their class label, for --guidance-scale when sampling."
    )
    conditioning_noise: float = option(
        0.0, "Super-resolution: add noise of up to this std to the low-resolution images (black to white is 2)."
    )
    fp16_scale_growth: float = option(
        0.0,
        "fp16: increase log2 of the loss scale by this every update, starting at 20, or 16 for a classifier; 0 uses "
        "PyTorch's rule.",
    )
    seed: int = option(0, "Seed of the initial weights, the image order and the noise.")
    log_interval: int = option(10, "Updates between log lines.", panel="Output")
    save_interval: int = option(10_000, "Updates between checkpoints; the last update is always saved.", panel="Output")
    keep_last: int = option(0, "Keep only this many of the newest checkpoints; 0 keeps all.", panel="Output")
    keep_every: int = option(
        0, "Never delete checkpoints at multiples of this many updates; 0 protects none.", panel="Output"
    )
    preview_interval: int = option(1000, "Updates between preview grids; 0 disables them.", panel="Output")
    eval_interval: int = option(
        1000, "Updates between measurements on the held-out images; 0 disables them.", panel="Output"
    )
    val_data_dir: str = option(
        "", "Folder of images, or a .zip or .npz, to measure on, instead of --holdout.", path=True, panel="Data"
    )
    holdout: float = option(0.0, HOLDOUT, panel="Data")
    tensorboard: bool = option(False, "Also write TensorBoard event files (extra 'tensorboard').", panel="Output")
    tracker: Tracker = option(
        Tracker.NONE, "Also send the log to wandb or trackio (extra of the same name).", panel="Output"
    )
    spike_guard: float = option(
        0.0, "Skip an update whose loss exceeds this multiple of the recent mean loss; 0 disables it."
    )
    parallel: Parallel = option(
        Parallel.DDP, "ddp replicates the model in every process; fsdp shards it, for models too large for that."
    )

    def __post_init__(self) -> None:
        for name in ("ema_rate", "ema_lengths"):
            object.__setattr__(self, name, tuple_of(float, name, getattr(self, name)))
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
            "eval_interval",
            "ema_snapshots",
        ):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require(self.spike_guard == 0 or self.spike_guard > 1, "spike_guard", "above 1, or 0 for never")
        self.require(self.lr > 0, "lr", "positive")
        self.require(0 <= self.holdout < 1, "holdout", "at least 0 and below 1")
        self.require(0 <= self.label_dropout < 1, "label_dropout", "at least 0 and below 1")
        self.require(0 <= self.conditioning_noise <= 2, "conditioning_noise", "between 0 and 2")
        self.require(0 <= self.fp16_scale_growth <= 1, "fp16_scale_growth", "between 0 and 1")
        self.require(0 <= self.seed < 2**32, "seed", "at least 0 and below 2^32")
        self.require(
            self.microbatch in (-1, "auto") or (type(self.microbatch) is int and self.microbatch > 0),
            "microbatch",
            "positive, -1 for the whole batch, or auto",
        )
        self.require(all(0 <= rate < 1 for rate in self.ema_rate), "ema_rate", "at least 0 and below 1")
        self.require(len(set(self.ema_rate)) == len(self.ema_rate), "ema_rate", "different rates")
        # above 1 / sqrt(12) older weights would count more than newer ones
        in_range = all(0 < length < 12**-0.5 for length in self.ema_lengths)
        self.require(in_range, "ema_lengths", "above 0 and below 0.2887")
        self.require(len(set(self.ema_lengths)) == len(self.ema_lengths), "ema_lengths", "different lengths")
        least = len(self.ema_lengths) / 2
        enough = self.ema_snapshots == 0 or self.ema_snapshots >= least
        self.require(enough, "ema_snapshots", f"at least {least:g} for {2 * least:g} lengths, or 0 for none")

    @property
    def snapshots_kept(self) -> int:
        """Number of snapshots that ema_snapshots has room for: each has the averages of all lengths in 16 bits."""
        return int(2 * self.ema_snapshots / len(self.ema_lengths)) if self.ema_lengths else 0


MOST_SAMPLES = 10**8
"""Maximum number of images in one job: their indices and classes are held in memory."""


@dataclass(frozen=True)
class SampleConfig(Config):
    """How images are sampled from a trained model."""

    panel = "Sampling"

    num_samples: int = option(16, "Number of images to sample.")
    batch_size: int = option(16, "Images per batch.")
    sampler: Sampler = option(
        Sampler.DDPM,
        "ddpm (ancestral), ddim, or for 6 to 30 steps dpm++, dpm++-sde, dpm++3m, unipc, ipndm or heun (two model calls "
        "a step).",
    )
    steps: int | None = option(None, "Number of timesteps, evenly spaced or as --time-grid says; by default all.")
    time_grid: TimeGrid | None = option(
        None,
        "How --steps are spread: uniform in t, log-snr, karras, quadratic, or tuned (fastdiff tune-steps); by default "
        "tuned if the checkpoint has a grid for this sampler and number of steps, else uniform.",
    )
    timestep_respacing: str | None = option(
        None, "Timesteps to use: a count (250), counts per section (10,15,20) or ddimN."
    )
    eta: float = option(0.0, "Noise of DDIM: 0 is deterministic, 1 adds as much as ancestral sampling.")
    clip_denoised: bool = option(True, "Clip the predicted x_0 to [-1, 1] in every step.")
    class_mix: ClassMix = option(ClassMix.BALANCED, "Sample each class in turn, or as often as in the training data.")
    guidance_scale: float = option(
        1.0, "Classifier-free guidance: above 1, images match their class more (needs --label-dropout; twice the work)."
    )
    classifier_scale: float = option(
        1.0, "Classifier guidance: scale of the classifier's gradient; above 1, images match their class more."
    )
    guidance_interval: tuple[float, float] | None = option(
        None, "Noise levels sigma / alpha within which guidance acts, e.g. 0.3,5; by default all."
    )
    seed: int = option(0, "Seed of the noise; the same seed gives the same images.")

    def __post_init__(self) -> None:
        if self.guidance_interval is not None:
            object.__setattr__(self, "guidance_interval", tuple_of(float, "guidance_interval", self.guidance_interval))
        super().__post_init__()

    def check(self) -> None:
        for name in ("num_samples", "batch_size"):
            self.require(getattr(self, name) > 0, name, "positive")
        self.require(self.num_samples <= MOST_SAMPLES, "num_samples", f"at most {MOST_SAMPLES:,}")
        for name in ("guidance_scale", "classifier_scale"):
            self.require(0 <= getattr(self, name) <= 1000, name, "between 0 and 1000")
        if self.guidance_interval is not None:
            finite = len(self.guidance_interval) == 2 and all(map(math.isfinite, self.guidance_interval))
            rising = finite and 0 <= self.guidance_interval[0] < self.guidance_interval[1]
            self.require(rising, "guidance_interval", "two noise levels, the lower one first, such as 0.3,5")
        self.require(0 <= self.eta <= 1, "eta", "between 0 and 1")
        if self.eta and self.sampler is not Sampler.DDIM:
            raise ValueError(f"eta {self.eta} is the noise of DDIM: use it with sampler ddim, not {self.sampler}")
        self.require(0 <= self.seed < 2**64, "seed", "at least 0 and below 2^64")
        if self.steps is not None:
            self.require(number(int, "steps", self.steps) > 0, "steps", "positive")
            if self.timestep_respacing:
                raise ValueError("steps and timestep_respacing both choose the timesteps: give one of them")
        elif self.time_grid is not None:
            instead = ", not timestep_respacing" if self.timestep_respacing else ""
            raise ValueError(f"time_grid {self.time_grid} spreads the timesteps of steps: give steps{instead}")

    @property
    def respacing(self) -> str | None:
        """The respacing spec of the timesteps to use, or None for the checkpoint's timesteps."""
        return str(self.steps) if self.steps is not None else self.timestep_respacing


@dataclass(frozen=True)
class RuntimeConfig(Config):
    """Where and how the model runs. Only the precision affects what it computes."""

    panel = "Machine"

    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: Precision = option(Precision.AUTO, "Precision of the model; auto is bf16 if the device supports it.")
    compile: Compile = option(Compile.AUTO, "torch.compile the model; auto does so when the job is long enough.")
    kernels: Kernels = option(Kernels.AUTO, "Implementation of the fused operations.")
    memory_format: MemoryFormat = option(MemoryFormat.CHANNELS_LAST, "Memory layout of the feature maps.")
