"""``fastdiff convert``: a model from one project's files to another's, and what it loses on the way."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiff.cli.loading import load_with_flags
from fastdiff.cli.options import DebugFlag, Flags, PresetFlag, all_flags, build, refuse_contradiction, with_flags
from fastdiff.config import NUM_CLASSES, DiffusionConfig, ModelConfig, channel_mult_for, is_table_size

if TYPE_CHECKING:
    from torch import Tensor

    from fastdiff.interop.diffusers import Scheduler

    Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]

_SAFETENSORS, _BARE = ".safetensors", ".pt"
_TOLERANCE = 1e-3
"""Of the outputs' largest value; more than this is no rounding."""
_COMPARED_SIDE = 64
_TIMESTEPS = 4


@with_flags(ModelConfig, DiffusionConfig)
def convert(
    flags: Flags,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A .safetensors, .pt, run folder or diffusers folder.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The .safetensors or .pt file, or diffusers folder, to write.")
    ],
    scheduler: Annotated[str, typer.Option(help="Scheduler of a diffusers folder: ddim or ddpm.")] = "ddim",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    preset: PresetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Convert a model between fastdiff (.safetensors), improved-diffusion (.pt) and diffusers (a folder).

    Both files are then loaded and run on the same input; the largest difference is printed, and so is what is lost.

    The model's and the process's flags are for bare state dicts, as in fastdiff sample.
    """
    for line in run_conversion(source, target, flags, scheduler, preset, overwrite):
        typer.echo(line)


@dataclass(frozen=True)
class Model:
    """What goes from one file to the other."""

    path: Path
    state: "dict[str, Tensor]"
    model: ModelConfig
    diffusion: DiffusionConfig
    step: int = 0
    class_names: tuple[str, ...] = ()
    metadata: dict[str, Any] | None = None


def run_conversion(
    source: Path, target: Path, flags: Flags, scheduler: str, preset: str | None, overwrite: bool
) -> Iterator[str]:
    """Convert as ``fastdiff convert`` does; yields the lines that it prints."""
    from fastdiff.interop.diffusers import Scheduler

    if scheduler not in list(Scheduler):
        raise ValueError(f"scheduler must be one of {', '.join(Scheduler)}, not {scheduler!r}")
    _check_target(source, target, overwrite)
    model = _read(source, flags, preset)
    if model.path.resolve() == target.resolve():  # of a run folder
        raise ValueError(f"{target} is SRC itself: name another place")
    with _replacing(target) as temporary:
        lines = _write(temporary, model, Scheduler(scheduler))
        difference = _difference(model, temporary, target)
    yield f"{model.path} -> {target}"
    yield from lines
    yield difference


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    is_file = target.suffix in (_SAFETENSORS, _BARE)
    if not is_file and target.suffix[1:].isalpha():
        raise ValueError(f"{target}: DST must end in .safetensors or .pt, or be a folder's name without a suffix")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{target} is SRC itself, or holds it: name another place")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no folder: make it first")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{target.parent} cannot be written to: name another folder for DST")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{target} exists: name another, or use --overwrite")
    if is_file != target.is_file() or not (is_file or (target / "model_index.json").exists()):
        raise ValueError(f"{target} exists and is not {'a file' if is_file else 'a diffusers folder'}: name another")


def _read(source: Path, flags: Flags, preset: str | None) -> Model:
    from fastdiff.checkpoint import find_checkpoint
    from fastdiff.interop import diffusers

    if diffusers.is_folder(source):
        state, model, process = diffusers.read(source)
        given = all_flags(flags, preset, ModelConfig, DiffusionConfig)
        if unsaid := [name for name in ("diffusion_steps", "noise_schedule") if name not in process | given]:
            wanted = " and ".join("--" + name.replace("_", "-") for name in unsaid)
            raise ValueError(f"{source}: its scheduler's betas are of no named schedule: say {wanted}")
        diffusion = build(DiffusionConfig, given | process)
        refuse_contradiction(given, str(source), model, diffusion)
        return Model(source, state, model, diffusion)
    path = find_checkpoint(source)
    loaded = load_with_flags(path, flags, preset)
    return Model(
        path,
        {key: value.float().contiguous() for key, value in loaded.model.state_dict().items()},
        loaded.model_config,
        loaded.diffusion_config,
        loaded.step,
        loaded.class_names,
        dict(loaded.metadata),
    )


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """As checkpoint.replacing, for a folder too."""
    from fastdiff.checkpoint import replacing

    if target.suffix in (_SAFETENSORS, _BARE):
        with replacing(target) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as folder:
        temporary = Path(folder) / target.name
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        if target.exists():
            target.rename(Path(folder) / "replaced")
        temporary.rename(target)


def _write(path: Path, model: Model, scheduler: "Scheduler") -> list[str]:
    """Write the file or folder; returns what is lost, one line each."""
    import torch
    from safetensors import SafetensorError

    from fastdiff.checkpoint import save_checkpoint
    from fastdiff.interop import diffusers

    if path.suffix == _SAFETENSORS:
        kept = {"kind", "model_config", "diffusion_config", "step", "class_names"}
        save_checkpoint(
            path,
            model.state,
            model_config=model.model,
            diffusion_config=model.diffusion,
            step=model.step,
            class_names=model.class_names,
            **{key: value for key, value in (model.metadata or {}).items() if key not in kept},
        )
        return []
    lost = []
    if model.class_names:
        names = ", ".join(f"{i} {name}" for i, name in enumerate(model.class_names))
        lost.append(f"the names of the classes are not written: {names}")
    if (model.metadata or {}).get("label_dropout"):
        lost.append("it was trained with --label-dropout: the label -1, no class, exists in fastdiff only")
    try:
        if path.suffix == _BARE:
            torch.save(model.state, path)
            return [*lost, *_for_the_original(model)]
        return [*lost, *diffusers.write(path, model.state, model.model, model.diffusion, scheduler)]
    except (RuntimeError, SafetensorError) as error:  # both are what a full disk may look like
        raise OSError(f"DST cannot be written ({str(error).splitlines()[0]})") from error


def _for_the_original(model: Model) -> Iterator[str]:
    """What improved-diffusion's scripts have to be told, and what they cannot do."""
    config, size = model.model, model.model.image_size
    own = is_table_size(size) and config.multipliers == channel_mult_for(size)
    widths = ",".join(map(str, config.multipliers))
    if not own:
        yield f"improved-diffusion's scripts know no channel_mult {widths} at image_size {size}: change script_util.py"
    elif size == 128:
        yield "image_size 128 is one of improved-diffusion's 128x128 fork only"
    if config.class_cond and config.num_classes != NUM_CLASSES:
        yield (
            f"improved-diffusion's scripts have {NUM_CLASSES} classes: set NUM_CLASSES = {config.num_classes} in "
            "script_util.py"
        )
    yield "the file holds tensors only; the flags for improved-diffusion's scripts are:"
    yield "  " + " ".join(f"--{name} {value}" for name, value in _flags_of(model))


def _flags_of(model: Model) -> Iterator[tuple[str, str]]:
    """improved-diffusion's flags, but those that have their default."""
    config = model.model
    if config.small_size is None:
        yield "image_size", str(config.image_size)
    else:
        yield "large_size", str(config.image_size)
        yield "small_size", str(config.small_size)
    for part in (config, model.diffusion):
        for f in fields(part):
            value = getattr(part, f.name)
            if f.name in ("image_size", "small_size", "channel_mult", "num_classes") or value == f.default:
                continue
            if f.name != "learn_sigma" or part is config:
                yield f.name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _difference(model: Model, written: Path, target: Path) -> str:
    """How far the outputs of the two models are apart, loaded anew from their files; ValueError where it is too far."""
    import torch

    config = model.model
    factor = 2 ** (len(config.multipliers) - 1)
    side = config.image_size if config.image_size <= _COMPARED_SIDE else factor * max(1, _COMPARED_SIDE // factor)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TIMESTEPS, 3, side, side, generator=generator)
    last = 999 if model.diffusion.rescale_timesteps else model.diffusion.diffusion_steps - 1
    t = torch.linspace(0, last, _TIMESTEPS).round()
    given = {}
    if config.class_cond:
        given["y"] = torch.randint(config.num_classes, (_TIMESTEPS,), generator=generator)
    if config.small_size is not None:
        given["low_res"] = torch.randn(_TIMESTEPS, 3, max(1, side // 2), max(1, side // 2), generator=generator)
    with torch.inference_mode():
        outputs = [_predictor(path, model)(x, t, given) for path in (model.path, written)]
    channels = min(output.shape[1] for output in outputs)  # DDIM's folder has no variance
    before, after = (output[:, :channels] for output in outputs)
    apart, size = (before - after).abs().max().item(), before.abs().max().item()
    relative = apart / size if size else apart
    if not relative <= _TOLERANCE:
        raise ValueError(
            f"{target} was not written: its outputs would differ from {model.path}'s by {apart:.2g} "
            f"({relative:.2g} relative)"
        )
    where = f"outputs at {_TIMESTEPS} timesteps, {side}x{side} pixels"
    return f"{where}: largest difference {apart:.2g} ({relative:.2g} relative)"


def _predictor(path: Path, model: Model) -> "Predict":
    from fastdiff.checkpoint import load_checkpoint
    from fastdiff.interop.diffusers import load_unet

    if path.is_dir():
        unet = load_unet(path)
        return lambda x, t, given: unet(x, t, given.get("y")).sample
    configs: dict[str, Any] = {}
    if path.suffix != _SAFETENSORS:
        configs = {"model_config": model.model, "diffusion_config": model.diffusion}
    net = load_checkpoint(path, **configs).model
    return lambda x, t, given: net(x, t, **given)
