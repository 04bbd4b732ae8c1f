"""A device's peak throughput, and a process's peak memory."""

import re
import sys

import torch

from fastdiff.config import Precision

# Dense TFLOP/s, on tensor or matrix cores if present, with fp32 accumulation; None if the device lacks the format.
# NVIDIA's data sheets (A10, A100, H100, H200, HGX B200, L4, L40S, T4, V100) and its white papers on the GA102, Ada and
# RTX Blackwell architectures; AMD's data sheets of the MI250X, here half of it, which is one device, and the MI300X.
# The full name must match: a MIG slice, a laptop GPU or a Ti has other figures.
_PEAKS: tuple[tuple[float, float | None, float | None, float, str], ...] = (
    #  fp16    bf16    tf32   fp32
    (2250.0, 2250.0, 1100.0,  75.0, r"B200"),
    ( 989.4,  989.4,  494.7,  66.9, r"H200|H100 80GB HBM3"),
    ( 835.5,  835.5,  417.5,  60.0, r"H[12]00 NVL"),
    ( 756.0,  756.0,  378.0,  51.0, r"H100 PCIe"),
    ( 312.0,  312.0,  156.0,  19.5, r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe"),
    ( 125.0,  125.0,   62.5,  31.2, r"A10"),
    ( 362.0,  362.0,  183.0,  91.6, r"L40S"),
    ( 121.0,  121.0,   60.0,  30.3, r"L4"),
    ( 209.5,  209.5,  104.8, 104.8, r"RTX 5090"),
    ( 165.2,  165.2,   82.6,  82.6, r"RTX 4090"),
    (  71.0,   71.0,   35.6,  35.6, r"RTX 3090"),
    ( 125.0,   None,   None,  15.7, r"V100-SXM2-(16|32)GB"),
    ( 112.0,   None,   None,  14.0, r"V100-PCIE-(16|32)GB"),
    (  65.0,   None,   None,   8.1, r"T4"),
    (1307.4, 1307.4,  653.7, 163.4, r"MI300X( VF)?"),
    ( 191.5,  191.5,   None,  47.9, r"MI250X"),
)  # fmt: skip
_MAKERS = r"((NVIDIA|GeForce|Tesla|AMD|Instinct) )*"


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """The device's peak floating-point operations per second, from its vendor's data sheet; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for *peaks, pattern in _PEAKS:
        if re.fullmatch(f"{_MAKERS}({pattern})", name):
            columns = (Precision.FP16, Precision.BF16, Precision.TF32, Precision.FP32)
            peak = dict(zip(columns, peaks, strict=True)).get(precision)
            return None if peak is None else peak * 1e12
    return None


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB since the process started: of tensors on a GPU, of the whole process on a CPU. No host sync.

    NaN if the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource

    # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
