"""``fastdiff evaluate fid`` and ``neighbours``: measure samples by their features."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiff.cli.loading import find_with_rate, load_for, young_average
from fastdiff.cli.options import (
    DebugFlag,
    EmaLengthFlag,
    EmaRateFlag,
    Flags,
    PresetFlag,
    path_argument,
    path_option,
    with_flags,
)
from fastdiff.cli.scripts import log_formats
from fastdiff.config import DiffusionConfig, MetricsConfig, ModelConfig, RuntimeConfig, SampleConfig

if TYPE_CHECKING:
    from fastdiff.checkpoint import Checkpoint
    from fastdiff.evaluation.image_sets import ImageSet, ReferenceStatistics
    from fastdiff.evaluation.session import Session

_DRAWING = {f.name for f in fields(SampleConfig)} - {"num_samples", "seed"}
"""The flags that only matter if images are drawn."""

SamplesArgument = Annotated[
    Path | None,
    path_argument(
        help="Images (.npz, folder, .zip), or a checkpoint, run folder or RUN@STEP, of which images are drawn first; "
        "by default the newest run under runs/."
    ),
]
ReferenceArgument = Annotated[
    Path | None,
    path_argument(
        help="Images, or statistics of their features (.npz of mu, sigma); by default the training images of a run."
    ),
]
TrainingArgument = Annotated[Path | None, path_argument(help="The training images; by default those of the run.")]
OutDirFlag = Annotated[
    Path | None, path_option(help="Folder for samples that are drawn; by default evaluation/ in the run.")
]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
TimeoutFlag = Annotated[
    int,
    typer.Option(min=1, help="Seconds after which a process that waits for the others gives up."),
]


@with_flags(MetricsConfig, RuntimeConfig, of_state_dicts=(ModelConfig, DiffusionConfig), without={"classifier_scale"})
def fid(
    flags: Flags,
    samples: SamplesArgument = None,
    reference: ReferenceArgument = None,
    out_dir: Annotated[
        Path | None,
        path_option(help="Folder for samples and figures; by default evaluation/ in the run, none for other samples."),
    ] = None,
    save_stats: Annotated[
        Path | None, path_option(help="Save the statistics of the reference's features in this .npz, to compare with.")
    ] = None,
    ema_rate: EmaRateFlag = None,
    ema_length: EmaLengthFlag = None,
    timeout: TimeoutFlag = 600,
    preset: PresetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Compare samples with images: FID, KID, precision, recall, density, coverage.

    For example: fastdiff evaluate fid samples.npz photos

    Of a run or checkpoint images are drawn first; the same command resumes an interrupted job. Figures compare only if
    extractor, number of samples and reference are equal. Under torchrun several processes share the work.
    """
    from fastdiff.evaluation.image_sets import refuse_statistics_file, save_statistics
    from fastdiff.evaluation.records import append_record, record_of

    if save_stats is not None:
        refuse_statistics_file(save_stats)
    with open_session(flags, timeout) as session:
        opened = _opened(session, flags, samples, reference, out_dir, (ema_rate, ema_length), preset)
        world, display, extractor = session.world, session.display, session.extractor
        with session.comparison(opened.out_dir) as comparison:
            compared = comparison.reference(opened.reference)
            figures = comparison.figures(opened.samples, compared)

            def written() -> None:
                if compared is None:  # not the first process
                    return
                for figure in figures:
                    display.line(figure.line())
                if save_stats is not None:
                    save_statistics(save_stats, compared.statistics, compared.spatial, extractor, compared.size)
                    display.line(f"wrote {save_stats}")
                if opened.out_dir is not None:
                    record = record_of(figures, opened.origin, compared.about, extractor, opened.checkpoint)
                    display.line(f"recorded in {append_record(opened.out_dir, record)}")

            world.on_all(written)


@with_flags(MetricsConfig, RuntimeConfig, of_state_dicts=(ModelConfig, DiffusionConfig), without={"classifier_scale"})
def neighbours(
    flags: Flags,
    samples: SamplesArgument = None,
    reference: TrainingArgument = None,
    out: Annotated[
        Path, path_option(help="The sheet to write (.png), with a table of all samples beside it (.csv).")
    ] = Path("neighbours.png"),
    out_dir: OutDirFlag = None,
    ema_rate: EmaRateFlag = None,
    ema_length: EmaLengthFlag = None,
    overwrite: OverwriteFlag = False,
    timeout: TimeoutFlag = 600,
    preset: PresetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Find the training images most like each sample: does the model repeat them?

    For example: fastdiff evaluate neighbours samples.npz photos

    The figure is the share of samples that are farther from their nearest training image than that is from any other.
    """
    from fastdiff.evaluation.image_sets import ImageSet
    from fastdiff.evaluation.neighbours import lines, neighbours_of, refuse_outputs, save_sheet, save_table

    table = refuse_outputs(out, overwrite)
    with open_session(flags, timeout) as session:
        opened = _opened(session, flags, samples, reference, out_dir, (ema_rate, ema_length), preset)
        ours, theirs = opened.samples, opened.reference
        if not isinstance(theirs, ImageSet):
            session.world.refuse(f"{reference} holds statistics: name the training images")
        with session.comparison(opened.out_dir) as comparison:
            images, drawn = comparison.extract(theirs, "reference"), comparison.extract(ours, "samples")

            def written() -> None:
                if images is None or drawn is None:  # not the first process
                    return
                found = neighbours_of(drawn.features, images.features, session.runtime.device)
                save_sheet(out, found, ours, theirs)
                save_table(table, found, ours, theirs)
                session.display.line(f"wrote {out} and {table}")
                for line in lines(found, ours, theirs, session.extractor.name):
                    session.display.line(line)

            session.world.on_all(written)


@contextmanager
def open_session(flags: Flags, timeout: int) -> Iterator["Session"]:
    """A Session with the flags, on every process that torchrun started."""
    config = MetricsConfig.from_flags(flags)
    to_terminal = "stdout" in log_formats()
    from fastdiff.cli.display import Display, Slowly
    from fastdiff.evaluation.session import Session
    from fastdiff.runtime.device import Runtime
    from fastdiff.runtime.distributed import World
    from fastdiff.runtime.signals import signals_as_exceptions
    from fastdiff.runtime.threads import fit_to_cores

    fit_to_cores()
    world = World.join(timeout)
    try:
        with (
            world.explained(f"use a smaller --batch-size than {config.batch_size}"),
            signals_as_exceptions(),
            Display(silent=not world.main or not to_terminal) as display,
        ):
            machine = RuntimeConfig.from_flags(flags)
            runtime = world.on_all(lambda: Runtime.resolve(machine, world.local_rank if world.size > 1 else None))
            session = Session(config, runtime, world, display, lambda what: Slowly(display, what))
            try:
                yield session
            except (KeyboardInterrupt, SystemExit):
                display.line("stopped: what is drawn and recorded stays, and the same command does the rest")
                raise
    except typer.Exit:
        world.leave()
        raise
    world.leave()


@dataclass(frozen=True, eq=False)
class _Opened:
    """The two sides of a comparison, the origin of the samples as values for JSON, and the folder of its record."""

    samples: "ImageSet"
    reference: "ImageSet | ReferenceStatistics"
    origin: dict[str, Any]
    checkpoint: dict[str, Any] | None
    out_dir: Path | None


def _opened(
    session: "Session",
    flags: Flags,
    samples: Path | None,
    reference: Path | None,
    out_dir: Path | None,
    chosen: tuple[str | None, float | None],
    preset: str | None,
) -> _Opened:
    """Open the reference and the samples; of a checkpoint images are drawn first.

    ``chosen`` are --ema-rate and --ema-length.
    """
    from fastdiff.evaluation.image_sets import refuse_missing
    from fastdiff.evaluation.records import about_checkpoint, refuse_folder
    from fastdiff.evaluation.session import is_checkpoint

    world, display = session.world, session.display
    load = partial(_load, session, flags, preset, out_dir)
    if out_dir is not None:
        world.from_main(lambda: refuse_folder(out_dir))
    if world.from_main(lambda: is_checkpoint(samples)):
        model = load(samples, *chosen)
        if reference is None:
            known: ImageSet | ReferenceStatistics = session.training_images(model.loaded, model.path)
        elif world.from_main(lambda: is_checkpoint(reference)):
            known = _draw(session, load(reference, None, None), _other_seed(session.config))[0]
        else:
            known = session.reference(reference, model.loaded.model_config.image_size)
        display.line(f"reference: {said_of(known)}")
        ours, origin = _draw(session, model)
        about = world.from_main(lambda: about_checkpoint(model.loaded, model.path))
        return _Opened(ours, known, origin, about, model.out_dir)
    assert samples is not None
    place = samples
    world.from_main(lambda: refuse_missing(place))
    if reference is None:
        world.refuse(f"reference: name the images to compare {samples} with")
    if world.from_main(lambda: is_checkpoint(reference)):
        known, _ = _draw(session, load(reference, *chosen), _other_seed(session.config))
        ours = session.images(samples, known.size)
    else:
        unused = sorted(_DRAWING & set(flags))
        others = zip(("ema_rate", "ema_length", "preset"), (*chosen, preset), strict=True)
        unused += [name for name, value in others if value is not None]
        if unused:
            world.refuse(f"{unused[0]} is for drawing from a checkpoint, and {samples} holds images: leave it out")
        ours, known = session.both(samples, reference)
        if "num_samples" in flags:
            ours = world.on_all(lambda: ours.first(session.config.num_samples))
    display.line(f"samples: {said_of(ours)}")
    display.line(f"reference: {said_of(known)}")
    return _Opened(ours, known, ours.about, None, out_dir)


def _other_seed(config: MetricsConfig) -> int:
    """The seed of a reference that is drawn: from the same noise two checkpoints draw nearly the same images."""
    return (config.seed + 1) % 2**64


@dataclass(frozen=True, eq=False)
class _Model:
    """A checkpoint to draw from, and the folder for its samples."""

    path: Path
    loaded: "Checkpoint"
    out_dir: Path


def _load(
    session: "Session",
    flags: Flags,
    preset: str | None,
    out_dir: Path | None,
    place: Path | None,
    ema_rate: str | None,
    ema_length: float | None,
) -> _Model:
    """The checkpoint at ``place``, which a line of the log names."""
    from fastdiff.evaluation.session import folder_for

    path = session.world.from_main(lambda: find_with_rate(place, ema_rate, ema_length))
    loaded = session.world.on_all(lambda: load_for(session.runtime, path, flags, preset))
    session.display.line(f"model: {path}, step {loaded.step}{young_average(loaded)}")
    return _Model(path, loaded, out_dir or folder_for(path))


def _draw(session: "Session", model: _Model, seed: int | None = None) -> "tuple[ImageSet, dict[str, Any]]":
    """The checkpoint's samples, and their origin as values for JSON; a signal ends the command."""
    assert session.extractor  # what is wrong with it is said before hours of drawing
    drawing = session.drawing(model.loaded, model.path, model.out_dir, seed)
    if status := drawing.run():
        raise typer.Exit(status)
    return session.images(drawing.path, model.loaded.model_config.image_size), drawing.origin


def said_of(known: "ImageSet | ReferenceStatistics") -> str:
    """One side of a comparison in words."""
    from fastdiff.evaluation.image_sets import ImageSet

    place, count = known.about["data"], known.about["count"]
    if isinstance(known, ImageSet):
        held_out = known.about.get("held_out", 0)
        without = f", without {held_out:,} that were held out" if held_out else ""
        return f"{len(known):,} images at {known.size} pixels{without}: {known.told}{place}"
    of_images = f" of {count:,} images" if count else ""
    more = "" if known.images is None else f", and {len(known.images):,} images for the other figures"
    return f"statistics{of_images}{more}: {place}"
