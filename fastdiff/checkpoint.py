"""Checkpoints: files that are whole or absent, and that say everything needed to use them.

A run's checkpoint of step 500 is ``model000500.safetensors``, one ``ema_0.9999_000500.safetensors`` per rate, and
``opt000500.safetensors``; the number counts completed updates. Each file's metadata hold the whole configuration.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.config import DiffusionConfig, Kernels, MemoryFormat, ModelConfig, with_multipliers
from fastdiff.diffusion import GaussianDiffusion, build_diffusion
from fastdiff.interop import openai
from fastdiff.models import UNet, build_model

FORMAT = "fastdiff-1"
_DESCRIBED = {"model_config", "diffusion_config"}
_ANY = "*.safetensors"
_NAME = re.compile(r"(?P<kind>model|opt|ema_(?P<rate>[0-9.e-]+)_)(?P<step>\d{6,})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to use, and what its file says of it."""

    model: UNet
    diffusion: GaussianDiffusion
    model_config: ModelConfig
    diffusion_config: DiffusionConfig
    step: int
    class_names: tuple[str, ...]
    metadata: Mapping[str, Any]


def model_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the raw weights of a step."""
    return run_dir / f"model{step:06d}.safetensors"


def ema_path(run_dir: Path, rate: float, step: int) -> Path:
    """Where a run keeps the averaged weights of a step."""
    return run_dir / f"ema_{rate}_{step:06d}.safetensors"


def optimizer_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the optimizer's state of a step."""
    return run_dir / f"opt{step:06d}.safetensors"


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | Mapping[str, Tensor],
    *,
    model_config: ModelConfig,
    diffusion_config: DiffusionConfig,
    step: int = 0,
    class_names: tuple[str, ...] = (),
    **metadata: Any,
) -> Path:
    """Write a model, or its state dict, with its configuration; further keywords become metadata (JSON values).

    The file appears whole or not at all. OSError where it cannot be written.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    described = {
        "kind": "model",
        "model_config": with_multipliers(model_config).to_dict(),
        "diffusion_config": diffusion_config.to_dict(),
        "step": step,
        "class_names": list(class_names),
        **metadata,
    }
    return write_tensors(Path(path), state, described)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model_config: ModelConfig | None = None,
    diffusion_config: DiffusionConfig | None = None,
    device: torch.device | str = "cpu",
    kernels: Kernels | str = Kernels.AUTO,
    memory_format: MemoryFormat | str = MemoryFormat.CHANNELS_LAST,
) -> Checkpoint:
    """A fastdiff checkpoint, or an improved-diffusion ``.pt`` state dict with the configurations given.

    The model is on ``device``, in evaluation mode. ValueError, in one line, where the file is missing, damaged, of
    another kind or architecture, or, for a bare state dict, where the configurations are missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if path.suffix == ".safetensors":
        state, metadata = read_tensors(path, kind="model")
        if model_config is not None or diffusion_config is not None:
            raise ValueError(f"{path} says itself what it is: configurations are for bare state dicts")
        try:
            model_config = ModelConfig.from_dict(metadata["model_config"])
            diffusion_config = DiffusionConfig.from_dict(metadata["diffusion_config"])
            class_names = tuple(map(str, metadata["class_names"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds a configuration of no model of this version: {error}") from None
    else:
        state, metadata, class_names = openai.load_state_dict(path), {}, ()
        if model_config is None or diffusion_config is None:
            raise ValueError(
                f"{path} is a bare state dict: say what it is with --preset or with the flags it was trained with"
            )
    model = build_model(model_config, kernels, memory_format)
    load_weights(model, state, path)
    return Checkpoint(
        model.eval().to(device),
        build_diffusion(diffusion_config, kernels),
        model_config,
        diffusion_config,
        metadata.get("step", 0),
        class_names,
        metadata,
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a fastdiff checkpoint or an improved-diffusion ``.pt`` file; ValueError as load_checkpoint."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    if path.suffix == ".safetensors":
        return read_tensors(path, kind="model")[0]
    return openai.load_state_dict(path)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy a state dict into a model; ValueError, naming the first difference, where it is of another architecture."""
    own = {key: value.shape for key, value in model.state_dict().items()}
    theirs = {key: value.shape for key, value in state.items()}
    if own != theirs:
        key = next(key for key in [*own, *theirs] if own.get(key) != theirs.get(key))
        says = [tuple(shapes[key]) if key in shapes else "absent" for shapes in (theirs, own)]
        differing = sum(own.get(key) != theirs.get(key) for key in own.keys() | theirs.keys())
        raise ValueError(
            f"{path} is of another architecture: {key} is {says[0]} in the file and {says[1]} in the model "
            f"({differing} tensors differ)"
        )
    model.load_state_dict(dict(state))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a fastdiff file of the kind "model" or "optimizer"; ValueError where it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            metadata = json.loads(raw.get(FORMAT, "{}"))
            if (
                not isinstance(metadata, dict)
                or "kind" not in metadata
                or (kind == "model" and not metadata.keys() >= _DESCRIBED and metadata["kind"] == kind)
            ):
                raise ValueError(f"{path} is a safetensors file, but not one of fastdiff's")
            if metadata["kind"] != kind:
                other = (
                    "the model*.safetensors or ema_*.safetensors file beside it" if kind == "model" else "the opt* file"
                )
                raise ValueError(f"{path} is a file of the kind {metadata['kind']}, not {kind}: name {other}")
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118  # not a dict
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({openai.first_line(error)})") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write tensors and metadata as one safetensors file, whole or not at all."""
    packed = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(packed, temporary, metadata={FORMAT: json.dumps(metadata)})
        except SafetensorError as error:  # a full disk, too, is one of these
            raise OSError(f"{path} cannot be written: {openai.first_line(error)}") from error
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; on success it takes path's place, on failure it is gone.

    The file is on the disk before it is renamed, and has the mode that the umask gives any new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    # the only way to read the umask is to set it
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # not on Windows, where a rename needs no such thing
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of a run that can be resumed, oldest first: those with both weights and optimizer."""
    models, optimizers = _steps(run_dir, "model"), _steps(run_dir, "opt")
    return sorted(models & optimizers)


def _steps(run_dir: Path, kind: str) -> set[int]:
    matches = (_NAME.fullmatch(path.name) for path in run_dir.glob(_ANY))
    return {int(m["step"]) for m in matches if m and m["kind"] == kind}


def delete_step(run_dir: Path, step: int) -> None:
    """Delete every file of a step, the optimizer's first: what is left cannot be taken for a whole checkpoint."""
    paths = [p for p in run_dir.glob(_ANY) if (m := _NAME.fullmatch(p.name)) and int(m["step"]) == step]
    for path in sorted(paths, key=lambda p: not p.name.startswith("opt")):
        path.unlink(missing_ok=True)


def find_checkpoint(place: Path | None, runs: Path = Path("runs")) -> Path:
    """The file to sample from: ``place`` itself, or the newest one in the run folder ``place`` or in the newest run.

    In a run folder the average of the highest rate is taken, else the raw weights. ValueError where there is none.
    """
    if place is not None and not place.is_dir():
        return place
    found = [p for p in (place.glob(_ANY) if place is not None else runs.glob(f"*/{_ANY}")) if _is_model(p)]
    if not found:
        where = f"in {place}" if place is not None else f"in any folder of {runs}/"
        raise ValueError(f"no checkpoint {where}: train a model first (fastdiff train --data-dir DIR) or name a file")
    newest = max(found, key=lambda path: path.stat().st_mtime_ns).parent
    there = [path for path in found if path.parent == newest]
    whole = set(saved_steps(newest))  # a killed process may leave a later step without its averages
    return max([path for path in there if _rank(path)[0] in whole] or there, key=_rank)


def _is_model(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    return match is not None and match["kind"] != "opt"


def _rank(path: Path) -> tuple[int, float]:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match["step"]), float(match["rate"] or 0)
