"""diffusers' UNet2DModel: the options that match one of our models, and the weights renamed to its keys."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.config import GROUPS, ModelConfig
from fastdiff.models import build_model

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_QKV = ("to_q", "to_k", "to_v")
_FAMILY = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_num_groups": GROUPS,
    "attn_norm_num_groups": GROUPS,  # the default drops the middle attention's norm if scale_shift is used
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
}
"""The options that are the same in every model of the family."""


def unet_options(config: ModelConfig, learn_sigma: bool) -> dict[str, Any]:
    """UNet2DModel's options for one of our models; ValueError, with the reason, if it cannot express the model."""
    if config.small_size is not None:
        raise ValueError(
            "diffusers cannot express a super-resolution model: its pipelines give a UNet2DModel no low-resolution "
            "image; convert to .pt or .safetensors"
        )
    if config.patch_size > 1:
        raise ValueError(
            f"diffusers cannot express patch_size {config.patch_size}: its UNet2DModel sees pixels; convert to .pt or "
            ".safetensors, or train with --patch-size 1"
        )
    if config.multipliers[0] != 1:
        raise ValueError(
            f"diffusers cannot express channel_mult {','.join(map(str, config.multipliers))}: it embeds timesteps in "
            "as many channels as the first level has; a model whose channel_mult starts with 1 works"
        )
    levels = range(len(config.multipliers))
    attends = [level in config.attention_levels for level in levels]
    plain = "Resnet{}sampleBlock2D" if config.resblock_updown else "{}Block2D"
    resize = "resnet" if config.resblock_updown else "conv"
    return {
        "sample_size": config.image_size,
        "in_channels": 3,
        "out_channels": 6 if learn_sigma else 3,
        "down_block_types": tuple("AttnDownBlock2D" if attends[i] else plain.format("Down") for i in levels),
        "up_block_types": tuple("AttnUpBlock2D" if attends[i] else plain.format("Up") for i in reversed(levels)),
        "downsample_type": resize,
        "upsample_type": resize,
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "attention_head_dim": _head_dim(config),
        "num_class_embeds": config.num_classes if config.class_cond else None,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        **_FAMILY,
    }


def _head_dim(config: ModelConfig) -> int | None:
    """The head dimension of every attention layer; None for one head, which diffusers takes as the level's width."""
    if config.num_head_channels != -1:
        return config.num_head_channels
    if config.heads_upsample != config.num_heads and config.attention_levels:
        raise ValueError(
            f"diffusers cannot express num_heads_upsample {config.heads_upsample} beside num_heads "
            f"{config.num_heads}: it has one head dimension for the whole model"
        )
    if config.num_heads == 1:
        return None
    dims = sorted({width // config.num_heads for width in attending(config)})
    if len(dims) > 1:
        raise ValueError(
            f"diffusers cannot express {config.num_heads} heads of {' and '.join(map(str, dims))} channels: it has one "
            "head dimension for all levels with attention and the middle; a model that attends only at levels as wide "
            "as the last one, or has one head, works"
        )
    return dims[0]


def attending(config: ModelConfig) -> set[int]:
    """The widths of all attention layers, including the middle block's."""
    return {config.widths[level] for level in (*config.attention_levels, -1)}


def _modules(config: ModelConfig) -> Iterator[tuple[str, str, bool]]:
    """Each module with weights: our name, diffusers' name, and whether it is a qkv, which diffusers has as three."""
    yield from ((ours, theirs, False) for ours, theirs in _ENDS.items() if config.class_cond or ours != "label_emb")

    def block(ours: str, theirs: str, layer: int, attends: bool) -> Iterator[tuple[str, str, bool]]:
        for name, their in _RESIDUAL.items():
            yield f"{ours}.0.{name}", f"{theirs}.resnets.{layer}.{their}", False
        if attends:
            yield from attention(f"{ours}.1", f"{theirs}.attentions.{layer}")

    def resize(ours: str, conv: str, theirs: str) -> Iterator[tuple[str, str, bool]]:
        if not config.resblock_updown:
            yield f"{ours}.{conv}", f"{theirs}.conv", False
            return
        for name, their in _RESIDUAL.items():
            yield f"{ours}.{name}", f"{theirs}.{their}", False

    def attention(ours: str, theirs: str) -> Iterator[tuple[str, str, bool]]:
        for name, their in _ATTENTION.items():
            yield f"{ours}.{name}", f"{theirs}.{their}", False
        yield f"{ours}.qkv", theirs, True

    last = len(config.multipliers) - 1
    number = 1
    for level in range(last + 1):
        for layer in range(config.num_res_blocks):
            yield from block(f"input_blocks.{number}", f"down_blocks.{level}", layer, level in config.attention_levels)
            number += 1
        if level < last:
            yield from resize(f"input_blocks.{number}.0", "op", f"down_blocks.{level}.downsamplers.0")
            number += 1
    yield from block("middle_block", "mid_block", 0, False)
    yield from attention("middle_block.1", "mid_block.attentions.0")
    for name, their in _RESIDUAL.items():
        yield f"middle_block.2.{name}", f"mid_block.resnets.1.{their}", False
    number = 0
    for level in range(last, -1, -1):
        attends = level in config.attention_levels
        theirs = f"up_blocks.{last - level}"
        for layer in range(config.num_res_blocks + 1):
            yield from block(f"output_blocks.{number}", theirs, layer, attends)
            number += 1
        if level:
            yield from resize(f"output_blocks.{number - 1}.{1 + attends}", "conv", f"{theirs}.upsamplers.0")


def unet_state(state: Mapping[str, Tensor], config: ModelConfig, learn_sigma: bool) -> dict[str, Tensor]:
    """Our state dict under diffusers' keys: q, k and v are separate; the variance is kept only if ``learn_sigma``."""
    result = {}
    for ours, theirs, is_qkv in _modules(config):
        for leaf in ("weight", "bias"):
            tensor = state.get(f"{ours}.{leaf}")
            if tensor is None:
                continue  # a skip connection without weights, or the embedding's bias
            if ours == "out.2":
                tensor = tensor[: 6 if learn_sigma else 3]
            if not is_qkv:
                result[f"{theirs}.{leaf}"] = tensor.squeeze(-1) if "proj_out" in ours else tensor
                continue
            width = len(tensor) // 3
            parts = _heads_inside(tensor.reshape(3 * width, -1), config)
            for name, part in zip(_QKV, parts, strict=True):
                result[f"{theirs}.{name}.{leaf}"] = part.reshape(width, *tensor.shape[1:-1])
    return result


def _heads_inside(rows: Tensor, config: ModelConfig) -> Tensor:
    """The rows of a qkv (3C, ...) as q, k and v (3, heads, d, ...)."""
    heads = config.heads_of(len(rows) // 3)
    if config.use_new_attention_order:
        return rows.unflatten(0, (3, heads, -1))
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1)


def _outside(parts: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of _heads_inside for q, k and v (3, C, ...)."""
    if config.use_new_attention_order:
        return parts.flatten(0, 1)
    return parts.unflatten(1, (config.heads_of(parts.shape[1]), -1)).transpose(0, 1).flatten(0, 2)


def our_state(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of unet_state, in the order of the original; ValueError naming the tensor that does not fit."""
    with torch.device("meta"):
        wanted = build_model(config).state_dict()
    names = {ours: (name, is_qkv) for ours, name, is_qkv in _modules(config)}
    state, used = {}, set[str]()
    for key, own in wanted.items():
        module, _, leaf = key.rpartition(".")
        name, is_qkv = names[module]
        keys = [f"{name}.{part}.{leaf}" for part in _QKV] if is_qkv else [f"{name}.{leaf}"]
        if missing := [k for k in keys if k not in theirs]:
            raise ValueError(f"has no {missing[0]}")
        parts = [theirs[k] for k in keys]
        shape = (len(own) // len(parts), *own.shape[1 : 2 if own.ndim == 3 else None])  # ours may be a 1x1 convolution
        for part, theirs_key in zip(parts, keys, strict=True):
            if tuple(part.shape) != shape:
                raise ValueError(f"has {theirs_key} as {tuple(part.shape)} instead of {shape}")
        whole = _outside(torch.stack(parts), config) if is_qkv else parts[0]
        state[key] = whole.reshape(own.shape).float()
        used.update(keys)
    if more := sorted(theirs.keys() - used):
        raise ValueError(f"has {more[0]}, which no model of this family has")
    return state
