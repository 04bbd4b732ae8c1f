"""Checkpoints of models: with everything in them that is needed to use them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fastdiff import DiffusionConfig, build_model, load_checkpoint, save_checkpoint
from fastdiff.checkpoint import model_metadata
from fastdiff.checkpoint.files import write_tensors

from .support import DIFFUSION, MODEL, save


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    model = build_model(MODEL)
    path = tmp_path / "new" / "m.safetensors"
    described = {"model_config": MODEL, "diffusion_config": DIFFUSION, "step": 12, "class_names": ("a", "b", "c")}
    assert save_checkpoint(path, model, **described, ema_rate=0.99) == path
    loaded = load_checkpoint(str(path))
    assert (loaded.model_config, loaded.diffusion_config) == (MODEL, DIFFUSION)
    assert (loaded.step, loaded.class_names, loaded.metadata["ema_rate"]) == (12, ("a", "b", "c"), 0.99)
    assert loaded.diffusion.num_timesteps == 5
    assert not loaded.model.training
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_model_for_inference_is_not_saved(tmp_path: Path) -> None:
    """Its weights are elsewhere: no file of them could be loaded."""
    with pytest.raises(ValueError, match="for inference only: save it before"):
        save_checkpoint(
            tmp_path / "m.safetensors",
            build_model(MODEL).for_inference(),
            model_config=MODEL,
            diffusion_config=DIFFUSION,
        )
    assert not (tmp_path / "m.safetensors").exists()


def test_the_metadata_are_plain_json_with_the_widths_written_out(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", replace(MODEL, channel_mult=None))
    with safe_open(path, framework="pt") as file:
        (text,) = file.metadata().values()
    metadata = json.loads(text)
    assert metadata["kind"] == "model"
    assert metadata["model_config"]["channel_mult"] == [1, 2, 2]  # 8 pixels have no entry in the original's table
    assert metadata["diffusion_config"]["noise_schedule"] == "cosine"
    assert load_checkpoint(path).model_config.channel_mult == (1, 2, 2)


def test_device_and_kernels_are_the_readers_choice(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors")
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 2])
    outputs = [load_checkpoint(path, kernels=kernels).model(x, t, y) for kernels in ("reference", "torch")]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_file_is_not_overruled_by_another_process(tmp_path: Path) -> None:
    """A checkpoint knows its process; another one is for bare state dicts."""
    path = save(tmp_path / "m.safetensors")
    other = DiffusionConfig(diffusion_steps=1000)
    try:
        loaded = load_checkpoint(path, diffusion_config=other)
    except ValueError:
        return  # a refusal would do too
    assert loaded.diffusion_config == DIFFUSION


def test_a_model_without_its_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_tensors(path, build_model(MODEL).state_dict(), model_metadata(MODEL, None, 0))
    with pytest.raises(ValueError, match=r"m\.safetensors has no diffusion_config in its metadata: save it with"):
        load_checkpoint(path)


BARE = {"image_size": 8, "num_heads": 4, "diffusion_steps": 20, "noise_schedule": "cosine"}


def test_a_bare_state_dict_is_recognised(tmp_path: Path) -> None:
    model = build_model(MODEL)
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(
        ValueError,
        match=r"model\.pt is a bare state dict: .*--image-size, --num-heads \(or --num-head-channels\), --dif",
    ):
        load_checkpoint(path)
    wanted = [
        load_checkpoint(path, model_config=MODEL, diffusion_config=DIFFUSION),
        load_checkpoint(path, model_config=MODEL, given={**BARE, "timestep_respacing": "5"}),
        load_checkpoint(path, diffusion_config=DIFFUSION, given={"image_size": 8, "num_heads": 4}),
        load_checkpoint(path, given={**BARE, "timestep_respacing": "5"}),
    ]
    for loaded in wanted:
        assert replace(loaded.model_config, attention_resolutions=(16, 8)) == MODEL
        assert loaded.model_config.attention_levels == MODEL.attention_levels
        assert (loaded.diffusion_config, loaded.step, loaded.class_names) == (DIFFUSION, 0, ())
        assert torch.equal(loaded.model.state_dict()["out.0.weight"], model.state_dict()["out.0.weight"])


def test_a_configuration_that_a_bare_state_dict_contradicts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(build_model(MODEL).state_dict(), path)
    with pytest.raises(ValueError, match=r"num_classes is 3 in .*model\.pt, but given as 4"):
        load_checkpoint(path, given={**BARE, "num_classes": 4})
    with pytest.raises(ValueError, match=r"another architecture: label_emb\.weight is \(3, 128\) in the file and \(4"):
        load_checkpoint(path, model_config=replace(MODEL, num_classes=4), diffusion_config=DIFFUSION)
    with pytest.raises(ValueError, match=r"another architecture: label_emb\.weight is \(3, 128\) in the file and abs"):
        load_checkpoint(path, model_config=replace(MODEL, class_cond=False), diffusion_config=DIFFUSION)
    with pytest.raises(ValueError, match=r"m\.safetensors already contains its configuration"):
        load_checkpoint(save(tmp_path / "m.safetensors"), given={"num_heads": 4})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = build_model(MODEL).state_dict()
    torch.save({f"module.{key}": value.to(dtype) for key, value in state.items()}, tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt", given=BARE).model.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[key], state[key].to(dtype).float()) for key in state)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model200000.pt", {"step": 200_000}),
        (
            "ema_0.9999_020000.pt",
            {"step": 20_000, "ema_rate": 0.9999, "ema_updates": 20_000, "ema_warmup": False},
        ),
        ("cifar10_uncond_50M_500K.pt", {}),
    ],
)
def test_the_name_of_a_bare_state_dict_tells_its_step(tmp_path: Path, name: str, said: dict[str, Any]) -> None:
    torch.save(build_model(MODEL).state_dict(), tmp_path / name)
    loaded = load_checkpoint(tmp_path / name, model_config=MODEL, diffusion_config=DIFFUSION)
    assert loaded.metadata == said
    assert loaded.step == said.get("step", 0)
