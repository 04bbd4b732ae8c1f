"""A training run: how it starts, and all the settings that its folder keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from fastdiff.config.base import Config, option
from fastdiff.config.job import DataConfig, DiffusionConfig, RuntimeConfig, TrainConfig
from fastdiff.config.model import ModelConfig


@dataclass(frozen=True)
class StartConfig(Config):
    """How a run starts: anew, with the weights of a checkpoint, or where it stopped."""

    run_dir: str = option("", "Folder of the run; by default runs/NAME of the data.", path=True)
    preset: str | None = option(None, "A released model's flags, see fastdiff presets.")
    resume: bool = option(False, "Go on with the run in the run folder.")
    allow_changes: bool = option(False, "Resume although the data set or the diffusion process has changed.")
    init_from: str = option("", "Begin with the weights of this checkpoint.", path=True)
    resume_checkpoint: str = option(
        "",
        "Go on from another run's modelNNNNNN.pt (improved-diffusion's) or .safetensors, with its averages and its "
        "optimizer.",
        path=True,
    )
    batch_size_per_process: int | None = option(None, "Images per update and process, instead of --batch-size.")
    timeout: int = option(600, "Seconds after which a process that waits for the others gives up.")

    def check(self) -> None:
        self.require(self.timeout > 0, "timeout", "positive")
        if (size := self.batch_size_per_process) is not None:
            self.require(type(size) is int and size > 0, "batch_size_per_process", "positive")
        if self.init_from and self.resume_checkpoint:
            raise ValueError("init_from and resume_checkpoint both say what to begin with: give one of them")


_PARTS: dict[str, type[Config]] = {
    "model": ModelConfig,
    "diffusion": DiffusionConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "runtime": RuntimeConfig,
}


@dataclass(frozen=True)
class RunConfig:
    """All the settings of a run, as config.json holds them.

    ``class_counts`` are the images of each class, in the order of ``class_names``. ValueError where the parts do not go
    together.
    """

    model: ModelConfig
    diffusion: DiffusionConfig
    data: DataConfig
    train: TrainConfig
    runtime: RuntimeConfig
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    data_fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.train.label_dropout and not self.model.class_cond:
            raise ValueError(
                f"label_dropout {self.train.label_dropout:g} needs a model that is told classes: train one with "
                "--class-cond"
            )
        if self.train.conditioning_noise and self.model.small_size is None:
            said = f"conditioning_noise {self.train.conditioning_noise:g}"
            raise ValueError(f"{said} is for super-resolution models: give --small-size, or leave it out")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        values: dict[str, Any] = {name: getattr(self, name).to_dict() for name in _PARTS}
        about_data = {"class_names": list(self.class_names), "class_counts": list(self.class_counts)}
        return {**values, **about_data, "data_fingerprint": self.data_fingerprint}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict."""
        return cls(
            **{name: kind.from_dict(values[name]) for name, kind in _PARTS.items()},  # type: ignore[arg-type]
            class_names=tuple(map(str, values["class_names"])),
            class_counts=tuple(map(int, values.get("class_counts", ()))),
            data_fingerprint=str(values.get("data_fingerprint", "")),
        )

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], base: Self | None = None) -> Self:
        """The run that the flags describe, each part over that of ``base`` or the defaults."""
        parts = {
            name: kind.from_flags(flags, base=None if base is None else getattr(base, name))
            for name, kind in _PARTS.items()
        }
        return cls(**parts) if base is None else replace(base, **parts)  # type: ignore[arg-type]
