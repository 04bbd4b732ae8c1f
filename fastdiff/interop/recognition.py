"""Recognise the model of a bare state dict: keys and shapes determine the architecture, except what UNSAID lists."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import count
from math import isqrt
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastdiff.config import ClassifierPool, DiffusionConfig, ModelConfig, channel_mult_for
from fastdiff.config.base import number
from fastdiff.models import build_model
from fastdiff.presets import PRESETS

UNSAID = (
    "image_size",
    "small_size",
    "num_heads",
    "use_new_attention_order",
    "diffusion_steps",
    "noise_schedule",
)
"""Fields that a state dict may not determine; num_head_channels may take the place of num_heads."""
_FLAGS = {
    "num_heads": "--num-heads (or --num-head-channels)",
    "use_new_attention_order": "--use-new-attention-order (or --no-use-new-attention-order)",
}
SIZES = {channel_mult_for(size): size for size in (32, 64, 128, 256, 512)}
"""The image size for which the originals have these width multipliers."""
_GUIDED_DEFAULTS = {"rescale_timesteps": False, "rescale_learned_sigmas": False}
PER_BLOCK = 10
"""Tensors of a residual block, at least."""
_LONGEST_KEY = 80

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """The part of a UNet's configuration that the keys and shapes of its state dict determine."""

    num_channels: int
    num_res_blocks: int
    widths: tuple[int, ...]
    """The channels of each level."""
    attention_levels: frozenset[int]
    learn_sigma: bool
    num_classes: int | None
    """None if the model is not class-conditional."""
    use_scale_shift_norm: bool
    super_resolution: bool
    resblock_updown: bool
    patch_size: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Architecture":
        """The architecture of a configuration."""
        return cls(
            num_channels=config.num_channels,
            num_res_blocks=config.num_res_blocks,
            widths=config.widths,
            attention_levels=config.attention_levels,
            learn_sigma=config.learn_sigma,
            num_classes=config.num_classes if config.class_cond else None,
            use_scale_shift_norm=config.use_scale_shift_norm,
            super_resolution=config.small_size is not None,
            resblock_updown=config.resblock_updown and len(config.widths) > 1,
            patch_size=config.patch_size,
        )

    @property
    def channel_mult(self) -> tuple[float, ...]:
        """The width of each level as a multiple of num_channels."""
        return tuple(
            width / self.num_channels if width % self.num_channels else width // self.num_channels
            for width in self.widths
        )

    @property
    def image_size(self) -> int | None:
        """The image size with these widths in the originals' table; None if no size has them, or two sizes do, or with
        patches, which the originals lack.

        guided-diffusion's upsamplers to 256 and 512 pixels have the same widths, and improved-diffusion has only the
        first of these sizes.
        """
        if self.patch_size > 1:
            return None
        found = [
            size
            for size in SIZES.values()
            if channel_mult_for(size, self.num_channels, super_resolution=self.super_resolution) == self.channel_mult
        ]
        return found[0] if len(found) == 1 or (found and not self.resblock_updown) else None

    @property
    def smallest_size(self) -> int:
        """The smallest image size that can be halved at every level."""
        return int(self.patch_size * 2 ** (len(self.widths) - 1))

    @property
    def presets(self) -> list[str]:
        """The presets with exactly this architecture."""
        return [name for name, preset in PRESETS.items() if Architecture.of(preset.config(ModelConfig)) == self]

    def flags(self, image_size: int) -> dict[str, Any]:
        """The ModelConfig fields that the architecture determines for this image size."""
        classes = {} if self.num_classes is None else {"num_classes": self.num_classes}
        patches = image_size // self.patch_size
        return classes | {
            "image_size": image_size,
            "num_channels": self.num_channels,
            "num_res_blocks": self.num_res_blocks,
            "channel_mult": self.channel_mult,
            "attention_resolutions": tuple(max(1, patches >> level) for level in sorted(self.attention_levels)),
            "learn_sigma": self.learn_sigma,
            "class_cond": self.num_classes is not None,
            "use_scale_shift_norm": self.use_scale_shift_norm,
            "resblock_updown": self.resblock_updown,
            "patch_size": self.patch_size,
        }

    @property
    def made_up(self) -> dict[str, Any]:
        """Arbitrary valid values for the ModelConfig fields that flags() lacks."""
        return {"num_heads": 1} | ({"small_size": 1} if self.super_resolution else {})

    def __str__(self) -> str:
        said = self.flags(self.image_size or self.smallest_size)
        if self.image_size is None:
            del said["image_size"], said["attention_resolutions"]
            said["attention at levels"] = tuple(sorted(self.attention_levels))
        if self.patch_size == 1:
            del said["patch_size"]
        kind = "a super-resolution model" if self.super_resolution else "a model"
        return f"{kind} of {', '.join(f'{name} {word(value)}' for name, value in said.items())}"


def recognise(state: Mapping[str, Tensor], name: object) -> Architecture:
    """The architecture of the model whose state dict is ``state``; errors call it ``name``.

    ValueError if it is a classifier, or not a model of this family: it names the nearest preset and the first key that
    differs from it.
    """
    refuse_classifier(state, name)
    own: Shapes = {}
    try:
        found = _read(state)
        own = _shapes_of_model(ModelConfig(**found.flags(found.smallest_size), **found.made_up))
    except (LookupError, ValueError, TypeError, RuntimeError, ArithmeticError):  # sizes of no valid model
        _refuse(state, name, {})
    if own != shapes_of(state):
        _refuse(state, name, own)
    refuse_integers(state, name)
    return found


def classifier_pool(state: Mapping[str, Tensor]) -> ClassifierPool | None:
    """The pool of the classifier whose state dict is ``state``; None if it is not a classifier's."""
    if any(key.startswith("output_blocks.") for key in state):
        return None
    if "out.2.positional_embedding" in state:
        return ClassifierPool.ATTENTION
    for key, dimensions, pool in (
        ("out.3.weight", 4, ClassifierPool.ADAPTIVE),
        ("out.3.weight", 2, ClassifierPool.SPATIAL_V2),
        ("out.2.weight", 2, ClassifierPool.SPATIAL),
    ):
        if key in state and state[key].ndim == dimensions:
            return pool
    return None


def refuse_classifier(state: Mapping[str, Tensor], name: object) -> None:
    """ValueError if ``state`` is the state dict of a classifier."""
    if classifier_pool(state) is not None:
        raise ValueError(f"{name} is a classifier, not a diffusion model (--classifier {name} guides a model)")


def refuse_integers(state: Mapping[str, Tensor], name: object) -> None:
    """ValueError, naming the first such tensor, if a tensor does not hold floating-point numbers."""
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds no weights: {key} has dtype {tensor.dtype}")


def _read(state: Mapping[str, Tensor]) -> Architecture:
    """Read the architecture from a model's tensors; LookupError or ArithmeticError if they are missing or misshapen."""
    widths: list[int] = []  # of each level
    blocks: list[int] = []
    attending = set()
    level, per_level = 0, _blocks_until_resized(state)
    for i in count(1):
        block = f"input_blocks.{i}"
        residual = state.get(f"{block}.0.in_layers.2.weight")
        if f"{block}.0.op.weight" in state or (residual is not None and per_level and i % (per_level + 1) == 0):
            level += 1
        elif residual is not None:
            if level == len(widths):
                widths.append(residual.shape[0])
                blocks.append(0)
            blocks[level] += 1
            if f"{block}.1.qkv.weight" in state:
                attending.add(level)
        else:
            break
    if len(set(blocks)) != 1 or PER_BLOCK * sum(blocks) > len(state):
        raise LookupError  # no model; one with the first level's blocks at all levels could be huge
    inputs, outputs = state["input_blocks.0.0.weight"].shape[1], state["out.2.weight"].shape[0]
    super_resolution = 6 * isqrt(inputs // 6) ** 2 == inputs  # which 3 times another square never is
    patch_size = max(1, isqrt(inputs // (6 if super_resolution else 3)))
    return Architecture(
        num_channels=state["time_embed.0.weight"].shape[1],
        num_res_blocks=blocks[0],
        widths=tuple(widths),
        attention_levels=frozenset(attending),
        learn_sigma=outputs == 6 * patch_size**2,
        num_classes=state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        use_scale_shift_norm=state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        super_resolution=super_resolution,
        resblock_updown=per_level is not None,
        patch_size=patch_size,
    )


def _blocks_until_resized(state: Mapping[str, Tensor]) -> int | None:
    """The residual blocks per level before one that resizes, None if no residual block does.

    A residual block that halves has the keys of any other, but one that doubles is the second of its output block.
    """
    for i in count():
        block = f"output_blocks.{i}"
        if f"{block}.0.in_layers.2.weight" not in state:
            return None
        if any(f"{block}.{second}.in_layers.2.weight" in state for second in (1, 2)):
            return i
    return None


def differing_keys(theirs: Shapes, ours: Shapes) -> list[str]:
    """The keys with another shape, or in only one of the two."""
    return [key for key in ours | theirs if ours.get(key) != theirs.get(key)]


def first_difference(keys: list[str], theirs: Shapes, ours: Shapes) -> str:
    """The number of ``keys``, which differ, and the first of them with its two shapes."""
    here, there = (shapes.get(keys[0], "absent") for shapes in (theirs, ours))
    return f"{len(keys)} tensors differ, first {keys[0][:_LONGEST_KEY]!r}: {here} instead of {there}"


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """The shape of every tensor."""
    return {key: tuple(value.shape) for key, value in state.items()}


@cache
def _shapes_of_model(config: ModelConfig) -> Shapes:
    with torch.device("meta"):
        return shapes_of(build_model(config).state_dict())


def _refuse(state: Mapping[str, Tensor], name: object, own: Shapes) -> NoReturn:
    """Raise ValueError that names the nearest preset and the first difference from it.

    ``own`` are the shapes of the model that the tensors suggest, or empty; that model may be nearer than any preset.
    """
    theirs = shapes_of(state)
    known = {"a model of its sizes": own} if own else {}
    known |= {f"--preset {preset}": _shapes_of_model(values.config(ModelConfig)) for preset, values in PRESETS.items()}
    differing = {what: differing_keys(theirs, ours) for what, ours in known.items()}
    nearest = min((what for what in known if what.startswith("--")), key=lambda what: len(differing[what]))

    def difference(what: str) -> str:
        return f"{what}, {first_difference(differing[what], theirs, known[what])}"

    nearer = [what for what in known if len(differing[what]) < len(differing[nearest])]
    also = "".join(f"; from {difference(what)}" for what in nearer)
    raise ValueError(
        f"{name} is not a model of improved-diffusion's family: from the nearest, {difference(nearest)}{also}"
    )


def describe(
    state: Mapping[str, Tensor], name: object, given: Mapping[str, Any]
) -> tuple[ModelConfig, DiffusionConfig]:
    """The configurations of a bare state dict, from its tensors and from the fields ``given`` by name.

    ValueError if a field is in neither (the number of heads, the diffusion process, and an image size that the widths
    do not determine), or if a given field contradicts the tensors. A field that is None counts as not given.
    """
    found = recognise(state, name)
    known = {field: value for field, value in given.items() if value is not None}
    if found.image_size is not None:
        known = {"image_size": found.image_size} | known
    if found.resblock_updown:
        known = _GUIDED_DEFAULTS | known
    unsaid = [f for f in UNSAID if f not in known and f not in _known_without(found, known)]
    if "image_size" in unsaid:  # attention_resolutions has no meaning without it
        _ask(found, name, unsaid)
    size = int(number(int, "image_size", known["image_size"]))
    _refuse_contradiction(found, known, size, name)
    if unsaid:
        _ask(found, name, unsaid)
    mine = {f.name for f in fields(ModelConfig)}
    return (
        ModelConfig.from_dict({k: v for k, v in known.items() if k in mine} | found.flags(size)),
        DiffusionConfig.from_dict(
            {k: v for k, v in known.items() if k not in mine} | {"learn_sigma": found.learn_sigma}
        ),
    )


def _known_without(found: Architecture, known: Mapping[str, Any]) -> Iterator[str]:
    """The fields of UNSAID that need not be given."""
    if not found.super_resolution:
        yield "small_size"
    if known.get("num_head_channels", -1) != -1:
        yield "num_heads"
    if not found.resblock_updown:
        yield "use_new_attention_order"  # the file is improved-diffusion's, which has one order


def _ask(found: Architecture, name: object, unsaid: list[str]) -> NoReturn:
    flags = [_FLAGS.get(field, "--" + field.replace("_", "-")) for field in unsaid]
    wanted = " and ".join(part for part in (", ".join(flags[:-1]), flags[-1]) if part)
    presets = f"or {fitting}" if (fitting := _fitting(found)) else "no --preset has this architecture"
    raise ValueError(f"{name} is a bare state dict: {found}; what it lacks must be given: {wanted} ({presets})")


def _fitting(found: Architecture) -> str:
    """The presets with the architecture, as a flag; empty if there is none."""
    return f"--preset {' or '.join(presets)}" if (presets := found.presets) else ""


def _refuse_contradiction(found: Architecture, values: Mapping[str, Any], size: int, name: object) -> None:
    """ValueError, naming the first field, if a given value contradicts the file."""
    if "small_size" in values and not found.super_resolution:
        raise ValueError(f"small_size {values['small_size']} is for super-resolution models, and {name} is not one")
    said = found.flags(size)
    for field in (field for field in said if field in values):
        # Check one field at a time, so that no other value changes its meaning.
        theirs = ModelConfig.from_dict({**said, **found.made_up, field: values[field]})
        if Architecture.of(theirs) != found:
            given = word(getattr(theirs, field))
            fits = f" ({fitting} fits)" if (fitting := _fitting(found)) else ""
            here = f"{field} is {word(said[field])} in {name}, but given as {given}"
            raise ValueError(f"{here}: leave out the flag, or --preset{fits}")


def word(value: object) -> str:
    """A setting's value as it is given on the command line."""
    return (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
