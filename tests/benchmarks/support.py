"""A model that is measured in no time, and machines as they might be."""

from types import ModuleType

import pytest
import torch

from fastdiff.benchmarks import roofline
from fastdiff.benchmarks.roofline import Roofline
from fastdiff.benchmarks.workload import Workload
from fastdiff.config import DiffusionConfig, ModelConfig, Precision

CPU = torch.device("cpu")
WORKLOAD = Workload(
    ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult=(1,), learn_sigma=True),
    DiffusionConfig(diffusion_steps=3, noise_schedule="cosine", learn_sigma=True),
    2,
    CPU,
)
ROOFS = dict.fromkeys(Precision, Roofline(bytes_per_s=1e9, flops_per_s=1e12, conv_flops_per_s=2e12))


def known() -> dict[Precision, Roofline]:
    """In the place of ceilings that are measured."""
    return ROOFS


def measure_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of sizes that take no time."""
    for name, size in (("ENOUGH", 1e6), ("SIDE", 64), ("FILLING", 2**20)):
        monkeypatch.setattr(roofline, name, {"cpu": size})


def count_no_memory(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """A call still runs where its memory would be counted; PyTorch's profiler takes longer than all the rest."""
    monkeypatch.setattr(module, "peak_bytes", lambda run, _: (run(), 2**20)[1])
