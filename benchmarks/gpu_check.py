"""The parts of gpu_check.sh that measure: ``python -m fastdiff.benchmarks.gpu_check targets --csv rows.csv``.

Needs only PyTorch, Triton and numpy, and starts nothing more when its seconds are over.
"""

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fastdiff.benchmarks.cases import cases
from fastdiff.benchmarks.harness import environment, side_stream
from fastdiff.benchmarks.kernels import Measured, measure, measure_all
from fastdiff.benchmarks.roofline import measure_roofline
from fastdiff.benchmarks.rows import Row, append_rows, with_against
from fastdiff.benchmarks.targets import training_verdicts, verdicts
from fastdiff.config import DiffusionConfig, ModelConfig
from fastdiff.kernels.attention.plan import Tiles
from fastdiff.kernels.group_norm_silu import plan as norm_plan
from fastdiff.presets import preset_named


def targets(device: torch.device, csv: Path, deadline: float) -> None:
    """Time every kernel and its alternatives, then print the verdicts on the marks."""
    about = environment(device)
    on_gpu = device.type == "cuda"
    roofline = measure_roofline(device, torch.bfloat16 if on_gpu else torch.float32)  # the cases' dtype
    print(f"in {'bf16' if on_gpu else 'fp32'}: {roofline}")
    found: list[Measured] = []
    for measured in measure_all(cases(device), 20 if on_gpu else 2, device):
        _keep([one.row(roofline) for one in measured], csv, about)
        found += measured
        if time.monotonic() > deadline:
            print("time is up: the rest was not measured")
            break
    for verdict in verdicts(found, roofline):
        print(verdict)


RESERVE = 120
"""Seconds for compiling the last rung that is started, for the rounds, and for the ceilings after them."""


def model(device: torch.device, csv: Path, deadline: float) -> None:
    """Time the training step of a released model, fused, compiled and the Trainer's, then print the verdicts."""
    # these need Pillow and safetensors, unlike the other parts
    from fastdiff.benchmarks.ladder import Models, ladder
    from fastdiff.benchmarks.suites import Ceilings, measure
    from fastdiff.benchmarks.workload import Workload
    from fastdiff.runtime.throughput import peak_flops

    on_gpu = device.type == "cuda"
    name, batch_size = ("imagenet64_uncond", 64) if on_gpu else ("cifar10_uncond", 1)
    preset = preset_named(name)
    workload = Workload(preset.config(ModelConfig), preset.config(DiffusionConfig), batch_size, device, name)
    fused = [rung for rung in ladder("train", device) if rung.fused]
    rungs = fused if on_gpu else fused[:1]
    roofline = Ceilings(workload, rungs)
    rows = measure("train", Models(workload), rungs, roofline, 10 if on_gpu else 2, False, deadline - RESERVE)
    for precision, measured in roofline.best.items():
        print(f"in {precision}: {measured}")
    _keep(rows, csv, environment(device))
    for verdict in training_verdicts(rows, peak_flops(device, rungs[-1].config.precision)):
        print(verdict)


def _keep(rows: Sequence[Row], csv: Path, about: Mapping[str, str]) -> None:
    append_rows(csv, [{**row.as_dict(), **about} for row in with_against(rows)])
    for row in rows:
        values = row.as_dict()
        result = (
            row.remark if row.timing is None else f"{values['median_s']:g} s, {values['share_of_limit']:.0%} of limit"
        )
        print(f"{row.workload:64s} {row.candidate:24s} {result}")


Variants = Mapping[str, Mapping[str, Any]]

NORM_VARIANTS: Variants = {
    "as it is": {},
    "larger tiles": {"ON_CHIP": {1: 32768, 2: 16384}},
    "smaller tiles": {"ON_CHIP": {1: 8192, 2: 4096}},
    "larger chunks": {"CHUNK": 8192},
    "smaller chunks": {"CHUNK": 2048},
}
ATTENTION_VARIANTS: Variants = {
    "as it is": {},
    "128 queries, 64 keys": {"forward": lambda *_: Tiles(128, 64, 8)},
    "128 queries, 128 keys": {"forward": lambda *_: Tiles(128, 128, 8)},
    "64 queries, 64 keys": {"forward": lambda *_: Tiles(64, 64, 4)},
    "one tile up to 64 tokens": {"AT_ONCE_UP_TO": 64},
    "never all keys at once": {"ALL_KEYS_UP_TO": 0},
}
"""Replacements of the plans' constants and tiles, by name."""


def tune(device: torch.device, csv: Path, deadline: float) -> None:
    """Time other divisions of the work than the plans choose; a faster one belongs in the plans."""
    if device.type != "cuda":
        print("nothing to tune without a GPU")
        return
    about = environment(device)
    roofline = measure_roofline(device, torch.bfloat16)
    for case in cases(device):
        variants = {"group_norm_silu": NORM_VARIANTS, "attention": ATTENTION_VARIANTS}.get(case.op, {})
        ours = replace(case, candidates={"triton": case.candidates["triton"]})
        for direction, (variant, changes) in itertools.product(case.directions, variants.items()):
            if time.monotonic() > deadline:
                print("time is up: the rest was not measured")
                return
            plan = import_module(f"fastdiff.kernels.{case.op}.plan")
            with patch.multiple(plan, **changes) if changes else nullcontext():
                norm_plan.plan.cache_clear()
                (one,) = measure(ours, direction, 10, device)
            _keep([replace(one.row(roofline), candidate=variant)], csv, about)
        norm_plan.plan.cache_clear()


PARTS = {"targets": targets, "tune": tune, "model": model}
ELSEWHERE = {"sample": "fastdiff.benchmarks.sampling", "train": "fastdiff.benchmarks.updates"}
"""Parts that also need Pillow and safetensors, with their modules."""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, *ELSEWHERE])
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=440)
    arguments = parser.parse_args()
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    part = arguments.part
    run = PARTS[part] if part in PARTS else getattr(import_module(ELSEWHERE[part]), part)
    with side_stream(on):
        run(on, arguments.csv, time.monotonic() + arguments.seconds)
