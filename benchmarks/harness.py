"""Timing that a sceptic can repeat: candidates in turn in one process, medians, and a row that says where it was."""

import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from fastdiff import __version__

HEAD_START = 500_000
"""GPU cycles, a quarter of a millisecond, in which the host can hand over what is timed before the clock starts."""

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Timing:
    """The seconds of one candidate's rounds, and of the first candidate's beside them."""

    name: str
    seconds: Sequence[float]
    baseline: Sequence[float]

    @property
    def median(self) -> float:
        """Seconds of a typical round."""
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """Seconds below which ``share`` of the rounds were."""
        return _quantile(self.seconds, share)

    def speedup(self, share: float = 0.5) -> float:
        """How many times as fast as the first candidate, round by round; the median, or another quantile."""
        return _quantile([base / own for own, base in zip(self.seconds, self.baseline, strict=True)], share)

    def speedup_over(self, other: "Timing") -> float:
        """The same over another candidate: by what both are to the first one, or, without that, round by round."""
        quotient = self.speedup() / other.speedup()
        if math.isnan(quotient):
            return statistics.median(theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True))
        return quotient

    def divided(self, parts: int) -> Self:
        """The time of each of so many equal parts of a round."""
        seconds, baseline = ([value / parts for value in values] for values in (self.seconds, self.baseline))
        return replace(self, seconds=seconds, baseline=baseline)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    device: torch.device,
    baseline: str | None = None,
    errors: dict[str, Exception] | None = None,
) -> list[Timing]:
    """Time the candidates in turn, round by round, so that a machine that slows down slows all of them.

    They are compared with the first one, or with ``baseline``, and with nothing where that is not among them. It runs
    before and after each of the others, P A P B P, and a run is compared with the mean of the two beside it. What a
    candidate raises is raised; with ``errors`` it is put there, the candidate has no time, and the others go on.
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
            errors[name] = error.with_traceback(None)  # which would hold the memory that it failed with
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
    """The seconds of so many rounds of one candidate."""
    return list(interleaved({"": run}, rounds, warmup, device)[0].seconds)


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU, ``run`` captured as a CUDA graph, so that what launching costs the host is not timed; else itself.

    ``run`` has been called before, so that nothing is compiled during the capture, and within ``side_stream``: no graph
    can be captured on the default stream, and a backward pass runs on the stream of its forward pass.
    """
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        run()
    return graph.replay


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """A stream on which CUDA graphs can be captured; nothing on a CPU."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that one call holds at a time, beside those that were there before it.

    What a library allocates for itself is seen on a GPU only where it asks PyTorch for it, on a CPU not at all; nor
    are, on a CPU, what other threads than PyTorch's own allocate and that a call frees what was there before it.
    """
    if device.type == "cuda":
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


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library says there when it begins and ends, and what it did not see the beginning of."""
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
    if device.type != "cuda":
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
    """Where and with what a row was measured."""
    threads = torch.get_num_threads()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_cpu_name()}, {threads} thread{'s' * (threads != 1)}",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
    }


def _quantile(values: Sequence[float], share: float) -> float:
    """Of the values in order the one at ``share`` of the way; the median between two."""
    return statistics.median(values) if share == 0.5 else sorted(values)[round(share * (len(values) - 1))]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The commit of this checkout, and not of another one that the package is installed in; or the version."""
    checkout = RESULTS.parents[1]
    if _git("rev-parse", "--show-toplevel") == str(checkout) and (found := _git("describe", "--always", "--dirty")):
        return found
    return f"fastdiff {__version__}"


def _git(*words: str) -> str:
    """What git says here, or nothing."""
    try:
        run = subprocess.run(["git", *words], cwd=RESULTS.parents[1], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
