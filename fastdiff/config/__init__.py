"""Every setting, declared and documented once, in frozen dataclasses that are validated when they are constructed.

The command line is derived from these fields (``cli/options.py``): a field's name becomes the flag, its ``help`` the
help text and its default the flag's default. Names and defaults match improved-diffusion's wherever it has them.
"""

from fastdiff.config.base import Config, option
from fastdiff.config.choices import (
    Cache,
    ClassifierPool,
    ClassMix,
    Compile,
    Contestant,
    Kernels,
    Labels,
    MemoryFormat,
    Metric,
    Mode,
    NoiseSchedule,
    Parallel,
    PictureSet,
    Precision,
    Prediction,
    Recipe,
    Sampler,
    ScheduleSampler,
    TimeGrid,
    Tracker,
    Weighting,
)
from fastdiff.config.classifier import UNUSED_BY_CLASSIFIERS, ClassifierConfig, ClassifierTrainConfig, with_multipliers
from fastdiff.config.evaluation import FAST_STEPS, MetricsConfig, NllConfig, QualityConfig
from fastdiff.config.job import (
    MOST_SAMPLES,
    MOST_TIMESTEPS,
    DataConfig,
    DiffusionConfig,
    ImagesConfig,
    RuntimeConfig,
    SampleConfig,
    TrainConfig,
)
from fastdiff.config.model import (
    GROUPS,
    NUM_CLASSES,
    ModelConfig,
    channel_mult_for,
    is_table_size,
)
from fastdiff.config.run import READING, RunConfig, StartConfig
from fastdiff.config.tuning import TuneConfig

__all__ = [
    "FAST_STEPS",
    "GROUPS",
    "MOST_SAMPLES",
    "MOST_TIMESTEPS",
    "NUM_CLASSES",
    "READING",
    "UNUSED_BY_CLASSIFIERS",
    "Cache",
    "ClassMix",
    "ClassifierConfig",
    "ClassifierPool",
    "ClassifierTrainConfig",
    "Compile",
    "Config",
    "Contestant",
    "DataConfig",
    "DiffusionConfig",
    "ImagesConfig",
    "Kernels",
    "Labels",
    "MemoryFormat",
    "Metric",
    "MetricsConfig",
    "Mode",
    "ModelConfig",
    "NllConfig",
    "NoiseSchedule",
    "Parallel",
    "PictureSet",
    "Precision",
    "Prediction",
    "QualityConfig",
    "Recipe",
    "RunConfig",
    "RuntimeConfig",
    "SampleConfig",
    "Sampler",
    "ScheduleSampler",
    "StartConfig",
    "TimeGrid",
    "Tracker",
    "TrainConfig",
    "TuneConfig",
    "Weighting",
    "channel_mult_for",
    "is_table_size",
    "option",
    "with_multipliers",
]
