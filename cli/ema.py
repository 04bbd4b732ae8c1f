"""``fastdiff ema``: a metric over the length of the average of a run's weights."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.loading import find_with_rate, load_for
from fastdiff.cli.metrics import ReferenceArgument, TimeoutFlag, open_session, reference_of, said_of
from fastdiff.cli.options import DebugFlag, Flags, path_argument, path_option, with_flags
from fastdiff.config import Metric, MetricsConfig, RuntimeConfig


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
    from fastdiff.checkpoint import read_metadata, reconstructed
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
        out_dir = run_dir / FOLDER / of_lengths.FOLDER
        world.from_main(lambda: refuse_folder(out_dir))
        newest = world.on_all(lambda: load_for(session.runtime, place))
        theirs = reference_of(session, newest, place, reference)
        display.line(f"reference: {said_of(theirs)}")
        count, extractor = session.config.num_samples, session.extractor
        world.on_all(lambda: of_run.refuse_metric(metric, extractor, theirs, count))
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
                world.from_main(lambda: of_lengths.keep_best(run_dir, step, rows, metric))

        def written() -> None:
            if not world.main:
                return
            best = of_run.best_of(rows, metric)
            for line in of_run.table(rows, best):
                display.line(line)
            of_run.write_table(out_dir / of_lengths.TABLE, rows)
            wrote = [str(out_dir / of_lengths.TABLE)]
            if plot is not None:
                of_lengths.plot(plot, rows, metric)
                wrote.append(str(plot))
            display.line(f"wrote {' and '.join(wrote)}; the best: --ema-length {best.ema_length:g}")

        world.on_all(written)
