"""The suites that measure a model: check every candidate, count its memory, then time all of them in turn."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from functools import partial

import torch
import torch._dynamo

from fastdiff.benchmarks.candidates import Job, forward, job_of, peer_job, sampling_steps, stepping
from fastdiff.benchmarks.flops import Flops
from fastdiff.benchmarks.harness import Timing, graphed, interleaved, peak_bytes, side_stream
from fastdiff.benchmarks.ladder import TF32, Models, Rung
from fastdiff.benchmarks.peers import PEERS, Peer, peers
from fastdiff.benchmarks.roofline import Roofline, measure_roofline
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.workload import Workload
from fastdiff.config import Precision
from fastdiff.runtime.memory import out_of_memory

DTYPES = {
    Precision.FP32: torch.float32,
    Precision.TF32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}
"""The dtypes that convolutions and matrix products read and write."""

HONEST = 1 / 1.1
"""Fraction of diffusers' speed: a plain path that is slower by more than 10% would inflate every speedup over it."""


def ceilings(workload: Workload, rungs: Iterable[Rung], rounds: int = 10) -> dict[Precision, Roofline]:
    """The highest rates of this device in each precision that is used, with the convolutions of this model."""
    convolutions = Flops.of(workload.model, workload.batch_size, training=False).convolutions
    found = {}
    for precision in dict.fromkeys(rung.config.precision for rung in rungs):
        _set_arithmetic(workload.device, precision)
        try:
            found[precision] = measure_roofline(workload.device, DTYPES[precision], rounds, convolutions)
        except Exception as error:
            if not out_of_memory(error):
                raise
            found[precision] = Roofline(math.nan, math.nan)
    return found


class Ceilings:
    """``ceilings``, measured at once and again at every call, because a shared machine may be slow for a while.

    ``best`` holds the best so far, so that the last of several suites has the highest ceilings.
    """

    def __init__(self, workload: Workload, rungs: Iterable[Rung]) -> None:
        self._workload, self._rungs = workload, list(rungs)
        self.best = ceilings(workload, self._rungs)

    def __call__(self) -> Mapping[Precision, Roofline]:
        # with all candidates in a GPU's memory there may be no room for the libraries' own
        with suppress(RuntimeError):
            for precision, found in ceilings(self._workload, self._rungs).items():
                self.best[precision] = found.or_better(self.best[precision])
        return self.best


Measuring = Callable[[], Mapping[Precision, Roofline]]
"""``Ceilings``, or a substitute."""


def measure(
    suite: str,
    models: Models,
    rungs: Sequence[Rung],
    roofline: Measuring,
    rounds: int,
    with_peers: bool = True,
    deadline: float = math.inf,
) -> list[Row]:
    """A row for each rung of "unet", "train" or "sample", then one for each peer; a wrong or failing one has no time.

    The first rung is the baseline of the others, and each has its gain over the last one before it. ``roofline`` is
    called after all were timed. After ``deadline``, of time.monotonic(), no further rung is started.
    """
    workload, training = models.workload, suite == "train"
    table = _Table(suite, workload, roofline)
    with ExitStack() as stack:
        stack.enter_context(_never_eager())
        work = Flops.of(workload.model, workload.batch_size, training)
        for rung in rungs:
            if time.monotonic() > deadline:
                table.leave_out(rung.name, "time was up before it was built")
                continue
            build = partial(job_of, suite, models, rung, stack)
            table.enter(rung.name, rung.config.precision, work, build, rung.trainer)
        for name, peer in peers(workload).items() if with_peers else ():
            table.enter_peer(name, peer, models.num_parameters, work)
        return table.timed(rounds)


def measure_step(models: Models, rung: Rung, roofline: Measuring, rounds: int) -> list[Row]:
    """The cost of an ancestral step with its noise over the model call alone, both as the engine runs them.

    On a GPU both are CUDA graphs.
    """
    workload, precision = models.workload, rung.config.precision
    model = workload.model
    work = Flops.of(model, workload.batch_size, training=False)
    # x is read and written, the model's output read
    moved = 4 * workload.batch_size * (3 + 3 + model.out_channels) * model.image_size**2
    table = _Table("step", workload, roofline)

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
    """The quality of the plain path as a baseline, if diffusers was timed as well.

    On a GPU this is the plain path in TF32, as diffusers runs.
    """
    timings = {row.candidate: row.timing for row in rows}
    tf32 = TF32 in timings
    plain, theirs = timings.get(TF32 if tf32 else "plain"), timings.get("diffusers")
    if plain is None or theirs is None:
        return []
    speed = plain.speedup_over(theirs)
    said = [f"plain path{' in tf32' * tf32}: {speed:.2f} times as fast as diffusers' eager model"]
    if speed < HONEST:
        said.append("warning: the plain path is slow here, so every speedup over it is inflated")
    return said


class _Table:
    """Collects the rows of one suite on one workload."""

    def __init__(self, suite: str, workload: Workload, roofline: Measuring) -> None:
        self._workload = workload
        self._roofline = roofline
        self._times = sampling_steps(workload) if suite == "sample" else 1
        label = f"{workload}, {self._times} DDIM steps" if suite == "sample" else str(workload)
        self._blank = Row(suite, label, "", None, images=workload.batch_size)
        self._rows: list[Row] = []
        self._runs: dict[str, Callable[[], object]] = {}
        self._held: dict[str, int] = {}
        self._work: dict[str, tuple[Precision, Flops]] = {}

    def enter(
        self,
        name: str,
        precision: Precision,
        work: Flops,
        build: Callable[[], Job],
        deterministic: bool = False,
        graph: bool = False,
    ) -> None:
        """Prepare one of our candidates and count its memory; with ``graph`` it becomes a CUDA graph on a GPU."""
        row = self._of(name, precision, work)
        beside = self._allocated()
        try:
            self._ready(row, build(), precision, deterministic, graph)
        except Exception as reason:  # any failure or wrong result becomes its remark
            self._rows.append(self._without_time(row, reason, beside))

    def enter_peer(self, name: str, build: Callable[[Workload], Peer], our_parameters: int, ours: Flops) -> None:
        """Prepare a peer as it comes, in PyTorch's default arithmetic, and count its memory."""
        suite, workload, row = self._blank.suite, self._workload, replace(self._blank, candidate=name)
        beside = self._allocated()
        try:
            peer = build(workload)
            with torch.device("meta"):  # recomputation is not counted, as for our models
                model = replace(workload.model, use_checkpoint=False)
                counted = build(replace(workload, model=model, device=torch.device("meta")))
            work = Flops.of_module(counted.module, counted.call, workload.model, workload.batch_size, suite == "train")
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
        """Add a row without a time that is not a failure."""
        self._rows.append(replace(self._blank, candidate=name, remark=remark))

    def _of(self, name: str, precision: Precision, work: Flops) -> Row:
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
        """Allocated bytes of the GPU's memory; 0 on a CPU."""
        device = self._workload.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def _without_time(self, row: Row, reason: Exception, beside: int) -> Row:
        """The row with a remark; ``beside`` bytes were held by other candidates.

        Running out of memory is not a failure, nor is an error of a peer.
        """
        full = out_of_memory(reason)
        said = f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
        if full:
            said = "out of memory" + f", with {beside / 2**30:.1f} GiB held by other candidates" * bool(beside)
        return replace(row, peak_gib=math.nan, remark=said, failed=not full and row.candidate not in PEERS)

    def timed(self, rounds: int) -> list[Row]:
        """Time all prepared candidates in turn; one that fails has no time, and the others continue."""
        device, allocated = self._workload.device, self._allocated()
        errors: dict[str, Exception] = {}
        first = self._rows[0].candidate
        timings = {t.name: t for t in interleaved(self._runs, rounds, 1, device, first, errors)}
        roofline = self._roofline()
        _set_arithmetic(device, Precision.FP32)
        rows: list[Row] = []
        before: Timing | None = None
        for row in self._rows:
            if (error := errors.get(row.candidate)) is not None:
                row = self._without_time(row, error, max(0, allocated - self._held[row.candidate]))
            if row.candidate in self._work:
                precision, work = self._work[row.candidate]
                known = roofline.get(precision, Roofline(math.nan, math.nan))
                row = replace(row, limit_s=known.limit(work, DTYPES[precision]))
            timing = timings.get(row.candidate)
            rows.append(replace(row, timing=timing, before=None if row.candidate in PEERS else before))
            before = timing or before
        return rows


def _size(parameters: int, flops: float) -> str:
    return f"{parameters / 1e6:.2f} M parameters, {flops / 1e9:.4g} GFLOP"


def _never_eager() -> AbstractContextManager[object]:
    """Beyond Dynamo's recompilation limit a compiled candidate is an error, instead of an eager one of that name."""
    return torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)


def _in_arithmetic(
    run: Callable[[], object], device: torch.device, precision: Precision | None, deterministic: bool
) -> Callable[[], object]:
    """The call with PyTorch's switches set as its runtime and, if ``deterministic``, as the Trainer sets them."""
    if device.type != "cuda":
        return run

    def switched() -> object:
        _set_arithmetic(device, precision, deterministic)
        return run()

    return switched


def _set_arithmetic(device: torch.device, precision: Precision | None, deterministic: bool = False) -> None:
    """Set PyTorch's switches; to their defaults if ``precision`` is None."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision is Precision.TF32 else "highest")
        torch.backends.cudnn.allow_tf32 = precision in (Precision.TF32, None)
        torch.backends.cudnn.deterministic = deterministic
