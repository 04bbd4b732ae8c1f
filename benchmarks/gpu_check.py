"""The parts of gpu_check.sh that measure: ``python -m fastdiff.benchmarks.gpu_check targets --csv rows.csv``.

targets and tune need only PyTorch, Triton and numpy. Nothing more is started when the seconds are over.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastdiff.benchmarks.cases import Case, cases
from fastdiff.benchmarks.harness import environment, side_stream
from fastdiff.benchmarks.kernels import Measured, measure_all
from fastdiff.benchmarks.roofline import measure_roofline
from fastdiff.benchmarks.rows import Row, append_rows, read_rows, with_against
from fastdiff.benchmarks.targets import sampling_verdicts, training_verdicts, verdicts
from fastdiff.benchmarks.tuning import compile_share, faster, tuned, worth_tuning
from fastdiff.config import DiffusionConfig, Kernels, ModelConfig, Precision
from fastdiff.presets import preset_named

if TYPE_CHECKING:
    from fastdiff.benchmarks.workload import Workload


def targets(device: torch.device, csv: Path, deadline: float) -> None:
    """Time every kernel and its alternatives, then print the verdicts on the targets."""
    about = environment(device)
    on_gpu = device.type == "cuda"
    roofline = measure_roofline(device, torch.bfloat16)  # the dtype of norm and attention
    print(f"in bf16: {roofline}")
    found: list[Measured] = []
    for measured in measure_all(_by_turns(cases(device)), 20 if on_gpu else 2, device):
        _keep([one.row(roofline) for one in measured], csv, about)
        found += measured
        if time.monotonic() > deadline:
            print("time is up: the rest was not measured")
            break
    for verdict in verdicts(found, roofline):
        print(verdict)


def _by_turns(cases: Iterable[Case]) -> list[Case]:
    """One case of each operation and layout, then another one of each: little time still shows something of all."""
    families: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        families.setdefault((case.op, case.layout), []).append(case)
    turns = itertools.zip_longest(*(families[name] for name in sorted(families)))
    return [case for turn in turns for case in turn if case is not None]


RESERVE = 120
"""Seconds for compiling the last candidate that is started, for the rounds, and for the ceilings after them."""


def model(device: torch.device, csv: Path, deadline: float) -> None:
    """Time the training step of a released model, fused, compiled and the Trainer's, then print the verdicts."""
    # these need Pillow and safetensors, unlike targets and tune
    from fastdiff.benchmarks.ladder import Models, ladder
    from fastdiff.benchmarks.suites import Ceilings, measure
    from fastdiff.runtime.throughput import peak_flops

    on_gpu = device.type == "cuda"
    workload = _workload("imagenet64_uncond", 64, device) if on_gpu else _workload("cifar10_uncond", 1, device)
    rungs = [rung for rung in ladder("train", device) if rung.fused]
    trainer = rungs[-1]
    for name, changes in (("fp16", {"precision": Precision.FP16}), ("torch kernels", {"kernels": Kernels.TORCH})):
        rungs.append(replace(trainer, name=f"trainer, {name}", config=replace(trainer.config, **changes)))
    rungs = rungs if on_gpu else rungs[:1]
    roofline = Ceilings(workload, rungs)
    rows = measure("train", Models(workload), rungs, roofline, 10 if on_gpu else 2, False, deadline - RESERVE)
    for precision, measured in roofline.best.items():
        print(f"in {precision}: {measured}")
    _keep(rows, csv, environment(device))
    for verdict in training_verdicts(rows, peak_flops(device, trainer.config.precision)):
        print(verdict)


SAMPLED = tuple(itertools.product(("imagenet64_uncond", "cifar10_uncond", "fork_128"), (1, 16, 256)))


def sample(device: torch.device, csv: Path, deadline: float) -> None:
    """Time a sampling step of the released models of 64, 32 and 128 pixels, from one image at a time to many.

    A further call of the same machine and commit measures only what ``csv`` lacks; the verdicts are on all its rows.
    """
    from fastdiff.benchmarks.ladder import Models, ladder, rivals
    from fastdiff.benchmarks.suites import Ceilings, measure_step

    on_gpu, about = device.type == "cuda", environment(device)
    ours, others = ladder("step", device)[-1], rivals(device)
    for name, batch_size in SAMPLED if on_gpu else [("cifar10_uncond", 1)]:
        workload = _workload(name, batch_size, device)
        measured = [row for row in _rows(csv, about) if row["workload"] == str(workload)]
        if measured and not any(row["remark"].startswith("time was up") for row in measured):
            continue
        if time.monotonic() > deadline - RESERVE:
            print("time is up: run the same command again to measure the rest")
            break
        torch.compiler.reset()  # a model compiled for another batch size counts towards Dynamo's limit of eight
        roofline = Ceilings(workload, [ours])
        rows = measure_step(Models(workload), ours, roofline, 10 if on_gpu else 2, others, deadline - RESERVE)
        _keep(rows, csv, about)
        del roofline
        gc.collect()  # frees the models' memory for the next ones
    for verdict in sampling_verdicts(_rows(csv, about)):
        print(verdict)


def _workload(name: str, batch_size: int, device: torch.device) -> "Workload":
    from fastdiff.benchmarks.workload import Workload

    preset = preset_named(name)
    return Workload(preset.config(ModelConfig), preset.config(DiffusionConfig), batch_size, device, name)


def _rows(csv: Path, about: Mapping[str, str]) -> list[dict[str, str]]:
    """The file's rows of this machine and commit; the last row of each candidate."""
    rows = read_rows(csv) if csv.exists() else []
    mine = [row for row in rows if all(row[name] == value for name, value in about.items() if name != "date")]
    return list({(row["workload"], row["candidate"]): row for row in mine}.values())


def _keep(rows: Sequence[Row], csv: Path, about: Mapping[str, str]) -> None:
    append_rows(csv, [{**row.as_dict(), **about} for row in with_against(rows)])
    for row in rows:
        values = row.as_dict()
        time_of = f"{values['median_s']:g} s, {values['share_of_limit']:.0%} of limit" if row.timing else ""
        print(f"{row.workload:64s} {row.candidate:24s} {'; '.join(filter(None, (time_of, row.remark)))}")


def tune(device: torch.device, csv: Path, deadline: float, share: str = "") -> None:
    """Time other divisions of the work than the plans choose; a faster one belongs in the plans.

    ``share``, "1/6", compiles the second sixth of them instead.
    """
    if device.type != "cuda":
        print("nothing to tune without a GPU")
        return
    turns = _by_turns(one for one in cases(device) if worth_tuning(one))
    if share:
        index, of = map(int, share.split("/"))
        compile_share(turns, device, index, of, deadline)
        return
    about = environment(device)
    roofline = measure_roofline(device, torch.bfloat16)
    advice = []
    for case, direction in [(one, direction) for one in turns for direction in one.directions]:
        if time.monotonic() > deadline:
            print("time is up: the rest was not measured")
            break
        found = tuned(case, direction, 10, device)
        _keep([one.row(roofline) for one in found], csv, about)
        advice.append(faster(found))
    print(*filter(None, advice), sep="\n")


PARTS = {"targets": targets, "tune": tune, "model": model, "sample": sample}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=440)
    parser.add_argument("--share", default="")
    arguments = parser.parse_args()
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with side_stream(on):
        options = {"share": arguments.share} if arguments.share else {}
        PARTS[arguments.part](on, arguments.csv, time.monotonic() + arguments.seconds, **options)
