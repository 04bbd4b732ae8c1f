"""Convert a model between projects' file formats, verify its outputs, and report what the target cannot store."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastdiff.checkpoint import model_card
from fastdiff.checkpoint.classifier import ClassifierCheckpoint, load_classifier
from fastdiff.checkpoint.files import write_tensors
from fastdiff.checkpoint.model import Checkpoint, load_checkpoint, model_metadata
from fastdiff.config import ClassifierConfig, ClassifierPool, DiffusionConfig, ModelConfig
from fastdiff.interop import diffusers
from fastdiff.interop.classifier import unsaid_of_classifier
from fastdiff.interop.scripts import for_the_classifier_scripts, for_the_scripts
from fastdiff.runtime.files import replacing, replacing_folder
from fastdiff.runtime.words import printable

_SAFETENSORS, _BARE = ".safetensors", ".pt"
_TOLERANCE = 1e-3
"""Tolerance relative to the outputs' largest absolute value; a larger difference is not rounding error."""
_COMPARED_SIDE = 64
_TIMESTEPS = 4
_PROCESS = "--diffusion-steps and --noise-schedule"
Loaded = Checkpoint | ClassifierCheckpoint
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


def convert(source: Path, loaded: Loaded, target: Path, scheduler: diffusers.Scheduler, license: str = "") -> list[str]:
    """Write the checkpoint loaded from ``source``, a model's or a classifier's, to ``target``; returns log lines.

    The suffix of ``target`` selects the format: .safetensors is fastdiff's, .pt is improved-diffusion's and
    guided-diffusion's, and any other name is a diffusers folder, whose model card states the ``license``. Both models
    are then loaded from their files again and run on the same input in fp32. The target is written atomically.
    ValueError if the format cannot express the model, or the outputs differ by more than rounding error; OSError if the
    target cannot be written.
    """
    state = {key: value.float().contiguous() for key, value in loaded.model.state_dict().items()}
    said = []
    if isinstance(loaded, Checkpoint) and loaded.model_config.augment_dim and target.suffix != _SAFETENSORS:
        loaded = replace(loaded, model_config=replace(loaded.model_config, augment_dim=0))
        del state["augment_emb.weight"]
        said = ["the layer that is told of --augment in training is not written: samples do not depend on it"]
    with (replacing if is_file(target) else replacing_folder)(target) as temporary:
        try:
            if target.suffix == _SAFETENSORS:
                lines = _write_ours(temporary, state, loaded)
            elif target.suffix == _BARE:
                torch.save(state, temporary)
                lines = [*_lost(loaded, "not written"), *_flags_of_bare(state, loaded)]
            else:
                lines = [
                    *_lost(loaded, f"in {model_card.NAME} only"),
                    *_write_folder(temporary, target.name, state, source, loaded, scheduler, license),
                ]
        except (RuntimeError, SafetensorError) as error:  # a full disk can raise either
            raise OSError(f"DST cannot be written ({str(error).splitlines()[0]})") from error
        difference = _difference(source, loaded, temporary, target)
    return [f"{source} -> {target}", *said, *lines, difference]


def _lost(loaded: Loaded, names_are: str) -> Iterator[str]:
    """A line for each thing that fastdiff's own files say of the model and the others do not."""
    if loaded.class_names:
        names = ", ".join(f"{i} {name}" for i, name in enumerate(loaded.class_names))
        yield f"the class names are {names_are}: {printable(names)}"
    if loaded.metadata.get("label_dropout"):
        yield "the model was trained with --label-dropout: label -1 (no class) exists only in fastdiff"
    if loaded.metadata.get("time_grids"):
        yield "the time grids of fastdiff tune-steps are not written"
    if not loaded.metadata.get("noised", True):
        yield "that it was trained on clean images, and so guides nothing, is not written"


def _write_ours(path: Path, state: dict[str, Tensor], loaded: Loaded) -> list[str]:
    """Write a file of fastdiff, with all that the checkpoint says of itself."""
    described = model_metadata(_config(loaded), loaded.diffusion_config, loaded.step, loaded.class_names)
    write_tensors(path, state, {**loaded.metadata, **described})
    if loaded.diffusion_config is None:
        return [f"the process of its training is not known: {_PROCESS} add it"]
    return []


def _flags_of_bare(state: dict[str, Tensor], loaded: Loaded) -> Iterator[str]:
    """The flags that describe a state dict, which holds tensors only."""
    if isinstance(loaded, Checkpoint):
        yield from for_the_scripts(loaded.model_config, loaded.diffusion_config)
        return
    if (process := loaded.diffusion_config) is None:
        yield f"the process of its training is not known: {_PROCESS} add it to a .safetensors file"
    yield from for_the_classifier_scripts(loaded.config, process)
    asked = [f"--{n.replace('_', '-')} {getattr(loaded.config, n)}" for n in unsaid_of_classifier(state, loaded.config)]
    if process is not None:
        asked += [f"--diffusion-steps {process.diffusion_steps}", f"--noise-schedule {process.noise_schedule}"]
        asked += [] if process.rescale_timesteps else ["--no-rescale-timesteps"]
    if asked:
        yield "and those that fastdiff may ask for:"
        yield f"  {' '.join(asked)}"


def _write_folder(
    path: Path,
    name: str,
    state: dict[str, Tensor],
    source: Path,
    loaded: Loaded,
    scheduler: diffusers.Scheduler,
    license: str,
) -> list[str]:
    """Write a diffusers folder, which will be called ``name``; returns a line for each thing that changes."""
    if not isinstance(loaded, Checkpoint):
        raise ValueError(f"{source} is a classifier, which diffusers cannot express: convert to .pt or .safetensors")
    lines = diffusers.write(path, state, loaded.model_config, loaded.diffusion_config, scheduler)
    back = diffusers.read_process(path, loaded.model_config)
    card = model_card.model_card(name, source, loaded, scheduler, back, license)
    (path / model_card.NAME).write_text(card, encoding="utf-8")
    return lines


def _config(loaded: Loaded) -> ModelConfig | ClassifierConfig:
    return loaded.model_config if isinstance(loaded, Checkpoint) else loaded.config


def _inputs(loaded: Loaded) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Noise, timesteps and conditions that the model takes."""
    config, process = _config(loaded), loaded.diffusion_config or DiffusionConfig(rescale_timesteps=False)
    patch_size = config.patch_size if isinstance(config, ModelConfig) else 1
    factor = patch_size * 2 ** (len(config.multipliers) - 1)
    side = config.image_size if config.image_size <= _COMPARED_SIDE else factor * max(1, _COMPARED_SIDE // factor)
    if isinstance(config, ClassifierConfig) and config.classifier_pool is ClassifierPool.ATTENTION:
        side = config.image_size  # the pool has a position for each pixel
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TIMESTEPS, 3, side, side, generator=generator)
    last = 999 if process.rescale_timesteps else process.diffusion_steps - 1
    t = torch.linspace(0, last, _TIMESTEPS).round()
    given = {}
    if isinstance(config, ModelConfig) and config.class_cond:
        given["y"] = torch.randint(config.num_classes, (_TIMESTEPS,), generator=generator)
    if isinstance(config, ModelConfig) and config.small_size is not None:
        given["low_res"] = torch.randn(_TIMESTEPS, 3, max(1, side // 2), max(1, side // 2), generator=generator)
    return x, t, given


def _difference(source: Path, loaded: Loaded, written: Path, target: Path) -> str:
    """Load both models from their files and compare their outputs; ValueError if they differ by more than rounding."""
    x, t, given = _inputs(loaded)
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
    where = f"outputs at {_TIMESTEPS} timesteps, {x.shape[3]}x{x.shape[2]} pixels"
    return f"{where}: largest difference {apart:.2g} ({relative:.2g} relative)"


def _predictor(path: Path, loaded: Loaded) -> _Predict:
    if path.is_dir():
        unet = diffusers.load_unet(path)
        return lambda x, t, given: unet(x, t, given.get("y")).sample
    if not isinstance(loaded, Checkpoint):
        return lambda x, t, given: load_classifier(path, config=loaded.config).model(x, t)
    configs: dict[str, Any] = {}
    if path.suffix != _SAFETENSORS:
        configs = {"model_config": loaded.model_config, "diffusion_config": loaded.diffusion_config}
    net = load_checkpoint(path, **configs).model
    return lambda x, t, given: net(x, t, **given)
