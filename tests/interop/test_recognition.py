"""Bare state dicts are recognised from their keys and shapes, and what they do not say is asked for by name."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import ClassifierConfig, DiffusionConfig, ModelConfig, build_classifier, build_model
from fastdiff.config import ClassifierPool, with_multipliers
from fastdiff.interop.recognition import describe, recognise
from fastdiff.presets import PRESETS

from ..parity.support import model_config
from ..support import refusal
from .support import ARCHITECTURE, CLASSIFIERS, GOLDEN, meta_state

PROCESS = {"num_heads": 4, "diffusion_steps": 4000, "noise_schedule": "cosine"}


def tiny(**changes: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        config = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, **changes}
        return build_model(ModelConfig(**config)).state_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_recognised(name: str) -> None:
    """Nothing is said but what no file can say: heads and schedule, the low resolution, the order of qkv."""
    wanted = PRESETS[name].config(ModelConfig)
    given: dict[str, Any] = {"diffusion_steps": 4000, "noise_schedule": "cosine"}
    heads = "num_heads" if wanted.num_head_channels == -1 else "num_head_channels"
    given[heads] = getattr(wanted, heads)
    if wanted.small_size:
        given["small_size"] = wanted.small_size
    if guided := wanted.resblock_updown:
        given["use_new_attention_order"] = wanted.use_new_attention_order
        if wanted.small_size:  # both of guided-diffusion's upsamplers have the widths of 256 pixels
            given["image_size"] = wanted.image_size
    model, diffusion = describe(meta_state(ARCHITECTURE.get(name, name)), "x.pt", given)
    assert model == replace(with_multipliers(wanted), dropout=0.0)  # which is training's
    process = DiffusionConfig(diffusion_steps=4000, noise_schedule="cosine", learn_sigma=True)
    unscaled = {"rescale_timesteps": False, "rescale_learned_sigmas": False}
    assert diffusion == (replace(process, **unscaled) if guided else process)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_missing_is_asked_for_with_the_presets_that_would_do(name: str) -> None:
    guided = GOLDEN[name]["flags"].get("resblock_updown", False)
    order = r" --use-new-attention-order \(or --no-use-new-attention-order\)," if guided else ""
    asks = (
        rf"x\.pt is a bare state dict: .*--num-heads \(or --num-head-channels\),{order} --diffusion-steps and --noise"
    )
    text = refusal(lambda: describe(meta_state(name), "x.pt", {}), asks)
    assert ("--small-size" in text) == ("upsample" in name)
    assert ("--image-size" in text) == ("upsampler" in name)
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
            with pytest.raises(
                ValueError, match=r"^\w+ (is .* in x\.pt, but given as|.* super-resolution|32 does not fit)"
            ):
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
        {"num_channels": 64, "channel_mult": (0.5, 1, 1.5)},
        {"resblock_updown": True},
        {"resblock_updown": True, "num_res_blocks": 3, "attention_resolutions": "32,8"},
        {"resblock_updown": True, "attention_resolutions": "", "channel_mult": (2, 1)},
        {"resblock_updown": True, "small_size": 16, "learn_sigma": True},
        {"resblock_updown": True, "use_new_attention_order": True, "num_head_channels": 32},
        {"use_new_attention_order": True},
        {"patch_size": 2, "attention_resolutions": 8},
        {"patch_size": 4, "attention_resolutions": 8, "small_size": 16, "learn_sigma": True},
    ],
    ids=str,
)
def test_every_part_of_an_architecture_is_read(changes: dict[str, Any]) -> None:
    wanted = with_multipliers(ModelConfig(**{"image_size": 32, "num_channels": 32, "num_res_blocks": 1, **changes}))
    unsaid = ("image_size", "small_size", "num_heads", "num_head_channels", "use_new_attention_order")
    given = {**PROCESS, **{field: getattr(wanted, field) for field in unsaid}}
    model, _ = describe(tiny(**changes), "x.pt", given)
    assert model == wanted


def test_a_single_level_has_nothing_that_resizes() -> None:
    """With and without residual blocks for it the model is the same, and the order of qkv is improved-diffusion's."""
    state = tiny(channel_mult=(2,), resblock_updown=True)
    model, _ = describe(state, "x.pt", {**PROCESS, "image_size": 32, "resblock_updown": True})
    assert (model.resblock_updown, model.use_new_attention_order) == (False, False)


def test_a_size_that_the_widths_do_not_tell_is_asked_for() -> None:
    state = tiny(channel_mult=(1, 2), attention_resolutions="16")
    with pytest.raises(ValueError, match=r"attention at levels 1; .*given: --image-size .no --preset has this arch"):
        describe(state, "x.pt", PROCESS)
    model, _ = describe(state, "x.pt", {**PROCESS, "image_size": 48})
    assert (model.image_size, model.attention_resolutions, model.attention_levels) == (48, (24,), {1})


def test_two_sizes_of_guided_diffusions_upsamplers_have_the_same_widths() -> None:
    state = meta_state("128_512_upsampler")
    given = {**PROCESS, "use_new_attention_order": False, "small_size": 64}
    asks = r"attention at levels 4,5; .*given: --image-size \(or --preset 128_512_upsampler\)$"
    refusal(lambda: describe(state, "x.pt", given), asks)
    for size, resolutions in ((256, (16, 8)), (512, (32, 16))):
        model, _ = describe(state, "x.pt", {**given, "image_size": size})
        assert (model.image_size, model.attention_resolutions) == (size, resolutions)


def test_guided_diffusions_sizes_without_a_preset() -> None:
    """Its models with convolutions that resize, and 512 pixels at another width."""
    given = {**PROCESS, "use_new_attention_order": False}
    for changes, size in (
        ({"image_size": 512, "num_channels": 64, "resblock_updown": True}, 512),
        ({"image_size": 512, "num_channels": 64}, 512),
        ({"image_size": 128}, 128),
    ):
        model, _ = describe(tiny(**changes), "x.pt", given)
        assert model.image_size == size


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
        ("resblock_updown", True, "False", "True"),
    ],
)
def test_a_contradiction_names_the_field_and_both_values(field: str, value: object, file: str, given: str) -> None:
    fits = r"leave out the flag, or --preset \(--preset imagenet64_uncond or imagenet64_uncond_vlb fits\)$"
    with pytest.raises(ValueError, match=rf"^{field} is {file} in x\.pt, but given as {given}: {fits}"):
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
    with pytest.raises(ValueError, match=r"num_head_channels 48 does not divide the 512 channels"):
        describe(meta_state("lsun_uncond"), "x.pt", {**PROCESS, "num_head_channels": 48})
    with pytest.raises(ValueError, match=r"resblock_updown is True in x\.pt, but given as False: .*fits\)$"):
        describe(meta_state("64x64_diffusion"), "x.pt", {**PROCESS, "resblock_updown": False})
    with pytest.raises(ValueError, match=r"channel_mult is 0\.5,1,1,2,2,4,4 in x\.pt, but given as 1,1,1,2,2,4,4"):
        describe(meta_state("512x512_diffusion"), "x.pt", {**PROCESS, "channel_mult": "1,1,1,2,2,4,4"})
    with pytest.raises(ValueError, match=r"no field num_head\b"):
        describe(meta_state("imagenet64_uncond"), "x.pt", {**PROCESS, "num_head": 5})


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_named_as_one(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^x\.pt is a classifier, not a diffusion model \(--classifier x\.pt guides a model\)$"
    ):
        recognise(meta_state(name), "x.pt")


@pytest.mark.parametrize("pool", ClassifierPool)
def test_a_classifier_of_any_pool_is_named_as_one(pool: ClassifierPool) -> None:
    with torch.device("meta"):
        classifier = build_classifier(ClassifierConfig(classifier_width=64, classifier_depth=1, classifier_pool=pool))
    with pytest.raises(ValueError, match=r"^x\.pt is a classifier, not a diffusion model"):
        recognise(classifier.state_dict(), "x.pt")


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
    for architecture, preset in (("lsun_uncond", "lsun_uncond"), ("512x512_diffusion", "512x512_diffusion")):
        extra = {**meta_state(architecture), "more": torch.zeros(2)}
        with pytest.raises(
            ValueError, match=rf"--preset {preset}, 1 tensors differ, first 'more': \(2,\) instead of absent$"
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
    residual = torch.zeros((), device=meta).expand(128, 128, 3, 3)
    found["resizes at once"] = {**whole, "output_blocks.0.1.in_layers.2.weight": residual}
    found["resizes somewhere"] = {**whole, "output_blocks.7.2.in_layers.2.weight": residual}
    found["widths of no model"] = {**whole, "input_blocks.5.0.in_layers.2.weight": residual[:100]}
    # a model of the first level's blocks at every level would have millions of layers
    many = {f"input_blocks.{i}.0.in_layers.2.weight": residual for i in range(1, 2000)}
    levels = {f"input_blocks.{i}.0.{'in_layers.2' if i % 2 else 'op'}.weight": residual for i in range(1, 4000)}
    behind = {f"input_blocks.{1999 + i}.0.{'op' if i % 2 else 'in_layers.2'}.weight": residual for i in range(1, 4000)}
    found["many blocks"] = {**whole, **many}
    found["many levels"] = {**whole, **levels}
    found["many blocks, many levels"] = {**whole, **many, **behind}
    found["other project's"] = {"conv1.weight": torch.zeros(2), "": torch.zeros(1), "a\nb" * 99: torch.zeros(1)}
    return found


@pytest.mark.parametrize("name", oddities())
def test_odd_state_dicts_are_one_clear_error(name: str) -> None:
    """And soon: no model of hostile sizes is built."""
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
