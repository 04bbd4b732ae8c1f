"""What gpu_check runs in processes of its own: kernels and plans (bars), and one candidate of a whole model (model).

A process sends its results as they come, each a line of JSON after MARK. It ends if its input does.
"""

import argparse
import fcntl
import gc
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from fastdiff.benchmarks.cases import LAYOUTS, Case, attention_case, cases, loss_case, norm_case, step_case
from fastdiff.benchmarks.harness import environment
from fastdiff.benchmarks.kernels import Measured, measure, repeatable
from fastdiff.benchmarks.ladder import Models, Rung, ladder, rivals
from fastdiff.benchmarks.rehearsal import rehearsed
from fastdiff.benchmarks.roofline import Roofline, measure_roofline
from fastdiff.benchmarks.rows import Row, with_against
from fastdiff.benchmarks.suites import ceilings, measure_step
from fastdiff.benchmarks.suites import measure as measure_suite
from fastdiff.benchmarks.targets import verdicts
from fastdiff.benchmarks.tuning import faster, tuned, worth_tuning
from fastdiff.benchmarks.workload import Workload
from fastdiff.config import DiffusionConfig, Kernels, ModelConfig, Precision
from fastdiff.presets import preset_named
from fastdiff.runtime.throughput import peak_flops

MARK = "gpu_check "

SLOW = ("compile", "eager ATen", "torch", "Liger norm, then eager")
"""Candidates that take seconds to prepare: timed on the first case of a family, and where a target needs them."""
JUDGED = ("C512 8x8", "noise given")
"""The ends of such cases' shapes."""


def send(**message: object) -> None:
    """Send a message to gpu_check."""
    print(f"\n{MARK}{json.dumps(message)}", flush=True)


def send_rows(rows: Sequence[Row], device: torch.device) -> None:
    """Send rows, with the machine's environment, and the kernels of steady steps."""
    about = environment(device)
    failed = [f"{row.workload}, {row.candidate}: {row.remark}" for row in rows if row.failed]
    send(rows=[{**row.as_dict(), **about} for row in with_against(rows)], failed=failed)
    for row in rows:
        if row.kernels:
            send(kernels=f"{row.workload}, {row.candidate}\n{row.kernels}")


def by_turns(cases: Iterable[Case]) -> Iterator[tuple[Case, bool]]:
    """One case of each operation and layout, then another one of each; and whether it is the first one."""
    families: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        families.setdefault((case.op, case.layout), []).append(case)
    for turn, row in enumerate(itertools.zip_longest(*(families[name] for name in sorted(families)))):
        yield from ((case, turn == 0) for case in row if case is not None)


def cases_of(device: torch.device) -> Iterator[Case]:
    """The published comparisons; in a rehearsal small ones with the same candidates."""
    if device.type == "cuda":
        yield from cases(device)
        return
    for layout in LAYOUTS:
        yield norm_case(2, 64, 8, torch.float16, layout, on_gpu=True)
        yield step_case(2, 8, layout, on_gpu=True, philox=True)
        yield loss_case(2, 8, layout, on_gpu=True)
    yield norm_case(2, 64, 8, torch.float16, "channels_last", on_gpu=True, two=True)
    yield attention_case(1, 64, 1, 16, torch.float16, on_gpu=True)


def bars(device: torch.device, deadline: float) -> None:
    """Time every kernel beside its alternatives, then other divisions of the work than its plan's."""
    with repeatable(device):
        roofline = measure_roofline(device, torch.bfloat16)  # the dtype of norm and attention
        send(said=f"in bf16: {roofline}")
        found: list[Measured] = []
        gc.freeze()  # each capture of a graph collects garbage
        for case, first in by_turns(cases_of(device)):
            if not first and not case.shape.endswith(JUDGED):
                few = {name: call for name, call in case.candidates.items() if name not in SLOW}
                case = replace(case, candidates=few)
            for direction in case.directions:
                if time.monotonic() > deadline:
                    return
                measured = list(measure(case, direction, 10, device))
                found += measured
                send_rows([one.row(roofline) for one in measured], device)
                send(verdicts=list(map(str, verdicts(found, roofline))), of="kernels")
        advice: list[str] = []
        for case, _ in by_turns(case for case in cases_of(device) if worth_tuning(case)):
            for direction in case.directions:
                if time.monotonic() > deadline:
                    return
                variants = tuned(case, direction, 10, device, deadline)
                rows = [replace(one.row(roofline), suite="tune", failed=False) for one in variants]
                send_rows(rows, device)
                advice += filter(None, [faster(variants)])
                send(advice=advice)


@contextmanager
def exclusively(lock: Path) -> Iterator[None]:
    """One process at a time: two plain paths in fp32 may not fit the memory together."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


def workload_of(batch_size: int, device: torch.device) -> Workload:
    """ImageNet's model of 64 pixels; in a rehearsal a tiny one that has every kind of layer."""
    if device.type == "cuda":
        name = "imagenet64_uncond"
        preset = preset_named(name)
        return Workload(preset.config(ModelConfig), preset.config(DiffusionConfig), batch_size, device, name)
    size: dict[str, Any] = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
    model = ModelConfig(**size, attention_resolutions=(4,), learn_sigma=True)
    return Workload(model, DiffusionConfig(learn_sigma=True), batch_size, device, "a rehearsal")


REINDEXING = "loop_reindexing_after_fusion"
NO_REINDEXING = "+ compile, loops not reindexed after fusion"
"""Inductor's setting with which some fusions around a norm are several times as fast (pytorch issue 189488)."""


def _training(*wanted: str, **changes: Kernels) -> Callable[[torch.device], list[Rung]]:
    """Rungs of the ladder; those of a CPU have no Triton kernels."""

    def rungs(device: torch.device) -> list[Rung]:
        found = [rung for rung in ladder("train", device) if rung.name in wanted]
        return found + [
            replace(
                rung, name=f"{rung.name}, {name} kernels", beside=True, config=replace(rung.config, kernels=kernels)
            )
            for rung in found
            for name, kernels in changes.items()
        ]

    return rungs


TRAINED = {
    "trainer": _training("trainer"),
    "compile": _training("+ compile"),
    "eager": _training("+ fused optimizer", our=Kernels.AUTO),
    "ladder": _training("+ Triton kernels", "+ beside the norms"),
    NO_REINDEXING: _training("+ compile"),
}
"""Training steps by the name of their process."""
SAMPLED = {"sample 16": (16, False), "sample 1": (1, False), "sample 256": (256, False), "rivals 16": (16, True)}
"""Sampling steps: the batch, and whether torch.compile's slowest modes are timed as well, which take minutes."""
MODELS = ("trainer", "compile", "sample 16", "rivals 16", "eager", "sample 1", "ladder", "sample 256", NO_REINDEXING)
"""All of them, in the order of their value."""


def _limits(name: str, workload: Workload, rungs: list[Rung]) -> Mapping[Precision, Roofline]:
    """The device's ceilings, measured in the two first processes alone; without them the timings are still kept."""
    if name in ("trainer", "sample 16"):
        with suppress(RuntimeError):
            return ceilings(workload, rungs, 5)
    return {}


def model(name: str, device: torch.device, lock: Path, ready: Callable[[], object]) -> None:
    """Prepare one process's candidates of a whole model, check them, and time them when told."""
    on_gpu = device.type == "cuda"
    if name in TRAINED:
        rungs = TRAINED[name](device)
        if name == NO_REINDEXING:
            if not hasattr(torch._inductor.config, REINDEXING):
                send(said=f"{name}: this PyTorch has no such setting")
                return
            setattr(torch._inductor.config, REINDEXING, False)
            rungs = [replace(rung, name=name) for rung in rungs]
        if not rungs:  # in a rehearsal there is no rung of Triton's kernels
            return
        models = Models(workload_of(64 if on_gpu else 2, device))
        with exclusively(lock):
            models.compute_plain(training=True)
        limits = partial(_limits, name, models.workload, rungs)
        send_rows(measure_suite("train", models, rungs, limits, 10, with_peers=False, ready=ready), device)
        send(peak=peak_flops(device, rungs[-1].config.precision))
        return
    batch_size, with_rivals = SAMPLED[name]
    models = Models(workload_of(batch_size if on_gpu else 1, device))
    with exclusively(lock):
        models.compute_plain(training=False)
    rung = ladder("step", device)[-1]
    others = [one for one in rivals(device) if with_rivals or not one.mode]
    limits = partial(_limits, name, models.workload, [rung])
    send_rows(measure_step(models, rung, limits, 10, others, ready), device)


def main() -> None:
    """Run one stage's part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["bars", "model"])
    parser.add_argument("--name", default="")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--lock", type=Path, default=Path(os.devnull))
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    told = threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            told.set()
        os.kill(os.getpid(), signal.SIGKILL)  # gpu_check is gone

    threading.Thread(target=listen, daemon=True).start()

    def ready() -> None:
        send(ready=arguments.name)
        told.wait()

    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.rehearse else "cpu")
    with ExitStack() as stack:
        stack.enter_context(rehearsed() if arguments.rehearse else nullcontext())
        if arguments.part == "bars":
            bars(device, time.monotonic() + arguments.seconds)
        else:
            model(arguments.name, device, arguments.lock, ready)


if __name__ == "__main__":
    main()
