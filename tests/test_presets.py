"""The presets against the flag groups of the two projects' READMEs and the 128x128 recipe."""

from dataclasses import fields
from typing import Any

import pytest

from fastdiff.config import (
    UNUSED_BY_CLASSIFIERS,
    ClassifierConfig,
    ClassifierTrainConfig,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    RuntimeConfig,
    SampleConfig,
    TrainConfig,
    with_multipliers,
)
from fastdiff.presets import CLASSIFIER_PRESETS, PRESETS, described_by, preset_named, with_preset

CONFIGS = [ModelConfig, ClassifierConfig, DiffusionConfig, DataConfig, TrainConfig, SampleConfig, RuntimeConfig]

# Copied flag by flag from improved-diffusion's section "Models and Hyperparameters".
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
    "lsun_uncond": "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 "
    "--diffusion_steps 1000 --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False "
    "--lr 1e-4 --batch_size 128",
    "lsun_uncond_lr2e-5": "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
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
_LSUN = (
    "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --dropout 0.1 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True"
)
# Copied flag by flag from guided-diffusion's section "Sampling from pre-trained models", but for --use_fp16: the
# precision is the user's choice. What the README leaves out stands in GUIDED_DEFAULTS.
GUIDED = {
    "64x64_diffusion": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 "
    "--image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 "
    "--num_res_blocks 3 --resblock_updown True --use_new_attention_order True --use_scale_shift_norm True",
    "128x128_diffusion": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    "256x256_diffusion": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    "256x256_diffusion_uncond": "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 "
    "--image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 "
    "--num_res_blocks 2 --resblock_updown True --use_scale_shift_norm True",
    "512x512_diffusion": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 512 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    # --large_size is --image_size here
    "64_256_upsampler": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 256 "
    "--small_size 64 --learn_sigma True --noise_schedule linear --num_channels 192 --num_heads 4 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    "128_512_upsampler": "--attention_resolutions 32,16 --class_cond True --diffusion_steps 1000 --image_size 512 "
    "--small_size 128 --learn_sigma True --noise_schedule linear --num_channels 192 --num_head_channels 64 "
    "--num_res_blocks 2 --resblock_updown True --use_scale_shift_norm True",
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": _LSUN.replace("0.1", "0.0"),
}
GUIDED_DEFAULTS = (
    "--image_size 64 --num_channels 128 --num_res_blocks 2 --num_heads 4 --num_heads_upsample -1 "
    "--num_head_channels -1 --attention_resolutions 16,8 --dropout 0.0 --class_cond False --use_checkpoint False "
    "--use_scale_shift_norm True --resblock_updown False --use_new_attention_order False --learn_sigma False "
    "--diffusion_steps 1000 --noise_schedule linear --use_kl False --predict_xstart False --rescale_timesteps False "
    "--rescale_learned_sigmas False --weight_decay 0.0 --lr_anneal_steps 0 --ema_rate 0.9999"
)
# Dhariwal & Nichol 2021, tables 11 and 13
GUIDED_TRAINING = dict.fromkeys(GUIDED, "--lr 1e-4 --batch_size 256") | {
    "64x64_diffusion": "--lr 3e-4 --batch_size 2048"
}
FLAGS = README | {"fork_128": FORK_128} | {n: f"{GUIDED_DEFAULTS} {f} {GUIDED_TRAINING[n]}" for n, f in GUIDED.items()}

# The README has all of the 128x128 classifier's flags, --classifier_depth 4 for 64x64, and the scripts' defaults; the
# rest is in Dhariwal & Nichol 2021, table 12.
_CLASSIFIER = (
    "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 "
    "--classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True "
    "--diffusion_steps 1000 --noise_schedule linear --rescale_timesteps False --lr_anneal_steps 300000 "
    "--batch_size 256 --lr 3e-4 --weight_decay 0.05"
)
CLASSIFIERS = {
    "64x64_classifier": f"{_CLASSIFIER} --image_size 64 --classifier_depth 4 --noise_schedule cosine "
    "--batch_size 1024 --lr 6e-4 --weight_decay 0.2",
    "128x128_classifier": _CLASSIFIER,
    "256x256_classifier": f"{_CLASSIFIER} --image_size 256 --lr_anneal_steps 500000",
    "512x512_classifier": f"{_CLASSIFIER} --image_size 512 --lr_anneal_steps 500000",
}


def parsed(flags: str) -> dict[str, Any]:
    words = flags.split()
    types = {f.name: f.type for config in CONFIGS for f in fields(config)}

    def value(name: str, word: str) -> Any:
        if word in ("True", "False"):
            return word == "True"
        return float(word) if types[name] is float else int(word) if word.lstrip("-").isdigit() else word

    return {name.removeprefix("--"): value(name[2:], word) for name, word in zip(words[::2], words[1::2], strict=True)}


def test_every_preset_is_tested() -> None:
    assert set(PRESETS) == set(FLAGS)
    assert set(CLASSIFIER_PRESETS) == set(CLASSIFIERS)
    assert not set(PRESETS) & set(CLASSIFIER_PRESETS)


@pytest.mark.parametrize("name", [*FLAGS, *CLASSIFIERS])
def test_flags(name: str) -> None:
    presets, model = (PRESETS, ModelConfig) if name in PRESETS else (CLASSIFIER_PRESETS, ClassifierConfig)
    wanted = parsed((FLAGS | CLASSIFIERS)[name])
    train = TrainConfig if name in PRESETS else ClassifierTrainConfig
    for config in (model, DiffusionConfig, train, RuntimeConfig):
        names = {f.name for f in fields(config)}
        expected = config(**{key: value for key, value in wanted.items() if key in names})
        assert preset_named(name, presets).config(config) == expected


@pytest.mark.parametrize("name", [*PRESETS, *CLASSIFIER_PRESETS])
def test_no_flag_is_of_no_configuration(name: str) -> None:
    known = {f.name for config in CONFIGS for f in fields(config)}
    preset = ({**PRESETS, **CLASSIFIER_PRESETS})[name]
    assert set(preset.flags) <= known
    assert preset.about
    assert name in PRESETS or not UNUSED_BY_CLASSIFIERS & set(preset.flags)


@pytest.mark.parametrize("name", ["imagenet64_cond", "upsample_256", "lsun_uncond", "lsun_uncond_lr2e-5", *GUIDED])
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
    assert PRESETS["lsun_uncond"].config(ModelConfig).attention_levels == {4}
    assert PRESETS["upsample_256"].config(ModelConfig).attention_levels == {4, 5}
    assert PRESETS["cifar10_uncond"].config(ModelConfig).attention_levels == {1, 2}
    assert PRESETS["512x512_diffusion"].config(ModelConfig).multipliers == (0.5, 1, 1, 2, 2, 4, 4)
    assert PRESETS["128_512_upsampler"].config(ModelConfig).multipliers == (1, 1, 2, 2, 4, 4)
    assert PRESETS["lsun_cat"].config(ModelConfig).attention_heads == ((8, 16, 16, 16), (8, 16, 16))
    assert PRESETS["128x128_diffusion"].config(ModelConfig).attention_heads == ((4, 4, 4, 4), (4, 4, 4))


def test_an_unknown_preset_is_refused_with_the_list_and_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"imagenet64_uncond, .*fork_128, .*nodropout, not 'none'$"):
        preset_named("none")
    with pytest.raises(ValueError, match=r"not 'lsun_horses'; did you mean lsun_horse or "):
        preset_named("lsun_horses")
    with pytest.raises(ValueError, match=r"not 'lsun_bedroom_lr2e-5'; did you mean .*lsun_uncond_lr2e-5\?$"):
        preset_named("lsun_bedroom_lr2e-5")  # its name before guided-diffusion's lsun_bedroom was a preset


def test_a_preset_of_the_other_kind_is_named_as_such() -> None:
    with pytest.raises(
        ValueError, match="64x64_classifier is a classifier, and a diffusion model is wanted: one of ima"
    ):
        preset_named("64x64_classifier")
    with pytest.raises(
        ValueError, match="lsun_cat is a diffusion model, and a classifier is wanted: one of 64x64_class"
    ):
        preset_named("lsun_cat", CLASSIFIER_PRESETS)


def test_flags_go_before_the_presets() -> None:
    assert with_preset({"dropout": 0.2}, "lsun_cat")["dropout"] == 0.2
    flags = with_preset({"lr": 1.0}, "64x64_classifier", ClassifierConfig, presets=CLASSIFIER_PRESETS)
    assert (flags["lr"], flags["classifier_depth"], "batch_size" in flags) == (1.0, 4, False)


def test_a_number_of_heads_goes_before_the_presets_width_of_heads() -> None:
    """In a model's own configuration num_head_channels goes before num_heads."""
    heads = ModelConfig.from_flags(with_preset({"num_heads": 2}, "lsun_cat")).attention_heads
    assert {*heads[0], *heads[1]} == {2}
    width = ModelConfig.from_flags(with_preset({"num_heads": 2, "num_head_channels": 128}, "lsun_cat"))
    assert width.num_head_channels == 128


def test_a_preset_describes_its_model_to_the_last_field() -> None:
    said = described_by("lsun_cat")
    assert ModelConfig.from_flags(said) == with_multipliers(PRESETS["lsun_cat"].config(ModelConfig))
    assert {f.name for config in (ModelConfig, DiffusionConfig) for f in fields(config)} == set(said)
    assert described_by(None) == {}
