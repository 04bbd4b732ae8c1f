"""The parts of gpu_check.sh that measure: ``python -m fastdiff.benchmarks.gpu_check bars --csv rows.csv``.

Runs where only PyTorch, Triton and numpy are installed, and stops asking for more when its seconds are over.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastdiff.benchmarks.bars import verdicts
from fastdiff.benchmarks.harness import environment, interleaved, side_stream
from fastdiff.benchmarks.kernels import Row, measure, measure_all
from fastdiff.benchmarks.problems import problems
from fastdiff.benchmarks.roofs import measure_roofs
from fastdiff.benchmarks.rows import append_rows
from fastdiff.config import DiffusionConfig, ModelConfig
from fastdiff.diffusion import build_diffusion
from fastdiff.kernels.attention.plan import Tiles
from fastdiff.kernels.group_norm_silu import plan as norm_plan
from fastdiff.models import build_model, forward_flops
from fastdiff.presets import preset_named


def bars(device: torch.device, csv: Path, deadline: float) -> None:
    """Every kernel beside what else computes the same, then the marks that were set."""
    about = environment(device)
    roofs = measure_roofs(device, torch.bfloat16)
    print(f"copy {roofs.bytes_per_s / 1e9:.0f} GB/s, bf16 matrix product {roofs.flops_per_s / 1e12:.2f} TFLOP/s")
    rows: list[Row] = []
    for measured in measure_all(problems(device), 20 if device.type == "cuda" else 2, device):
        for row in measured:
            values = row.as_dict(roofs)
            append_rows(csv, [{**values, **about}])
            label = f"{row.problem.op} {row.direction} {row.problem.shape} {row.problem.layout}"
            result = row.remark or f"{values['median_us']} us, {values['share_of_roof']:.0%} of the roof"
            print(f"{label:64s} {row.candidate:24s} {result}")
        rows += measured
        if time.monotonic() > deadline:
            print("the time is over: what follows was not measured")
            break
    for verdict in verdicts(rows, roofs):
        print(verdict)


def model(device: torch.device, csv: Path, deadline: float) -> None:
    """A training step of a released model, kernels off and on, everything else equal."""
    on_gpu = device.type == "cuda"
    name, batch_size = ("imagenet64_uncond", 64) if on_gpu else ("cifar10_uncond", 1)
    about = environment(device)
    roofs = measure_roofs(device, torch.bfloat16)
    candidates, flops = _training(name, batch_size, device)
    for timing in interleaved(candidates, 10 if on_gpu else 2, 2 if on_gpu else 1, device):
        row = {
            "step": "training step",
            "preset": name,
            "batch_size": batch_size,
            "candidate": timing.name,
            "median_s": float(f"{timing.median:.5g}"),
            "p20_s": float(f"{timing.quantile(0.2):.5g}"),
            "p80_s": float(f"{timing.quantile(0.8):.5g}"),
            "speedup": float(f"{timing.speedup():.4g}"),
            "share_of_matmul": float(f"{flops / timing.median / roofs.flops_per_s:.4g}"),
        }
        append_rows(csv, [{**row, **about}])
        print(row)


def _training(name: str, batch_size: int, device: torch.device) -> tuple[dict[str, Callable[[], object]], float]:
    preset = preset_named(name)
    config, process = preset.config(ModelConfig), preset.config(DiffusionConfig)
    x = torch.rand(batch_size, 3, config.image_size, config.image_size, device=device) * 2 - 1
    t = torch.randint(process.diffusion_steps, (batch_size,), device=device)
    found: dict[str, Callable[[], object]] = {}
    for label, backend, compiled in _ways(device):
        net = build_model(config, kernels=backend).to(device).train()
        diffusion = build_diffusion(process, kernels=backend)
        call = torch.compile(net, dynamic=False) if compiled else net
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

        def step(
            diffusion: object = diffusion,
            call: Callable[..., Tensor] = call,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = diffusion.training_losses(call, x, t)["loss"].mean()  # type: ignore[attr-defined]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        found[label] = step
    return found, 3 * forward_flops(config) * batch_size


def _ways(device: torch.device) -> Iterator[tuple[str, str, bool]]:
    on_gpu = device.type == "cuda"
    yield "torch kernels" + (", compiled" if on_gpu else ""), "torch", on_gpu
    if on_gpu:
        yield "triton kernels, compiled", "triton", True
        yield "triton kernels, eager", "triton", False


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
"""What the plans' constants and tiles are replaced with, by name."""


def tune(device: torch.device, csv: Path, deadline: float) -> None:
    """Other divisions of the work than the plans choose: what wins belongs into the plans."""
    if device.type != "cuda":
        print("nothing to tune without a GPU")
        return
    about = environment(device)
    roofs = measure_roofs(device, torch.bfloat16)
    for problem in problems(device):
        variants = {"group_norm_silu": NORM_VARIANTS, "attention": ATTENTION_VARIANTS}.get(problem.op, {})
        ours = replace(problem, candidates={"triton": problem.candidates["triton"]})
        for direction, (variant, changes) in itertools.product(problem.directions, variants.items()):
            if time.monotonic() > deadline:
                print("the time is over: what follows was not measured")
                return
            plan = import_module(f"fastdiff.kernels.{problem.op}.plan")
            with patch.multiple(plan, **changes) if changes else nullcontext():
                norm_plan.plan.cache_clear()
                (row,) = measure(ours, direction, 10, device)
            values = row.as_dict(roofs)
            append_rows(csv, [{"variant": variant, **values, **about}])
            print(f"{problem.shape} {problem.layout} {direction} {variant}: {row.remark or values['median_us']}")
        norm_plan.plan.cache_clear()


PARTS = {"bars": bars, "tune": tune, "model": model}
ELSEWHERE = {"sample": "fastdiff.benchmarks.sampling", "train": "fastdiff.benchmarks.updates"}
"""Parts that want Pillow and safetensors besides, by their modules."""

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
