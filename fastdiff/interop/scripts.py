"""The flags with which improved-diffusion's or guided-diffusion's scripts load a model, and what these scripts lack."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastdiff.config import (
    NUM_CLASSES,
    UNUSED_BY_CLASSIFIERS,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    channel_mult_for,
)


@dataclass(frozen=True)
class _Project:
    """What a project's scripts know.

    ``lacks`` are the fields that they have no flag for, and ``lacks_enlarging`` those that only the super-resolution
    scripts have none for. They choose channel multipliers for ``sizes``, and for super-resolution for ``large_sizes``.
    """

    name: str
    lacks: frozenset[str]
    lacks_enlarging: frozenset[str]
    sizes: tuple[int, ...]
    large_sizes: tuple[int, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Where they are not the fields' own."""

    def missing(self, model: ModelConfig, diffusion: DiffusionConfig) -> list[str]:
        """What the scripts lack for the model, in words."""
        lacks = self._lacking(model)
        found = [f"{name} {_word(value)}" for name, value in _settings(model, diffusion, {}) if name in lacks]
        if not (self.chooses_widths(model) or self.takes_widths(model)):
            found.append(f"channel_mult {_word(model.multipliers)} at image_size {model.image_size}")
        return found

    def chooses_widths(self, model: ModelConfig) -> bool:
        """Whether the scripts choose the model's channel multipliers themselves."""
        enlarges = model.small_size is not None
        return model.image_size in (self.large_sizes if enlarges else self.sizes) and (
            model.multipliers == channel_mult_for(model.image_size, super_resolution=enlarges)
        )

    def takes_widths(self, model: ModelConfig) -> bool:
        """Whether the model's channel multipliers can be given as a flag, which takes whole numbers only."""
        return "channel_mult" not in self._lacking(model) and all(mult == int(mult) for mult in model.multipliers)

    def _lacking(self, model: ModelConfig) -> frozenset[str]:
        return self.lacks if model.small_size is None else self.lacks | self.lacks_enlarging


_OURS = frozenset(("prediction", "noise_shift", "zero_terminal_snr", "patch_size"))
_ONLY_TRAINED = frozenset(("weighting", "min_snr_gamma", "sigmoid_bias"))
"""Fields of the loss: a model is loaded without them."""
_GUIDED_FIELDS = frozenset(("num_head_channels", "resblock_updown", "use_new_attention_order"))
_IMPROVED = _Project(
    "improved-diffusion",
    lacks=_GUIDED_FIELDS | _OURS | {"channel_mult"},
    lacks_enlarging=frozenset(("sigma_small",)),
    sizes=(32, 64, 128, 256),
    large_sizes=(64, 256),
)
_GUIDED = _Project(
    "guided-diffusion",
    lacks=_OURS | {"sigma_small"},
    lacks_enlarging=frozenset(("channel_mult", "use_new_attention_order")),
    sizes=(64, 128, 256, 512),
    large_sizes=(64, 256, 512),
    defaults={"rescale_timesteps": False, "rescale_learned_sigmas": False},
)


def for_the_scripts(model: ModelConfig, diffusion: DiffusionConfig) -> Iterator[str]:
    """Lines that say which project's scripts take the model, with which flags, and what they lack.

    The scripts are improved-diffusion's, unless only guided-diffusion has what the model needs.
    """
    guided = any(name in _GUIDED_FIELDS for name, _ in _settings(model, diffusion, {}))
    project = next(
        (p for p in (_IMPROVED, _GUIDED) if not p.missing(model, diffusion)), _GUIDED if guided else _IMPROVED
    )
    if missing := project.missing(model, diffusion):
        files = "unet.py and script_util.py" if model.patch_size > 1 else "script_util.py"
        yield f"{project.name}'s scripts lack {' and '.join(missing)}: change {files}"
    elif project is _IMPROVED and model.image_size == 128:
        yield "only improved-diffusion's 128x128 fork supports image_size 128"
    if model.class_cond and model.num_classes != NUM_CLASSES:
        yield (
            f"{project.name}'s scripts have {NUM_CLASSES} classes: set NUM_CLASSES = {model.num_classes} in "
            "script_util.py"
        )
    yield f"the file holds tensors only; the flags for {project.name}'s scripts are:"
    flags: list[tuple[str, Any]] = [("image_size", model.image_size)]
    if model.small_size is not None:
        flags = [("large_size", model.image_size), ("small_size", model.small_size)]
    flags += _settings(model, diffusion, project.defaults)
    if not project.chooses_widths(model) and project.takes_widths(model):
        flags.append(("channel_mult", model.multipliers))
    yield "  " + " ".join(f"--{name} {_word(value)}" for name, value in flags)


def for_the_classifier_scripts(config: ClassifierConfig, process: DiffusionConfig | None) -> Iterator[str]:
    """Lines that say with which flags guided-diffusion's scripts take a classifier, and what they lack."""
    if config.image_size not in _GUIDED.sizes or config.multipliers != channel_mult_for(config.image_size):
        yield (
            f"guided-diffusion's scripts lack channel_mult {_word(config.multipliers)} at image_size "
            f"{config.image_size}: change script_util.py"
        )
    if config.num_classes != NUM_CLASSES:
        yield (
            f"guided-diffusion's scripts have {NUM_CLASSES} classes: set out_channels={config.num_classes} in "
            "create_classifier of script_util.py"
        )
    if process is not None:
        for name, default in (("noise_shift", 1.0), ("zero_terminal_snr", False)):
            if (value := getattr(process, name)) != default:
                yield f"guided-diffusion's scripts lack {name} {_word(value)}: change script_util.py"
    yield "the file holds tensors only; the flags for guided-diffusion's scripts are:"
    flags: list[tuple[str, Any]] = [("image_size", config.image_size)]
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "classifier_attention_resolutions":
            value = _resolutions(config.encoder())
        if f.name.startswith("classifier_") and value != f.default:
            flags.append((f.name, value))
    for f in fields(process) if process is not None else ():
        value = getattr(process, f.name)
        if f.name not in UNUSED_BY_CLASSIFIERS and value != _GUIDED.defaults.get(f.name, f.default):
            flags.append((f.name, value))
    yield "  " + " ".join(f"--{name} {_word(value)}" for name, value in flags)


def _settings(model: ModelConfig, diffusion: DiffusionConfig, defaults: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields that are not at their default, but for the sizes, the channel multipliers and the classes."""
    for part in (model, diffusion):
        for f in fields(part):
            if f.name in ("image_size", "small_size", "channel_mult", "num_classes") or f.name in _ONLY_TRAINED:
                continue
            if f.name == "prediction" and diffusion.predict_xstart:
                continue  # predict_xstart says it
            value = _resolutions(model) if f.name == "attention_resolutions" else getattr(part, f.name)
            if value != defaults.get(f.name, f.default) and (f.name != "learn_sigma" or part is model):
                yield f.name, value


def _resolutions(model: ModelConfig) -> tuple[int, ...]:
    """attention_resolutions by the originals' rule: r selects the feature map that is grid_size // r times smaller.

    It selects the same levels as here if sizes and resolutions are powers of two.
    """
    smaller = {model.grid_size // r for r in model.attention_resolutions}
    if {level for level in range(len(model.multipliers)) if 2**level in smaller} == model.attention_levels:
        return model.attention_resolutions
    return tuple(model.grid_size >> level for level in sorted(model.attention_levels))


def _word(value: Any) -> str:
    # no attention_resolutions is 1, a size that no feature map has
    return (",".join(map(str, value)) or "1") if isinstance(value, tuple) else str(value)
