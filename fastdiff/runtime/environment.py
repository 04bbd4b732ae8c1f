"""Where a run ran: versions, commit, command, device, host and time. Its files keep it, and nothing depends on it."""

import functools
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastdiff.config import Kernels
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.words import printable

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that holds the package: a git checkout, or where packages are installed."""


def environment(runtime: Runtime, processes: int, calls: int, command: str) -> dict[str, Any]:
    """What the files of a run say about its process, as JSON-compatible values, each as decided and not "auto".

    ``command`` started the run, on so many ``processes``; it calls the model ``calls`` times.
    """
    found = versions()
    kernels = str(runtime.kernels)
    if runtime.kernels is Kernels.AUTO:
        kernels = "triton" if runtime.device.type == "cuda" and found["triton"] else "torch"
    return {
        **found,
        "commit": commit(),
        "command": printable(command),
        "device": device_name(runtime.device),
        "processes": processes,
        "precision": str(runtime.precision),
        "kernels": kernels,
        "compile": runtime.compiles(calls),
        "host": printable(socket.gethostname()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str | None]:
    """The versions of fastdiff, torch, triton (None without it) and python."""
    ours = sys.modules[__name__.partition(".")[0]].__version__  # the layers forbid to import fastdiff itself
    found = {"fastdiff": ours, "torch": str(torch.__version__), "triton": version_of("triton")}
    return {**found, "python": platform.python_version()}


def version_of(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The name of a GPU; of a CPU, "cpu (AMD EPYC 9B45)"."""
    return f"cpu ({cpu_name()})" if device.type == "cpu" else torch.cuda.get_device_name(device)


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def commit() -> str | None:
    """The commit of fastdiff's git checkout, 40 hex digits; None for an installed package."""
    return git(CHECKOUT, "rev-parse", "HEAD")


def git(checkout: Path, *words: str) -> str | None:
    """The output of git in the folder ``checkout``; None if it fails, or if the folder is inside another checkout."""
    said = ""
    for asked in (("rev-parse", "--show-toplevel"), words):
        try:
            run = subprocess.run(["git", *asked], cwd=checkout, capture_output=True, text=True, check=False)
        except OSError:  # git is not installed, or there is no such folder
            return None
        said = run.stdout.strip()
        if run.returncode or (asked is not words and Path(said).resolve() != checkout.resolve()):
            return None
    return said
