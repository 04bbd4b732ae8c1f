"""What a device can do at most, what a model asks of it, and memory."""

import subprocess
import sys

import pytest
import torch

from fastdiff.config import ModelConfig, Precision
from fastdiff.models import build_model, forward_flops
from fastdiff.runtime.throughput import peak_flops, peak_memory_gib

GPU = torch.device("cuda:0")
NAMES = {
    # what drivers call them: dense bf16 and fp32 TFLOP/s
    "NVIDIA B200": (2250.0, 75.0),
    "NVIDIA H200": (989.4, 66.9),
    "NVIDIA H200 NVL": (835.5, 60.0),
    "NVIDIA H100 80GB HBM3": (989.4, 66.9),
    "NVIDIA H100 NVL": (835.5, 60.0),
    "NVIDIA H100 PCIe": (756.0, 51.0),
    "A100-SXM4-40GB": (312.0, 19.5),
    "NVIDIA A100-SXM4-80GB": (312.0, 19.5),
    "NVIDIA A100-PCIE-40GB": (312.0, 19.5),
    "NVIDIA A100 80GB PCIe": (312.0, 19.5),
    "NVIDIA A10": (125.0, 31.2),
    "NVIDIA L4": (121.0, 30.3),
    "NVIDIA L40S": (362.0, 91.6),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
    "Tesla V100-SXM2-16GB": (None, 15.7),
    "Tesla V100-PCIE-32GB": (None, 14.0),
    "Tesla T4": (None, 8.1),
    "AMD Instinct MI250X": (191.5, 47.9),
    "AMD Instinct MI300X": (1307.4, 163.4),
}


def peak(monkeypatch: pytest.MonkeyPatch, name: str, precision: Precision) -> float | None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(GPU, precision)
    return None if found is None else found / 1e12


@pytest.mark.parametrize("name", NAMES)
def test_peaks_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    bf16, fp32 = NAMES[name]
    assert peak(monkeypatch, name, Precision.BF16) == bf16
    assert peak(monkeypatch, name, Precision.FP32) == fp32
    fp16 = peak(monkeypatch, name, Precision.FP16)
    assert fp16 is not None
    assert fp16 == bf16 if bf16 else fp16 > fp32
    tf32 = peak(monkeypatch, name, Precision.TF32)
    assert tf32 is None or fp32 <= tf32 < fp16


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA L40",
        "Tesla V100S-PCIE-32GB",
        "Quadro T400",
        "Graphics Device",
    ],
)
def test_another_device_is_not_taken_for_a_known_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert all(peak(monkeypatch, name, precision) is None for precision in Precision)


def test_no_peak_of_a_cpu() -> None:
    assert peak_flops(torch.device("cpu"), Precision.FP32) is None


def test_peak_memory_of_a_process_never_falls() -> None:
    """In a process of its own: this one may have held more. Nor in its child, which begins with its parent's peak."""
    text = """
import torch
from fastdiff.runtime.throughput import peak_memory_gib
read = lambda: print(peak_memory_gib(torch.device("cpu")))
read()
held = bytearray(b"1") * 2**28
read()
del held
read()
"""
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    done = subprocess.run([sys.executable, "-c", start, text], capture_output=True, text=True, check=True)
    before, with_it, after = map(float, done.stdout.split())
    assert 0.02 < before < 4
    assert before + 0.2 < with_it < before + 0.6
    assert after >= with_it


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_of_a_gpu() -> None:
    before = peak_memory_gib(GPU)
    held = torch.empty(int((before + 1) * 2**30), dtype=torch.uint8, device=GPU)
    assert peak_memory_gib(GPU) >= before + 1
    del held
    assert peak_memory_gib(GPU) >= before + 1


PLAIN = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": ""}


def convolution(inputs: int, outputs: int, kernel: int = 3, pixels: int = 64) -> int:
    return 2 * inputs * outputs * kernel**2 * pixels


def test_flops_are_those_of_the_layers() -> None:
    """The one-level model, layer by layer: two residual blocks down and in the middle and up, one attention."""

    def residual(inputs: int) -> int:
        skip = convolution(inputs, 32, 1) if inputs != 32 else 0
        return convolution(inputs, 32) + convolution(32, 32) + skip + 2 * 128 * 64  # the embedding's scale and shift

    embedding = 2 * (32 * 128 + 128 * 128)
    attention = convolution(32, 96, 1) + convolution(32, 32, 1) + 2 * 2 * 64 * 64 * 32  # scores and their average
    blocks = residual(32) + 2 * residual(32) + attention + 2 * residual(64)
    expected = embedding + convolution(3, 32) + blocks + convolution(32, 3)
    assert forward_flops(ModelConfig(**PLAIN)) == expected


def test_flops_of_what_is_like_it_and_of_what_asks_for_more() -> None:
    base = forward_flops(ModelConfig(**PLAIN))
    assert forward_flops(ModelConfig(**PLAIN, class_cond=True)) == base  # a class is looked up
    assert forward_flops(ModelConfig(**PLAIN, use_checkpoint=True)) == base
    assert forward_flops(ModelConfig(**PLAIN, small_size=4)) == base + convolution(3, 32)
    assert forward_flops(ModelConfig(**PLAIN, learn_sigma=True)) == base + convolution(32, 3)
    assert forward_flops(ModelConfig(**{**PLAIN, "image_size": 16})) > 3.9 * base


def test_counting_flops_draws_no_random_number() -> None:
    config = ModelConfig(**PLAIN, dropout=0.5)
    torch.manual_seed(3)
    forward_flops(config)
    counted = build_model(config).state_dict()
    torch.manual_seed(3)
    plain = build_model(config).state_dict()
    assert all(torch.equal(counted[name], plain[name]) for name in plain)
