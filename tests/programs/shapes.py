"""The shapes of the fused operations in the released models, found from the models themselves, not listed by hand."""

from contextlib import ExitStack
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from fastdiff.benchmarks.flops import Flops
from fastdiff.config import ClassifierConfig, ModelConfig
from fastdiff.models import build_classifier, build_model
from fastdiff.models.blocks import AttentionBlock
from fastdiff.models.classifier import AttentionPool
from fastdiff.models.layers import GroupNormSiLU
from fastdiff.presets import CLASSIFIER_PRESETS, PRESETS


class NormShape(NamedTuple):
    """One group_norm_silu of a model, for one image."""

    channels: int
    size: int  # height and width
    conditioned: bool  # with scale and shift
    silu: bool
    input_bias: bool = False
    with_input: bool = False
    second: int = 0
    """Channels of the second of two inputs; ``channels`` counts both."""


class AttentionShape(NamedTuple):
    """One attention of a model, for one image."""

    tokens: int
    channels: int
    heads: int


def preset_shapes() -> tuple[list[NormShape], list[AttentionShape]]:
    """Every norm and every attention of the presets' models, sorted, found by running the models without data."""
    norms: set[NormShape] = set()
    attentions: set[AttentionShape] = set()

    # The modules return their input: PyTorch computes the shapes of their outputs in slow Python code.
    def norm(
        module: GroupNormSiLU,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        input_bias: Tensor | None = None,
        second: Tensor | None = None,
        with_input: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        both = 0 if second is None else second.shape[1]
        size = x.shape[1] + both, x.shape[2]
        norms.add(NormShape(*size, scale is not None, module.silu, input_bias is not None, with_input, both))
        y = x if second is None else torch.cat([x, second], dim=1)
        return (y, x, *([] if second is None else [second])) if with_input else y

    def attention(module: AttentionBlock, x: Tensor) -> Tensor:
        norm(module.norm, x, with_input=True)
        attentions.add(AttentionShape(x.shape[2] * x.shape[3], x.shape[1], module.heads))
        return x

    def pool(module: AttentionPool, x: Tensor) -> Tensor:
        attentions.add(AttentionShape(x.shape[2] * x.shape[3] + 1, x.shape[1], module.heads))  # the mean token, too
        return x.new_empty(len(x), 1)

    patched = (GroupNormSiLU, norm), (AttentionBlock, attention), (AttentionPool, pool)
    with ExitStack() as patches, torch.device("meta"):
        for module, forward in patched:
            patches.enter_context(patch.object(module, "forward", forward))
        for config in {preset.config(ModelConfig) for preset in PRESETS.values()}:
            model = build_model(config, kernels="triton")
            Flops.of_module(model, model, config, 1, training=False)  # runs it on inputs of its shapes
        for classifier in {preset.config(ClassifierConfig) for preset in CLASSIFIER_PRESETS.values()}:
            size = classifier.image_size
            build_classifier(classifier, kernels="triton")(torch.empty(1, 3, size, size), torch.empty(1))
    return sorted(norms), sorted(attentions)
