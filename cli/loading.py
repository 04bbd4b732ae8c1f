"""Loads the checkpoint that a command names, and compares it with the command's flags."""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import Flags
from fastdiff.cli.scripts import log_folder
from fastdiff.config import UNUSED_BY_CLASSIFIERS, ClassifierConfig, DiffusionConfig, ModelConfig
from fastdiff.config.base import refuse_contradiction
from fastdiff.presets import CLASSIFIER_PRESETS, described_by, with_preset

if TYPE_CHECKING:
    from fastdiff.checkpoint import Checkpoint, ClassifierCheckpoint
    from fastdiff.runtime.device import Runtime

_NAMES = frozenset(f.name for config in (ModelConfig, DiffusionConfig) for f in fields(config))


def find_with_rate(place: Path | None, ema_rate: str | None, ema_length: float | None = None) -> Path:
    """The file to load: ``place``, or the newest of a run folder, of OPENAI_LOGDIR or under runs/.

    ``ema_rate`` is the text of --ema-rate, which selects among a run folder's files, as --ema-length does. ValueError
    if there is none.
    """
    from fastdiff.checkpoint import find_checkpoint

    return find_checkpoint(place or log_folder(), ema_rate=rate_of(ema_rate), ema_length=ema_length)


def rate_of(ema_rate: str | None) -> float | None:
    """The rate that the text of --ema-rate names: 0 for the raw weights, None without a text."""
    try:
        return None if ema_rate is None else 0.0 if ema_rate == "raw" else float(ema_rate)
    except ValueError:
        raise ValueError(f"ema_rate must be a rate such as 0.9999, or raw, not {ema_rate!r}") from None


def load_for(runtime: "Runtime", path: Path, flags: Flags | None = None, preset: str | None = None) -> "Checkpoint":
    """Like load_with_flags, for a job that itself selects its timesteps: the flag timestep_respacing is ignored."""
    described = {name: value for name, value in (flags or {}).items() if name != "timestep_respacing"}
    where = {"device": runtime.device, "kernels": runtime.kernels, "memory_format": runtime.memory_format}
    return load_with_flags(path, described, preset, **where)


def load_classifier_for(runtime: "Runtime", path: Path, model: "Checkpoint", flags: Flags) -> "ClassifierCheckpoint":
    """The classifier at ``path``; what a bare state dict does not say comes from the flags and the model it guides."""
    from fastdiff.checkpoint import load_classifier

    own = {f.name for f in fields(ClassifierConfig)} - {f.name for f in fields(ModelConfig)}
    given = {name: value for name, value in flags.items() if name in own}
    if path.suffix != ".safetensors":
        given["image_size"] = model.model_config.image_size
    return load_classifier(
        path, given=given, device=runtime.device, kernels=runtime.kernels, memory_format=runtime.memory_format
    )


def load_with_flags(path: Path, flags: Flags, preset: str | None = None, **where: Any) -> "Checkpoint":
    """Load the checkpoint at ``path``; ValueError if a model or diffusion flag contradicts it.

    The flags and the preset supply what a bare state dict does not store. ``where`` is load_checkpoint's device,
    kernels and memory_format. Raises load_checkpoint's ValueErrors.
    """
    from fastdiff.checkpoint import load_checkpoint

    given = {name: value for name, value in with_preset(flags, preset).items() if name in _NAMES}
    if path.suffix != ".safetensors":
        return load_checkpoint(path, given=described_by(preset) | given, **where)
    loaded = load_checkpoint(path, **where)
    refuse_contradiction(given, str(path), loaded.model_config, loaded.diffusion_config)
    return loaded


def load_classifier_with_flags(path: Path, flags: Flags, preset: str | None = None) -> "ClassifierCheckpoint":
    """Load the classifier at ``path``, as load_with_flags does a model.

    The process of its training is None if neither the file nor the flags say it. ValueError if they say a part of it.
    """
    from fastdiff.checkpoint import load_classifier

    refuse_flags_of(ModelConfig, flags, f"{path} is a classifier")
    given = with_preset(flags, preset, ClassifierConfig, DiffusionConfig, presets=CLASSIFIER_PRESETS)
    if unused := next((name for name in given if name in UNUSED_BY_CLASSIFIERS), None):
        raise ValueError(f"{unused} means nothing for a classifier, and {path} is one: leave it out")
    own = {f.name for f in fields(ClassifierConfig)}
    loaded = load_classifier(path, given={name: value for name, value in given.items() if name in own})
    said = {name: value for name, value in given.items() if name not in own}
    if loaded.diffusion_config is not None:
        refuse_contradiction(said, str(path), loaded.diffusion_config)
        return loaded
    if missing := [name for name in ("diffusion_steps", "noise_schedule") if said and name not in said]:
        asked = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ValueError(f"{path} does not say the process of its training: give {asked}, too")
    return replace(loaded, diffusion_config=DiffusionConfig.from_flags(said) if said else None)


def refuse_flags_of(kind: type[ModelConfig | ClassifierConfig], flags: Flags, why: str) -> None:
    """ValueError, which says ``why``, if a flag is for models of this kind only."""
    other = ClassifierConfig if kind is ModelConfig else ModelConfig
    only = {f.name for f in fields(kind)} - {f.name for c in (other, DiffusionConfig) for f in fields(c)}
    if name := next((name for name in flags if name in only), None):
        what = "diffusion models" if kind is ModelConfig else "classifiers"
        raise ValueError(f"{name} is a flag of {what}, and {why}: leave it out")


def young_average(loaded: "Checkpoint | ClassifierCheckpoint") -> str:
    """A warning if an EMA without warm-up still consists of more than 1% initial weights; else empty."""
    rate, updates = loaded.metadata.get("ema_rate", 0.0), loaded.metadata.get("ema_updates", 0)
    share = 0.0 if loaded.metadata.get("ema_warmup", True) else rate**updates
    return f" (warning: {share:.0%} of this EMA are the initial weights)" if share > 0.01 else ""
