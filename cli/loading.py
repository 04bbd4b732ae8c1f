"""Loads the checkpoint that a command names, and compares it with the command's flags."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import Flags
from fastdiff.cli.scripts import log_folder
from fastdiff.config import ClassifierConfig, DiffusionConfig, ModelConfig
from fastdiff.config.base import refuse_contradiction
from fastdiff.presets import described_by, with_preset

if TYPE_CHECKING:
    from fastdiff.checkpoint import Checkpoint, ClassifierCheckpoint
    from fastdiff.runtime.device import Runtime

_NAMES = frozenset(f.name for config in (ModelConfig, DiffusionConfig) for f in fields(config))


def find_with_rate(place: Path | None, ema_rate: str | None) -> Path:
    """The file to load: ``place``, or the newest of a run folder, of OPENAI_LOGDIR or under runs/.

    ``ema_rate`` is the text of --ema-rate, which selects among a run folder's files. ValueError if there is none.
    """
    from fastdiff.checkpoint import find_checkpoint

    return find_checkpoint(place or log_folder(), ema_rate=rate_of(ema_rate))


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


def young_average(loaded: "Checkpoint | ClassifierCheckpoint") -> str:
    """A warning if an EMA without warm-up still consists of more than 1% initial weights; else empty."""
    rate, updates = loaded.metadata.get("ema_rate", 0.0), loaded.metadata.get("ema_updates", 0)
    share = 0.0 if loaded.metadata.get("ema_warmup", True) else rate**updates
    return f" (warning: {share:.0%} of this EMA are the initial weights)" if share > 0.01 else ""
