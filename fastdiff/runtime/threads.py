"""Threads on a CPU that others use, too: how many, how long they wait for each other, and what is said of a slow run.

Nothing here imports torch before it is called: how OpenMP's threads wait is read from the environment when torch loads.
"""

import ctypes
import functools
import os
import re
import statistics
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

COMMANDS = frozenset({"train", "train-classifier", "sample", "evaluate", "ema", "demo", "tune-steps"})
"""The commands that choose their threads; ``benchmark`` measures what is asked."""

_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

_SPINS = 20_000
"""Turns of GNU's OpenMP in which a thread waits before it sleeps, a fifteenth of its own default. A thread
that turns keeps a shared core from the thread that it waits for (docs/performance.md, "A CPU that others use, too")."""

_INTERVALS = 3
"""Intervals whose median is the speed at the start, and slow ones in a row that count."""

_FACTOR = 3.0
"""A speed is slow if it is this many times lower than at the start."""

_CROWDED = 1.5
"""Load per core that shows other work beside a job that was never fast: its own threads cause up to 1."""

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_1, _PERIOD_1 = (Path("/sys/fs/cgroup/cpu") / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
"""Of version 1 of cgroups."""


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Set how long OpenMP's threads turn before they sleep, unless the environment says it. Call it before torch loads.

    Only GNU's OpenMP, which PyTorch's wheels for Linux contain, reads the variable.
    """
    if not any(name in environment for name in _WAITING):
        environment["GOMP_SPINCOUNT"] = str(_SPINS)


def fit_to_cores() -> None:
    """Let torch use no more threads than there are usable cores, unless the environment says how many.

    PyTorch knows the process's affinity, and no quota.
    """
    if not any(os.environ.get(name) for name in _CHOSEN):
        import torch

        if (most := max(1, int(usable_cores()))) < torch.get_num_threads():
            torch.set_num_threads(most)


def one_thread() -> None:
    """Let PyTorch's operations in the calling thread run on it alone: for threads that work in the background.

    Each thread that computes otherwise has a team of its own, and as soon as all teams have more threads than there are
    cores, GNU's OpenMP lets every waiting thread of the process sleep at once: on two cores an update of a model of
    0.85 million parameters took 126 ms instead of 75. Other OpenMPs are left alone.
    """
    import torch

    torch.get_num_threads()  # PyTorch sets the number of a new thread once, at its first question
    for library in _gnu_openmps():
        library.omp_set_num_threads(1)


@functools.cache
def _gnu_openmps() -> list[ctypes.CDLL]:
    """GNU's OpenMP as this process has loaded it, on Linux."""
    try:
        loaded = Path("/proc/self/maps").read_text()
        return [ctypes.CDLL(path) for path in sorted({*re.findall(r"/.*/libgomp[^/\n]*", loaded)})]
    except OSError:  # no Linux, or a library that was replaced since
        return []


def usable_cores() -> float:
    """The cores that this process may use: its affinity, or less under a cgroup's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _quota()
    except (OSError, ValueError):  # no cgroup, or no quota ("max")
        return affinity
    return min(affinity, quota / period) if quota > 0 else affinity  # -1 is none


def _quota() -> tuple[int, int]:
    try:
        quota, period = _QUOTA.read_text().split()
    except OSError:
        quota, period = _QUOTA_1.read_text(), _PERIOD_1.read_text()
    return int(quota), int(period)


def load_average() -> float:
    """The mean number of threads that ran or waited for a core in the last minute; 0 if the system does not say it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


@dataclass
class Pace:
    """Notices once that a job on a CPU is slow because other processes use its cores.

    ``what`` it does, in the plural, and whether it runs ``on_cpu``. With one thread nothing is said: no other number
    would be faster.
    """

    what: str
    on_cpu: bool
    _first: list[float] = field(default_factory=list)
    _slow: int = 0
    _said: bool = False

    def warning(self, speed: float) -> str | None:
        """The line to say after an interval at this ``speed``, in anything per second; None if there is none."""
        import torch

        if self._said or not self.on_cpu or torch.get_num_threads() == 1:
            return None
        cores, load = usable_cores(), load_average()
        seen = f"the load is {load:.1f} on {cores:g} {'core' if cores == 1 else 'cores'}: other processes use them"
        if len(self._first) < _INTERVALS:
            self._first.append(speed)
            crowded = len(self._first) == _INTERVALS and load > _CROWDED * cores
            return self._once(seen) if crowded else None
        factor = statistics.median(self._first) / max(speed, 1e-9)
        self._slow = self._slow + 1 if factor >= _FACTOR and load > cores else 0
        if self._slow < _INTERVALS:
            return None
        return self._once(f"{self.what} take {factor:.1f} times as long as at the start, and {seen}")

    def _once(self, seen: str) -> str:
        import torch

        self._said = True
        threads = torch.get_num_threads()
        return f"warning: {seen}; OMP_NUM_THREADS=1 may be faster than {threads} threads that wait for each other"
