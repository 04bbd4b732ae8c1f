"""The suites that measure a model: check every candidate, count its memory, then time all of them in turn."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch._dynamo

from fastdiff.benchmarks.candidates import Job, forward, job_of, peer_job, sampling_steps, stepping
from fastdiff.benchmarks.flops import Flops
from fastdiff.benchmarks.harness import Timing, graphed, interleaved, peak_bytes, side_stream, watched
from fastdiff.benchmarks.ladder import TF32, Models, Rung
from fastdiff.benchmarks.peers import Peer, peers
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

UNKNOWN = Roofline(math.nan, math.nan)


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
            found[precision] = UNKNOWN
    return found


class Ceilings:
    """``ceilings``, measured at once and again at every call, because a shared machine may be slow for a while.

    ``best`` holds the best so far, so that the last of several suites has the highest ceilings.
    """

    def __init__(self, workload: Workload, rungs: Iterable[Rung]) -> None:
        self._measure = partial(ceilings, workload, list(rungs))
        self.best = self._measure()

    def __call__(self) -> Mapping[Precision, Roofline]:
        # with all candidates in a GPU's memory there may be no room for the libraries' own
        with suppress(RuntimeError):
            for precision, found in self._measure().items():
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
    ready: Callable[[], object] = lambda: None,
) -> list[Row]:
    """A row for each rung of "unet", "train" or "sample", then one for each peer; a wrong or failing one has no time.

    The first rung is the baseline of the others, and each has its gain over the last one before it. ``roofline`` is
    called after all were timed, ``ready`` when all are prepared and before any is timed.
    """
    workload = models.workload
    table = _Table(suite, workload, roofline)
    with ExitStack() as stack:
        stack.enter_context(_never_eager())
        work = Flops.of(workload.model, workload.batch_size, suite == "train")
        for rung in rungs:
            table.enter(rung.name, rung.config.precision, work, partial(job_of, suite, models, rung, stack))
        for name, build in peers(workload).items() if with_peers else ():
            table.enter_peer(name, build, models.num_parameters, work)
        ready()
        return table.timed(rounds)


def measure_step(
    models: Models,
    rung: Rung,
    roofline: Measuring,
    rounds: int,
    rivals: Sequence[Rung] = (),
    ready: Callable[[], object] = lambda: None,
) -> list[Row]:
    """The cost of an ancestral step with its noise over the model call alone, both as the engine runs them.

    On a GPU both are CUDA graphs. The same step of each of ``rivals`` follows. ``ready`` is called when all are
    prepared.
    """
    workload, precision = models.workload, rung.config.precision
    model = workload.model
    work = Flops.of(model, workload.batch_size, training=False)
    # x is read and written, the model's output read
    moved = 4 * workload.batch_size * (3 + 3 + model.out_channels) * model.image_size**2
    with_step = replace(work, fp32_bytes=moved)
    table = _Table("step", workload, roofline)
    with side_stream(workload.device), _never_eager():
        table.enter(
            "model call",
            precision,
            work,
            lambda: forward(workload, models.inference(rung.config, beside=rung.beside)),
            graph=True,
        )
        table.enter("model call and step", precision, with_step, partial(stepping, models, rung))
        for rival in rivals:
            build = partial(stepping, models, rival)
            table.enter(rival.name, rival.config.precision, with_step, build, ours=False)
        ready()
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


@dataclass
class _Entry:
    """A candidate: its row, and what is needed to time it and to find its limit."""

    row: Row
    ours: bool
    precision: Precision | None = None
    work: Flops | None = None
    run: Callable[[], object] | None = None
    held: int = 0  # bytes between rounds
    steady: bool = False


class _Table:
    """The candidates of one suite on one workload, and their rows."""

    def __init__(self, suite: str, workload: Workload, roofline: Measuring) -> None:
        self._workload = workload
        self._roofline = roofline
        self._times = sampling_steps(workload) if suite == "sample" else 1
        label = f"{workload}, {self._times} DDIM steps" if suite == "sample" else str(workload)
        self._blank = Row(suite, label, "", None, images=workload.batch_size)
        self._entries: list[_Entry] = []

    def enter(
        self,
        name: str,
        precision: Precision,
        work: Flops,
        build: Callable[[], Job],
        *,
        graph: bool = False,
        ours: bool = True,
        remark: str = "",
    ) -> None:
        """Prepare a candidate and count its memory; with ``graph`` it becomes a CUDA graph on a GPU.

        One that is not ours runs in PyTorch's default arithmetic, and its error is no failure.
        """
        device, work = self._workload.device, work.times(self._times)
        row = replace(self._blank, candidate=name, flops=work.flops, n_bytes=work.n_bytes(DTYPES[precision]))
        entry = _Entry(row, ours, precision, work)
        self._entries.append(entry)
        beside = self._allocated()
        try:
            job = build()
            run = _in_arithmetic(job.run, device, precision if ours else None, job.deterministic)
            entry.held = sum({tensor.data_ptr(): tensor.nbytes for tensor in job.tensors()}.values())
            peak = entry.held + peak_bytes(run, device)
            job.check()
            entry.run, entry.steady = graphed(run, device) if graph else run, job.steady
            entry.row = replace(row, peak_gib=peak / 2**30, remark=remark)
        except Exception as reason:  # any failure or wrong result becomes its remark
            entry.row = _without_time(row, reason, beside, ours)

    def enter_peer(self, name: str, build: Callable[[Workload], Peer], our_parameters: int, ours: Flops) -> None:
        """Prepare a peer as it comes and count its memory; its remark compares its size with ours."""
        suite, workload = self._blank.suite, self._workload
        rounded = workload.device.type == "cuda" and any(e.precision is Precision.TF32 for e in self._entries)
        try:
            with torch.device("meta"):  # recomputation is not counted, as for our models
                model = replace(workload.model, use_checkpoint=False)
                peer = build(replace(workload, model=model, device=torch.device("meta")))
            work = Flops.of_module(peer.module, peer.call, workload.model, workload.batch_size, suite == "train")
        except Exception as reason:
            row = replace(self._blank, candidate=name)
            self._entries.append(_Entry(_without_time(row, reason, 0, ours=False), ours=False))
            return
        theirs, own = work.times(self._times), ours.times(self._times)
        said = f"{_size(peer.num_parameters, theirs)}; ours {_size(our_parameters, own)}"
        precision = Precision.TF32 if rounded else Precision.FP32
        self.enter(name, precision, work, lambda: peer_job(suite, workload, build(workload)), ours=False, remark=said)

    def timed(self, rounds: int) -> list[Row]:
        """Time all prepared candidates in turn; one that fails has no time, and the others continue."""
        device, allocated = self._workload.device, self._allocated()
        runs = {entry.row.candidate: entry.run for entry in self._entries if entry.run is not None}
        errors: dict[str, Exception] = {}
        first = self._entries[0].row.candidate
        timings = {t.name: t for t in interleaved(runs, rounds, 1, device, first, errors)}
        roofline = self._roofline()
        rows: list[Row] = []
        before: Timing | None = None
        for entry in self._entries:
            row, name = entry.row, entry.row.candidate
            if name in errors:
                row = _without_time(row, errors[name], max(0, allocated - entry.held), entry.ours)
            elif entry.steady and entry.run is not None:
                try:
                    seen = watched(entry.run, device)
                    row = replace(row, remark=seen.calls, kernels=seen.kernels)
                except RuntimeError as error:  # it has its time, and the others continue
                    row = replace(row, remark=_without_time(row, error, 0, entry.ours).remark)
            if entry.precision is not None and entry.work is not None:
                known = roofline.get(entry.precision, UNKNOWN)
                row = replace(row, limit_s=known.limit(entry.work, DTYPES[entry.precision]))
            rows.append(replace(row, timing=timings.get(name), before=before if entry.ours else None))
            before = timings.get(name, before)
        _set_arithmetic(device, Precision.FP32)
        return rows

    def _allocated(self) -> int:
        """Allocated bytes of the GPU's memory; 0 on a CPU."""
        device = self._workload.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _size(parameters: int, work: Flops) -> str:
    return f"{parameters / 1e6:.2f} M parameters, {work.flops / 1e9:.4g} GFLOP"


def _without_time(row: Row, reason: Exception, beside: int, ours: bool) -> Row:
    """The row with a remark; ``beside`` bytes were held by other candidates.

    Running out of memory is not a failure, nor is an error of a candidate that is not ours.
    """
    full = out_of_memory(reason)
    said = f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
    if full:
        said = "out of memory" + f", with {beside / 2**30:.1f} GiB held by other candidates" * bool(beside)
    return replace(row, peak_gib=math.nan, remark=said, failed=ours and not full)


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
