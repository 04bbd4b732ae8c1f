"""The trainer's updates under DDP: whether they wait for the device, and how fast they are."""

import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastdiff.benchmarks.harness import environment
from fastdiff.benchmarks.roofline import measure_roofline
from fastdiff.benchmarks.rows import append_rows
from fastdiff.config import (
    Compile,
    DataConfig,
    DiffusionConfig,
    Kernels,
    ModelConfig,
    Precision,
    RunConfig,
    RuntimeConfig,
    ScheduleSampler,
    TrainConfig,
)
from fastdiff.data import Dataset, Preflight, batches, prefetch_to_device
from fastdiff.models import forward_flops
from fastdiff.presets import preset_named
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.throughput import peak_memory_gib
from fastdiff.training import Trainer
from fastdiff.training.run_folder import Silence
from fastdiff.training.update import Updater

WAYS = (("bf16", "auto"), ("fp16", "auto"), ("bf16", "torch"))
"""Precision and kernels."""


def train(device: torch.device, csv: Path, deadline: float) -> None:
    """A row for each of WAYS: a released model trained by the Trainer's updater, compiled on a GPU, in a group of one.

    On a GPU the timed updates run with torch.cuda.set_sync_debug_mode("error"): the row says so if one waited.
    """
    on_gpu = device.type == "cuda"
    name, batch_size, updates = ("imagenet64_uncond", 64, 20) if on_gpu else ("cifar10_uncond", 1, 2)
    preset = preset_named(name)
    model, process = preset.config(ModelConfig), preset.config(DiffusionConfig)
    training = TrainConfig(batch_size=batch_size, schedule_sampler=ScheduleSampler.LOSS_SECOND_MOMENT, grad_clip=1.0)
    compiled = Compile.ON if on_gpu else Compile.OFF
    about, roofline = environment(device), measure_roofline(device, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/store"
        dist.init_process_group("nccl" if on_gpu else "gloo", init_method=meeting, rank=0, world_size=1)
        for precision, kernels in WAYS:
            if time.monotonic() > deadline:
                print("time is up: the rest was not measured")
                break
            torch.compiler.reset()
            on = RuntimeConfig(str(device), Precision(precision), compiled, Kernels(kernels))
            trainer = build_trainer(model, process, training, on, Path(folder))
            seconds, remark = _timed(trainer, updates)
            flops = 3 * forward_flops(model) * batch_size
            row = {
                "preset": name,
                "batch_size": batch_size,
                "precision": precision,
                "kernels": kernels,
                "compiled": on_gpu,
                "update_s": float(f"{seconds:.5g}"),
                "images_per_s": float(f"{batch_size / seconds:.5g}"),
                "share_of_matmul": float(f"{flops / seconds / roofline.flops_per_s:.4g}"),
                "memory_gib": float(f"{peak_memory_gib(device):.4g}"),
                "remark": remark,
            }
            append_rows(csv, [{**row, **about}])
            print(row)
        dist.destroy_process_group()


def build_trainer(
    model: ModelConfig, process: DiffusionConfig, training: TrainConfig, on: RuntimeConfig, folder: Path
) -> Trainer:
    """The Trainer of a run on random images, which writes nothing to ``folder``."""
    size, images = model.image_size, max(256, training.batch_size)
    classes = model.num_classes if model.class_cond else 0
    pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
    labels = np.arange(images) % classes if classes else None
    preflight = Preflight({"png": images}, (), (size, size), (size, size), ())
    dataset = Dataset(pixels, labels, tuple(map(str, range(classes))), preflight, tuple(map(str, range(images))), "")
    config = RunConfig(model, process, DataConfig(), training, on)
    return Trainer(config, dataset, Runtime.resolve(on), folder, Silence())


def stream(trainer: Trainer) -> Generator[tuple[Tensor, Tensor | None], None, None]:
    """Batches like the trainer's, uint8 (B, H, W, 3), with their labels (B,)."""
    config, pin = trainer.config, trainer.device.type == "cuda"
    data = batches(trainer.dataset, config.data, config.train.batch_size, config.train.seed, 0, pin=pin)
    return prefetch_to_device(data, trainer.device)


def _timed(trainer: Trainer, updates: int) -> tuple[float, str]:
    """Seconds per update, and the remark of the row."""
    on_gpu = trainer.device.type == "cuda"
    # as several processes do; parallelise() does not wrap the model of a single one
    module = DistributedDataParallel(trainer.model, gradient_as_bucket_view=True)
    forward = trainer.runtime.prepare(module, trainer.model_calls)
    update = Updater(trainer.config, trainer.state, trainer.diffusion, module, forward, trainer.world)
    data = stream(trainer)
    remark, began = "no wait for the device" if on_gpu else "", time.perf_counter()
    try:
        for _ in range(5 if on_gpu else 1):  # compiles, and fills two buffers of data
            update(*next(data))
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        began = time.perf_counter()
        for _ in range(updates):
            update(*next(data))
    except RuntimeError as error:
        remark = f"waits for the device: {' '.join(str(error).split())[:200]}"
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        data.close()
    return (time.perf_counter() - began) / updates, remark
