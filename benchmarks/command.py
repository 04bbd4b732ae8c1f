"""Run the suites one after the other; print and save their rows as soon as they are measured."""

import gc
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fastdiff.benchmarks.chart import PANELS, check_chart, draw_ladder
from fastdiff.benchmarks.compare import print_comparison, read_measured
from fastdiff.benchmarks.harness import environment
from fastdiff.benchmarks.rows import Row, append_rows, require_columns, with_against
from fastdiff.benchmarks.table import print_rows
from fastdiff.benchmarks.workload import Workload
from fastdiff.config import RuntimeConfig

MODEL_SUITES = ("unet", "train", "sample", "step")
SUITES = ("kernels", *MODEL_SUITES, "data", "growth")

ROUNDS = {"cpu": {True: 3, False: 25}, "cuda": {True: 10, False: 40}}
"""By device, and by whether the run is quick."""


@dataclass(frozen=True)
class Request:
    """What to measure: the ladder or, if ``asked``, only the arithmetic of ``ours`` and the plain path."""

    suites: Sequence[str]
    workloads: Sequence[Workload]  # the same model, in several batch sizes
    ours: RuntimeConfig
    asked: bool = False
    rounds: int | None = None
    quick: bool = False

    @property
    def device(self) -> torch.device:
        """The device to measure on."""
        return self.workloads[0].device


def run(
    request: Request, console: Console, csv: Path | None = None, chart: Path | None = None, compare: Path | None = None
) -> bool:
    """Measure, print and save. Returns False if one of our candidates was wrong or failed, or a file was not written.

    ValueError or OSError, before anything is measured, if one of the files cannot be used.
    """
    about = environment(request.device)
    if csv is not None:
        require_columns(csv, list(Row("", "", "", None).as_dict() | about))
    if chart is not None:
        if not set(PANELS) & set(request.suites):
            raise ValueError(f"chart shows {', '.join(PANELS)}: measure one of them, or leave --chart out")
        if csv is not None and csv.resolve() == chart.resolve():
            raise ValueError(f"chart {chart} is also the file of --csv: name another one")
        check_chart(chart)
    old = None if compare is None else read_measured(compare)
    rows: list[dict[str, object]] = []
    unsaved: list[Mapping[str, object]] = []
    good = True

    def said(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    for table in _tables(request, console):
        measured = with_against(table)
        values = [row.as_dict() | about for row in measured]
        rows += values
        unsaved += values
        refusal = _append(csv, unsaved)  # before printing, which may fail
        print_rows(measured, console)
        if refusal:
            said(f"warning: {refusal}")  # unsaved rows are added with the next ones
        good = good and not any(row.failed for row in measured)
    said(", ".join(f"{key} {value}" for key, value in about.items()))
    if csv is not None:
        refusal = _append(csv, unsaved)
        said(f"error: {refusal}: {len(unsaved)} rows are not saved" if refusal else f"rows added to {csv}")
        good = good and not refusal
    if old is not None:
        print_comparison(old, rows, console)
    if chart is not None:
        try:
            draw_ladder(rows, chart)
            said(f"chart drawn to {chart}")
        except (ValueError, OSError) as error:
            said(f"error: {error}")
            good = False
    return good


def _append(csv: Path | None, unsaved: list[Mapping[str, object]]) -> str:
    """Move the rows to the file, if there is one. Returns the reason if that fails, else an empty string."""
    try:
        if csv is not None and unsaved:
            append_rows(csv, unsaved)
    except (ValueError, OSError) as error:
        return str(error)
    unsaved.clear()
    return ""


def _tables(request: Request, console: Console) -> Iterator[list[Row]]:
    """The rows of each table, as soon as they are measured."""
    rounds = request.rounds or ROUNDS[request.device.type][request.quick]
    suites = [suite for suite in MODEL_SUITES if suite in request.suites]
    if "kernels" in request.suites:
        yield from _kernels(request, rounds, console)
    for workload in request.workloads if suites else ():
        yield from _models(request, suites, workload, rounds, console)
        gc.collect()  # frees the models' memory for the next ones
    if "data" in request.suites:
        yield from _grouped(_or_failed("data", _data(request)))
    if "growth" in request.suites:
        from fastdiff.benchmarks.growth import measure_growth

        growth = measure_growth(request.workloads[0], request.ours, request.quick, request.rounds)
        yield from _grouped(_or_failed("growth", growth))


def _data(request: Request) -> Iterator[Row]:
    from fastdiff.benchmarks.data import measure_data

    with tempfile.TemporaryDirectory() as folder:
        yield from measure_data(request.quick, Path(folder), request.device, request.rounds)


def _or_failed(suite: str, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows. If an OSError such as a full disk ends them, a failed row says so, and the other rows are not lost."""
    try:
        yield from rows
    except OSError as error:
        yield Row(suite, "the rest", "not measured", None, remark=" ".join(str(error).split()), failed=True)


def _kernels(request: Request, rounds: int, console: Console) -> Iterator[list[Row]]:
    from fastdiff.benchmarks.cases import cases
    from fastdiff.benchmarks.kernels import measure_all
    from fastdiff.benchmarks.roofline import measure_roofline

    device = request.device
    if device.type == "cpu":
        console.print("kernels: no GPU, so these are CPU figures of the PyTorch implementations, at small sizes")
    roofline = measure_roofline(device, torch.bfloat16)
    console.print(f"measured here in bf16: {roofline}", highlight=False)
    found = list(cases(device))
    if request.quick:  # the first of each
        found = list({(p.op, p.layout): p for p in reversed(found)}.values())[::-1]
    for measured in measure_all(found, rounds, device):
        yield [one.row(roofline) for one in measured]


def _models(
    request: Request, suites: Sequence[str], workload: Workload, rounds: int, console: Console
) -> Iterator[list[Row]]:
    from fastdiff.benchmarks.ladder import Models, as_asked, ladder
    from fastdiff.benchmarks.peers import missing
    from fastdiff.benchmarks.suites import Ceilings, against_diffusers, measure, measure_step

    torch.compiler.reset()  # a model compiled for another batch size counts towards Dynamo's limit of eight
    device, models = workload.device, Models(workload)
    climbed = {s: as_asked(s, request.ours, device) if request.asked else ladder(s, device) for s in suites}
    roofline = Ceilings(workload, itertools.chain(*climbed.values()))
    console.print(f"{workload}: {models.num_parameters / 1e6:.2f} M parameters", highlight=False)
    for line in missing():
        console.print(line, highlight=False)
    console.print("building and checking; compiling takes a minute or two when its cache is cold ...")
    for suite, rungs in climbed.items():
        if suite == "step":
            rows = measure_step(models, rungs[-1], roofline, rounds)
        else:
            rows = measure(suite, models, rungs, roofline, rounds)
        yield rows
        for precision, measured in roofline.best.items():
            console.print(f"measured here in {precision}: {measured}", highlight=False)
        for line in against_diffusers(rows):
            console.print(line, highlight=False)


def _grouped(rows: Iterable[Row]) -> Iterator[list[Row]]:
    for _, group in itertools.groupby(rows, lambda row: (row.suite, row.workload)):
        yield list(group)
