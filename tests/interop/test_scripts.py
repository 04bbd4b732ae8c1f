"""The flags that are printed for the originals' scripts build the same model and process there."""

import re
from dataclasses import fields, replace
from typing import Any

import pytest

from fastdiff import DiffusionConfig, ModelConfig
from fastdiff.config import with_multipliers
from fastdiff.interop.scripts import for_the_scripts
from fastdiff.presets import PRESETS

SMALL = ModelConfig(image_size=32, num_channels=32, num_res_blocks=1, num_heads=2)
GUIDED = replace(SMALL, image_size=64, resblock_updown=True, num_head_channels=32)
PROCESS = DiffusionConfig(diffusion_steps=1000)
UNSCALED = replace(PROCESS, rescale_timesteps=False, rescale_learned_sigmas=False)
DEFAULTS: dict[str, dict[str, bool]] = {
    "improved-diffusion": {},
    "guided-diffusion": {"rescale_timesteps": False, "rescale_learned_sigmas": False},
}
"""Of the scripts, where they are not ours."""


def there(lines: list[str]) -> tuple[str, ModelConfig, DiffusionConfig]:
    """The project that the last two lines name, and what its scripts make of the flags."""
    project = lines[-2].removeprefix("the file holds tensors only; the flags for ").removesuffix("'s scripts are:")
    words = lines[-1].replace("--large_size", "--image_size").replace("--", "").split()
    types = {f.name: f.type for config in (ModelConfig, DiffusionConfig) for f in fields(config)}
    types |= {"small_size": int, "attention_resolutions": str, "channel_mult": str, "noise_schedule": str}
    values: dict[str, Any] = dict(DEFAULTS[project])
    for name, word in zip(words[::2], words[1::2], strict=True):
        values[name] = word == "True" if types[name] is bool else types[name](word)
    return project, ModelConfig.from_flags(values), DiffusionConfig.from_flags(values)


@pytest.mark.parametrize("name", PRESETS)
def test_the_released_models_flags_are_their_projects_own(name: str) -> None:
    model, process = PRESETS[name].config(ModelConfig), PRESETS[name].config(DiffusionConfig)
    lines = list(for_the_scripts(with_multipliers(model), process))
    project, theirs, steps = there(lines)
    assert project == ("guided-diffusion" if model.resblock_updown else "improved-diffusion")
    assert (with_multipliers(theirs), steps) == (with_multipliers(model), process)
    assert "channel_mult" not in lines[-1]
    assert lines[:-2] == (
        ["only improved-diffusion's 128x128 fork supports image_size 128"] if name == "fork_128" else []
    )


def test_the_flags_as_they_are_printed() -> None:
    model, process = (
        PRESETS["64_256_upsampler"].config(ModelConfig),
        PRESETS["64_256_upsampler"].config(DiffusionConfig),
    )
    assert list(for_the_scripts(model, process))[-1] == (
        "  --large_size 256 --small_size 64 --num_channels 192 --attention_resolutions 32,16,8 --learn_sigma True "
        "--class_cond True --resblock_updown True"
    )
    assert list(for_the_scripts(GUIDED, PROCESS))[-1] == (
        "  --image_size 64 --num_channels 32 --num_res_blocks 1 --num_heads 2 --num_head_channels 32 "
        "--resblock_updown True --rescale_timesteps True --rescale_learned_sigmas True"
    )


@pytest.mark.parametrize(
    ("model", "project"),
    [
        (SMALL, "improved"),
        (replace(SMALL, num_head_channels=32), "guided"),
        (replace(SMALL, resblock_updown=True), "guided"),
        (replace(SMALL, use_new_attention_order=True), "guided"),
        (replace(SMALL, channel_mult=(1, 2)), "guided"),  # which has a flag for it
        (replace(SMALL, image_size=512, num_channels=64), "guided"),
        (replace(SMALL, image_size=512, num_channels=32), "guided"),  # whose first level is no half here
        (replace(SMALL, image_size=256, small_size=64), "improved"),
        (replace(SMALL, image_size=512, small_size=64), "guided"),
        (replace(SMALL, image_size=96, channel_mult=(1, 1, 2, 3)), "guided"),
        (replace(SMALL, image_size=96, attention_resolutions=(), channel_mult=(1, 2)), "guided"),
        (replace(GUIDED, image_size=20, channel_mult=(1, 2)), "guided"),
    ],
)
def test_the_project_whose_scripts_have_what_the_model_needs(model: ModelConfig, project: str) -> None:
    lines = list(for_the_scripts(model, UNSCALED))
    found, theirs, process = there(lines)
    assert (found, len(lines)) == (f"{project}-diffusion", 2)
    assert (theirs.widths, theirs.attention_levels, process) == (model.widths, model.attention_levels, UNSCALED)
    same = {"channel_mult": None, "attention_resolutions": (16, 8)}
    assert replace(theirs, **same) == replace(model, **same)
    # image_size // resolution, their rule, gives the same levels
    factors = {theirs.image_size // r for r in theirs.attention_resolutions}
    assert model.attention_levels == {level for level in range(len(model.widths)) if 2**level in factors}


def test_the_resolutions_of_a_model_of_patches_are_in_patches() -> None:
    model = replace(SMALL, patch_size=2, channel_mult=(1, 1, 2), attention_resolutions=(8,))
    flags = list(for_the_scripts(model, PROCESS))[-1]
    assert "--attention_resolutions 8 " in flags
    assert "--patch_size 2" in flags


@pytest.mark.parametrize(
    ("model", "process", "lacks"),
    [
        (
            replace(SMALL, image_size=64, small_size=32, channel_mult=(1, 2)),
            PROCESS,
            "improved-diffusion's scripts lack channel_mult 1,2 at image_size 64: change",
        ),
        (
            replace(SMALL, channel_mult=(1, 1.5), num_channels=64),
            PROCESS,
            "channel_mult 1,1.5 at image_size 32: change",
        ),
        (
            replace(SMALL, patch_size=2, channel_mult=(1, 2, 2, 2)),
            PROCESS,
            "improved-diffusion's scripts lack patch_size 2: change",
        ),
        (GUIDED, replace(PROCESS, sigma_small=True), "guided-diffusion's scripts lack sigma_small True: change"),
        (
            replace(GUIDED, image_size=256, small_size=64, use_new_attention_order=True, channel_mult=(1, 2)),
            PROCESS,
            "scripts lack use_new_attention_order True and channel_mult 1,2 at image_size 256: change script_util.py",
        ),
        (
            replace(SMALL, image_size=256, small_size=64),
            replace(PROCESS, sigma_small=True),
            "improved-diffusion's scripts lack sigma_small True: change script_util.py",
        ),
        (
            replace(GUIDED, class_cond=True, num_classes=7),
            PROCESS,
            "guided-diffusion's .*1000 classes: set NUM_CLASSES = 7",
        ),
    ],
)
def test_what_the_scripts_lack_is_said(model: ModelConfig, process: DiffusionConfig, lacks: str) -> None:
    first, *_, flags = for_the_scripts(model, process)
    assert re.search(lacks, first)
    assert flags.startswith("  --")
