"""Recognise the classifier of a bare state dict: keys and shapes determine it, except some image sizes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fastdiff.config import ClassifierConfig, ClassifierPool
from fastdiff.config.base import number
from fastdiff.interop.recognition import (
    PER_BLOCK,
    SIZES,
    Shapes,
    classifier_pool,
    differing_keys,
    first_difference,
    refuse_integers,
    shapes_of,
    word,
)
from fastdiff.models import build_classifier

LAST_LAYER = {
    ClassifierPool.ATTENTION: "out.2.c_proj.weight",
    ClassifierPool.ADAPTIVE: "out.3.weight",
    ClassifierPool.SPATIAL: "out.2.weight",
    ClassifierPool.SPATIAL_V2: "out.3.weight",
}
"""The weight of each pool's last layer, which has a row for each class."""

_MOST_BLOCKS = 64  # the released classifiers have up to 29


def describe_classifier(state: Mapping[str, Tensor], name: object, given: Mapping[str, Any]) -> ClassifierConfig:
    """The configuration of a bare state dict, from its tensors and from ClassifierConfig's fields ``given`` by name.

    ValueError, which calls the file ``name``, if it is not a classifier of guided-diffusion's family, if a given field
    contradicts the tensors, or if they leave a field open that is not given: the image size, where the pool has no
    positions and the widths are not in the originals' table, or the depth, where several would have these shapes. A
    field that is None counts as not given.
    """
    given = {field: value for field, value in given.items() if value is not None}
    found = _recognise(state, name)
    fitting = [one for one in found if not _contradictions(one, given)]
    if not fitting:
        field, said, value = _contradictions(found[0], given)[0]
        raise ValueError(f"{field} is {word(said)} in {name}, but given as {word(value)}: leave it out")
    if len(fitting) > 1:
        depths = " or ".join(f"{one.depth} (channel_mult {word(one.channel_mult)})" for one in fitting)
        raise ValueError(f"{name} is a classifier whose classifier_depth may be {depths}: give classifier_depth")
    (one,) = fitting
    size = given.get("image_size", one.image_size)
    if size is None:
        raise ValueError(f"{name} is a classifier that does not say its image size: give image_size")
    return ClassifierConfig.from_dict(given | one.flags(size))


def unsaid_of_classifier(state: Mapping[str, Tensor], config: ClassifierConfig) -> tuple[str, ...]:
    """The fields of ``config`` that its state dict does not determine, and describe_classifier asks for."""
    unsaid = ("image_size", "classifier_depth")
    for names in ((), *((name,) for name in unsaid), unsaid):
        given = {name: getattr(config, name) for name in names}
        try:
            found = describe_classifier(state, "the classifier", given)
        except ValueError:
            continue
        if all(getattr(found, name) == getattr(config, name) for name in unsaid):
            return names
    return unsaid


@dataclass(frozen=True)
class _Architecture:
    """The part of a classifier's configuration that the keys and shapes of its state dict determine."""

    width: int
    depth: int
    channel_mult: tuple[float, ...]
    attention_levels: frozenset[int]
    use_scale_shift_norm: bool
    resblock_updown: bool
    pool: ClassifierPool
    num_classes: int
    side: int | None
    """Side of the feature map that the pool attends to; None for the other pools."""

    @classmethod
    def of(cls, config: ClassifierConfig) -> "_Architecture":
        encoder = config.encoder()
        halvings = len(encoder.multipliers) - 1
        attends = config.classifier_pool is ClassifierPool.ATTENTION
        return cls(
            width=config.classifier_width,
            depth=config.classifier_depth,
            channel_mult=encoder.multipliers,
            attention_levels=encoder.attention_levels,
            use_scale_shift_norm=config.classifier_use_scale_shift_norm,
            resblock_updown=config.classifier_resblock_updown or not halvings,
            pool=config.classifier_pool,
            num_classes=config.num_classes,
            side=config.image_size >> halvings if attends else None,
        )

    @property
    def image_size(self) -> int | None:
        """As the pool's positions or else the originals' table of widths say it."""
        if self.side is not None:
            return self.side << (len(self.channel_mult) - 1)
        return SIZES.get(self.channel_mult)

    @property
    def smallest_size(self) -> int:
        """The image size that the pool requires, or the smallest one that can be halved at every level."""
        return (self.side or 1) << (len(self.channel_mult) - 1)

    def flags(self, image_size: int) -> dict[str, Any]:
        """The ClassifierConfig fields for this image size."""
        return {
            "image_size": image_size,
            "classifier_width": self.width,
            "classifier_depth": self.depth,
            "classifier_attention_resolutions": tuple(
                max(1, image_size >> level) for level in sorted(self.attention_levels)
            ),
            "classifier_use_scale_shift_norm": self.use_scale_shift_norm,
            "classifier_resblock_updown": self.resblock_updown,
            "classifier_pool": self.pool,
            "channel_mult": self.channel_mult,
            "num_classes": self.num_classes,
        }


def _recognise(state: Mapping[str, Tensor], name: object) -> list[_Architecture]:
    """The architectures with these keys and shapes: one, or several if no level but the middle block has attention."""
    pool = classifier_pool(state)
    if pool is None:
        if "output_blocks.0.0.in_layers.0.weight" in state:
            raise ValueError(f"{name} is a diffusion model, not a classifier")
        raise ValueError(f"{name} is not a classifier of guided-diffusion's family: it has no pool")
    theirs, found, others = shapes_of(state), list[_Architecture](), list[tuple[list[str], Shapes]]()
    for one in _readings(state, pool):
        try:
            ours = _shapes_of_classifier(ClassifierConfig(**one.flags(one.smallest_size)))
        except (ValueError, TypeError, RuntimeError, ArithmeticError):  # sizes of no valid classifier
            continue
        if differing := differing_keys(theirs, ours):
            others.append((differing, ours))
        else:
            found.append(one)
    if not found:
        said = "its sizes are those of none"
        if others:
            keys, ours = min(others, key=lambda other: len(other[0]))
            said = f"from the nearest, {first_difference(keys, theirs, ours)}"
        raise ValueError(f"{name} is not a classifier of guided-diffusion's family: {said}")
    refuse_integers(state, name)
    return found


def _readings(state: Mapping[str, Tensor], pool: ClassifierPool) -> Iterator[_Architecture]:
    """Every division of the input blocks into levels that their number allows.

    A residual block that halves has the keys of any other, but a level has ``depth`` blocks and, except the last, one
    that halves.
    """
    present = {key.split(".", 2)[1] for key in state if key.startswith("input_blocks.")}
    blocks = next(i for i in count(1) if str(i) not in present) - 1
    residual = sum(f"input_blocks.{i}.0.in_layers.2.weight" in state for i in range(1, blocks + 1))
    if blocks > _MOST_BLOCKS or PER_BLOCK * residual > len(state):
        return  # no classifier, and one model after another with as many whole blocks would be built
    for depth in range(1, blocks + 1):
        if (blocks + 1) % (depth + 1):
            continue
        starts = range(1, blocks + 1, depth + 1)
        try:
            width = state["time_embed.0.weight"].shape[1]
            widths = [state[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in starts]
            positions = state["out.2.positional_embedding"].shape[1] - 1 if pool is ClassifierPool.ATTENTION else None
            yield _Architecture(
                width=width,
                depth=depth,
                channel_mult=tuple(w / width if w % width else w // width for w in widths),
                attention_levels=frozenset(
                    level for level, i in enumerate(starts) if f"input_blocks.{i}.1.qkv.weight" in state
                ),
                use_scale_shift_norm=state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
                resblock_updown=f"input_blocks.{depth + 1}.0.op.weight" not in state,
                pool=pool,
                num_classes=state[LAST_LAYER[pool]].shape[0],
                side=None if positions is None else math.isqrt(positions),
            )
        except (LookupError, ValueError, ArithmeticError):  # a tensor is missing, or has another number of dimensions
            continue


@cache
def _shapes_of_classifier(config: ClassifierConfig) -> Shapes:
    with torch.device("meta"):
        return shapes_of(build_classifier(config).state_dict())


def _contradictions(found: _Architecture, given: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The given fields that would make it another architecture, as (name, the file's value, the given one).

    Each is checked alone, so that no other value changes its meaning.
    """
    size = found.image_size or found.smallest_size
    if found.side is None and "image_size" in given:
        size = int(number(int, "image_size", given["image_size"]))
    said = found.flags(size)
    contradicting = []
    for name in (name for name in said if name in given):
        theirs = ClassifierConfig.from_dict(said | {name: given[name]})
        if _Architecture.of(theirs) != found:
            contradicting.append((name, said[name], getattr(theirs, name)))
    return contradicting
