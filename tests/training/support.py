"""A training of a few updates without the command line."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fastdiff import DataConfig, DiffusionConfig, ModelConfig, RuntimeConfig, TrainConfig
from fastdiff.config import RunConfig
from fastdiff.data import load_dataset
from fastdiff.models import UNet
from fastdiff.runtime.device import Runtime
from fastdiff.training import Trainer

from ..support import randomise as randomise_model

TINY: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "",
    "diffusion_steps": 20,
    "noise_schedule": "cosine",
    "batch_size": 4,
    "preview_interval": 0,
    "log_interval": 1,
}


class Lines(list[str]):
    """The log of a run."""

    def __call__(self, line: str, *, shown: bool = True) -> None:
        self.append(line)


def run_config(data_dir: Path, **flags: Any) -> RunConfig:
    values = {**TINY, "data_dir": str(data_dir), **flags}
    if values.get("class_cond"):
        values.setdefault("num_classes", 4)
    kinds = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig, RuntimeConfig)
    known = {f.name for kind in kinds for f in fields(kind)}
    assert set(values) <= known, set(values) - known
    return RunConfig(*(kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values}) for kind in kinds))


def trainer(run_dir: Path, data_dir: Path, precision: str = "fp32", **flags: Any) -> Trainer:
    config = run_config(data_dir, **({"device": "cpu", "precision": precision, "compile": "off"} | flags))
    dataset = load_dataset(config.data, config.decoded_size, labelled=config.model.class_cond)
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(config, dataset, Runtime.resolve(config.runtime), run_dir, Lines())


def randomise(trainer: Trainer) -> Trainer:
    """Weights that are nowhere zero: with the usual ones the first gradient is zero but in the last layer."""
    randomise_model(trainer.model, seed=1)
    return trainer


def each_step(call: Callable[[int], None]) -> Callable[[int, int, str], None]:
    return lambda step, steps, note: call(step)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118


def content(path: Path) -> bytes:
    """A checkpoint file's bytes, but without what it says about the process that wrote it."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    (key,) = header["__metadata__"]
    metadata = json.loads(header["__metadata__"][key])
    assert metadata.pop("environment").keys() >= {"command", "started"}
    del metadata["sha256"]
    header["__metadata__"][key] = json.dumps(metadata)
    return json.dumps(header).encode() + raw[start:]


def digests(run_dir: Path, step: int) -> dict[str, str]:
    """The SHA-256 of each file of a step, as ``content`` reads it."""
    return {p.name: hashlib.sha256(content(p)).hexdigest() for p in run_dir.glob(f"*{step:06d}.safetensors")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def with_room(monkeypatch: pytest.MonkeyPatch, room: int, first: int = 0) -> list[int]:
    """From the call ``first`` on a forward pass has memory for so many images; returns the sizes that were tried."""
    real = UNet.forward
    sizes: list[int] = []

    def forward(self: UNet, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(x))
        if len(x) > room and len(sizes) > first:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet, "forward", forward)
    return sizes
