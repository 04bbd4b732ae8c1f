"""The suites that measure a model: every candidate checked, its memory counted, then all of them timed in turn."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from functools import partial

import torch
import torch._dynamo

from fastdiff.benchmarks.harness import Timing, graphed, interleaved, peak_bytes, side_stream
from fastdiff.benchmarks.jobs import Job, forward, job_of, peer_job, sampling_steps, stepping
from fastdiff.benchmarks.ladder import TF32, Models, Rung
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

HONEST = 1 / 1.1
"""Of diffusers' speed: a plain path that is slower by more than 10% would flatter every ratio that is quoted against
it."""


def ceilings(workload: Workload, rungs: Iterable[Rung], rounds: int = 10) -> dict[Precision, Roofs]:
    """What this device can do at most, in each precision that is used, with the convolutions of this very model."""
    convolutions = Work.of(workload.model, workload.batch_size, training=False).convolutions
    found = {}
    for precision in dict.fromkeys(rung.config.precision for rung in rungs):
        _set_arithmetic(workload.device, precision)
        try:
            found[precision] = measure_roofs(workload.device, DTYPES[precision], rounds, convolutions)
        except Exception as error:
            if not out_of_memory(error):
                raise
            found[precision] = Roofs(math.nan, math.nan)
    return found


class Ceilings:
    """``ceilings``, measured at once and anew at every call, for a machine that others use may be slow for a while.

    The best so far counts, ``best``, so that of several suites the last has the highest ceilings.
    """

    def __init__(self, workload: Workload, rungs: Iterable[Rung]) -> None:
        self._workload, self._rungs = workload, list(rungs)
        self.best = ceilings(workload, self._rungs)

    def __call__(self) -> Mapping[Precision, Roofs]:
        # with all candidates in a GPU's memory there may be no room for its libraries
        with suppress(RuntimeError):
            for precision, found in ceilings(self._workload, self._rungs).items():
                self.best[precision] = found.or_better(self.best[precision])
        return self.best


Measuring = Callable[[], Mapping[Precision, Roofs]]
"""``Ceilings``, or what stands for them."""


def measure(
    suite: str,
    models: Models,
    rungs: Sequence[Rung],
    roofs: Measuring,
    rounds: int,
    with_peers: bool = True,
    deadline: float = math.inf,
) -> list[Row]:
    """A row for each rung of "unet", "train" or "sample", then one for each peer; what is wrong or fails has no time.

    The first rung is what the others are compared with, and each has its gain over the last one before it. ``roofs``
    is called when all were timed. After ``deadline``, of time.monotonic(), no other is begun.
    """
    workload, training = models.workload, suite == "train"
    table = _Table(suite, workload, roofs)
    with ExitStack() as stack:
        stack.enter_context(_never_eager())
        work = Work.of(workload.model, workload.batch_size, training)
        for rung in rungs:
            if time.monotonic() > deadline:
                table.leave_out(rung.name, "the time was over before it was built")
                continue
            build = partial(job_of, suite, models, rung, stack)
            table.enter(rung.name, rung.config.precision, work, build, rung.trainer)
        for name, peer in peers(workload).items() if with_peers else ():
            table.enter_peer(name, peer, models.num_parameters, work)
        return table.timed(rounds)


def measure_step(models: Models, rung: Rung, roofs: Measuring, rounds: int) -> list[Row]:
    """What an ancestral step with its noise costs over the model's call alone, both as the engine runs them.

    On a GPU both are CUDA graphs.
    """
    workload, precision = models.workload, rung.config.precision
    model = workload.model
    work = Work.of(model, workload.batch_size, training=False)
    # x is read and written, the model's output read
    moved = 4 * workload.batch_size * (3 + 3 + model.out_channels) * model.image_size**2
    table = _Table("step", workload, roofs)

    def call() -> Job:
        candidate = models.inference(rung.config)
        return forward(workload, candidate.module, candidate.call)

    def step() -> Job:
        return stepping(models, models.inference(rung.config))

    with_step = replace(work, fp32_bytes=moved)
    with side_stream(workload.device), _never_eager():
        table.enter("model call", precision, work, call, graph=True)
        table.enter("model call and step", precision, with_step, step)
        return table.timed(rounds)


def against_diffusers(rows: Sequence[Row]) -> list[str]:
    """What the plain path is worth as the one to compare with, where diffusers was timed beside it.

    On a GPU it is the plain path in TF32, as diffusers is.
    """
    timings = {row.candidate: row.timing for row in rows}
    tf32 = TF32 in timings
    plain, theirs = timings.get(TF32 if tf32 else "plain"), timings.get("diffusers")
    if plain is None or theirs is None:
        return []
    speed = plain.speedup_over(theirs)
    said = [f"plain path{' in tf32' * tf32}: {speed:.2f} times as fast as diffusers' eager model"]
    if speed < HONEST:
        said.append("warning: the plain path is slow here, and every ratio to it flatters")
    return said


class _Table:
    """The rows of one suite on one workload, as they come to be."""

    def __init__(self, suite: str, workload: Workload, roofs: Measuring) -> None:
        self._workload = workload
        self._roofs = roofs
        self._times = sampling_steps(workload) if suite == "sample" else 1
        label = f"{workload}, {self._times} DDIM steps" if suite == "sample" else str(workload)
        self._blank = Row(suite, label, "", None, images=workload.batch_size)
        self._rows: list[Row] = []
        self._runs: dict[str, Callable[[], object]] = {}
        self._held: dict[str, int] = {}
        self._work: dict[str, tuple[Precision, Work]] = {}

    def enter(
        self,
        name: str,
        precision: Precision,
        work: Work,
        build: Callable[[], Job],
        deterministic: bool = False,
        graph: bool = False,
    ) -> None:
        """One of ours, made ready and its memory counted; with ``graph`` it becomes a CUDA graph on a GPU."""
        row = self._of(name, precision, work)
        beside = self._allocated()
        try:
            self._ready(row, build(), precision, deterministic, graph)
        except Exception as reason:  # whatever keeps it from running or being right is its remark
            self._rows.append(self._without_time(row, reason, beside))

    def enter_peer(self, name: str, build: Callable[[Workload], Peer], our_parameters: int, ours: Work) -> None:
        """One that is compared with as it comes, in PyTorch's default arithmetic."""
        suite, workload, row = self._blank.suite, self._workload, replace(self._blank, candidate=name)
        beside = self._allocated()
        try:
            peer = build(workload)
            with torch.device("meta"):  # what is computed a second time is not counted, nor is it of ours
                model = replace(workload.model, use_checkpoint=False)
                counted = build(replace(workload, model=model, device=torch.device("meta")))
            work = Work.of_module(counted.module, counted.call, workload.model, workload.batch_size, suite == "train")
            rounded = workload.device.type == "cuda" and any(kind is Precision.TF32 for kind, _ in self._work.values())
            row = self._of(name, Precision.TF32 if rounded else Precision.FP32, work)
            said = (
                f"{_size(peer.num_parameters, row.flops)}; ours {_size(our_parameters, ours.times(self._times).flops)}"
            )
            row = replace(row, remark=said)
            self._ready(row, peer_job(suite, workload, peer.module, peer.call), None)
        except Exception as reason:
            self._rows.append(self._without_time(row, reason, beside))

    def leave_out(self, name: str, remark: str) -> None:
        """A row without a time, which is nobody's fault."""
        self._rows.append(replace(self._blank, candidate=name, remark=remark))

    def _of(self, name: str, precision: Precision, work: Work) -> Row:
        work = work.times(self._times)
        self._work[name] = (precision, work)
        return replace(self._blank, candidate=name, flops=work.flops, n_bytes=work.n_bytes(DTYPES[precision]))

    def _ready(
        self, row: Row, job: Job, precision: Precision | None, deterministic: bool = False, graph: bool = False
    ) -> None:
        device = self._workload.device
        run = _in_arithmetic(job.run, device, precision, deterministic)
        held = {tensor.data_ptr(): tensor.nbytes for tensor in job.tensors()}
        peak = sum(held.values()) + peak_bytes(run, device)
        job.check()
        self._runs[row.candidate] = graphed(run, device) if graph else run
        self._held[row.candidate] = sum(held.values())
        self._rows.append(replace(row, peak_gib=peak / 2**30))

    def _allocated(self) -> int:
        """Bytes of the GPU's memory that are taken."""
        device = self._workload.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def _without_time(self, row: Row, reason: Exception, beside: int) -> Row:
        """Its remark; what is only too large, with ``beside`` bytes of others there, has not failed, nor has a peer."""
        full = out_of_memory(reason)
        said = f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
        if full:
            said = "out of memory" + f", beside {beside / 2**30:.1f} GiB of other candidates" * bool(beside)
        return replace(row, peak_gib=math.nan, remark=said, failed=not full and row.candidate not in PEERS)

    def timed(self, rounds: int) -> list[Row]:
        """All that is ready, in turn; one that fails meanwhile has no time, and the others go on."""
        device, allocated = self._workload.device, self._allocated()
        errors: dict[str, Exception] = {}
        first = self._rows[0].candidate
        timings = {t.name: t for t in interleaved(self._runs, rounds, 1, device, first, errors)}
        roofs = self._roofs()
        _set_arithmetic(device, Precision.FP32)
        rows: list[Row] = []
        before: Timing | None = None
        for row in self._rows:
            if (error := errors.get(row.candidate)) is not None:
                row = self._without_time(row, error, max(0, allocated - self._held[row.candidate]))
            if row.candidate in self._work:
                precision, work = self._work[row.candidate]
                known = roofs.get(precision, Roofs(math.nan, math.nan))
                row = replace(row, limit_s=known.limit(work, DTYPES[precision]))
            timing = timings.get(row.candidate)
            rows.append(replace(row, timing=timing, before=None if row.candidate in PEERS else before))
            before = timing or before
        return rows


def _size(parameters: int, flops: float) -> str:
    return f"{parameters / 1e6:.2f} M parameters, {flops / 1e9:.4g} GFLOP"


def _never_eager() -> AbstractContextManager[object]:
    """Past Dynamo's limit of recompilations a compiled candidate is an error, not an eager one of that name."""
    return torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)


def _in_arithmetic(
    run: Callable[[], object], device: torch.device, precision: Precision | None, deterministic: bool
) -> Callable[[], object]:
    """The call with PyTorch's own switches as its runtime and, ``deterministic``, as the Trainer sets them."""
    if device.type != "cuda":
        return run

    def switched() -> object:
        _set_arithmetic(device, precision, deterministic)
        return run()

    return switched


def _set_arithmetic(device: torch.device, precision: Precision | None, deterministic: bool = False) -> None:
    """PyTorch's switches; those that it has by itself where ``precision`` is None."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision is Precision.TF32 else "highest")
        torch.backends.cudnn.allow_tf32 = precision in (Precision.TF32, None)
        torch.backends.cudnn.deterministic = deterministic
