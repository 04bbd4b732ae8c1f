"""The settings of a job: the process, the data, the optimisation, the sampling, the machine."""

from dataclasses import dataclass

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
    Sampler,
    ScheduleSampler,
    Tracker,
)


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

    data_dir: str = option("", "Folder of images with its sub-folders, or a .zip or .npz of them.", path=True)
    labels: Labels = option(Labels.PREFIX, "Class of an image: file name up to the first '_', or its sub-folder.")
    flip: bool = option(False, "Mirror each image left to right half of the time.")
    strict: bool = option(False, "Refuse a folder with unreadable images instead of skipping them.")
    cache: Cache = option(Cache.AUTO, "Keep decoded images in memory or in a memory-mapped file.")
    cache_dir: str = option("", "Folder for the memory-mapped file; by default the user's cache folder.", path=True)


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
    label_dropout: float = option(
        0.0, "Train this share of the images without their class, for --guidance-scale when sampling."
    )
    conditioning_noise: float = option(
        0.0, "Super-resolution: train on small images with noise of up to this standard deviation (black to white: 2)."
    )
    fp16_scale_growth: float = option(
        0.0, "fp16: grow log2 of the loss scale by this in every update, from 20 on; 0 means PyTorch's rule."
    )
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
        object.__setattr__(self, "ema_rate", tuple_of(float, "ema_rate", self.ema_rate))
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
        ):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require(self.spike_guard == 0 or self.spike_guard > 1, "spike_guard", "above 1, or 0 for never")
        self.require(self.lr > 0, "lr", "positive")
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


MOST_SAMPLES = 10**8
"""Images of one job: their numbers and classes are held in memory."""


@dataclass(frozen=True)
class SampleConfig(Config):
    """How images are drawn from a trained model."""

    num_samples: int = option(16, "Images to draw.")
    batch_size: int = option(16, "Images drawn together.")
    sampler: Sampler = option(
        Sampler.DDPM, "ddpm (ancestral), ddim, or in 10 to 30 steps dpm++, dpm++-sde or heun (two model calls a step)."
    )
    steps: int | None = option(None, "Evenly spaced timesteps to use; by default all of the process.")
    timestep_respacing: str | None = option(
        None, "Timesteps to use: a count (250), counts per section (10,15,20) or ddimN."
    )
    eta: float = option(0.0, "Noise of DDIM: 0 is deterministic, 1 as much as ancestral sampling.")
    clip_denoised: bool = option(True, "Clip the predicted x_0 to [-1, 1] in every step.")
    class_mix: ClassMix = option(ClassMix.BALANCED, "Draw all classes in turn, or as often as the data had them.")
    guidance_scale: float = option(
        1.0, "Above 1: images more like their class (a model trained with --label-dropout; twice the work)."
    )
    seed: int = option(0, "Seed of the noise; the same seed draws the same images.")

    def check(self) -> None:
        for name in ("num_samples", "batch_size"):
            self.require(getattr(self, name) > 0, name, "positive")
        self.require(self.num_samples <= MOST_SAMPLES, "num_samples", f"at most {MOST_SAMPLES:,}")
        self.require(0 <= self.guidance_scale <= 1000, "guidance_scale", "between 0 and 1000")
        self.require(0 <= self.eta <= 1, "eta", "between 0 and 1")
        if self.eta and self.sampler is not Sampler.DDIM:
            raise ValueError(f"eta {self.eta} is the noise of DDIM: use it with sampler ddim, not {self.sampler}")
        self.require(0 <= self.seed < 2**64, "seed", "at least 0 and below 2^64")
        if self.steps is not None:
            self.require(number(int, "steps", self.steps) > 0, "steps", "positive")
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
