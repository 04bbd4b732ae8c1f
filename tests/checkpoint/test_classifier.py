"""Checkpoints of classifiers: fastdiff's, and guided-diffusion's bare state dicts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fastdiff import (
    ClassifierConfig,
    DiffusionConfig,
    build_classifier,
    build_model,
    load_checkpoint,
    load_classifier,
    save_checkpoint,
    save_classifier,
)
from fastdiff.checkpoint import model_metadata
from fastdiff.models import Classifier

from ..support import randomise, refusal
from .support import DIFFUSION, MODEL

CLASSIFIER = ClassifierConfig(
    image_size=8,
    classifier_width=64,
    classifier_depth=1,
    classifier_attention_resolutions=(4,),
    channel_mult=(1, 1),
    num_classes=3,
)
NAMES = ("cat", "dog", "zebra")


def classifier(config: ClassifierConfig = CLASSIFIER) -> Classifier:
    torch.manual_seed(0)
    return randomise(build_classifier(config))


def bare(path: Path, config: ClassifierConfig = CLASSIFIER, dtype: torch.dtype = torch.float32) -> Path:
    torch.save({key: value.to(dtype) for key, value in classifier(config).state_dict().items()}, path)
    return path


def same(one: Classifier, other: Classifier) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("process", [None, DIFFUSION])
def test_it_comes_back_whole(tmp_path: Path, process: DiffusionConfig | None) -> None:
    path = tmp_path / "new" / "c.safetensors"
    subject = classifier()
    said: dict[str, Any] = {"config": CLASSIFIER, "diffusion_config": process, "step": 7, "class_names": NAMES}
    assert save_classifier(path, subject, **said, noised=True) == path
    loaded = load_classifier(str(path), kernels="reference", memory_format="channels_last")
    assert same(loaded.model, subject)
    assert not loaded.model.training
    assert (loaded.config, loaded.diffusion_config) == (CLASSIFIER, process)
    assert (loaded.step, loaded.class_names, loaded.metadata["noised"]) == (7, NAMES, True)


def test_the_metadata_are_plain_json_with_the_widths_written_out(tmp_path: Path) -> None:
    config = replace(CLASSIFIER, image_size=32, channel_mult=None)
    path = save_classifier(tmp_path / "c.safetensors", classifier(config), config=config)
    with safe_open(path, framework="pt") as file:
        (text,) = file.metadata().values()
    metadata = json.loads(text)
    assert (metadata["kind"], metadata["classifier_config"]["channel_mult"]) == ("classifier", [1, 2, 2, 2])
    assert metadata.keys() == {"sha256", *model_metadata(config, None, 0)}


def test_a_setting_may_repeat_the_file_but_not_contradict_it(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "c.safetensors", classifier(), config=CLASSIFIER)
    given = {"image_size": 8, "classifier_depth": None, "classifier_attention_resolutions": "4"}
    assert load_classifier(path, given=given, config=CLASSIFIER).config == CLASSIFIER
    text = refusal(lambda: load_classifier(path, given={"classifier_width": 128}))
    assert text.startswith(f"classifier_width is 64 in {path} and 128 on the command line")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bare_state_dict_of_any_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = load_classifier(bare(tmp_path / "model000300.pt", dtype=dtype))
    assert loaded.config == CLASSIFIER  # the pool's positions say the image size
    assert (loaded.diffusion_config, loaded.step, loaded.class_names) == (None, 300, ())
    wanted = {key: value.to(dtype).float() for key, value in classifier().state_dict().items()}
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.model.state_dict().items())


def test_a_bare_state_dict_with_its_configuration(tmp_path: Path) -> None:
    path = bare(tmp_path / "c.pt")
    assert load_classifier(path, config=CLASSIFIER).config == CLASSIFIER
    text = refusal(lambda: load_classifier(path, config=replace(CLASSIFIER, num_classes=4)))
    assert text == f"num_classes is 3 in {path}, but given as 4: leave it out"


def test_a_file_of_the_other_kind_is_named(tmp_path: Path) -> None:
    model = build_model(MODEL)
    ours = save_classifier(tmp_path / "c.safetensors", classifier(), config=CLASSIFIER)
    theirs = save_checkpoint(tmp_path / "m.safetensors", model, model_config=MODEL, diffusion_config=DIFFUSION)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert (
        refusal(lambda: load_checkpoint(ours))
        == f"{ours} is a classifier, not a diffusion model (--classifier {ours} guides a model)"
    )
    assert refusal(lambda: load_classifier(theirs)) == f"{theirs} is a diffusion model, not a classifier"
    path = bare(tmp_path / "c.pt")
    assert (
        refusal(lambda: load_checkpoint(path))
        == f"{path} is a classifier, not a diffusion model (--classifier {path} guides a model)"
    )
    path = tmp_path / "m.pt"
    assert refusal(lambda: load_classifier(path)) == f"{path} is a diffusion model, not a classifier"


def test_what_is_no_classifier(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    assert "a.pt is not a classifier of guided-diffusion's family" in refusal(
        lambda: load_classifier(tmp_path / "a.pt")
    )
    assert "does not exist" in refusal(lambda: load_classifier(tmp_path / "b.pt"))
    path = save_classifier(tmp_path / "c.safetensors", classifier(), config=CLASSIFIER)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "is damaged" in refusal(lambda: load_classifier(path))
