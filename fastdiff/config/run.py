"""A training run: how it starts, and all the settings that its run folder stores."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from fastdiff.config.base import Config, number, option
from fastdiff.config.choices import Recipe
from fastdiff.config.classifier import (
    UNUSED_BY_CLASSIFIERS,
    ClassifierConfig,
    ClassifierTrainConfig,
    used_by_classifiers,
)
from fastdiff.config.job import DataConfig, DiffusionConfig, RuntimeConfig, TrainConfig
from fastdiff.config.model import AUGMENT_DIM, ModelConfig

NO_DATA = "no data: name a folder of images with --data-dir"

READING = 2
"""Version of the rules by which files count as images and npz arrays as classes (fastdiff/data/): a run keeps its own,
so that it resumes with the same images. Runs that do not say theirs follow the first."""


@dataclass(frozen=True)
class StartConfig(Config):
    """How a run starts: from scratch, from a checkpoint's weights, or resumed where it stopped."""

    panel = "Run"

    run_dir: str = option(
        "", "Run folder; by default runs/NAME of the data, a classifier's runs/NAME-classifier.", path=True
    )
    recipe: Recipe = option(
        Recipe.AUTO,
        "Settings that are not given: chosen for the images and the time (auto), or improved-diffusion's, as with "
        "--preset.",
    )
    minutes: float | None = option(
        None, "Train for this many minutes, compilation included, instead of --steps; a CPU's default is 30."
    )
    preset: str | None = option(None, "A released model's flags, see fastdiff presets.")
    resume: bool = option(False, "Resume the run in the run folder.")
    allow_changes: bool = option(False, "Resume even if the data set or the diffusion process has changed.")
    init_from: str = option("", "Start from the weights of this checkpoint.", path=True)
    resume_checkpoint: str = option(
        "",
        "Resume from another run's modelNNNNNN.pt (improved-diffusion's) or .safetensors, with its EMAs and "
        "optimizer state.",
        path=True,
    )
    batch_size_per_process: int | None = option(None, "Images per update and process, instead of --batch-size.")
    dry_run: bool = option(
        False, "Show the data, the model, its memory and speed; train nothing and leave the run folder alone."
    )
    timeout: int = option(600, "Seconds after which a process that waits for the others gives up.")

    def check(self) -> None:
        self.require(self.timeout > 0, "timeout", "positive")
        if self.batch_size_per_process is not None:
            size = number(int, "batch_size_per_process", self.batch_size_per_process)
            self.require(size > 0, "batch_size_per_process", "positive")
        if self.minutes is not None:
            minutes = number(float, "minutes", self.minutes)
            self.require(0 < minutes <= 10**6, "minutes", "above 0 and at most 1,000,000")
        if self.init_from and self.resume_checkpoint:
            raise ValueError("init_from and resume_checkpoint both say which weights to start from: give one of them")

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], base: Self | None = None) -> Self:
        """As Config.from_flags, for all flags of a run; ValueError if they contradict each other or name no data."""
        start = super().from_flags(flags, base)
        if not (flags.get("data_dir") or start.resume or start.resume_checkpoint):
            raise ValueError(NO_DATA)
        if start.batch_size_per_process is not None and "batch_size" in flags:
            raise ValueError("batch_size and batch_size_per_process both set the size of a batch: give one of them")
        if start.minutes is not None and "steps" in flags:
            raise ValueError("minutes and steps both set the length of the run: give one of them")
        return start


_PARTS: dict[str, type[Config]] = {
    "model": ModelConfig,
    "diffusion": DiffusionConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "runtime": RuntimeConfig,
}
_PARTS_OF_CLASSIFIER = _PARTS | {"model": ClassifierConfig, "train": ClassifierTrainConfig}


@dataclass(frozen=True)
class RunConfig:
    """All the settings of a run, as config.json stores them; a classifier's run has a ClassifierTrainConfig, too.

    ``class_counts`` holds the number of images of each class, in the order of ``class_names``. ``reading`` is the
    version of the rules by which the data is read, and ``recipe`` where settings came from that nobody gave. ValueError
    if the parts are inconsistent.
    """

    model: ModelConfig | ClassifierConfig
    diffusion: DiffusionConfig
    data: DataConfig
    train: TrainConfig
    runtime: RuntimeConfig
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    data_fingerprint: str = ""
    reading: int = READING
    recipe: Recipe = Recipe.IMPROVED

    def __post_init__(self) -> None:
        if not 1 <= self.reading <= READING:
            raise ValueError(f"reading must be from 1 to {READING}, not {self.reading!r}")
        if isinstance(self.model, ClassifierConfig):
            return
        if self.train.label_dropout and not self.model.class_cond:
            raise ValueError(
                f"label_dropout {self.train.label_dropout:g} needs a class-conditional model: train one with "
                "--class-cond"
            )
        if self.train.conditioning_noise and self.model.small_size is None:
            said = f"conditioning_noise {self.train.conditioning_noise:g}"
            raise ValueError(f"{said} is for super-resolution models: give --small-size, or leave it out")
        if self.data.augment and not self.model.augment_dim:
            object.__setattr__(self, "model", replace(self.model, augment_dim=AUGMENT_DIM))

    @property
    def classifies(self) -> bool:
        """Whether the run trains a classifier."""
        return isinstance(self.model, ClassifierConfig)

    @property
    def decoded_size(self) -> int:
        """The side of the decoded images, see DataConfig."""
        return self.data.decoded_size(self.model.image_size)

    @property
    def labelled(self) -> bool:
        """Whether training takes the class of every image."""
        return isinstance(self.model, ClassifierConfig) or self.model.class_cond

    def to_dict(self) -> dict[str, Any]:
        """The settings as a JSON-serialisable dict."""
        values: dict[str, Any] = {name: getattr(self, name).to_dict() for name in _PARTS}
        if self.classifies:
            for part in values.values():
                for name in UNUSED_BY_CLASSIFIERS & part.keys():
                    del part[name]
        about_data = {"class_names": list(self.class_names), "class_counts": list(self.class_counts)}
        recipe = {} if self.classifies else {"recipe": self.recipe}
        return {**values, **about_data, "data_fingerprint": self.data_fingerprint, "reading": self.reading, **recipe}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict."""
        parts = _PARTS
        if "classifier_width" in values["model"]:
            parts, values = _PARTS_OF_CLASSIFIER, {**values, "diffusion": used_by_classifiers(values["diffusion"])}
        return cls(
            **{name: kind.from_dict(values[name]) for name, kind in parts.items()},  # type: ignore[arg-type]
            class_names=tuple(map(str, values["class_names"])),
            class_counts=tuple(map(int, values.get("class_counts", ()))),
            data_fingerprint=str(values.get("data_fingerprint", "")),
            reading=int(values.get("reading", 1)),
            recipe=Recipe(values.get("recipe", Recipe.IMPROVED)),
        )

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], base: Self | None = None, classifier: bool = False) -> Self:
        """The run that the flags describe: of a ``classifier``, or of a diffusion model.

        Fields that no flag sets come from ``base``, which then also says the kind of the run, or the defaults.
        """
        kinds = _PARTS
        if classifier or (base is not None and base.classifies):
            kinds, flags = _PARTS_OF_CLASSIFIER, used_by_classifiers(flags)
        parts = {
            name: kind.from_flags(flags, base=None if base is None else getattr(base, name))
            for name, kind in kinds.items()
        }
        return cls(**parts) if base is None else replace(base, **parts)  # type: ignore[arg-type]
