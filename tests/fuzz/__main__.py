"""``python -m tests.fuzz [KIND ...] --count 1000 --seed 0``: damaged inputs through the commands that read them.

A damaged input must be read as it was, or be refused in one line with exit status 2: no traceback, no hang, no code
run, no other result without a word. A finding is printed with the words that repeat it; the exit status is then 1.
"""

import argparse
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from .kinds import KINDS, run

LONGEST, LONGEST_WAIT = 10, 60
"""Seconds of the processor, and seconds of a clock, after which a command hangs: others may be using the machine."""

MOST_GROWTH = 1.0
"""GiB by which a damaged input may raise the peak of the memory."""


class Hang(BaseException):
    """A command takes too long."""


def _hangs(*_: Any) -> None:
    raise Hang


def watch() -> None:
    """Let the two clocks raise Hang."""
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _hangs)


def _end_after(seconds: float, waiting: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, waiting)


class Bench:
    """The sound inputs of a kind, and what the command makes of them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.kind = name, KINDS[name]
        self._inputs, self._sound, self._work = folder / "inputs", folder / "sound", folder / "work"
        self._inputs.mkdir(parents=True)
        self.kind.make(self._inputs)
        status, _, err, _ = self._run(self._sound)
        assert status == 0, f"{name}: the sound input fails: {err}"

    def _run(self, folder: Path, random: Random | None = None) -> tuple[int, str, str, str]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._inputs, folder)
        os.chdir(folder)
        damaged = "" if random is None else self.kind.damage(folder, random)
        return *run(self.kind.words), damaged

    def fault(self, seed: int, number: int) -> tuple[str, str]:
        """What is wrong with the command's answer to the damage ``number``, or an empty text; and its answer."""
        peak = _peak()
        _end_after(LONGEST, LONGEST_WAIT)
        try:
            status, out, err, damaged = self._run(self._work, Random(f"{seed} {self.name} {number}"))
        except Hang:
            return f"takes more than {LONGEST} s", ""
        except Exception:
            return traceback.format_exc(), ""
        finally:
            _end_after(0, 0)
        answer = f"{damaged}: {(err or out).strip().splitlines()[-1:] or ['nothing']}"
        if (self._work / "HACKED").exists():
            return "runs code", answer
        if _peak() - peak > MOST_GROWTH:
            return f"takes {_peak() - peak:.1f} GiB", answer
        if "Traceback" in out + err:
            return f"shows a traceback: {err}", answer
        if status == 2:
            lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
            return ("" if len(lines) == 1 and re.match(r"error: \S", lines[0]) else f"is not one line: {err}"), answer
        if status:
            return f"ends with status {status}: {err}", answer
        return self.kind.wrong(self._work, self._sound, out + err), answer


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> int:
    """Run the kinds; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--count", type=int, default=1000, help="damaged inputs of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every answer")
    given = parser.parse_args()
    torch.set_num_threads(1)
    watch()
    home, faults = Path.cwd(), 0
    for name in given.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            began, answers = time.perf_counter(), Counter[str]()
            bench = Bench(name, Path(folder))
            for number in range(given.first, given.first + given.count):
                fault, answer = bench.fault(given.seed, number)
                answers["refused" if "error: " in answer else "read"] += 1
                if given.show:
                    print(f"{name} {number}: {answer}")
                if fault:
                    faults += 1
                    again = f"python -m tests.fuzz {name} --seed {given.seed} --first {number} --count 1 --show"
                    print(f"FAULT {name} {number}: {fault.strip()}\n  answer: {answer}\n  again: {again}", flush=True)
            os.chdir(home)
        told = ", ".join(f"{count} {what}" for what, count in sorted(answers.items()))
        print(f"{name}: {given.count} inputs, {told}, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
