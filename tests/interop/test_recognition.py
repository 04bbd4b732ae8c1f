"""Bare state dicts are recognised from their keys and shapes, and what they do not say is asked for by name."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import DiffusionConfig, ModelConfig, build_model
from fastdiff.config import with_multipliers
from fastdiff.interop.recognition import describe, recognise
from fastdiff.presets import PRESETS

from ..parity.support import model_config
from ..support import refusal
from .support import GOLDEN, meta_state

PROCESS = {"num_heads": 4, "diffusion_steps": 4000, "noise_schedule": "cosine"}
ARCHITECTURE = {  # of each preset, by its entry in the golden file
    "imagenet64_uncond_vlb": "imagenet64_uncond",
    "cifar10_uncond_vlb": "cifar10_uncond",
    "lsun_uncond_lr2e-5": "lsun_bedroom",
}


def tiny(**changes: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        config = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, **changes}
        return build_model(ModelConfig(**config)).state_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_recognised(name: str) -> None:
    """Nothing is said but what no file can say: heads and schedule, and the low resolution."""
    wanted = PRESETS[name].config(ModelConfig)
    given = {"num_heads": wanted.num_heads, "diffusion_steps": 4000, "noise_schedule": "cosine"}
    if wanted.small_size:
        given["small_size"] = wanted.small_size
    model, diffusion = describe(meta_state(ARCHITECTURE.get(name, name)), "x.pt", given)
    assert model == replace(with_multipliers(wanted), dropout=0.0)  # which is training's
    assert diffusion == DiffusionConfig(diffusion_steps=4000, noise_schedule="cosine", learn_sigma=True)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_missing_is_asked_for_with_the_presets_that_would_do(name: str) -> None:
    asks = r"x\.pt is a bare state dict: .*--num-heads, --diffusion-steps and"
    text = refusal(lambda: describe(meta_state(name), "x.pt", {}), asks)
    assert ("--small-size" in text) == ("upsample" in name)
    assert "--image-size" not in text
    named = set(re.findall(r"\w[\w-]+", text.partition("(or --preset")[2])) & PRESETS.keys()
    assert named == {preset for preset in PRESETS if ARCHITECTURE.get(preset, preset) == name}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_preset_says_everything_or_is_refused(name: str) -> None:
    for preset, values in PRESETS.items():
        given = {**values.config(DiffusionConfig).to_dict(), **with_multipliers(values.config(ModelConfig)).to_dict()}
        if ARCHITECTURE.get(preset, preset) == name:
            model, diffusion = describe(meta_state(name), "x.pt", given)
            assert model == with_multipliers(values.config(ModelConfig))
            assert diffusion == values.config(DiffusionConfig)
        else:
            with pytest.raises(ValueError, match=r"^\w+ (is .* in x\.pt, but given as|.* super-resolution)"):
                describe(meta_state(name), "x.pt", given)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_cond": True, "num_classes": 7},
        {"learn_sigma": True},
        {"use_scale_shift_norm": False},
        {"small_size": 16},
        {"num_res_blocks": 3},
        {"attention_resolutions": "32,4"},
        {"attention_resolutions": ""},
        {"channel_mult": (2, 1, 3)},
        {"channel_mult": (2,), "attention_resolutions": 32},
        {"num_channels": 64},
    ],
    ids=str,
)
def test_every_part_of_an_architecture_is_read(changes: dict[str, Any]) -> None:
    wanted = with_multipliers(ModelConfig(**{"image_size": 32, "num_channels": 32, "num_res_blocks": 1, **changes}))
    given = {**PROCESS, "image_size": 32, "small_size": wanted.small_size}
    model, _ = describe(tiny(**changes), "x.pt", given)
    assert model == wanted


def test_a_size_that_the_widths_do_not_tell_is_asked_for() -> None:
    state = tiny(channel_mult=(1, 2), attention_resolutions="16")
    with pytest.raises(ValueError, match=r"attention at levels 1; .*given: --image-size .no --preset has this arch"):
        describe(state, "x.pt", PROCESS)
    model, _ = describe(state, "x.pt", {**PROCESS, "image_size": 48})
    assert (model.image_size, model.attention_resolutions, model.attention_levels) == (48, (24,), {1})


def test_the_size_may_be_another_where_the_widths_allow_it() -> None:
    state = meta_state("imagenet64_uncond")
    model, _ = describe(state, "x.pt", {**PROCESS, "image_size": 96})
    assert (model.image_size, model.channel_mult, model.attention_resolutions) == (96, (1, 2, 3, 4), (24, 12))
    with pytest.raises(ValueError, match=r"image_size 20 does not fit"):
        describe(state, "x.pt", {**PROCESS, "image_size": 20})
    with pytest.raises(ValueError, match=r"image_size must be a whole number, not 'big'"):
        describe(state, "x.pt", {**PROCESS, "image_size": "big"})


@pytest.mark.parametrize(
    ("field", "value", "file", "given"),
    [
        ("num_channels", 64, "128", "64"),
        ("num_res_blocks", 2, "3", "2"),
        ("learn_sigma", False, "True", "False"),
        ("class_cond", True, "False", "True"),
        ("use_scale_shift_norm", False, "True", "False"),
        ("channel_mult", "1,2,3,3", "1,2,3,4", "1,2,3,3"),
        ("attention_resolutions", "8", "16,8", "8"),
        ("attention_resolutions", "", "16,8", "none"),
    ],
)
def test_a_contradiction_names_the_field_and_both_values(field: str, value: object, file: str, given: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is {file} in x\.pt, but given as {given}: leave"):
        describe(meta_state("imagenet64_uncond"), "x.pt", {**PROCESS, field: value})


def test_what_means_the_same_is_no_contradiction() -> None:
    given = {**PROCESS, "attention_resolutions": (8, 128, 16), "channel_mult": "1, 2,3,4", "num_classes": 1000}
    model, _ = describe(meta_state("imagenet64_uncond"), "x.pt", given)
    assert model.attention_resolutions == (16, 8)


def test_other_contradictions() -> None:
    with pytest.raises(ValueError, match=r"small_size 16 is for super-resolution models, and x\.pt is not one"):
        describe(meta_state("cifar10_uncond"), "x.pt", {**PROCESS, "small_size": 16})
    with pytest.raises(ValueError, match=r"num_classes is 1000 in x\.pt, but given as 10"):
        describe(meta_state("imagenet64_cond"), "x.pt", {**PROCESS, "num_classes": 10})
    with pytest.raises(ValueError, match=r"num_heads 5 does not divide the 384 channels"):
        describe(meta_state("imagenet64_uncond"), "x.pt", {**PROCESS, "num_heads": 5})
    with pytest.raises(ValueError, match=r"no field num_head\b"):
        describe(meta_state("imagenet64_uncond"), "x.pt", {**PROCESS, "num_head": 5})


def test_the_nearest_preset_and_the_first_difference_are_named() -> None:
    state = meta_state("cifar10_uncond")
    state["input_blocks.2.0.in_layers.2.weight"] = torch.empty(128, 128, 1, 1, device="meta")
    del state["out.0.bias"]
    with pytest.raises(
        ValueError,
        match=r"x\.pt is not a model of .* nearest, --preset cifar10_uncond, 2 tensors differ, first "
        r"'input_blocks\.2\.0\.in_layers\.2\.weight': \(128, 128, 1, 1\) instead of \(128, 128, 3, 3\)$",
    ):
        recognise(state, "x.pt")
    extra = {**meta_state("lsun_bedroom"), "more": torch.zeros(2)}
    with pytest.raises(
        ValueError, match=r"--preset lsun_bedroom, 1 tensors differ, first 'more': \(2,\) instead of absent$"
    ):
        recognise(extra, "x.pt")


def test_a_model_that_is_no_preset_is_compared_with_one_of_its_own_sizes_too() -> None:
    state = tiny(channel_mult=(1, 1))
    del state["out.0.bias"]
    with pytest.raises(
        ValueError,
        match=r"; from a model of its sizes, 1 tensors differ, first 'out\.0\.bias': absent instead of \(32,\)$",
    ):
        recognise(state, "x.pt")


def oddities() -> dict[str, dict[str, Tensor]]:
    meta = torch.device("meta")
    whole = meta_state("cifar10_uncond")
    changed = {
        "nothing": ("time_embed.0.weight", ()),
        "no width": ("time_embed.0.weight", (512, 0)),
        "huge width": ("time_embed.0.weight", (4, 2**40)),
        "huge classes": ("label_emb.weight", (2**53, 512)),
        "odd width": ("time_embed.0.weight", (404, 101)),
        "no rows": ("input_blocks.1.0.in_layers.2.weight", (0, 128, 3, 3)),
        "a number as output": ("out.2.weight", ()),
    }
    found = {}
    for name, (key, shape) in changed.items():
        base = torch.zeros((), device=meta)
        found[name] = {**whole, key: base.expand(shape)}
    found["huge index"] = {**whole, f"input_blocks.{10**30}.0.op.weight": torch.zeros(2)}
    found["no index"] = {**whole, "input_blocks.x.0.op.weight": torch.zeros(2)}
    found["ends early"] = {k: v for k, v in whole.items() if not k.startswith("input_blocks.4.")}
    found["two halvings"] = {**whole, "input_blocks.5.0.op.weight": torch.zeros(2)}
    found["begins with a halving"] = {**whole, "input_blocks.1.0.op.weight": torch.zeros(2)}
    found["other project's"] = {"conv1.weight": torch.zeros(2), "": torch.zeros(1), "a\nb" * 99: torch.zeros(1)}
    return found


@pytest.mark.parametrize("name", oddities())
def test_odd_state_dicts_are_one_clear_error(name: str) -> None:
    says = r"x\.pt is not a model of improved-diffusion's family: from the nearest, --preset"
    assert len(refusal(lambda: recognise(oddities()[name], "x.pt"), says)) < 500


def test_integers_are_no_weights() -> None:
    state = meta_state("cifar10_uncond")
    state["out.2.bias"] = state["out.2.bias"].long()
    with pytest.raises(ValueError, match=r"x\.pt holds no weights: out\.2\.bias has dtype torch\.int64"):
        recognise(state, "x.pt")


@pytest.mark.parametrize("name", GOLDEN)
def test_the_order_of_the_parameters_is_the_originals(name: str) -> None:
    """Its optimizer's files know parameters by number only."""
    with torch.device("meta"):
        model = build_model(model_config(GOLDEN[name]["flags"]))
    assert [n for n, _ in model.named_parameters()] == list(GOLDEN[name]["state_dict"])
