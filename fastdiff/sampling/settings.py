"""Records everything that determines a job's images, so that two different jobs are never confused."""

import hashlib
from pathlib import Path
from typing import Any

from fastdiff.checkpoint import Checkpoint, sha256
from fastdiff.data import ImageFolder
from fastdiff.runtime.device import Runtime
from fastdiff.sampling.loop import Int64Array
from fastdiff.sampling.plan import Plan


def settings_of(
    plan: Plan,
    indices: Int64Array,
    runtime: Runtime,
    model: Path,
    super_res: Path | None = None,
    base_samples: Path | None = None,
) -> dict[str, Any]:
    """The settings of a job, as values for JSON, with the SHA-256 of every file that it reads."""
    settings = plan.config.to_dict()
    del settings["batch_size"]  # does not determine the images, nor do device, kernels and torch.compile
    del settings["num_samples"]
    settings["indices"] = _ranges(indices)
    settings["class"] = ",".join(map(str, plan.classes)) or None
    settings["precision"] = str(runtime.precision)
    settings["model"] = _described(model, plan.checkpoint)
    if super_res is not None and plan.super_res is not None:
        settings["super_res"] = _described(super_res, plan.super_res)
    if base_samples is not None:
        settings["base_samples"] = _fingerprint(base_samples)
    if plan.ends is not None:
        settings["interpolate"] = [end if end.isdecimal() else _fingerprint(Path(end)) for end in plan.ends]
    return settings


def _described(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    configs = {**checkpoint.model_config.to_dict(), **checkpoint.diffusion_config.to_dict()}
    about = {name: checkpoint.metadata[name] for name in ("ema_rate",) if name in checkpoint.metadata}
    return {"file": path.name, "step": checkpoint.step, "sha256": sha256(path), **about, **configs}


def _fingerprint(path: Path) -> str:
    """The fingerprint of a file by its bytes, of a folder of images by their names and sizes."""
    path = path.expanduser()
    if path.is_file():
        return f"{path.name} {sha256(path)}"
    folder = ImageFolder(path, 1, labels=None)
    names = "\n".join(f"{name} {file.stat().st_size}" for name, file in zip(folder.names, folder.paths, strict=True))
    return f"{path.name} {hashlib.sha256(names.encode(errors='surrogateescape')).hexdigest()}"


def _ranges(numbers: Int64Array) -> str:
    """The numbers in the format of --indices: 17,42,100-199."""
    parts: list[list[int]] = []
    for number in numbers.tolist():
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
