"""The presets against the flag groups of improved-diffusion's README and the 128x128 recipe."""

from dataclasses import fields
from typing import Any

import pytest

from fastdiff.config import DataConfig, DiffusionConfig, ModelConfig, RuntimeConfig, SampleConfig, TrainConfig
from fastdiff.presets import PRESETS, preset_named

CONFIGS = [ModelConfig, DiffusionConfig, DataConfig, TrainConfig, SampleConfig, RuntimeConfig]

# Copied flag by flag from the section "Models and Hyperparameters".
README = {
    "imagenet64_uncond": "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
    "--diffusion_steps 4000 --noise_schedule cosine --lr 1e-4 --batch_size 128",
    "cifar10_uncond": "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
    "--diffusion_steps 4000 --noise_schedule cosine --lr 1e-4 --batch_size 128",
    "imagenet64_cond": "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True "
    "--diffusion_steps 4000 --noise_schedule cosine --rescale_learned_sigmas False --rescale_timesteps False "
    "--lr 3e-4 --batch_size 2048",
    # the sizes are the defaults of the super-resolution scripts
    "upsample_256": "--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True "
    "--diffusion_steps 4000 --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False "
    "--lr 3e-4 --batch_size 256 --image_size 256 --small_size 64",
    "lsun_bedroom": "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 "
    "--diffusion_steps 1000 --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False "
    "--lr 1e-4 --batch_size 128",
    "lsun_bedroom_lr2e-5": "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 "
    "--diffusion_steps 1000 --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False "
    "--lr 2e-5 --batch_size 128",
    "imagenet64_uncond_vlb": "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
    "--diffusion_steps 4000 --noise_schedule cosine --use_kl True "
    "--lr 1e-4 --batch_size 128 --schedule_sampler loss-second-moment",
    "cifar10_uncond_vlb": "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
    "--diffusion_steps 4000 --noise_schedule cosine --use_kl True "
    "--lr 1e-4 --batch_size 128 --schedule_sampler loss-second-moment",
}
FORK_128 = (
    "--image_size 128 --num_channels 192 --num_res_blocks 2 --attention_resolutions 32,16 --dropout 0.1 "
    "--learn_sigma True --use_scale_shift_norm True --class_cond False --diffusion_steps 4000 --noise_schedule linear "
    "--lr 1e-4 --batch_size 16 --save_interval 20000 --precision fp16"
)
FLAGS = README | {"fork_128": FORK_128}


def parsed(flags: str) -> dict[str, Any]:
    words = flags.split()
    types = {f.name: f.type for config in CONFIGS for f in fields(config)}

    def value(name: str, word: str) -> Any:
        if word in ("True", "False"):
            return word == "True"
        return float(word) if types[name] is float else int(word) if word.isdigit() and "," not in word else word

    return {name.removeprefix("--"): value(name[2:], word) for name, word in zip(words[::2], words[1::2], strict=True)}


def test_every_preset_is_tested() -> None:
    assert set(PRESETS) == set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str) -> None:
    wanted = parsed(FLAGS[name])
    for config in (ModelConfig, DiffusionConfig, TrainConfig, RuntimeConfig):
        names = {f.name for f in fields(config)}
        expected = config(**{key: value for key, value in wanted.items() if key in names})
        assert preset_named(name).config(config) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_no_flag_is_of_no_configuration(name: str) -> None:
    known = {f.name for config in CONFIGS for f in fields(config)}
    assert set(PRESETS[name].flags) <= known
    assert PRESETS[name].about


@pytest.mark.parametrize("name", ["imagenet64_cond", "upsample_256", "lsun_bedroom", "lsun_bedroom_lr2e-5"])
def test_unscaled_presets(name: str) -> None:
    config = PRESETS[name].config(DiffusionConfig)
    assert config.rescale_timesteps is False
    assert config.rescale_learned_sigmas is False


@pytest.mark.parametrize("name", PRESETS)
def test_both_configs_agree_on_the_variance(name: str) -> None:
    preset = PRESETS[name]
    assert preset.config(ModelConfig).learn_sigma is preset.config(DiffusionConfig).learn_sigma is True


def test_levels_and_heads() -> None:
    assert PRESETS["fork_128"].config(ModelConfig).multipliers == (1, 1, 2, 3, 4)
    assert PRESETS["fork_128"].config(ModelConfig).attention_levels == {2, 3}
    assert PRESETS["lsun_bedroom"].config(ModelConfig).attention_levels == {4}
    assert PRESETS["upsample_256"].config(ModelConfig).attention_levels == {4, 5}
    assert PRESETS["cifar10_uncond"].config(ModelConfig).attention_levels == {1, 2}


def test_an_unknown_preset_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"imagenet64_uncond, .*fork_128, not 'imagenet'"):
        preset_named("imagenet")
