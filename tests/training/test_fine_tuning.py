"""What a run that starts from a file's weights may change, and how it learns what a bare state dict does not say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff import DiffusionConfig, ModelConfig, build_model, save_checkpoint
from fastdiff.config import RunConfig
from fastdiff.presets import with_preset
from fastdiff.training.fine_tuning import carried_over, configuration, flags_to_fine_tune, read_initial

from ..support import refusal

GUIDED = ModelConfig(
    image_size=32,
    num_channels=64,
    num_res_blocks=1,
    channel_mult=(1, 1.5),
    attention_resolutions=(32,),
    num_head_channels=32,
    resblock_updown=True,
    use_new_attention_order=True,
)
FOUR_HEADS = replace(GUIDED, channel_mult=(2, 2), num_head_channels=-1)
"""One per 32 channels, too."""
PROCESS = DiffusionConfig(rescale_timesteps=False)


def file(folder: Path, model: ModelConfig = GUIDED, suffix: str = "safetensors") -> Path:
    state = build_model(model).state_dict()
    if suffix == "safetensors":
        return save_checkpoint(folder / "m.safetensors", state, model_config=model, diffusion_config=PROCESS)
    torch.save(state, folder / "m.pt")
    return folder / "m.pt"


def begun(path: Path, **flags: Any) -> ModelConfig:
    return configuration(read_initial(path, flags), flags)[0]


def test_the_files_architecture_is_taken(tmp_path: Path) -> None:
    path = file(tmp_path)
    assert begun(path) == GUIDED
    assert begun(path, dropout=0.1, image_size=64) == replace(
        GUIDED, dropout=0.1, image_size=64, attention_resolutions=(64,)
    )
    same = {"resblock_updown": True, "use_new_attention_order": True, "channel_mult": "1,1.5", "num_head_channels": 32}
    assert begun(path, **same) == GUIDED


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"use_new_attention_order": False}, "use_new_attention_order is True in .* and False on the command line"),
        ({"resblock_updown": False}, "resblock_updown is True in .* and False on the command line: leave the flag out"),
        (
            {"num_head_channels": 64},
            "num_heads is one per 32 channels in .* and one per 64 channels on the command line",
        ),
        ({"num_heads": 1}, "num_heads is one per 32 channels in .* and 1 on the command line: leave the flag out"),
        ({"channel_mult": "1,1"}, r"channel_mult is \(1, 1.5\) in .* and \(1, 1\) on the command line"),
    ],
)
def test_what_would_make_the_weights_meaningless_is_refused(tmp_path: Path, flags: dict[str, Any], said: str) -> None:
    refusal(lambda: begun(file(tmp_path, replace(GUIDED, num_channels=128)), **flags), said)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        (FOUR_HEADS, {"num_heads": 4}),
        (FOUR_HEADS, {"num_head_channels": 32}),
        (replace(FOUR_HEADS, num_head_channels=32), {"num_heads": 4}),
        (replace(FOUR_HEADS, num_head_channels=32, num_heads=1), {"num_heads": 4}),
        (replace(FOUR_HEADS, num_head_channels=32), {"num_heads": 2, "num_head_channels": 32}),
        (replace(FOUR_HEADS, num_heads_upsample=4), {"num_heads_upsample": -1}),
    ],
)
def test_heads_are_compared_by_their_meaning(tmp_path: Path, model: ModelConfig, flags: dict[str, Any]) -> None:
    found = begun(file(tmp_path, model), **flags)
    assert found.attention_heads == FOUR_HEADS.attention_heads == ((4, 4), (4,))


@pytest.mark.parametrize("before", [0, 9])
@pytest.mark.parametrize("augment", [0.0, 0.1])
def test_augmentation_may_begin_and_end(tmp_path: Path, before: int, augment: float) -> None:
    path = file(tmp_path, replace(GUIDED, augment_dim=before))
    weights = read_initial(path, {"augment": augment})
    flags, _ = flags_to_fine_tune(weights, {"augment": augment, "data_dir": "x"})
    config = RunConfig.from_flags(flags).model
    assert config == replace(GUIDED, augment_dim=9 if augment else before)
    assert isinstance(config, ModelConfig)
    own = build_model(config).state_dict()
    state, said = carried_over(weights, own, lambda name: own[name], ())
    assert state.keys() == own.keys()
    new = augment > 0 and not before
    assert said == [f"{path} was trained without --augment: the layer that is told of it is newly initialised"] * new
    if before:
        assert state["augment_emb.weight"] is weights.state["augment_emb.weight"]


def test_heads_of_the_upsampling_half_are_named(tmp_path: Path) -> None:
    said = "num_heads_upsample is -1 in .* and 2 on the command line"
    refusal(lambda: begun(file(tmp_path, FOUR_HEADS), num_heads_upsample=2), said)


def test_a_bare_file_of_improved_diffusion_has_its_defaults(tmp_path: Path) -> None:
    model = replace(FOUR_HEADS, resblock_updown=False, use_new_attention_order=False)
    weights = read_initial(file(tmp_path, model, "pt"), {"image_size": 32})
    assert (weights.model_config.num_heads, weights.diffusion_config) == (4, DiffusionConfig())


def test_a_bare_file_of_guided_diffusion_asks(tmp_path: Path) -> None:
    """Its models have heads of any kind, and qkv in one of two orders: nothing is assumed."""
    path, flags = file(tmp_path, GUIDED, "pt"), {"image_size": 32, "diffusion_steps": 1000, "noise_schedule": "linear"}
    asks = r"must be given: --num-heads \(or --num-head-channels\) and --use-new-attention-order \(or --no-use-new-"
    refusal(lambda: read_initial(path, flags), asks)
    flags |= {"num_head_channels": 32, "use_new_attention_order": True}
    assert read_initial(path, flags).model_config == GUIDED
    assert read_initial(path, flags).diffusion_config == replace(PROCESS, rescale_learned_sigmas=False)


def test_a_preset_says_what_a_bare_file_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its defaults too: the order of qkv, for instance, is not among its flags."""
    from fastdiff.presets import PRESETS, Preset

    small = {"num_channels": 64, "num_res_blocks": 1, "image_size": 32, "channel_mult": "1,2"}
    for name in ("256x256_diffusion", "64x64_diffusion"):
        monkeypatch.setitem(PRESETS, name, Preset("small", {**PRESETS[name].flags, **small}))  # type: ignore[arg-type]
        wanted = PRESETS[name].config(ModelConfig)
        path = file(tmp_path, wanted, "pt")
        flags = with_preset({"preset": name, "class_cond": False, "lr": 1e-5}, name)
        found, _ = flags_to_fine_tune(read_initial(path, flags), flags)
        assert ModelConfig.from_flags(found) == replace(wanted, class_cond=False)
        assert (found["lr"], found["noise_schedule"]) == (1e-5, PRESETS[name].config(DiffusionConfig).noise_schedule)
