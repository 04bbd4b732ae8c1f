"""The settings of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from fastdiff.config.base import Config, number, option, tuple_of
from fastdiff.config.choices import Contestant, Labels, Mode, PictureSet, Precision, Sampler, TimeGrid
from fastdiff.config.job import MOST_SAMPLES, ImagesConfig, SampleConfig


@dataclass(frozen=True)
class NllConfig(ImagesConfig):
    """Which images to compute the likelihood of, and how."""

    panel = "Evaluation"

    data_dir: str = option(
        "", "Folder of images, including sub-folders, or a .zip or .npz of images. Required.", path=True
    )
    labels: Labels = option(
        Labels.PREFIX,
        "Class of an image: file name up to the first '_' (prefix), its sub-folder (folder), or whichever fits the "
        "files (auto); by default auto if the model was trained so, else prefix.",
        shown="",
    )
    num_samples: int | None = option(
        None, "Images to evaluate, in the folder's order, starting over at its end; by default each image once."
    )
    batch_size: int = option(16, "Images per batch.")
    steps: int | None = option(None, "Number of evenly spaced timesteps; fewer give a different bound. By default all.")
    timestep_respacing: str | None = option(
        None, "Timesteps to use: a count (250), counts per section (10,15,20) or ddimN."
    )
    clip_denoised: bool = option(True, "Clip the predicted x_0 to [-1, 1] in every step.")
    seed: int = option(0, "Seed of the noise; the same seed gives the same results.")
    precision: Precision = option(
        Precision.FP32, "Precision of the model; fp32 by default, because rounding errors affect the likelihood."
    )

    def check(self) -> None:
        super().check()
        self.require(self.batch_size > 0, "batch_size", "positive")
        for name in ("num_samples", "steps"):
            if (value := getattr(self, name)) is not None:
                self.require(number(int, name, value) > 0, name, "positive")
        self.require((self.num_samples or 0) <= MOST_SAMPLES, "num_samples", f"at most {MOST_SAMPLES:,}")
        self.require(0 <= self.seed < 2**64, "seed", "at least 0 and below 2^64")
        if self.steps is not None and self.timestep_respacing:
            raise ValueError("steps and timestep_respacing both choose the timesteps: give one of them")

    @property
    def respacing(self) -> str | None:
        """The respacing spec of the timesteps to use, or None for the checkpoint's timesteps."""
        return str(self.steps) if self.steps is not None else self.timestep_respacing


FAST_STEPS = 20
"""Steps of the fast sampler, unless flags say otherwise: for images to measure, and of models that it suits best."""

_METRICS = "Metrics"


@dataclass(frozen=True)
class MetricsConfig(SampleConfig):
    """Which features images are compared by, and how those of a checkpoint are drawn."""

    num_samples: int = option(
        10_000, "Images to draw of a run or checkpoint; of other images the first so many, by default all.", shown=""
    )
    sampler: Sampler = option(
        Sampler.DPM,
        "ddpm (ancestral), ddim, dpm++, dpm++-sde, dpm++3m, unipc, ipndm or heun; dpm++ with 20 steps by default.",
    )
    steps: int | None = option(
        FAST_STEPS, "Number of evenly spaced timesteps; by default all if a --sampler is given.", shown=""
    )
    time_grid: TimeGrid | None = option(
        None,
        "How --steps are spread: uniform in t, log-snr, karras, quadratic, or tuned (fastdiff tune-steps).",
        shown=TimeGrid.UNIFORM,
    )
    seed: int = option(0, "Seed of the noise and of the subsets that the kernel distance compares.")
    extractor: str = option(
        "efficientnet-lite0",
        "Network whose features are compared: efficientnet-lite0 (extra 'metrics'), or a file: TorchScript "
        "(inception-2015-12-05.pt), a state dict of Inception, or an exported program.",
        panel=_METRICS,
    )
    extractor_size: int = option(
        224, "Pixels to which images are resized for other networks than Inception and EfficientNet.", panel=_METRICS
    )
    trust: bool = option(False, "Run the extractor's file, which may contain any code.", panel=_METRICS)
    image_size: int | None = option(
        None,
        "Size to which the images of folders are resized and cropped; by default that of the samples.",
        panel=_METRICS,
    )
    cache_dir: str = option(
        "", "Folder for the decoded images of folders; by default the user's cache folder.", path=True, panel=_METRICS
    )

    def __post_init__(self) -> None:
        if self.steps is not None and self.time_grid is None:  # a tuned grid would be of one checkpoint alone
            object.__setattr__(self, "time_grid", TimeGrid.UNIFORM)
        super().__post_init__()

    def check(self) -> None:
        super().check()
        self.require(self.num_samples > 1, "num_samples", "at least 2")
        self.require(0 < self.extractor_size <= 4096, "extractor_size", "between 1 and 4096")
        if self.image_size is not None:
            self.require(0 < number(int, "image_size", self.image_size) <= 4096, "image_size", "between 1 and 4096")

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], base: Self | None = None) -> Self:
        """As Config.from_flags; a given sampler or timestep_respacing has no default number of steps."""
        chosen = {"sampler", "timestep_respacing"} & {name for name, value in flags.items() if value is not None}
        return super().from_flags({"steps": None, "time_grid": None, **flags} if chosen else flags, base)

    def within(self, timesteps: int) -> Self:
        """The same for a process of ``timesteps``, which may have fewer than the default number of steps."""
        few = self.steps == FAST_STEPS and timesteps < FAST_STEPS
        return replace(self, steps=None, time_grid=None) if few else self


@dataclass(frozen=True)
class QualityConfig(Config):
    """What ``fastdiff benchmark quality`` measures, and how."""

    panel = "Quality"

    set: tuple[PictureSet, ...] = option(tuple(PictureSet), "Sets of real images: digits, photographs or both.")
    run: str = option("", "Only measure this run, checkpoint or .npz of samples, trained on one --set.", path=True)
    contestants: tuple[Contestant, ...] = option(
        tuple(Contestant), "Recipes to compare: improved-diffusion's, the one of earlier experiments, and auto."
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "Seeds of the runs.")
    only: tuple[Mode, ...] = option(
        tuple(Mode), "Compare in equal updates, in equal time, or auto with each of its choices undone (first seed)."
    )
    updates: int = option(300, "Updates of a run in updates and undone.")
    minutes: float = option(10.0, "Minutes of a run in time.")
    out_dir: str = option("quality", "Folder for the data, the judges, the runs and what is measured.", path=True)
    num_samples: int = option(2000, "Images to draw of every run.")
    sampler: Sampler = option(Sampler.DPM, "Sampler of every run.")
    steps: int = option(FAST_STEPS, "Number of evenly spaced timesteps of the sampler.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple_of(int, "seeds", self.seeds))
        super().__post_init__()

    def check(self) -> None:
        self.require(
            len(set(self.seeds)) == len(self.seeds) > 0 and all(0 <= seed < 2**32 for seed in self.seeds),
            "seeds",
            "different numbers of at least 0 and below 2^32",
        )
        self.require(self.updates > 0, "updates", "positive")
        self.require(0 < self.minutes <= 10**6, "minutes", "above 0 and at most 1,000,000")
        self.require(self.num_samples > 5, "num_samples", "at least 6")
        self.require(self.steps > 0, "steps", "positive")
