"""The closed choices among the settings."""

from enum import StrEnum


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
    """How images are drawn: ancestral (DDPM, Ho et al. 2020), DDIM (Song et al. 2021), or in few steps.

    Those are DPM-Solver++(2M) and its SDE variant (Lu et al. 2022), and Heun's method (Karras et al. 2022).
    """

    DDPM = "ddpm"
    DDIM = "ddim"
    DPM = "dpm++"
    DPM_SDE = "dpm++-sde"
    HEUN = "heun"

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise in its steps, for DDIM leaving eta aside."""
        return self in (Sampler.DDPM, Sampler.DPM_SDE)


class ClassMix(StrEnum):
    """Which class an image is drawn of where none is named: each in turn, or as often as the training data had it."""

    BALANCED = "balanced"
    DATA = "data"


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
