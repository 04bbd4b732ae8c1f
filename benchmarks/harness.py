"""Timing that a sceptic can repeat: candidates take turns in one process, medians, and the environment in every row."""

import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from fastdiff import __version__
from fastdiff.runtime.environment import cpu_name, git, version_of

HEAD_START = 500_000
"""GPU cycles, a quarter of a millisecond, in which the host can queue the timed work before the clock starts."""

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Timing:
    """The seconds of a candidate's rounds, and those of the baseline in the same rounds."""

    name: str
    seconds: Sequence[float]
    baseline: Sequence[float]

    @property
    def median(self) -> float:
        """Median seconds of a round."""
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """Seconds below which ``share`` of the rounds were."""
        return _quantile(self.seconds, share)

    def speedup(self, share: float = 0.5) -> float:
        """The speedup over the baseline, round by round: the median, or another quantile."""
        return _quantile([base / own for own, base in zip(self.seconds, self.baseline, strict=True)], share)

    def speedup_over(self, other: "Timing") -> float:
        """The speedup over another candidate: from both speedups over the baseline or, without one, round by round."""
        quotient = self.speedup() / other.speedup()
        if math.isnan(quotient):
            return statistics.median(theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True))
        return quotient

    def divided(self, parts: int) -> Self:
        """The time of each of ``parts`` equal parts of a round."""
        seconds, baseline = ([value / parts for value in values] for values in (self.seconds, self.baseline))
        return replace(self, seconds=seconds, baseline=baseline)


def on_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU, or stands for one in a rehearsal."""
    return device.type == "cuda"


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    device: torch.device,
    baseline: str | None = None,
    errors: dict[str, Exception] | None = None,
) -> list[Timing]:
    """Time the candidates in turn, round by round, so that a machine that slows down slows all of them.

    The baseline is the first candidate, or ``baseline``; if that is not a candidate, there is none. The baseline P runs
    before and after each of the others, P A P B P, and each run is compared with the mean of its two neighbours. An
    exception in a candidate is raised or, with ``errors``, stored there: the candidate has no time, and the others
    continue.
    """
    base = next(iter(candidates), "") if baseline is None else baseline
    others = [name for name in candidates if name != base]
    one_round = [name for other in others for name in (base, other)] or [base]
    seconds: dict[str, list[float]] = {name: [] for name in candidates}

    def run(name: str, into: list[float]) -> None:
        if name not in seconds:
            return
        try:
            into.append(_timed(candidates[name], device))
        except Exception as error:
            if errors is None:
                raise
            errors[name] = error.with_traceback(None)  # the traceback would keep its memory alive
            del seconds[name]

    for name in [name for name in candidates for _ in range(warmup)]:
        run(name, [])
    beside: list[float] = []  # the times of base
    for name in [*one_round * rounds, *[base] * bool(others)]:
        run(name, beside if name == base else seconds.get(name, []))
    if base in seconds:
        turns = max(1, len(others))
        seconds[base] = beside[: rounds * turns : turns]  # one of each round
        between = [statistics.mean(pair) for pair in itertools.pairwise(beside)]
        against = {base: seconds[base], **{name: between[turn::turns] for turn, name in enumerate(others)}}
    else:
        against = dict.fromkeys(others, [math.nan] * rounds)
    return [Timing(name, own, against[name]) for name, own in seconds.items()]


def seconds_of(run: Callable[[], object], rounds: int, device: torch.device, warmup: int = 2) -> list[float]:
    """The seconds of ``rounds`` rounds of one candidate."""
    return list(interleaved({"": run}, rounds, warmup, device)[0].seconds)


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU, ``run`` captured as a CUDA graph, so that the host's launch overhead is not timed; else ``run`` itself.

    ``run`` must have been called before, so that the capture compiles nothing, and within ``side_stream``: no graph can
    be captured on the default stream, and a backward pass runs on the stream of its forward pass.
    """
    if not on_gpu(device):
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        run()

    def replay(_: object = run) -> None:  # the graph reads what run holds, such as the results of a forward pass
        graph.replay()

    return replay


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """A stream on which CUDA graphs can be captured; an empty context on a CPU."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu(device) else nullcontext()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of tensors that one call holds, in addition to those that existed before it.

    A library's own allocations are seen on a GPU only if they go through PyTorch, and on a CPU never. On a CPU,
    allocations of other threads than PyTorch's are not seen either, nor are frees of tensors from before the call.
    """
    if on_gpu(device):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder:
        with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            run()
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    in_order = (n_bytes for _, n_bytes in sorted(changes, key=lambda change: change[0]))
    return max(itertools.accumulate(in_order, initial=0))


ALONE = "graph launches 1, others 0,"
"""A step that is one CUDA graph, in the words of ``watched``."""

STEPS = 5
"""Steps that are watched or profiled at a time."""

MOST_KERNELS = 40


@dataclass(frozen=True)
class Watched:
    """What a step asks of the device."""

    calls: str  # launches, and whether it waits for the device
    kernels: str  # a line for each kernel: milliseconds and launches per step, name


def watched(step: Callable[[], object], device: torch.device) -> Watched:
    """The launches of a step, whether it waits for the device, and its kernels by time; empty on a CPU."""
    if not on_gpu(device):
        return Watched("", "")
    waits = "no wait for the device"
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        waits = f"waits for the device: {' '.join(str(error).split())[:200]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    there = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []  # in a rehearsal there is none
    with profile(activities=[ProfilerActivity.CPU, *there]) as seen:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize(device)
    events = seen.key_averages()
    graphs, others = launches({e.key: e.count for e in events if e.device_type.name == "CPU"})
    on_device = [e for e in events if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)]
    kernels = sorted(on_device, key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels) / 1000 / STEPS
    lines = [f"{total:9.3f} ms on the device, {sum(e.count for e in kernels) / STEPS:g} kernels"]
    lines += [
        f"{e.self_device_time_total / 1000 / STEPS:9.3f} ms {e.count / STEPS:7.1f}  {e.key[:120]}"
        for e in kernels[:MOST_KERNELS]
    ]
    return Watched(f"graph launches {graphs / STEPS:g}, others {others / STEPS:g}, {waits}", "\n".join(lines))


def launches(counts: Mapping[str, int]) -> tuple[int, int]:
    """The numbers of CUDA or HIP calls that launch a graph, and that launch, copy or fill without one."""
    asked = {name: n for name, n in counts.items() if re.fullmatch(r"(cu|hip)\w*(Launch|Memcpy|Memset)\w*", name)}
    graphs = sum(n for name, n in asked.items() if "GraphLaunch" in name)
    return graphs, sum(asked.values()) - graphs


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence stderr, to which the profiler's library logs its start, its end, and events whose start it missed."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if not on_gpu(device):
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    torch.cuda.synchronize(device)
    began_event, ended_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    began_event.record()
    run()
    ended_event.record()
    ended_event.synchronize()
    return began_event.elapsed_time(ended_event) / 1000


def environment(device: torch.device) -> dict[str, str]:
    """The machine, versions, commit and date of a row."""
    threads = torch.get_num_threads()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}",
        "gpu": torch.cuda.get_device_name(device) if on_gpu(device) else "none",
        "torch": torch.__version__,
        "triton": version_of("triton") or "none",
        "commit": _commit(),
    }


def _quantile(values: Sequence[float], share: float) -> float:
    """The value at ``share`` of the sorted values; a median may lie between two."""
    return statistics.median(values) if share == 0.5 else sorted(values)[round(share * (len(values) - 1))]


def _commit() -> str:
    """The commit of this checkout, not of another one in which the package is installed; else the version."""
    return git(RESULTS.parents[1], "describe", "--always", "--dirty") or f"fastdiff {__version__}"
