"""The shapes of the fused operations in the released models, found from the models themselves, not listed by hand."""

from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor

from fastdiff.config import ModelConfig
from fastdiff.models import build_model
from fastdiff.models.blocks import AttentionBlock
from fastdiff.models.layers import GroupNormSiLU
from fastdiff.presets import PRESETS


@dataclass(frozen=True, order=True)
class NormShape:
    """One group_norm_silu of a model, for one image."""

    channels: int
    size: int  # height and width
    conditioned: bool  # with scale and shift
    silu: bool


@dataclass(frozen=True, order=True)
class AttentionShape:
    """One attention of a model, for one image."""

    tokens: int
    channels: int
    heads: int


@cache
def shapes_of(config: ModelConfig) -> tuple[frozenset[NormShape], frozenset[AttentionShape]]:
    """Every norm and every attention of the model, found by running it without data."""
    norms: set[NormShape] = set()
    attentions: set[AttentionShape] = set()

    # The modules return their input: PyTorch computes the shapes of their outputs in slow Python code.
    def norm(module: GroupNormSiLU, x: Tensor, *conditions: Tensor) -> Tensor:
        norms.add(NormShape(x.shape[1], x.shape[2], len(conditions) > 0, module.silu))
        return x

    def attention(module: AttentionBlock, x: Tensor) -> Tensor:
        norm(module.norm, x)
        attentions.add(AttentionShape(x.shape[2] * x.shape[3], x.shape[1], module.heads))
        return x

    with (
        torch.device("meta"),
        patch.object(GroupNormSiLU, "forward", norm),
        patch.object(AttentionBlock, "forward", attention),
    ):
        model = build_model(config, kernels="torch")
        x, t = torch.empty(1, 3, config.image_size, config.image_size), torch.empty(1)
        conditions = {}
        if config.class_cond:
            conditions["y"] = torch.empty(1, dtype=torch.int64)
        if config.small_size:
            conditions["low_res"] = torch.empty(1, 3, config.small_size, config.small_size)
        with torch.no_grad():
            model(x, t, **conditions)
    return frozenset(norms), frozenset(attentions)


def preset_shapes() -> tuple[list[NormShape], list[AttentionShape]]:
    """The shapes of all presets together, sorted."""
    norms: set[NormShape] = set()
    attentions: set[AttentionShape] = set()
    for preset in PRESETS.values():
        found = shapes_of(preset.config(ModelConfig))
        norms |= found[0]
        attentions |= found[1]
    return sorted(norms), sorted(attentions)
