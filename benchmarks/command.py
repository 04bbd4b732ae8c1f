"""Run the suites one after the other; print and save their rows as soon as they are measured."""

import gc
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from fastdiff.benchmarks.chart import check_chart, draw_ladder
from fastdiff.benchmarks.compare import print_comparison, read_measured
from fastdiff.benchmarks.harness import environment
from fastdiff.benchmarks.rows import Row, Values, append_rows, require_columns, with_against
from fastdiff.benchmarks.table import print_rows
from fastdiff.benchmarks.workload import Workload
from fastdiff.config import RuntimeConfig

MODEL_SUITES = ("unet", "train", "sample", "step")

ROUNDS = {"cpu": {True: 3, False: 25}, "cuda": {True: 10, False: 40}}
"""By device, and by whether the run is quick."""

Tables = Iterator[list[Row] | str]
"""The rows of each table as soon as they are measured, and the lines to print between the tables."""


def measure_suites(
    suites: Sequence[str], workloads: Sequence[Workload], asked: RuntimeConfig | None, rounds: int | None, quick: bool
) -> Tables:
    """Measure the suites. ``workloads`` are the same model in several batch sizes.

    The model climbs the ladder; with ``asked`` only the plain path and these settings are measured.
    """
    device = workloads[0].device
    each = rounds or ROUNDS[device.type][quick]
    if "kernels" in suites:
        yield from _kernels(device, each, quick)
    from_model = [suite for suite in MODEL_SUITES if suite in suites]
    for workload in workloads if from_model else ():
        yield from _models(from_model, workload, asked, each)
        gc.collect()  # frees the models' memory for the next ones
    if "data" in suites:
        yield from _grouped("data", _data(quick, device, rounds))
    if "features" in suites:
        from fastdiff.benchmarks.features import measure_features

        yield measure_features(device, each)
    if "growth" in suites:
        from fastdiff.benchmarks.growth import measure_growth

        yield from _grouped("growth", measure_growth(workloads[0], asked or RuntimeConfig(), quick, rounds))


def _kernels(device: torch.device, rounds: int, quick: bool) -> Tables:
    from fastdiff.benchmarks.cases import cases
    from fastdiff.benchmarks.kernels import measure_all
    from fastdiff.benchmarks.roofline import measure_roofline

    if device.type == "cpu":
        yield "kernels: no GPU, so these are CPU figures of the PyTorch implementations, at small sizes"
    roofline = measure_roofline(device, torch.bfloat16)
    yield f"measured here in bf16: {roofline}"
    found = list(cases(device))
    if quick:  # the first of each
        found = list({(case.op, case.layout): case for case in reversed(found)}.values())[::-1]
    for measured in measure_all(found, rounds, device):
        yield [one.row(roofline) for one in measured]


def _models(suites: Sequence[str], workload: Workload, asked: RuntimeConfig | None, rounds: int) -> Tables:
    from fastdiff.benchmarks.ladder import Models, as_asked, ladder
    from fastdiff.benchmarks.peers import missing
    from fastdiff.benchmarks.suites import Ceilings, against_diffusers, measure, measure_step

    torch.compiler.reset()  # a model compiled for another batch size counts towards Dynamo's limit of eight
    device, models = workload.device, Models(workload)
    climbed = {s: as_asked(s, asked, device) if asked else ladder(s, device) for s in suites}
    roofline = Ceilings(workload, itertools.chain(*climbed.values()))
    yield f"{workload}: {models.num_parameters / 1e6:.2f} M parameters"
    yield from missing()
    yield "building and checking; compiling takes a minute or two when its cache is cold ..."
    for suite, rungs in climbed.items():
        if suite == "step":
            rows = measure_step(models, rungs[-1], roofline, rounds)
        else:
            rows = measure(suite, models, rungs, roofline, rounds)
        yield rows
        for precision, measured in roofline.best.items():
            yield f"measured here in {precision}: {measured}"
        yield from against_diffusers(rows)


def _data(quick: bool, device: torch.device, rounds: int | None) -> Iterator[Row]:
    from fastdiff.benchmarks.data import measure_data

    with tempfile.TemporaryDirectory() as folder:
        yield from measure_data(quick, Path(folder), device, rounds)


def _grouped(suite: str, rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows table by table. If an OSError such as a full disk ends them, a failed row says so; the others remain."""

    def kept() -> Iterator[Row]:
        try:
            yield from rows
        except OSError as error:
            yield Row(suite, "the rest", "not measured", None, remark=" ".join(str(error).split()), failed=True)

    for _, group in itertools.groupby(kept(), lambda row: (row.suite, row.workload)):
        yield list(group)


def report(
    tables: Tables,
    device: torch.device,
    console: Console,
    csv: Path | None,
    chart: Path | None,
    compare: Path | None,
) -> bool:
    """Print and save the tables, which are measured as they are drawn from ``tables``.

    Returns False if one of our candidates was wrong or failed, or a file was not written. ValueError or OSError, before
    anything is measured, if one of the files cannot be used.
    """
    about = environment(device)
    if csv is not None:
        require_columns(csv, list(Row("", "", "", None).as_dict() | about))
    if chart is not None:
        if csv is not None and csv.resolve() == chart.resolve():
            raise ValueError(f"chart {chart} is also the file of --csv: name another one")
        check_chart(chart)
    old = None if compare is None else read_measured(compare)
    rows: list[Values] = []
    saved, refusal, good = 0, "", True

    def save() -> None:
        nonlocal saved, refusal
        try:
            if csv is not None and len(rows) > saved:
                append_rows(csv, rows[saved:])
                saved, refusal = len(rows), ""
        except (ValueError, OSError) as error:
            refusal = str(error)

    for table in tables:
        if isinstance(table, str):
            console.print(table)
            continue
        measured = with_against(table)
        rows += [row.as_dict() | about for row in measured]
        save()  # before printing, which may fail
        print_rows(measured, console)
        if refusal:
            console.print(f"warning: {refusal}")  # unsaved rows are added with the next ones
        good = good and not any(row.failed for row in measured)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    save()
    if csv is not None:
        lost = f"error: {refusal}: {len(rows) - saved} rows are not saved"
        console.print(lost if refusal else f"rows added to {csv}")
        good = good and not refusal
    if old is not None:
        print_comparison(old, rows, console)
    if chart is not None:
        try:
            draw_ladder(rows, chart)
            console.print(f"chart drawn to {chart}")
        except (ValueError, OSError) as error:
            console.print(f"error: {error}")
            good = False
    return good
