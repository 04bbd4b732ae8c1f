"""How the cost grows with the batch, the image size and the channels, and how a second process changes it."""

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastdiff.benchmarks.candidates import Job, forward
from fastdiff.benchmarks.data import slope
from fastdiff.benchmarks.flops import Flops
from fastdiff.benchmarks.harness import peak_bytes, seconds_of
from fastdiff.benchmarks.ladder import Candidate, Models, Rung
from fastdiff.benchmarks.roofline import Roofline
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.runs import alone, measure_processes
from fastdiff.benchmarks.suites import DTYPES, ceilings
from fastdiff.benchmarks.updates import build_trainer, stream
from fastdiff.benchmarks.workload import Workload
from fastdiff.config import Compile, RuntimeConfig, TrainConfig
from fastdiff.data.cache import available_memory
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.memory import out_of_memory
from fastdiff.training.update import Updater

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

    def at(self, workload: Workload, size: int) -> Workload:
        """The workload with this size; ValueError if there is no such model."""
        if self.name == "batch":
            return replace(workload, batch_size=size)
        model, small = workload.model, _small(workload)
        model = replace(model, image_size=size) if self.name == "side" else replace(model, num_channels=size)
        return replace(workload, model=model, batch_size=small)

    def fixed(self, workload: Workload) -> str:
        """The sizes that do not vary, as text."""
        model = workload.model
        values = {"side": model.image_size, "channels": model.num_channels, "batch": _small(workload)}
        said = [axis.label.format(values[axis.name]) for axis in AXES if axis.name != self.name]
        return ", ".join([workload.name] * bool(workload.name) + said)


AXES = (
    Axis("batch", "batch {}", 1, tuple(2**i for i in range(20)), (1, 4, 16)),
    Axis("side", "{} pixels", 2, (32, 64, 128, 256), (16, 32, 64)),
    Axis("channels", "{} channels", 2, (32, 64, 128, 256), (32, 64, 96)),
)

JobOf = Callable[[Models, Workload, RuntimeConfig, ExitStack], Job]


def measure_growth(workload: Workload, ours: RuntimeConfig, quick: bool, rounds: int | None = None) -> Iterator[Row]:
    """Rows of the suite growth: a forward pass and a training step by each of AXES, then training by processes.

    The path is a user's, but eager unless ``ours`` has compile on: every size would be compiled again, for a minute or
    more each. Larger batches are tried until memory or PATIENCE runs out. The remark of the last row has the reason and
    the fitted power. With another image size the model has the widths that --image-size selects.
    """
    compiled = Compile.ON if ours.compile is Compile.ON else Compile.OFF
    precision = Runtime.resolve(replace(ours, device=str(workload.device))).precision
    config = replace(ours, device=str(workload.device), compile=compiled, precision=precision)
    rounds = rounds or (3 if quick else 5)
    roofline = ceilings(workload, [Rung("", config)], rounds)[precision]
    for kind, job_of in (("forward", _forward), ("training step", _training)):
        for axis in AXES:
            yield from _Series(axis, kind, job_of, config, roofline, rounds).measured(workload, quick)
    yield from measure_processes(workload, config, quick)


@dataclass(frozen=True)
class _Series:
    axis: Axis
    kind: str
    job_of: JobOf
    config: RuntimeConfig
    roofline: Roofline
    rounds: int

    def measured(self, workload: Workload, quick: bool) -> list[Row]:
        """A row for each size. The last one has the fitted power, and the reason why no larger size was measured."""
        axis, about = self.axis, f"{self.kind} by {self.axis.name}: {self.axis.fixed(workload)}"
        rows: dict[int, Row] = {}
        left_out: list[Row] = []
        models: Models | None = None
        reason = ""
        for size in axis.quick if quick else axis.full:
            blank = Row("growth", about, axis.label.format(size), None)
            try:
                at = axis.at(workload, size)
            except ValueError as error:
                left_out.append(replace(blank, remark=str(error)))
                continue
            if reason := self._too_much(rows, size):
                break
            try:
                if models is None or models.workload.model != at.model:  # each model is checked with its first batch
                    models = Models(at)
                rows[size] = self._measured(blank, models, at)
            except Exception as error:  # any failure or wrong result becomes its remark
                if out_of_memory(error):
                    reason = f"{axis.label.format(size)}: out of memory"
                else:
                    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    left_out.append(replace(blank, remark=said, failed=True))
                break
            finally:
                _free()
        if rows:
            last = max(rows)
            rows[last] = replace(rows[last], remark="; ".join(filter(None, (_power(axis.name, rows), reason))))
        elif reason:
            left_out.append(replace(blank, remark=reason))
        return [*rows.values(), *left_out]

    def _measured(self, row: Row, models: Models, workload: Workload) -> Row:
        device, dtype = workload.device, DTYPES[self.config.precision]
        work = Flops.of(workload.model, workload.batch_size, training=self.job_of is _training)
        with ExitStack() as stack:
            if self.config.compile is Compile.ON:
                torch.compiler.reset()  # it compiles a model for a limited number of sizes
            job = self.job_of(models, workload, self.config, stack)
            Runtime.resolve(self.config)  # sets PyTorch's switches again, which the check changed
            job.run()
            peak = peak_bytes(job.run, device) + sum(tensor.nbytes for tensor in job.tensors())
            seconds = seconds_of(job.run, 1, device, warmup=0)
            if seconds[0] < PATIENCE:
                seconds += seconds_of(job.run, self.rounds - 1, device, warmup=0)
        return replace(
            row,
            timing=alone(row.candidate, seconds),
            images=workload.batch_size,
            flops=work.flops,
            n_bytes=work.n_bytes(dtype),
            limit_s=self.roofline.limit(work, dtype),
            peak_gib=peak / 2**30,
        )

    def _too_much(self, rows: Mapping[int, Row], size: int) -> str:
        """The reason not to try this size after the last one, or an empty string."""
        if not rows or (timing := rows[max(rows)].timing) is None:
            return ""
        larger = (size / max(rows)) ** self.axis.power
        if (seconds := timing.median * larger) > PATIENCE:
            return f"{self.axis.label.format(size)} would take about {seconds:.0f} s"
        # On a GPU it is tried: running out of its memory does no other harm.
        if self.config.device == "cpu" and (gib := rows[max(rows)].peak_gib * larger) > available_memory() / 2**30:
            return f"{self.axis.label.format(size)} would need about {gib:.0f} GiB of memory"
        return ""


def _small(workload: Workload) -> int:
    return min(workload.batch_size, SMALL_BATCH[workload.device.type])


def _power(axis: str, rows: Mapping[int, Row]) -> str:
    """The fitted growth as text; empty for fewer than two sizes."""
    seconds = {size: row.timing.median for size, row in rows.items() if row.timing}
    return f"time ~ {axis}^{slope(list(seconds), list(seconds.values())):.2f}" if len(seconds) > 1 else ""


def _forward(models: Models, workload: Workload, config: RuntimeConfig, stack: ExitStack) -> Job:
    candidate = models.inference(config)
    return forward(workload, candidate.module, candidate.call)


def _training(models: Models, workload: Workload, config: RuntimeConfig, stack: ExitStack) -> Job:
    """The Trainer's update, with batches as in a run."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    training = TrainConfig(batch_size=workload.batch_size)
    trainer = build_trainer(workload.model, workload.diffusion, training, config, folder)
    models.checked(Candidate(trainer.model, trainer.forward, trainer.runtime))
    state = trainer.state
    update = Updater(trainer.config, state, trainer.diffusion, trainer.module, trainer.forward, trainer.world)
    batches = stack.enter_context(closing(stream(trainer)))
    averages = [tensor for ema in state.emas for tensor in ema.tensors()]

    def tensors() -> list[torch.Tensor]:
        moments = [v for held in state.optimizer.state.values() for v in held.values() if isinstance(v, torch.Tensor)]
        return [*state.parameters, *averages, *moments]

    return Job(lambda: update(*next(batches)), tensors)


def _free() -> None:
    """Free the memory of the previous size, which an error may also keep alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
