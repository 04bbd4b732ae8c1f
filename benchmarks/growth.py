"""How the cost grows with the batch, the image size and the channels, and how a second process changes it."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from fastdiff.benchmarks.candidates import job_of
from fastdiff.benchmarks.data import slope
from fastdiff.benchmarks.flops import Flops
from fastdiff.benchmarks.harness import peak_bytes, seconds_of
from fastdiff.benchmarks.ladder import Models, Rung
from fastdiff.benchmarks.roofline import Roofline
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.runs import alone, measure_processes
from fastdiff.benchmarks.suites import DTYPES, ceilings
from fastdiff.benchmarks.workload import Workload
from fastdiff.config import Compile, RuntimeConfig
from fastdiff.data.cache import available_memory
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.memory import out_of_memory

PATIENCE = 4.0
"""Seconds per step beyond which no larger size is tried."""

SMALL_BATCH = {"cpu": 2, "cuda": 16}
"""Largest batch on the axes that do not vary it. With a smaller one a GPU would only wait for launches."""


@dataclass(frozen=True)
class Axis:
    """What is varied, and the approximate power with which the cost grows, to predict the cost of the next size."""

    name: str
    label: str  # of a candidate; the size replaces the braces
    power: int
    full: tuple[int, ...]
    quick: tuple[int, ...]


AXES = (
    Axis("batch", "batch {}", 1, tuple(2**i for i in range(20)), (1, 4, 16)),
    Axis("side", "{} pixels", 2, (32, 64, 128, 256), (16, 32, 64)),
    Axis("channels", "{} channels", 2, (32, 64, 128, 256), (32, 64, 96)),
)


def measure_growth(workload: Workload, ours: RuntimeConfig, quick: bool, rounds: int | None = None) -> Iterator[Row]:
    """Rows of the suite growth: a forward pass and a training step by each of AXES, then training by processes.

    The path is a user's, but eager unless ``ours`` has compile on: every size would be compiled again, for a minute or
    more each. Larger batches are tried until memory or PATIENCE runs out. The remark of the last row has the reason and
    the fitted power. With another image size the model has the widths that --image-size selects.
    """
    compiled = Compile.ON if ours.compile is Compile.ON else Compile.OFF
    precision = Runtime.resolve(replace(ours, device=str(workload.device))).precision
    rung = Rung("", replace(ours, device=str(workload.device), compile=compiled, precision=precision), trainer=True)
    rounds = rounds or (3 if quick else 5)
    roofline = ceilings(workload, [rung], rounds)[precision]
    for suite, kind in (("unet", "forward"), ("train", "training step")):
        measured = partial(_measured, suite, rung, roofline, rounds)
        for axis in AXES:
            yield from _series(workload, kind, axis, axis.quick if quick else axis.full, measured)
    yield from measure_processes(workload, rung.config, quick)


def _series(
    workload: Workload, kind: str, axis: Axis, sizes: Sequence[int], measured: Callable[[Models, Workload, Row], Row]
) -> list[Row]:
    """A row for each size. The last one has the fitted power, and the reason why no larger size was measured."""
    model, device = workload.model, workload.device
    small = min(workload.batch_size, SMALL_BATCH[device.type])
    usual = {"batch": small, "side": model.image_size, "channels": model.num_channels}
    fixed = [other.label.format(usual[other.name]) for other in AXES if other != axis]
    about = f"{kind} by {axis.name}: {', '.join(filter(None, [workload.name, *fixed]))}"
    rows: dict[int, Row] = {}
    left_out: list[Row] = []
    models: Models | None = None
    reason = ""
    for size in sizes:
        name, chosen = axis.label.format(size), usual | {axis.name: size}
        blank = Row("growth", about, name, None)
        try:
            other = replace(model, image_size=chosen["side"], num_channels=chosen["channels"])
        except ValueError as error:  # there is no such model
            left_out.append(replace(blank, remark=str(error)))
            continue
        if reason := _too_much(rows, size, axis, device):
            break
        at = replace(workload, model=other, batch_size=chosen["batch"])
        try:
            if models is None or models.workload.model != other:  # each model is checked with its first batch
                models = Models(at)
            rows[size] = measured(models, at, blank)
        except Exception as error:  # any failure or wrong result becomes its remark
            full = out_of_memory(error)
            reason = f"{name}: out of memory" if full else ""
            if not (full and rows):
                said = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                left_out.append(replace(blank, remark=said, failed=not full))
            break
        finally:  # frees the memory of this size, which an error may also keep alive
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if rows:
        seconds = {size: row.timing.median for size, row in rows.items() if row.timing}
        power = f"time ~ {axis.name}^{slope(list(seconds), list(seconds.values())):.2f}" if len(seconds) > 1 else ""
        last = max(rows)
        rows[last] = replace(rows[last], remark="; ".join(filter(None, (power, reason))))
    return [*rows.values(), *left_out]


def _too_much(rows: Mapping[int, Row], size: int, axis: Axis, device: torch.device) -> str:
    """The reason not to try this size after the last one, or an empty string."""
    if not rows or (timing := rows[max(rows)].timing) is None:
        return ""
    name, larger = axis.label.format(size), (size / max(rows)) ** axis.power
    if (seconds := timing.median * larger) > PATIENCE:
        return f"{name} would take about {seconds:.0f} s"
    # On a GPU it is tried: running out of its memory does no other harm.
    if device.type == "cpu" and (gib := rows[max(rows)].peak_gib * larger) > available_memory() / 2**30:
        return f"{name} would need about {gib:.0f} GiB of memory"
    return ""


def _measured(
    suite: str, rung: Rung, roofline: Roofline, rounds: int, models: Models, workload: Workload, row: Row
) -> Row:
    device, dtype = workload.device, DTYPES[rung.config.precision]
    work = Flops.of(workload.model, workload.batch_size, training=suite == "train")
    with ExitStack() as stack:
        if rung.config.compile is Compile.ON:
            torch.compiler.reset()  # it compiles a model for a limited number of sizes
        job = job_of(suite, models, rung, stack, workload)
        Runtime.resolve(rung.config)  # sets PyTorch's switches again, which the check changed
        job.run()
        peak = peak_bytes(job.run, device) + sum(tensor.nbytes for tensor in job.tensors())
        seconds = seconds_of(job.run, 1, device, warmup=0)
        if seconds[0] < PATIENCE:
            seconds += seconds_of(job.run, rounds - 1, device, warmup=0)
    return replace(
        row,
        timing=alone(row.candidate, seconds),
        images=workload.batch_size,
        flops=work.flops,
        n_bytes=work.n_bytes(dtype),
        limit_s=roofline.limit(work, dtype),
        peak_gib=peak / 2**30,
    )
