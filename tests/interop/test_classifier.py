"""A classifier's bare state dict is recognised from its keys and shapes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import ClassifierConfig, build_classifier
from fastdiff.interop.classifier import describe_classifier
from fastdiff.interop.recognition import classifier_pool

from ..parity.support import classifier_config, load_json
from ..support import refusal
from .support import meta_state

GUIDED = load_json("state_dicts_guided.json")
TINY = ClassifierConfig(
    image_size=32,
    classifier_width=64,
    classifier_depth=2,
    classifier_attention_resolutions=(16, 8),
    channel_mult=(1, 2, 2),
    num_classes=7,
)


def state_of(config: ClassifierConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_classifier(config).state_dict()


@pytest.mark.parametrize("name", [name for name in GUIDED if name.endswith("classifier")])
def test_a_released_classifier_says_everything(name: str) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in GUIDED[name]["state_dict"].items()}
    assert describe_classifier(state, "c.pt", {}) == classifier_config(GUIDED[name]["flags"])


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classifier_use_scale_shift_norm": False},
        {"classifier_resblock_updown": False},
        {"classifier_depth": 1, "classifier_attention_resolutions": (32, 16, 8)},
        {"channel_mult": (2, 0.5, 3), "classifier_attention_resolutions": (32, 8)},
        {"channel_mult": (2,), "classifier_attention_resolutions": (32,)},
        {"classifier_resblock_updown": False, "classifier_attention_resolutions": ()},
    ],
)
def test_every_field_is_recognised(pool: str, changes: dict[str, Any]) -> None:
    """But the image size of widths that are in no table, unless the pool has positions."""
    config = replace(TINY, classifier_pool=pool, **changes)
    state = state_of(config)
    if pool != "attention":
        text = refusal(lambda: describe_classifier(state, "c.pt", {"image_size": None}))
        assert text == "c.pt is a classifier that does not say its image size: give image_size"
    found = describe_classifier(state, "c.pt", {} if pool == "attention" else {"image_size": 32})
    assert found == config


def test_widths_of_the_table_say_the_image_size() -> None:
    config = replace(TINY, image_size=64, channel_mult=(1, 2, 3, 4), classifier_pool="adaptive")
    assert describe_classifier(state_of(config), "c.pt", {}) == config
    other = replace(config, image_size=96, classifier_attention_resolutions=(24,))  # convolutions work at any size
    assert describe_classifier(state_of(other), "c.pt", {"image_size": 96}) == other


def test_levels_that_the_shapes_leave_open_are_asked_for() -> None:
    """Without attention a block that halves has the keys of any other."""
    config = replace(TINY, channel_mult=(1, 1, 1), classifier_attention_resolutions=(), classifier_pool="adaptive")
    state = state_of(config)
    text = refusal(lambda: describe_classifier(state, "c.pt", {"image_size": 32}))
    assert text == (
        "c.pt is a classifier whose classifier_depth may be 2 (channel_mult 1,1,1) or 8 (channel_mult 1): give "
        "classifier_depth"
    )
    assert describe_classifier(state, "c.pt", {"image_size": 32, "classifier_depth": 2}) == config
    positions = state_of(replace(config, classifier_pool="attention"))
    given = {"image_size": 32}  # the map is of 8 pixels: only three levels make it
    assert describe_classifier(positions, "c.pt", given) == replace(config, classifier_pool="attention")


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        ("image_size", 64, "32"),
        ("classifier_width", 128, "64"),
        ("classifier_depth", 5, "2"),
        ("classifier_attention_resolutions", (8,), "16,8"),
        ("classifier_use_scale_shift_norm", False, "True"),
        ("classifier_resblock_updown", False, "True"),
        ("classifier_pool", "adaptive", "attention"),
        ("channel_mult", (1, 2, 3), "1,2,2"),
        ("num_classes", 8, "7"),
    ],
)
def test_a_contradiction_names_the_field_and_both_values(field: str, given: Any, said: str) -> None:
    state = state_of(TINY)
    text = refusal(lambda: describe_classifier(state, "c.pt", {field: given}))
    value = ",".join(map(str, given)) if isinstance(given, tuple) else given
    assert text == f"{field} is {said} in c.pt, but given as {value}: leave it out"
    assert describe_classifier(state, "c.pt", {field: getattr(TINY, field)}) == TINY


def test_a_unet_is_no_classifier() -> None:
    assert classifier_pool(meta_state("cifar10_uncond")) is None
    text = refusal(lambda: describe_classifier(meta_state("cifar10_uncond"), "m.pt", {}))
    assert text == "m.pt is a diffusion model, not a classifier"


@pytest.mark.parametrize("tensors", [1, 10])
def test_of_many_made_up_blocks_no_model_is_built(tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may name hundreds of blocks, of views of one number, and each division into levels is a model."""
    block = [key.removeprefix("input_blocks.1.") for key in state_of(TINY) if key.startswith("input_blocks.1.")]
    block.sort(key=lambda key: key != "0.in_layers.2.weight")
    assert len(block) == 10
    state = {"time_embed.0.weight": torch.zeros(256, 64), "out.3.weight": torch.zeros(7, 64, 1, 1)}
    for i in range(1, 360):
        state |= {f"input_blocks.{i}.{key}": torch.zeros(1).expand(64, 64, 3, 3) for key in block[:tensors]}
    built: list[ClassifierConfig] = []
    monkeypatch.setattr("fastdiff.interop.classifier.build_classifier", lambda config: built.append(config) or 1 / 0)  # type: ignore[func-returns-value]
    assert "its sizes are those of none" in refusal(lambda: describe_classifier(state, "c.pt", {}))
    assert not built


def test_a_state_dict_of_other_shapes_is_refused() -> None:
    state = state_of(TINY)
    state["input_blocks.2.0.in_layers.2.bias"] = torch.empty(65, device="meta")
    text = refusal(lambda: describe_classifier(state, "c.pt", {}))
    assert text == (
        "c.pt is not a classifier of guided-diffusion's family: from the nearest, 1 tensors differ, first "
        "'input_blocks.2.0.in_layers.2.bias': (65,) instead of (64,)"
    )
    del state["time_embed.0.weight"]
    assert "its sizes are those of none" in refusal(lambda: describe_classifier(state, "c.pt", {}))
    whole = state_of(TINY)
    whole["time_embed.0.bias"] = whole["time_embed.0.bias"].int()
    assert "c.pt holds no weights: time_embed.0.bias has" in refusal(lambda: describe_classifier(whole, "c.pt", {}))
