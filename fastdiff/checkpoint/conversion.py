"""Convert a model between projects' file formats, verify its outputs, and report what the target cannot store."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastdiff.checkpoint import model_card
from fastdiff.checkpoint.model import Checkpoint, load_checkpoint, save_checkpoint
from fastdiff.interop import diffusers
from fastdiff.interop.scripts import for_the_scripts
from fastdiff.runtime.files import replacing, replacing_folder

_SAFETENSORS, _BARE = ".safetensors", ".pt"
_TOLERANCE = 1e-3
"""Tolerance relative to the outputs' largest absolute value; a larger difference is not rounding error."""
_COMPARED_SIDE = 64
_TIMESTEPS = 4
_Predict = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def is_file(target: Path) -> bool:
    """Whether this name is that of a file, and not of a diffusers folder."""
    return target.suffix in (_SAFETENSORS, _BARE)


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """ValueError if ``target`` is not a valid name for a converted model, may not be replaced or is not writable."""
    if not is_file(target) and target.suffix[1:].isalpha():
        raise ValueError(f"{target}: DST must end in .safetensors or .pt, or be a folder's name without a suffix")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{target} is SRC itself, or contains it: name another path")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is not a folder: create it first")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{target.parent} cannot be written to: name another folder for DST")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{target} exists: name another, or use --overwrite")
    if is_file(target) != target.is_file() or not (is_file(target) or diffusers.is_folder(target)):
        kind = "a file" if is_file(target) else "a diffusers folder"
        raise ValueError(f"{target} exists and is not {kind}: name another")
    there = [] if is_file(target) else [path for path in target.rglob("*") if not path.is_dir() or path.is_symlink()]
    ours = diffusers.WRITTEN | ({model_card.NAME} if model_card.is_untouched(target / model_card.NAME) else set())
    if others := sorted({path.relative_to(target).as_posix() for path in there} - ours):
        raise ValueError(f"{target} holds {others[0]} too, which would be lost: name another, or move that away")


def convert(
    source: Path, loaded: Checkpoint, target: Path, scheduler: diffusers.Scheduler, license: str = ""
) -> list[str]:
    """Write the checkpoint loaded from ``source`` to ``target``; returns lines for the log.

    The suffix of ``target`` selects the format: .safetensors is fastdiff's, .pt is improved-diffusion's and
    guided-diffusion's, and any other name is a diffusers folder, whose model card states the ``license``. Both models
    are then loaded from their files again and run on the same input in fp32. The target is written atomically.
    ValueError if the format cannot express the model, or the outputs differ by more than rounding error; OSError if the
    target cannot be written.
    """
    state = {key: value.float().contiguous() for key, value in loaded.model.state_dict().items()}
    with (replacing if is_file(target) else replacing_folder)(target) as temporary:
        lines = _write(temporary, state, loaded, scheduler)
        if not is_file(target):
            back = diffusers.read_process(temporary, loaded.model_config)
            card = model_card.model_card(target.name, source, loaded, scheduler, back, license)
            (temporary / model_card.NAME).write_text(card, encoding="utf-8")
        difference = _difference(source, loaded, temporary, target)
    return [f"{source} -> {target}", *lines, difference]


def _write(path: Path, state: dict[str, Tensor], loaded: Checkpoint, scheduler: diffusers.Scheduler) -> list[str]:
    """Write the file or folder; returns one line for each thing the format cannot store."""
    if path.suffix == _SAFETENSORS:
        described = {"kind", "model_config", "diffusion_config", "step", "class_names"}
        save_checkpoint(
            path,
            state,
            model_config=loaded.model_config,
            diffusion_config=loaded.diffusion_config,
            step=loaded.step,
            class_names=loaded.class_names,
            **{key: value for key, value in loaded.metadata.items() if key not in described},
        )
        return []
    lost = []
    if loaded.class_names:
        names = ", ".join(f"{i} {name}" for i, name in enumerate(loaded.class_names))
        where = "not written" if path.suffix == _BARE else f"in {model_card.NAME} only"
        lost.append(f"the class names are {where}: {names}")
    if loaded.metadata.get("label_dropout"):
        lost.append("the model was trained with --label-dropout: label -1 (no class) exists only in fastdiff")
    try:
        if path.suffix == _BARE:
            torch.save(state, path)
            return [*lost, *for_the_scripts(loaded.model_config, loaded.diffusion_config)]
        return [*lost, *diffusers.write(path, state, loaded.model_config, loaded.diffusion_config, scheduler)]
    except (RuntimeError, SafetensorError) as error:  # a full disk can raise either
        raise OSError(f"DST cannot be written ({str(error).splitlines()[0]})") from error


def _difference(source: Path, loaded: Checkpoint, written: Path, target: Path) -> str:
    """Load both models from their files and compare their outputs; ValueError if they differ by more than rounding."""
    config, process = loaded.model_config, loaded.diffusion_config
    factor = 2 ** (len(config.multipliers) - 1)
    side = config.image_size if config.image_size <= _COMPARED_SIDE else factor * max(1, _COMPARED_SIDE // factor)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TIMESTEPS, 3, side, side, generator=generator)
    last = 999 if process.rescale_timesteps else process.diffusion_steps - 1
    t = torch.linspace(0, last, _TIMESTEPS).round()
    given = {}
    if config.class_cond:
        given["y"] = torch.randint(config.num_classes, (_TIMESTEPS,), generator=generator)
    if config.small_size is not None:
        given["low_res"] = torch.randn(_TIMESTEPS, 3, max(1, side // 2), max(1, side // 2), generator=generator)
    with torch.inference_mode():
        outputs = [_predictor(path, loaded)(x, t, given) for path in (source, written)]
    if not all(output.isfinite().all() for output in outputs):
        raise ValueError(f"{target} was not written: the outputs of {source} are not finite")
    channels = min(output.shape[1] for output in outputs)  # a DDIM folder has no variance channels
    before, after = (output[:, :channels] for output in outputs)
    apart, size = (before - after).abs().max().item(), before.abs().max().item()
    relative = apart / size if size else apart
    if not relative <= _TOLERANCE:
        raise ValueError(
            f"{target} was not written: its outputs would differ from {source}'s by {apart:.2g} "
            f"({relative:.2g} relative)"
        )
    where = f"outputs at {_TIMESTEPS} timesteps, {side}x{side} pixels"
    return f"{where}: largest difference {apart:.2g} ({relative:.2g} relative)"


def _predictor(path: Path, loaded: Checkpoint) -> _Predict:
    if path.is_dir():
        unet = diffusers.load_unet(path)
        return lambda x, t, given: unet(x, t, given.get("y")).sample
    configs: dict[str, Any] = {}
    if path.suffix != _SAFETENSORS:
        configs = {"model_config": loaded.model_config, "diffusion_config": loaded.diffusion_config}
    net = load_checkpoint(path, **configs).model
    return lambda x, t, given: net(x, t, **given)
