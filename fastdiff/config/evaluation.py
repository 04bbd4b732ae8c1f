"""The settings of an evaluation."""

from dataclasses import dataclass

from fastdiff.config.base import number, option
from fastdiff.config.choices import Labels, Precision
from fastdiff.config.job import MOST_SAMPLES, ImagesConfig


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
