"""A sampling step: the engine's CUDA graph against a model compiled by max-autotune with the step's single operations.

A run resumes an earlier one of the same machine and commit that ran out of time.
"""

import csv
import gc
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastdiff.benchmarks.harness import environment, interleaved
from fastdiff.benchmarks.rows import append_rows
from fastdiff.benchmarks.targets import Verdict
from fastdiff.benchmarks.workload import TOLERANCE, Workload, inputs, randomised, require_close
from fastdiff.config import Compile, DiffusionConfig, Kernels, ModelConfig, RuntimeConfig, SampleConfig, Sampler
from fastdiff.data import to_uint8
from fastdiff.diffusion import GaussianDiffusion, Philox, build_diffusion
from fastdiff.models import build_model
from fastdiff.presets import preset_named
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.throughput import peak_memory_gib
from fastdiff.sampling import Loop

PRESETS = ("imagenet64_uncond", "cifar10_uncond", "fork_128")
MARKS = {1: 1.6, 16: 1.6, 256: 1.0}
"""For each batch size, the required speedup over the faster of the compiled rivals."""

IMAGE_STEPS = 250
STEPS = 20
"""Steps that are timed, checked for waits and profiled at a time."""

CHECKED_STEPS = 4
MAX_LEVELS_OFF = 2


COLUMNS = (
    "step_s",
    "p20_s",
    "p80_s",
    "images_per_s",
    "ratio_to_ours",
    "peak_gib",
    "graph_launches",
    "other_launches",
    "levels_off",
    "build_s",
)
"""Launches are per step, counted on the host."""


@dataclass(frozen=True)
class Way:
    """Kernels and steps: the engine's steps, or p_sample's on a model compiled in a ``mode`` of torch.compile."""

    name: str
    kernels: Kernels
    mode: str | None = None


OURS = Way("fastdiff", Kernels.AUTO)
RIVALS = (
    Way("max-autotune", Kernels.TORCH, "max-autotune"),
    Way("max-autotune-no-cudagraphs", Kernels.TORCH, "max-autotune-no-cudagraphs"),
    Way("fastdiff, torch kernels", Kernels.TORCH),
)
ON_CPU = (Way("not compiled", Kernels.TORCH, "none"),)


@dataclass(frozen=True)
class Contender:
    """A prepared way: compiled, captured and checked."""

    output: Tensor  # the model's
    step: Callable[[], None]
    levels_off: float  # between a graph's images and those of the same steps without it
    seconds: float  # of the preparation
    peak_gib: float  # of the steps, weights included; on a CPU of the complete process


def sample(device: torch.device, path: Path, deadline: float) -> None:
    """Rows for the released models of 64, 32 and 128 pixels, from one image at a time to many, and the verdicts.

    Nothing more is started if the longest measurement so far would end after ``deadline``.
    """
    on_gpu = device.type == "cuda"
    about = environment(device)
    cells = list(itertools.product(PRESETS, MARKS)) if on_gpu else [("cifar10_uncond", 1)]
    rivals = RIVALS if on_gpu else ON_CPU
    had = {(row["preset"], int(row["batch_size"]), row["candidate"]) for row in _rows(path, about)}
    left = [(name, size) for name, size in cells if (name, size, rivals[-1].name) not in had]
    longest, began = 0.0, time.monotonic()
    for row in _measure_all(left, rivals, device):
        append_rows(path, [{**row, **about}])
        print(row)
        longest, began = max(longest, time.monotonic() - began), time.monotonic()
        if began + longest > deadline:
            print("time is up: the rest was not measured; run the same command again to resume")
            break
    for verdict in verdicts(_rows(path, about)):
        print(verdict)


def _measure_all(
    cells: Iterable[tuple[str, int]], rivals: Sequence[Way], device: torch.device
) -> Iterator[dict[str, object]]:
    for name, batch_size in cells:
        preset = preset_named(name)
        process = replace(preset.config(DiffusionConfig), timestep_respacing=str(IMAGE_STEPS))
        workload = Workload(preset.config(ModelConfig), process, batch_size, device)
        for row in measure(workload, rivals):
            yield {"preset": name, **row}


def measure(workload: Workload, rivals: Sequence[Way]) -> Iterator[dict[str, object]]:
    """A row for ours, then one for each rival as soon as it is measured; a wrong or failing one has no time."""
    # a model compiled for another batch size counts towards Dynamo's limit of eight
    torch.compiler.reset()
    about = {"image_size": workload.model.image_size, "batch_size": workload.batch_size}
    ours: Contender | None = None
    for way in (OURS, *rivals):
        figures, contender = _tried(way, workload, ours)
        ours = ours or contender
        del contender  # frees a rival's memory for the next one
        gc.collect()
        yield {**about, "candidate": way.name, **figures}
        if ours is None:
            return


def _tried(way: Way, workload: Workload, ours: Contender | None) -> tuple[dict[str, object], Contender | None]:
    try:
        contender = _contender(way, workload, ours)
        return _figures(contender, ours or contender, workload), contender
    except Exception as reason:  # any failure or wrong result becomes its remark
        remark = f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
        return {**dict.fromkeys(COLUMNS, math.nan), "remark": remark}, None


def _figures(contender: Contender, ours: Contender, workload: Workload) -> dict[str, object]:
    device = workload.device
    on_gpu = device.type == "cuda"
    waits = _waits(contender.step) if on_gpu else ""
    graphs, others = launches(_profiled(contender.step)) if on_gpu else (math.nan, math.nan)

    def several(step: Callable[[], None]) -> None:
        for _ in range(STEPS if on_gpu else 1):
            step()

    pair = {"ours": lambda: several(ours.step), "its": lambda: several(contender.step)}
    *_, timing = interleaved(pair, 5 if on_gpu else 2, 1, device)
    steps = STEPS if on_gpu else 1
    step_s = timing.median / steps
    figures = {
        "step_s": step_s,
        "p20_s": timing.quantile(0.2) / steps,
        "p80_s": timing.quantile(0.8) / steps,
        "images_per_s": workload.batch_size / step_s / IMAGE_STEPS,
        "ratio_to_ours": 1 / timing.speedup(),
        "peak_gib": contender.peak_gib,
        "graph_launches": graphs / STEPS,
        "other_launches": others / STEPS,
        "levels_off": contender.levels_off,
        "build_s": contender.seconds,
    }
    said = f"waits for the device: {waits}" if waits else "no wait for the device" if on_gpu else ""
    return {name: float(f"{value:.5g}") for name, value in figures.items()} | {"remark": said}


def _contender(way: Way, workload: Workload, ours: Contender | None) -> Contender:
    """Prepare a way; ValueError if the model differs from ours, or a graph's images from those without it."""
    device, on_gpu, began = workload.device, workload.device.type == "cuda", time.monotonic()
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    compiled = Compile.ON if on_gpu and way.mode is None else Compile.OFF
    runtime = Runtime.resolve(RuntimeConfig(device=str(device), compile=compiled, kernels=way.kernels))
    torch.manual_seed(0)
    module = build_model(workload.model, runtime.kernels, runtime.memory_format)
    module.load_state_dict(randomised(module.state_dict()))
    module = runtime.cast(module.to(device).eval())
    if on_gpu and way.mode is not None:
        call = runtime.eager(torch.compile(module, dynamic=False, mode=way.mode))
    else:
        call = runtime.prepare(module, calls=0)
    x, t, conditions = inputs(workload)
    with torch.no_grad():
        output = call(x, t.float(), **conditions).clone()  # a captured model's next call overwrites its output
    if ours is not None:
        require_close(output, ours.output, TOLERANCE[runtime.precision], f"{way.name} differs from {OURS.name}")
    batch = _Batch(workload)
    off = batch.levels_off(call, runtime.kernels) if way.mode is None else math.nan
    if off > MAX_LEVELS_OFF:
        raise ValueError(f"the graph's images are {off:.0f} levels from those without it: not timed")
    diffusion = build_diffusion(workload.diffusion, runtime.kernels)
    step = batch.by_engine(call, diffusion) if way.mode is None else batch.by_operations(call, diffusion)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):  # the second step captures a graph, whose replay allocates nothing
        step()
    if not on_gpu:
        return Contender(output, step, off, time.monotonic() - began, peak_memory_gib(device))
    torch.cuda.synchronize(device)
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**30
    return Contender(output, step, off, time.monotonic() - began, peak)


class _Batch:
    """The images that a workload draws, and the ways to step them."""

    def __init__(self, workload: Workload) -> None:
        self._process = workload.diffusion
        self._shape = (workload.batch_size, 3, workload.model.image_size, workload.model.image_size)
        self._noise = Philox(0, torch.arange(workload.batch_size, device=workload.device))
        _, _, self._conditions = inputs(workload)

    def by_engine(self, call: Callable[..., Tensor], diffusion: GaussianDiffusion) -> Callable[[], None]:
        """A step of the engine's loop, which starts again after the last step."""
        loop = Loop(call, diffusion, SampleConfig(sampler=Sampler.DDPM), graphs=True)
        start = self._noise.of_start(self._shape, diffusion.kernels)

        def step() -> None:
            if not loop.left:
                loop.begin(start, self._noise, self._conditions)
            loop.step()

        return step

    def by_operations(self, call: Callable[..., Tensor], diffusion: GaussianDiffusion) -> Callable[[], None]:
        """A step of p_sample, with fresh noise from the device's generator, which is cheaper than Philox's."""
        x = self._noise.of_start(self._shape, diffusion.kernels)
        timesteps = torch.arange(diffusion.num_timesteps, device=x.device).flip(0)[:, None].expand(-1, len(x))
        rounds = itertools.cycle(timesteps.unbind())

        @torch.no_grad()
        def step() -> None:
            nonlocal x
            out = diffusion.p_sample(call, x, next(rounds), model_kwargs=self._conditions, pred_xstart=False)
            x = out["sample"]

        return step

    def levels_off(self, call: Callable[..., Tensor], kernels: Kernels) -> int:
        """The largest difference, of 255, between images of the engine's loop with and without a graph."""
        few = build_diffusion(replace(self._process, timestep_respacing=str(CHECKED_STEPS)), kernels)
        start = self._noise.of_start(self._shape, few.kernels)
        images = []
        for graphs in (True, False):
            loop = Loop(call, few, SampleConfig(sampler=Sampler.DDPM), graphs=graphs)
            loop.begin(start, self._noise, self._conditions)
            while loop.left:
                loop.step()
            images.append(to_uint8(loop.x).int())
        return int((images[0] - images[1]).abs().max())


def _waits(step: Callable[[], None]) -> str:
    """What waited for the device in some steps, or an empty string."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            step()
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _profiled(step: Callable[[], None]) -> dict[str, int]:
    """How often each event occurred on the host in STEPS steps."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    return {event.key: event.count for event in seen.key_averages() if event.device_type.name == "CPU"}


def launches(counts: Mapping[str, int]) -> tuple[int, int]:
    """The numbers of CUDA or HIP calls that launch a graph, and that launch, copy or fill without one."""
    asked = {name: n for name, n in counts.items() if re.fullmatch(r"(cu|hip)\w*(Launch|Memcpy|Memset)\w*", name)}
    graphs = sum(n for name, n in asked.items() if "GraphLaunch" in name)
    return graphs, sum(asked.values()) - graphs


def verdicts(rows: Sequence[Mapping[str, str]]) -> list[Verdict]:
    """Verdicts on the marks: the speedup over max-autotune, one launch per step, no wait."""
    found = []
    ours = [row for row in rows if row["candidate"] == OURS.name]
    for size, mark in MARKS.items():
        figures = [(0.0, f"{_where(row)}: {row['remark']}") for row in ours if _untimed(row, size)]
        for row in rows:
            if row["candidate"].startswith("max-autotune") and int(row["batch_size"]) == size:
                ratio = float(row["ratio_to_ours"])
                figures += [] if math.isnan(ratio) else [(ratio, f"{_where(row)}, {row['candidate']}")]
        found.append(Verdict(f"sampling, batch {size}, against max-autotune", mark, *_worst(figures)))
    on_gpu = [row for row in ours if row["graph_launches"] != "nan"]
    alone = [(float(_is_one_launch(row)), _where(row)) for row in on_gpu]
    found.append(Verdict("sampling, a step is one graph's launch and nothing else", 1.0, *_worst(alone)))
    unhindered = [(float(row["remark"] == "no wait for the device"), _where(row)) for row in on_gpu]
    found.append(Verdict("sampling, no step waits for the device", 1.0, *_worst(unhindered)))
    return found


def _untimed(row: Mapping[str, str], size: int) -> bool:
    return int(row["batch_size"]) == size and row["step_s"] == "nan"


def _is_one_launch(row: Mapping[str, str]) -> bool:
    return float(row["graph_launches"]) == 1 and float(row["other_launches"]) == 0


def _where(row: Mapping[str, str]) -> str:
    return f"{row['image_size']} pixels, batch {row['batch_size']}"


def _worst(figures: Sequence[tuple[float, str]]) -> tuple[float, str]:
    return min(figures, default=(math.nan, "not measured"))


def _rows(path: Path, about: Mapping[str, str]) -> list[dict[str, str]]:
    """The file's rows of this machine and commit."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row[name] == value for name, value in about.items() if name != "date")]
