"""``fastdiff sample``: a checkpoint in, images out."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.help import OUTPUT
from fastdiff.cli.loading import find_with_rate, load_classifier_for, load_for, young_average
from fastdiff.cli.options import (
    CheckpointArgument,
    DebugFlag,
    EmaLengthFlag,
    EmaRateFlag,
    Flags,
    PresetFlag,
    path_option,
    with_flags,
)
from fastdiff.cli.scripts import log_formats
from fastdiff.config import MOST_SAMPLES, ClassifierConfig, DiffusionConfig, ModelConfig, RuntimeConfig, SampleConfig
from fastdiff.presets import with_preset

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastdiff.checkpoint import Checkpoint
    from fastdiff.runtime.device import Runtime

PANEL = SampleConfig.panel


@with_flags(SampleConfig, RuntimeConfig, of_state_dicts=(ModelConfig, DiffusionConfig, ClassifierConfig))
def sample(
    flags: Flags,
    checkpoint: CheckpointArgument = None,
    out: Annotated[
        Path,
        path_option(
            help="The npz file to write ({shape} in its name is NxHxWx3); a grid is saved beside it as .png.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("samples.npz"),
    class_: Annotated[
        str | None,
        typer.Option("--class", help="Class to draw, by name or index, or several: cat,dog.", rich_help_panel=PANEL),
    ] = None,
    indices: Annotated[
        str | None,
        typer.Option(help="Draw only the images with these numbers, e.g. 17,42 or 100-199.", rich_help_panel=PANEL),
    ] = None,
    ema_rate: EmaRateFlag = None,
    ema_length: EmaLengthFlag = None,
    base_samples: Annotated[
        Path | None,
        path_option(
            help="Images for a super-resolution model to enlarge: an npz of samples, or a folder or zip.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    skip_unreadable: Annotated[
        bool,
        typer.Option(
            "--skip-unreadable", help="Leave out files of --base-samples that cannot be read.", rich_help_panel=PANEL
        ),
    ] = False,
    super_res: Annotated[
        Path | None,
        path_option(help="Enlarge the images with this super-resolution checkpoint or run.", rich_help_panel=PANEL),
    ] = None,
    classifier: Annotated[
        Path | None,
        path_option(
            help="Guide the images towards their class with this classifier's checkpoint or run.", rich_help_panel=PANEL
        ),
    ] = None,
    guide: Annotated[
        Path | None,
        path_option(
            help="Guide the images away from this worse model, such as an earlier step (RUN@STEP) or a smaller model, "
            "by --guidance-scale.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    interpolate: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="Interpolate two image files or seeds; needs a deterministic sampler.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    png_dir: Annotated[
        Path | None, path_option(help="Also write every image as a PNG file into this folder.", rich_help_panel=OUTPUT)
    ] = None,
    trajectory: Annotated[
        Path | None,
        path_option(
            help="Save the steps of the first image as an animation (.gif) or a strip (.png).", rich_help_panel=OUTPUT
        ),
    ] = None,
    trajectory_images: Annotated[
        int, typer.Option(min=1, max=64, help="Number of images that --trajectory shows.", rich_help_panel=OUTPUT)
    ] = 1,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace existing files, and restart an unfinished job.", rich_help_panel=OUTPUT
        ),
    ] = False,
    timeout: Annotated[
        int,
        typer.Option(
            min=1,
            help="Seconds after which a process that waits for the others gives up.",
            rich_help_panel=RuntimeConfig.panel,
        ),
    ] = 600,
    preset: PresetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Draw images from a trained model.

    For example: fastdiff sample runs/photos --sampler dpm++ --steps 20 --out samples.npz

    The same command resumes an interrupted job. Under torchrun several processes share the images:
    torchrun --nproc-per-node=8 -m fastdiff sample ...

    A checkpoint stores its model and diffusion process. A bare state dict (.pt) reveals the architecture, but not the
    number of heads or the process: --help-all lists the flags that describe it.
    """
    flags = with_preset(flags, preset, ModelConfig, DiffusionConfig)
    config = SampleConfig.from_flags(flags)
    if indices is not None and "num_samples" in flags:
        raise ValueError("num_samples and indices both say which images to draw: give one of them")
    if guide is not None and "guidance_scale" not in flags:
        raise ValueError("guide: say by how much it guides, such as --guidance-scale 2")
    to_terminal = "stdout" in log_formats()
    from fastdiff.cli.display import Display, Slowly
    from fastdiff.runtime.device import Runtime
    from fastdiff.runtime.distributed import World
    from fastdiff.runtime.threads import fit_to_cores
    from fastdiff.runtime.words import printable
    from fastdiff.sampling import Classes, Job, Plan, SampleFiles, settings_of, split_classes
    from fastdiff.sampling.base_samples import unreadable_in
    from fastdiff.sampling.plan import with_sampler

    fit_to_cores()
    world = World.join(timeout)
    with world.explained(f"use a smaller --batch-size than {config.batch_size}"):
        local_rank = world.local_rank if world.size > 1 else None
        runtime = world.on_all(lambda: Runtime.resolve(RuntimeConfig.from_flags(flags), local_rank))
        paths = world.from_main(lambda: _paths(checkpoint, classifier, guide, super_res, ema_rate, ema_length))
        silent = not world.main or not to_terminal
        skipped: dict[str, str] = {}
        if skip_unreadable:
            with Display(silent) as display:
                skipped = world.from_main(lambda: unreadable_in(base_samples, partial(display.advance, "base samples")))

        def planned() -> Plan:
            loaded = load_for(runtime, paths[0], flags, preset)
            guiding = None if paths[1] is None else load_classifier_for(runtime, paths[1], loaded, flags)
            names = (Classes.of(loaded, guiding) or Classes((), (), ())).named
            return Plan.of(
                loaded,
                SampleConfig.from_flags(with_sampler(flags, loaded)),
                num_samples=flags.get("num_samples"),
                base_samples=base_samples,
                skipped=skipped,
                classifier=guiding,
                guide=None if paths[2] is None else _load_other("guide", paths[2], runtime),
                super_res=None if paths[3] is None else _load_other("super_res", paths[3], runtime),
                ends=interpolate,
                classes=split_classes(class_, names) if class_ is not None else (),
            )

        plan = world.on_all(planned)
        numbers = world.on_all(lambda: _indices(indices, plan.config.num_samples))
        size = plan.image_size
        out = out.with_name(out.name.replace("{shape}", f"{len(numbers)}x{size}x{size}x3"))
        files = SampleFiles(out, png_dir, trajectory, overwrite, trajectory_images)
        world.from_main(files.check)
        settings = world.from_main(lambda: settings_of(plan, numbers, runtime, *paths, base_samples))
        job = world.on_all(lambda: Job(plan, numbers, files, settings, runtime, world))
        with Display(silent) as display:
            for name, reason in skipped.items():
                display.line(f"skipped: {printable(name)} ({reason})")
            models = (
                ("model", plan.checkpoint, ""),
                ("guided by", plan.classifier, f", scale {config.classifier_scale:g}"),
                ("guided by", plan.guide, f", scale {config.guidance_scale:g}"),
                ("enlarged by", plan.super_res, ""),
            )
            for (what, loaded, scale), path in zip(models, paths, strict=True):
                if loaded is not None:
                    display.line(f"{what}: {path}, step {loaded.step}{scale}{young_average(loaded)}")
            if plan.config.sampler != config.sampler:
                display.line(f"sampler: {plan.config.sampler}, {plan.config.steps or 'all'} steps (or give --sampler)")
            if plan.base is not None and not skip_unreadable:
                base = plan.base
                world.from_main(lambda: base.check(numbers, partial(display.advance, "base samples")))
                display.finish("base samples")
            status = job.run(display.line, Slowly(display))
    world.leave()
    raise typer.Exit(status)


def _paths(
    checkpoint: Path | None,
    classifier: Path | None,
    guide: Path | None,
    super_res: Path | None,
    ema_rate: str | None,
    ema_length: float | None,
) -> tuple[Path, Path | None, Path | None, Path | None]:
    """The paths of the checkpoint, the classifier, the guide and the super-resolution model, None if absent."""
    path = find_with_rate(checkpoint, ema_rate, ema_length)
    guiding = None if classifier is None else find_with_rate(classifier, None)
    worse = None if guide is None else find_with_rate(guide, None)
    if worse == path:
        raise ValueError(f"guide {worse}: it is the model itself; name an earlier step (RUN@STEP) or another model")
    if super_res is None:
        return path, guiding, worse, None
    return path, guiding, worse, find_with_rate(super_res, ema_rate if not super_res.is_file() else None)


def _load_other(what: str, path: Path, runtime: "Runtime") -> "Checkpoint":
    if path.suffix != ".safetensors":  # the flags describe the first model
        raise ValueError(
            f"{what} {path} does not store its settings: fastdiff convert {path} FILE.safetensors, and name that"
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
