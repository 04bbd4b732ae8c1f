"""Enumerations: the settings with a fixed set of values."""

from enum import StrEnum


class NoiseSchedule(StrEnum):
    """How the betas grow: linear (Ho et al. 2020) or cosine (Nichol & Dhariwal 2021, section 3.2)."""

    LINEAR = "linear"
    COSINE = "cosine"


class Recipe(StrEnum):
    """Where the settings of a run come from that are not given.

    auto chooses them for the images, the device and the length of the run; improved takes improved-diffusion's.
    """

    AUTO = "auto"
    IMPROVED = "improved"


class Prediction(StrEnum):
    """What the model predicts: the noise (Ho et al. 2020), x_0, v (Salimans & Ho 2022) or a flow's velocity.

    v is alpha epsilon - sigma x_0; flow is epsilon - x_0, along a straight path (Liu et al. 2023, Lipman et al. 2023).
    """

    EPSILON = "epsilon"
    X_START = "x_start"
    V = "v"
    FLOW = "flow"


class Weighting(StrEnum):
    """How the squared error is weighted over the noise levels, in addition to what the prediction implies.

    min-snr limits the weight of little noise (Hang et al. 2023); sigmoid favours much noise (Kingma & Gao 2023,
    Hoogeboom et al. 2024).
    """

    NONE = "none"
    MIN_SNR = "min-snr"
    SIGMOID = "sigmoid"


class Labels(StrEnum):
    """Where an image's class label comes from: the file name up to its first underscore, or its sub-folder.

    auto decides by the files: a label file, else sub-folders, else file names.
    """

    AUTO = "auto"
    PREFIX = "prefix"
    FOLDER = "folder"


class Cache(StrEnum):
    """Where decoded images are kept: in memory, in a memory-mapped file, or in memory if they fit."""

    AUTO = "auto"
    MEMORY = "memory"
    DISK = "disk"


class ClassifierPool(StrEnum):
    """How a classifier's feature map becomes logits.

    attention is attention over its pixels, adaptive their average; the spatial ones average every block's output.
    """

    ATTENTION = "attention"
    ADAPTIVE = "adaptive"
    SPATIAL = "spatial"
    SPATIAL_V2 = "spatial_v2"


class ScheduleSampler(StrEnum):
    """How training draws timesteps (Nichol & Dhariwal 2021, section 3.3)."""

    UNIFORM = "uniform"
    LOSS_SECOND_MOMENT = "loss-second-moment"


class Sampler(StrEnum):
    """The sampling algorithm: ancestral (DDPM, Ho et al. 2020), DDIM (Song et al. 2021), or one for few steps.

    The few-step samplers are DPM-Solver++(2M), its SDE variant and its third order (Lu et al. 2022), UniPC (Zhao et al.
    2023), iPNDM (Liu et al. 2022, Zhang & Chen 2023), and Heun's method (Karras et al. 2022).
    """

    DDPM = "ddpm"
    DDIM = "ddim"
    DPM = "dpm++"
    DPM_SDE = "dpm++-sde"
    DPM_3M = "dpm++3m"
    UNIPC = "unipc"
    IPNDM = "ipndm"
    HEUN = "heun"

    @property
    def stochastic(self) -> bool:
        """Whether the sampler adds noise in its steps; DDIM counts as deterministic, whatever its eta."""
        return self in (Sampler.DDPM, Sampler.DPM_SDE)


class TimeGrid(StrEnum):
    """How few timesteps are spread over those of a process.

    They are even in t, in log-SNR (Lu et al. 2022), in sigma^(1/7) (Karras et al. 2022, equation 5), or in the square
    root of t (Song et al. 2021, appendix D.2), or were tuned for the checkpoint (fastdiff tune-steps).
    """

    UNIFORM = "uniform"
    LOG_SNR = "log-snr"
    KARRAS = "karras"
    QUADRATIC = "quadratic"
    TUNED = "tuned"


class Metric(StrEnum):
    """A figure of samples: Fréchet and kernel distance of features, shares of neighbourhoods, sFID, Inception score."""

    FD = "fd"
    KD = "kd"
    PRECISION = "precision"
    RECALL = "recall"
    DENSITY = "density"
    COVERAGE = "coverage"
    SFID = "sfid"
    SCORE = "inception_score"

    @property
    def lower_is_better(self) -> bool:
        """Whether it is a distance."""
        return self in (Metric.FD, Metric.KD, Metric.SFID)


class ClassMix(StrEnum):
    """How classes are chosen if none is given: each in turn, or as often as in the training data."""

    BALANCED = "balanced"
    DATA = "data"


class Precision(StrEnum):
    """The precision of the forward and backward passes; parameters and optimizer updates are always fp32.

    tf32 is fp32, but matrix products and convolutions round their inputs to 10-bit mantissas on GPUs that support it.
    """

    AUTO = "auto"
    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"


class Parallel(StrEnum):
    """How processes hold the model: ddp replicates it on each, fsdp shards it (FSDP2, fully_shard)."""

    DDP = "ddp"
    FSDP = "fsdp"


class Tracker(StrEnum):
    """A service that receives the log in addition to the log files: Weights & Biases, or trackio."""

    NONE = "none"
    WANDB = "wandb"
    TRACKIO = "trackio"


class Compile(StrEnum):
    """Whether to torch.compile the model; auto does so when the job is long enough to repay the compilation."""

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
    """The memory layout of the feature maps."""

    CHANNELS_LAST = "channels_last"
    CONTIGUOUS = "contiguous"


class PictureSet(StrEnum):
    """A data set of real images that recipes are compared on: scikit-learn's digits, or crops of four photographs."""

    DIGITS = "digits"
    PHOTOGRAPHS = "photographs"


class Contestant(StrEnum):
    """A recipe that is compared with others."""

    IMPROVED = "improved"
    CONTRIBUTING = "contributing"
    AUTO = "auto"


class Mode(StrEnum):
    """What recipes have in common when they are compared; or one recipe, with each of its choices undone."""

    UPDATES = "updates"
    TIME = "time"
    UNDONE = "undone"
