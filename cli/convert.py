"""``fastdiff convert``: convert a model between the file formats of fastdiff, its originals and diffusers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.loading import find_with_rate, load_classifier_with_flags, load_with_flags, refuse_flags_of
from fastdiff.cli.options import (
    DebugFlag,
    EmaLengthFlag,
    EmaRateFlag,
    Flags,
    PresetFlag,
    path_argument,
    with_flags,
)
from fastdiff.config import ClassifierConfig, DiffusionConfig, ModelConfig
from fastdiff.config.base import refuse_contradiction
from fastdiff.presets import with_preset

if TYPE_CHECKING:
    from fastdiff.checkpoint import Checkpoint
    from fastdiff.checkpoint.conversion import Loaded


@with_flags(of_state_dicts=(ModelConfig, DiffusionConfig, ClassifierConfig))
def convert(
    flags: Flags,
    source: Annotated[
        Path, path_argument(metavar="SRC", help="A .safetensors or .pt file, run folder, RUN@STEP or diffusers folder.")
    ],
    target: Annotated[
        Path, path_argument(metavar="DST", help="The .safetensors or .pt file, or diffusers folder, to write.")
    ],
    scheduler: Annotated[str, typer.Option(help="Scheduler to write into a diffusers folder: ddim or ddpm.")] = "ddim",
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="Licence that a folder's model card states, such as mit.")
    ] = None,
    ema_rate: EmaRateFlag = None,
    ema_length: EmaLengthFlag = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing DST.")] = False,
    preset: PresetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Convert a model between fastdiff (.safetensors), improved- or guided-diffusion (.pt) and diffusers (a folder).

    A classifier is converted between .safetensors and .pt. Both files are then loaded and run on the same input. The
    command prints the largest difference, what the conversion loses, and for a .pt file the flags of the originals'
    scripts. A folder gets a model card, README.md.

    --help-all lists the flags that describe a bare state dict, as in fastdiff sample.
    """
    from fastdiff.checkpoint import conversion
    from fastdiff.checkpoint.model_card import check_license
    from fastdiff.interop.diffusers import Scheduler

    if scheduler not in list(Scheduler):
        raise ValueError(f"scheduler must be one of {', '.join(Scheduler)}, not {scheduler!r}")
    conversion.check_target(source, target, overwrite)
    if license is not None:
        check_license(license)
        if conversion.is_file(target):
            raise ValueError(
                f"license {license} is for the model card of a folder, and {target} has none: leave it out"
            )
    path, loaded = _load(source, flags, preset, ema_rate, ema_length)
    if path.resolve() == target.resolve():  # SRC may be the run folder that holds DST
        raise ValueError(f"{target} is SRC itself: name another place")
    for line in conversion.convert(path, loaded, target, Scheduler(scheduler), license or ""):
        typer.echo(line)


def _load(
    source: Path, flags: Flags, preset: str | None, ema_rate: str | None, ema_length: float | None
) -> "tuple[Path, Loaded]":
    """The file or folder that ``source`` names, and its checkpoint."""
    from fastdiff.checkpoint import is_classifier
    from fastdiff.interop import diffusers

    if diffusers.is_folder(source):
        for name, chosen in (("ema_rate", ema_rate), ("ema_length", ema_length)):
            if chosen is not None:
                raise ValueError(f"{name} {chosen} chooses among the files of a run folder, and {source} is not one")
        refuse_flags_of(ClassifierConfig, flags, f"{source} is not a classifier")
        return source, _load_folder(source, flags, preset)
    path = find_with_rate(source, ema_rate, ema_length)
    if path.is_file() and is_classifier(path):
        return path, load_classifier_with_flags(path, flags, preset)
    refuse_flags_of(ClassifierConfig, flags, f"{path} is not a classifier")
    return path, load_with_flags(path, flags, preset)


def _load_folder(source: Path, flags: Flags, preset: str | None) -> "Checkpoint":
    from fastdiff.checkpoint import Checkpoint, load_weights
    from fastdiff.diffusion import build_diffusion
    from fastdiff.interop import diffusers
    from fastdiff.models import build_model

    state, config, process = diffusers.read(source)
    given = with_preset(flags, preset, ModelConfig, DiffusionConfig)
    if unsaid := [name for name in ("diffusion_steps", "noise_schedule") if name not in process | given]:
        wanted = " and ".join("--" + name.replace("_", "-") for name in unsaid)
        raise ValueError(f"{source}: its scheduler has no noise schedule that fastdiff can name: give {wanted}")
    diffusion = DiffusionConfig.from_flags(given | process)
    refuse_contradiction(given, str(source), config, diffusion)
    model = build_model(config)
    load_weights(model, state, source)
    return Checkpoint(model.eval(), build_diffusion(diffusion), config, diffusion, 0, (), {})
