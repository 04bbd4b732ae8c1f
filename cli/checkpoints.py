"""``fastdiff evaluate checkpoints`` and ``fastdiff ema``: which checkpoint, or average, of a run is the best."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.loading import find_with_rate, load_for, rate_of
from fastdiff.cli.metrics import ReferenceArgument, TimeoutFlag, open_session, said_of
from fastdiff.cli.options import DebugFlag, Flags, path_argument, path_option, with_flags
from fastdiff.config import Metric, MetricsConfig, RuntimeConfig

if TYPE_CHECKING:
    from fastdiff.checkpoint import Checkpoint
    from fastdiff.evaluation.checkpoints import Row
    from fastdiff.evaluation.image_sets import ImageSet, ReferenceStatistics
    from fastdiff.evaluation.session import Session


@with_flags(MetricsConfig, RuntimeConfig, without={"classifier_scale", "image_size"})
def checkpoints(
    flags: Flags,
    run: Annotated[Path | None, path_argument(help="Run folder; by default the newest run under runs/.")] = None,
    reference: ReferenceArgument = None,
    metric: Annotated[Metric, typer.Option(help="The figure that decides which checkpoint is the best.")] = Metric.FD,
    ema_rate: Annotated[
        str | None, typer.Option(help="Only the EMA of this rate, or raw; by default every EMA of a step.")
    ] = None,
    plot: Annotated[
        Path | None, path_option(help="Plot the figure over the steps in this .png file (extra 'plot': matplotlib).")
    ] = None,
    timeout: TimeoutFlag = 600,
    debug: DebugFlag = False,
) -> None:
    """Compare the checkpoints of a run, and record which one is the best: RUN@best names it.

    For example: fastdiff evaluate checkpoints runs/photos --num-samples 1000

    Images are drawn from every checkpoint and compared with the training images. The same command resumes, and measures
    only checkpoints that are new. The table is also in evaluation/checkpoints.csv of the run.
    """
    rate = rate_of(ema_rate)
    from fastdiff.evaluation import checkpoints as of_run
    from fastdiff.evaluation.plot import refuse_plot
    from fastdiff.evaluation.records import refuse_folder
    from fastdiff.evaluation.session import FOLDER

    if plot is not None:
        refuse_plot(plot, overwrite=True)
    if run is not None and not run.is_dir():
        raise ValueError(f"{run} is not a folder: name the folder of a run")
    with open_session(flags, timeout) as session:
        world, display = session.world, session.display
        run_dir = world.from_main(lambda: run or find_with_rate(None, None).parent)
        paths = world.from_main(lambda: of_run.checkpoints_of(run_dir, rate))
        out_dir = run_dir / FOLDER
        world.from_main(lambda: refuse_folder(out_dir))
        while (newest := _loaded(session, paths[-1], others=len(paths) > 1)) is None:
            paths.pop()
        theirs = _reference(session, newest, paths[-1], reference, metric)
        count = session.config.num_samples
        display.line(f"checkpoints: {len(paths)} of {run_dir}, {count:,} images from each; --num-samples reduces it")
        rows = []
        with session.comparison(out_dir) as comparison:
            comparing = of_run.Comparing(session, comparison, theirs, out_dir, metric)
            for path in paths:
                display.line(f"model: {path}")
                if (loaded := _loaded(session, path, others=True)) is None:
                    continue
                row = comparing.measure(loaded, path)
                if isinstance(row, int):
                    raise typer.Exit(row)
                rows.append(row)

        def recorded(best: of_run.Row) -> str:
            of_run.write_best(run_dir, best, metric)
            return f"{run_dir}@best is step {best.step}, {best.weights}"

        world.on_all(lambda: _conclude(session, rows, metric, out_dir / of_run.TABLE, plot, of_run.plot, recorded))


@with_flags(MetricsConfig, RuntimeConfig, without={"classifier_scale", "image_size"})
def ema(
    flags: Flags,
    run: Annotated[
        Path | None, path_argument(help="Run folder or RUN@STEP; by default the newest run under runs/.")
    ] = None,
    reference: ReferenceArgument = None,
    lengths: Annotated[
        str | None, typer.Option(help="Lengths to measure, e.g. 0.03,0.05,0.1; by default usual ones.")
    ] = None,
    metric: Annotated[Metric, typer.Option(help="The figure that decides which length is the best.")] = Metric.FD,
    plot: Annotated[
        Path | None,
        path_option(help="Plot the figure over the length in this .png or .svg file (extra 'plot': matplotlib)."),
    ] = None,
    timeout: TimeoutFlag = 600,
    debug: DebugFlag = False,
) -> None:
    """Find the length of the average of the weights that draws the best images: --ema-length takes it.

    For example: fastdiff ema runs/photos --num-samples 1000 --plot lengths.png

    The run was trained with --ema-lengths. Averages of other lengths are reconstructed, images are drawn from each and
    compared with the training images. The same command resumes. The table is also in evaluation/lengths/lengths.csv.
    """
    from fastdiff.checkpoint import averages_of, read_metadata, reconstructed
    from fastdiff.evaluation import checkpoints as of_run
    from fastdiff.evaluation import lengths as of_lengths
    from fastdiff.evaluation.plot import refuse_plot
    from fastdiff.evaluation.records import refuse_folder
    from fastdiff.evaluation.session import FOLDER

    if plot is not None:
        refuse_plot(plot, overwrite=True, kinds=(".png", ".svg"))
    if run is not None and run.is_file():
        raise ValueError(f"{run} is not a folder: name the folder of a run")
    with open_session(flags, timeout) as session:
        world, display = session.world, session.display
        place = world.from_main(lambda: find_with_rate(run, None))
        run_dir, step = place.parent, int(world.from_main(lambda: read_metadata(place))["step"])
        chosen = world.from_main(lambda: of_lengths.lengths_to_measure(run_dir, step, lengths))
        before = world.from_main(lambda: set(averages_of(run_dir, step).values()))
        out_dir = run_dir / FOLDER / of_lengths.FOLDER
        world.from_main(lambda: refuse_folder(out_dir))
        newest = world.on_all(lambda: load_for(session.runtime, place))
        theirs = _reference(session, newest, place, reference, metric)
        display.line(f"lengths: {', '.join(f'{length:g}' for length in chosen)} at step {step} of {run_dir}")
        rows: list[of_run.Row] = []
        with session.comparison(out_dir) as comparison:
            comparing = of_run.Comparing(session, comparison, theirs, out_dir, metric)
            for length in chosen:
                path = world.from_main(partial(reconstructed, run_dir, step, length))
                display.line(f"model: {path}")
                row = comparing.measure(world.on_all(partial(load_for, session.runtime, path)), path)
                if isinstance(row, int):
                    raise typer.Exit(row)
                rows.append(row)
                world.from_main(lambda: of_lengths.keep_best(run_dir, step, rows, metric, before))

        def named(best: of_run.Row) -> str:
            return f"the best: --ema-length {best.ema_length:g}"

        world.on_all(lambda: _conclude(session, rows, metric, out_dir / of_lengths.TABLE, plot, of_lengths.plot, named))


def _loaded(session: "Session", path: Path, others: bool) -> "Checkpoint | None":
    """One of a run's checkpoints; None, with a line that says why, if it is damaged and there are ``others``."""
    try:
        return session.world.on_all(lambda: load_for(session.runtime, path))
    except (ValueError, OSError) as error:
        if not others:
            raise
        session.display.line(f"left out: {error}")
        return None


def _reference(
    session: "Session", loaded: "Checkpoint", path: Path, reference: Path | None, metric: Metric
) -> "ImageSet | ReferenceStatistics":
    """What the models of a run are compared with, by default its training images; ``path`` is that of one of them.

    A line of the log names it. ValueError if comparisons with it do not have the metric.
    """
    from fastdiff.evaluation.checkpoints import refuse_metric

    known: ImageSet | ReferenceStatistics
    if reference is None:
        known = session.training_images(loaded, path)
    else:
        known = session.reference(reference, loaded.model_config.image_size)
    session.display.line(f"reference: {said_of(known)}")
    count, extractor = session.config.num_samples, session.extractor
    session.world.on_all(lambda: refuse_metric(metric, extractor, known, count))
    return known


def _conclude(
    session: "Session",
    rows: Sequence["Row"],
    metric: Metric,
    table_path: Path,
    plot: Path | None,
    draw: "Callable[[Path, Sequence[Row], Metric], None]",
    said: Callable[["Row"], str],
) -> None:
    """Print the table, write it and the plot, and end with what is ``said`` of the best row, on the first process."""
    from fastdiff.evaluation.checkpoints import best_of, table, write_table

    if not session.world.main:
        return
    best = best_of(rows, metric)
    for line in table(rows, best):
        session.display.line(line)
    write_table(table_path, rows)
    wrote = [str(table_path)]
    if plot is not None:
        draw(plot, rows, metric)
        wrote.append(str(plot))
    session.display.line(f"wrote {' and '.join(wrote)}; {said(best)}")
