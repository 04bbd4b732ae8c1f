"""State-dict keys and shapes of the released models' architectures: a checkpoint moves without renaming."""

import pytest
import torch

from fastdiff import build_classifier, build_model

from .support import classifier_config, load_json, model_config

ENTRIES = load_json("state_dicts.json")
GUIDED = load_json("state_dicts_guided.json")


@pytest.mark.parametrize("name", ENTRIES)
def test_keys_and_shapes(name: str) -> None:
    entry = ENTRIES[name]
    assert set(entry) == {"flags", "parameters", "state_dict"}
    with torch.device("meta"):
        model = build_model(model_config(entry["flags"]))
    # In order too: the original's optimizer state knows parameters by their number only.
    assert [(k, list(v.shape)) for k, v in model.state_dict().items()] == list(entry["state_dict"].items())
    assert [k for k, _ in model.named_parameters()] == list(entry["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]


@pytest.mark.parametrize("name", GUIDED)
def test_keys_and_shapes_of_guided_diffusion(name: str) -> None:
    entry = GUIDED[name]
    state = entry["state_dict"]
    if isinstance(state, str):  # "as NAME"
        state = GUIDED[state.removeprefix("as ")]["state_dict"]
    with torch.device("meta"):
        if name.endswith("classifier"):
            model: torch.nn.Module = build_classifier(classifier_config(entry["flags"]))
        else:
            model = build_model(model_config(entry["flags"]))
    assert [(k, list(v.shape)) for k, v in model.state_dict().items()] == list(state.items())
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]
