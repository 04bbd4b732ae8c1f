"""``fastdiff sample``: a checkpoint in, images out."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.improved_diffusion import log_formats
from fastdiff.cli.loading import find_with_rate, load_for, young_average
from fastdiff.cli.options import (
    CheckpointArgument,
    DebugFlag,
    EmaRateFlag,
    Flags,
    PresetFlag,
    path_option,
    with_flags,
)
from fastdiff.config import MOST_SAMPLES, DiffusionConfig, ModelConfig, RuntimeConfig, SampleConfig
from fastdiff.presets import with_preset

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastdiff.checkpoint import Checkpoint
    from fastdiff.runtime.device import Runtime
    from fastdiff.sampling import Plan


@dataclass(frozen=True)
class Choices:
    """The options of ``fastdiff sample`` that are not fields of a configuration."""

    checkpoint: Path | None
    out: Path
    classes: str | None = None
    indices: str | None = None
    ema_rate: str | None = None
    base_samples: Path | None = None
    super_res: Path | None = None
    interpolate: tuple[str, str] | None = None
    png_dir: Path | None = None
    trajectory: Path | None = None
    overwrite: bool = False
    timeout: int = 600
    preset: str | None = None


@with_flags(SampleConfig, RuntimeConfig, ModelConfig, DiffusionConfig)
def sample(
    flags: Flags,
    checkpoint: CheckpointArgument = None,
    out: Annotated[
        Path,
        path_option(help="The npz file to write ({shape} in its name is NxHxWx3); a grid is saved beside it as .png."),
    ] = Path("samples.npz"),
    class_: Annotated[
        str | None, typer.Option("--class", help="Class to draw, by name or index, or several: cat,dog.")
    ] = None,
    indices: Annotated[
        str | None, typer.Option(help="Draw only the images with these numbers, e.g. 17,42 or 100-199.")
    ] = None,
    ema_rate: EmaRateFlag = None,
    base_samples: Annotated[
        Path | None,
        path_option(help="Images for a super-resolution model to enlarge: an npz of samples, or a folder."),
    ] = None,
    super_res: Annotated[
        Path | None, path_option(help="Enlarge the images with this super-resolution checkpoint or run.")
    ] = None,
    interpolate: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Interpolate two image files or seeds; needs a deterministic sampler."),
    ] = None,
    png_dir: Annotated[Path | None, path_option(help="Also write every image as a PNG file into this folder.")] = None,
    trajectory: Annotated[
        Path | None, path_option(help="Save the steps of the first image as an animation (.gif) or a strip (.png).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files, and restart an unfinished job.")
    ] = False,
    timeout: Annotated[
        int, typer.Option(min=1, help="Seconds after which a process that waits for the others gives up.")
    ] = 600,
    preset: PresetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Draw images from a trained model.

    The same command resumes an interrupted job. Under torchrun several processes share the images:
    torchrun --nproc-per-node=8 -m fastdiff sample ...

    A checkpoint stores its model. The model and diffusion flags are for bare state dicts (.pt), which reveal the
    architecture, but not the number of heads or the noise schedule.
    """
    choices = Choices(
        checkpoint=checkpoint,
        out=out,
        classes=class_,
        indices=indices,
        ema_rate=ema_rate,
        base_samples=base_samples,
        super_res=super_res,
        interpolate=interpolate,
        png_dir=png_dir,
        trajectory=trajectory,
        overwrite=overwrite,
        timeout=timeout,
        preset=preset,
    )
    raise typer.Exit(run_sampling(with_preset(flags, preset, ModelConfig, DiffusionConfig), choices))


def run_sampling(flags: Flags, choices: Choices) -> int:
    """Run the job of ``flags`` and ``choices``; return the exit status."""
    config = SampleConfig.from_flags(flags)
    if choices.indices is not None and "num_samples" in flags:
        raise ValueError("num_samples and indices both say which images to draw: give one of them")
    to_terminal = "stdout" in log_formats()
    from fastdiff.cli.display import Display, Slowly
    from fastdiff.runtime.device import Runtime
    from fastdiff.runtime.distributed import World
    from fastdiff.sampling import Job, SampleFiles, settings_of

    world = World.join(choices.timeout)
    with world.explained(f"use a smaller --batch-size than {config.batch_size}"):
        local_rank = world.local_rank if world.size > 1 else None
        runtime = world.on_all(lambda: Runtime.resolve(RuntimeConfig.from_flags(flags), local_rank))
        paths = world.from_main(lambda: _paths(choices))
        plan = world.on_all(lambda: _plan(paths, flags, config, choices, runtime))
        indices = world.on_all(lambda: _indices(choices.indices, plan.config.num_samples))
        size = plan.image_size
        out = choices.out.with_name(choices.out.name.replace("{shape}", f"{len(indices)}x{size}x{size}x3"))
        files = SampleFiles(out, choices.png_dir, choices.trajectory, choices.overwrite)
        world.from_main(files.check)
        settings = world.from_main(lambda: settings_of(plan, indices, runtime, *paths, choices.base_samples))
        job = world.on_all(lambda: Job(plan, indices, files, settings, runtime, world))
        with Display(silent=not world.main or not to_terminal) as display:
            models = ("model", plan.checkpoint), ("enlarged by", plan.super_res)
            for (what, loaded), path in zip(models, paths, strict=True):
                if loaded is not None:
                    display.line(f"{what}: {path}, step {loaded.step}{young_average(loaded)}")
            status = job.run(display.line, Slowly(display))
    world.leave()
    return status


def _paths(choices: Choices) -> tuple[Path, Path | None]:
    """The paths of the checkpoint and of the super-resolution model, if there is one."""
    path = find_with_rate(choices.checkpoint, choices.ema_rate)
    if choices.super_res is None:
        return path, None
    return path, find_with_rate(choices.super_res, choices.ema_rate if not choices.super_res.is_file() else None)


def _plan(
    paths: tuple[Path, Path | None], flags: Flags, config: SampleConfig, choices: Choices, runtime: "Runtime"
) -> "Plan":
    from fastdiff.sampling import Plan, split_classes

    loaded = load_for(runtime, paths[0], flags, choices.preset)
    return Plan.of(
        loaded,
        config,
        num_samples=flags.get("num_samples"),
        base_samples=choices.base_samples,
        super_res=None if paths[1] is None else _load_super_res(paths[1], runtime),
        ends=choices.interpolate,
        classes=split_classes(choices.classes, loaded.class_names) if choices.classes is not None else (),
    )


def _load_super_res(path: Path, runtime: "Runtime") -> "Checkpoint":
    if path.suffix != ".safetensors":  # the flags describe the base model
        raise ValueError(
            f"super_res {path} does not store its settings: fastdiff convert {path} FILE.safetensors, and name that"
        )
    return load_for(runtime, path)


def _indices(text: str | None, count: int) -> "NDArray[np.int64]":
    """The numbers in "17,42,100-199", or the first ``count``."""
    import numpy as np

    if text is None:
        return np.arange(count)
    parts, count = [], 0
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdecimal() and len(end) < 19 for end in ends) or int(ends[0]) > int(ends[1]):
            raise ValueError(f"indices must be numbers and ranges such as 17,42,100-199, not {text!r}")
        count += int(ends[1]) - int(ends[0]) + 1
        if count > MOST_SAMPLES:
            raise ValueError(f"indices {text!r} are more than {MOST_SAMPLES:,} images")
        parts.append(np.arange(int(ends[0]), int(ends[1]) + 1))
    numbers = np.concatenate(parts)
    if len(np.unique(numbers)) != len(numbers):
        raise ValueError(f"indices {text!r} name an image twice")
    return numbers
