"""The suites that measure a model: every candidate checked, its memory counted, then all of them timed in turn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from fastdiff.benchmarks.harness import Timing, interleaved, peak_bytes
from fastdiff.benchmarks.jobs import Job, forward, job_of, peer_job, sampling_steps, stepping
from fastdiff.benchmarks.ladder import Models, Rung
from fastdiff.benchmarks.peers import PEERS, Peer, peers
from fastdiff.benchmarks.roofs import Roofs, measure_roofs
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.work import Work
from fastdiff.benchmarks.workload import Workload
from fastdiff.config import Precision
from fastdiff.runtime.memory import out_of_memory

DTYPES = {
    Precision.FP32: torch.float32,
    Precision.TF32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}
"""Of the numbers that convolutions and matrix products read and write."""

HONEST = 0.9
"""Of diffusers' speed: a plain path that is slower would flatter every ratio that is quoted against it."""

Ceilings = Mapping[Precision, Roofs]


def ceilings(workload: Workload, rungs: Iterable[Rung], rounds: int = 10) -> dict[Precision, Roofs]:
    """What this device can do at most, in each precision that is used, with the convolutions of this very model."""
    convolutions = Work.of(workload.model, workload.batch_size, training=False).convolutions
    found = {}
    for precision in dict.fromkeys(rung.config.precision for rung in rungs):
        _set_arithmetic(workload.device, precision)
        found[precision] = measure_roofs(workload.device, DTYPES[precision], rounds, convolutions)
    return found


def measure(suite: str, models: Models, rungs: Sequence[Rung], roofs: Ceilings, rounds: int) -> list[Row]:
    """A row for each rung of "unet", "train" or "sample", then one for each peer; what is wrong or fails has no time.

    The first rung is what the others are compared with, and each has its gain over the last one before it.
    """
    workload, training = models.workload, suite == "train"
    table = _Table(suite, workload, roofs)
    with ExitStack() as stack:
        work = Work.of(workload.model, workload.batch_size, training)
        for rung in rungs:
            build = partial(job_of, suite, models, rung, stack)
            table.enter(rung.name, rung.config.precision, work, build, rung.trainer)
        for name, peer in peers(workload).items():
            table.enter_peer(name, peer, models.num_parameters)
        return table.timed(rounds)


def measure_step(models: Models, rung: Rung, roofs: Ceilings, rounds: int) -> list[Row]:
    """What an ancestral step with its noise costs over the model's call alone, both as the engine runs them."""
    workload, precision = models.workload, rung.config.precision
    model = workload.model
    work = Work.of(model, workload.batch_size, training=False)
    # x is read and written, the model's output read
    moved = 4 * workload.batch_size * (3 + 3 + model.out_channels) * model.image_size**2
    table = _Table("step", workload, roofs)

    def call() -> Job:
        candidate = models.inference(rung.config)
        return forward(workload, candidate.module, candidate.call)

    table.enter("model call", precision, work, call)
    with_step = replace(work, fp32_bytes=moved)
    table.enter("model call and step", precision, with_step, lambda: stepping(workload, models.inference(rung.config)))
    return table.timed(rounds)


def against_diffusers(rows: Sequence[Row]) -> list[str]:
    """What the plain path is worth as the one to compare with, where diffusers was timed beside it."""
    timings = {row.candidate: row.timing for row in rows}
    plain, theirs = timings.get("plain"), timings.get("diffusers")
    if plain is None or theirs is None:
        return []
    speed = plain.speedup_over(theirs)
    said = [f"plain path: {speed:.2f} times as fast as diffusers' eager model"]
    if speed < HONEST:
        said.append("warning: the plain path is slow here, and every ratio to it flatters")
    return said


class _Table:
    """The rows of one suite on one workload, as they come to be."""

    def __init__(self, suite: str, workload: Workload, roofs: Ceilings) -> None:
        self._workload = workload
        self._roofs = roofs
        self._times = sampling_steps(workload) if suite == "sample" else 1
        label = f"{workload}, {self._times} DDIM steps" if suite == "sample" else str(workload)
        self._blank = Row(suite, label, "", None, images=workload.batch_size)
        self._rows: list[Row] = []
        self._runs: dict[str, Callable[[], object]] = {}

    def enter(
        self, name: str, precision: Precision, work: Work, build: Callable[[], Job], deterministic: bool = False
    ) -> None:
        """One of ours, made ready and its memory counted."""
        row = self._of(name, precision, work)
        try:
            self._ready(row, build(), precision, deterministic)
        except Exception as reason:  # whatever keeps it from running or being right is its remark
            self._rows.append(replace(row, remark=_said(reason), failed=not out_of_memory(reason)))

    def enter_peer(self, name: str, build: Callable[[Workload], Peer], our_parameters: int) -> None:
        """One that is compared with as it comes."""
        suite, workload, row = self._blank.suite, self._workload, replace(self._blank, candidate=name)
        try:
            peer = build(workload)
            with torch.device("meta"):
                counted = build(replace(workload, device=torch.device("meta")))
            work = Work.of_module(counted.module, counted.call, workload.model, workload.batch_size, suite == "train")
            said = f"{peer.num_parameters / 1e6:.2f} M parameters, ours {our_parameters / 1e6:.2f} M"
            row = replace(self._of(name, Precision.FP32, work), remark=said)
            self._ready(row, peer_job(suite, workload, peer.module, peer.call), Precision.FP32, deterministic=False)
        except Exception as reason:
            self._rows.append(replace(row, remark=_said(reason)))

    def _of(self, name: str, precision: Precision, work: Work) -> Row:
        work, dtype = work.times(self._times), DTYPES[precision]
        limit = self._roofs[precision].limit(work, dtype)
        return replace(self._blank, candidate=name, flops=work.flops, n_bytes=work.n_bytes(dtype), limit_s=limit)

    def _ready(self, row: Row, job: Job, precision: Precision, deterministic: bool) -> None:
        device = self._workload.device
        run = _in_arithmetic(job.run, device, precision, deterministic)
        held = {tensor.data_ptr(): tensor.nbytes for tensor in job.tensors()}
        peak = sum(held.values()) + peak_bytes(run, device)
        self._rows.append(replace(row, peak_gib=peak / 2**30))
        self._runs[row.candidate] = run

    def timed(self, rounds: int) -> list[Row]:
        """All that is ready, in turn."""
        device = self._workload.device
        first = self._rows[0].candidate
        timings = {t.name: t for t in interleaved(self._runs, rounds, 1, device, first)} if self._runs else {}
        _set_arithmetic(device, Precision.FP32, deterministic=False)
        rows: list[Row] = []
        before: Timing | None = None
        for row in self._rows:
            timing = timings.get(row.candidate)
            rows.append(replace(row, timing=timing, before=None if row.candidate in PEERS else before))
            before = timing or before
        return rows


def _said(reason: Exception) -> str:
    return f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"


def _in_arithmetic(
    run: Callable[[], object], device: torch.device, precision: Precision, deterministic: bool
) -> Callable[[], object]:
    """The call with PyTorch's own switches as its runtime and, ``deterministic``, as the Trainer sets them."""
    if device.type != "cuda":
        return run

    def switched() -> object:
        _set_arithmetic(device, precision, deterministic)
        return run()

    return switched


def _set_arithmetic(device: torch.device, precision: Precision, deterministic: bool = False) -> None:
    if device.type == "cuda":
        rounded = precision is Precision.TF32
        torch.set_float32_matmul_precision("high" if rounded else "highest")
        torch.backends.cudnn.allow_tf32 = rounded
        torch.backends.cudnn.deterministic = deterministic
