"""The configurations: what each field refuses and says, and how they are written down."""

import json
import math
import re
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    PictureSet,
    QualityConfig,
    RuntimeConfig,
    SampleConfig,
    TrainConfig,
    channel_mult_for,
    is_table_size,
    with_multipliers,
)
from fastdiff.models import build_model

from .support import refusal

CONFIGS = [ModelConfig, DiffusionConfig, DataConfig, TrainConfig, SampleConfig, RuntimeConfig]

ENUM_FIELDS = [
    (DiffusionConfig, "noise_schedule", "linear, cosine"),
    (DiffusionConfig, "prediction", "epsilon, x_start, v, flow"),
    (DiffusionConfig, "weighting", "none, min-snr, sigmoid"),
    (DataConfig, "labels", "auto, prefix, folder"),
    (DataConfig, "cache", "auto, memory, disk"),
    (TrainConfig, "schedule_sampler", "uniform, loss-second-moment"),
    (TrainConfig, "parallel", "ddp, fsdp"),
    (TrainConfig, "tracker", "none, wandb, trackio"),
    (SampleConfig, "sampler", "ddpm, ddim, dpm++, dpm++-sde, dpm++3m, unipc, ipndm, heun"),
    (SampleConfig, "class_mix", "balanced, data"),
    (RuntimeConfig, "precision", "auto, fp32, tf32, bf16, fp16"),
    (RuntimeConfig, "compile", "auto, on, off"),
    (RuntimeConfig, "kernels", "auto, triton, torch, reference"),
    (RuntimeConfig, "memory_format", "channels_last, contiguous"),
]

REFUSED: list[tuple[type[Config], str, Any]] = [
    (ModelConfig, "image_size", 0),
    (ModelConfig, "image_size", -64),
    (ModelConfig, "num_channels", 0),
    (ModelConfig, "num_channels", 100),
    (ModelConfig, "num_res_blocks", 0),
    (ModelConfig, "num_heads", 0),
    (ModelConfig, "num_heads", 5),
    (ModelConfig, "num_heads_upsample", 0),
    (ModelConfig, "num_heads_upsample", -2),
    (ModelConfig, "num_heads_upsample", 7),
    (ModelConfig, "num_classes", 0),
    (ModelConfig, "num_classes", 10**30),
    (ModelConfig, "attention_resolutions", "16,eight"),
    (ModelConfig, "attention_resolutions", None),
    (ModelConfig, "attention_resolutions", (16, -8)),
    (ModelConfig, "attention_resolutions", (16, 0)),
    (ModelConfig, "dropout", -0.1),
    (ModelConfig, "dropout", 1.0),
    (ModelConfig, "channel_mult", "1,x"),
    (ModelConfig, "channel_mult", (1, 0)),
    (ModelConfig, "channel_mult", (1, -2)),
    (ModelConfig, "small_size", 0),
    (ModelConfig, "small_size", 65),
    (ModelConfig, "small_size", 16.0),
    (DiffusionConfig, "diffusion_steps", 0),
    (DiffusionConfig, "diffusion_steps", -1),
    (DiffusionConfig, "diffusion_steps", 2**31),
    (DiffusionConfig, "min_snr_gamma", 0.0),
    (DiffusionConfig, "noise_shift", -1.0),
    (DiffusionConfig, "sigmoid_bias", 100.0),
    (TrainConfig, "steps", 0),
    (TrainConfig, "batch_size", 0),
    (TrainConfig, "microbatch", 0),
    (TrainConfig, "microbatch", -2),
    (TrainConfig, "lr", 0.0),
    (TrainConfig, "lr", -1e-4),
    (TrainConfig, "weight_decay", -0.1),
    (TrainConfig, "lr_anneal_steps", -1),
    (TrainConfig, "lr_warmup_steps", -1),
    (TrainConfig, "grad_clip", -1.0),
    (TrainConfig, "ema_rate", "0.9999,often"),
    (TrainConfig, "ema_rate", (1.0,)),
    (TrainConfig, "ema_rate", (-0.1,)),
    (TrainConfig, "ema_rate", (math.nan,)),
    (TrainConfig, "ema_rate", (0.9, 0.9)),
    (TrainConfig, "seed", -1),
    (TrainConfig, "log_interval", 0),
    (TrainConfig, "save_interval", 0),
    (TrainConfig, "keep_last", -1),
    (TrainConfig, "preview_interval", -1),
    (SampleConfig, "num_samples", 0),
    (SampleConfig, "num_samples", 10**8 + 1),
    (SampleConfig, "batch_size", 0),
    (SampleConfig, "guidance_scale", -0.1),
    (SampleConfig, "guidance_scale", 1e4),
    (SampleConfig, "guidance_interval", (5.0, 0.3)),
    (SampleConfig, "guidance_interval", (0.0, math.inf)),
    (SampleConfig, "steps", 0),
    (SampleConfig, "steps", 2.5),
    (SampleConfig, "eta", -0.5),
    (SampleConfig, "seed", -1),
]
for kind in CONFIGS:
    for f in fields(kind):
        if f.type is bool:
            REFUSED += [(kind, f.name, "True"), (kind, f.name, 1)]
        if f.type is int:
            REFUSED += [(kind, f.name, 1.5), (kind, f.name, "3"), (kind, f.name, True)]
        if f.type is float:
            REFUSED += [(kind, f.name, math.nan), (kind, f.name, math.inf), (kind, f.name, "0.5")]


@pytest.mark.parametrize(("config", "name", "value"), REFUSED, ids=lambda v: getattr(v, "__name__", str(v)))
def test_refused_by_field_and_value(config: type[Config], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        config(**{name: value})
    message = str(caught.value)
    assert message.startswith(name)
    assert repr(value) in message


@pytest.mark.parametrize(("config", "name", "choices"), ENUM_FIELDS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_choices(config: type[Config], name: str, choices: str) -> None:
    for choice in choices.split(", "):
        assert getattr(config(**{name: choice}), name) == choice
    with pytest.raises(ValueError, match=re.escape(f"{name} must be one of {choices}, not 'vanilla'")):
        config(**{name: "vanilla"})
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        config(**{name: None})


@pytest.mark.parametrize("config", CONFIGS)
def test_every_choice_is_tested(config: type[Config]) -> None:
    enums = {f.name for f in fields(config) if isinstance(f.type, type) and f.type not in (int, float, bool, str)}
    enums = {name for name in enums if not isinstance(getattr(config(), name), tuple)}
    assert enums == {name for kind, name, _ in ENUM_FIELDS if kind is config}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_described(config: type[Config]) -> None:
    for f in fields(config):
        assert f.metadata["help"].endswith("."), f.name


@pytest.mark.parametrize("config", CONFIGS)
def test_frozen(config: type[Config]) -> None:
    made = config()
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(config)[0].name, 3)
    assert hash(made) == hash(config())


OTHER_VALUES = [
    ModelConfig(
        image_size=48,
        num_channels=64,
        attention_resolutions="12",
        channel_mult="1,2",
        small_size=24,
        class_cond=True,
        num_classes=7,
        dropout=0.25,
    ),
    DiffusionConfig(noise_schedule="cosine", timestep_respacing="10,15", learn_sigma=True),
    DataConfig(data_dir="some/where", labels="folder", cache="disk", window="0,4095", max_pixels=100),
    TrainConfig(ema_rate="0.9999,0.999", lr=3e-4, schedule_sampler="loss-second-moment"),
    SampleConfig(sampler="ddim", steps=50, eta=0.5),
    RuntimeConfig(precision="bf16", kernels="reference"),
]


@pytest.mark.parametrize("config", [*(kind() for kind in CONFIGS), *OTHER_VALUES], ids=lambda c: type(c).__name__)
def test_round_trip_through_json(config: Config) -> None:
    back = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert [type(getattr(back, f.name)) for f in fields(back)] == [type(getattr(config, f.name)) for f in fields(back)]


def test_from_dict_takes_defaults_and_refuses_unknown_names() -> None:
    assert ModelConfig.from_dict({"image_size": 32}) == ModelConfig(image_size=32)
    with pytest.raises(ValueError, match="ModelConfig has no field colour, sise"):
        ModelConfig.from_dict({"sise": 32, "image_size": 32, "colour": 1})


def test_defaults_are_the_originals() -> None:
    model, diffusion = ModelConfig().to_dict(), DiffusionConfig().to_dict()
    assert model == {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "attention_resolutions": [16, 8],
        "dropout": 0.0,
        "learn_sigma": False,
        "class_cond": False,
        "num_classes": 1000,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "channel_mult": None,
        "small_size": None,
        # guided-diffusion's
        "num_head_channels": -1,
        "resblock_updown": False,
        "use_new_attention_order": False,
        "patch_size": 1,
        "augment_dim": 0,
    }
    assert diffusion == {
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "learn_sigma": False,
        "sigma_small": False,
        "prediction": "epsilon",
        "predict_xstart": False,
        "weighting": "none",
        "min_snr_gamma": 5.0,
        "sigmoid_bias": 0.0,
        "noise_shift": 1.0,
        "zero_terminal_snr": False,
        "use_kl": False,
        "rescale_timesteps": True,
        "rescale_learned_sigmas": True,
    }
    train = TrainConfig()
    assert (train.lr, train.weight_decay, train.ema_rate, train.microbatch) == (1e-4, 0.0, (0.9999,), -1)
    assert (train.log_interval, train.save_interval, train.schedule_sampler) == (10, 10_000, "uniform")


@pytest.mark.parametrize("given", ["16,8", " 16 , 8 ", "16,8,", [16, 8], (16, 8), ("16", "8")])
def test_tuples_from_strings_and_sequences(given: Any) -> None:
    assert ModelConfig(attention_resolutions=given).attention_resolutions == (16, 8)
    assert ModelConfig(channel_mult=given, image_size=64).channel_mult == (16, 8)


def test_a_single_number_is_a_tuple_too() -> None:
    assert ModelConfig(attention_resolutions=16).attention_resolutions == (16,)
    assert ModelConfig(attention_resolutions="16").attention_resolutions == (16,)
    assert TrainConfig(ema_rate=0.999).ema_rate == (0.999,)
    assert TrainConfig(ema_rate="0.9999, 0.999").ema_rate == (0.9999, 0.999)
    assert ModelConfig(attention_resolutions="").attention_resolutions == ()


@pytest.mark.parametrize("none", [None, "", ()])
def test_no_channel_mult_means_by_image_size(none: Any) -> None:
    config = ModelConfig(channel_mult=none)
    assert config.channel_mult is None
    assert config.multipliers == (1, 2, 3, 4)
    assert with_multipliers(config).channel_mult == (1, 2, 3, 4)
    assert with_multipliers(config).multipliers == config.multipliers


def test_numpys_numbers_are_numbers() -> None:
    config = ModelConfig(
        image_size=np.int64(16),
        channel_mult=(np.int32(1), 2),
        attention_resolutions=np.int64(8),
        dropout=np.float32(0.5),
    )
    assert config == ModelConfig(image_size=16, channel_mult=(1, 2), attention_resolutions=(8,), dropout=0.5)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    for wrong in (np.float32(1.5), np.float64(1.5)):
        assert ModelConfig(channel_mult=(wrong,), attention_resolutions=()).to_dict()["channel_mult"] == [1.5]
        with pytest.raises(ValueError, match="image_size must be a whole number"):
            ModelConfig(image_size=wrong)


@pytest.mark.parametrize(("name", "value"), [("num_res_blocks", 1.5), ("attention_resolutions", (16.5,))])
def test_fractions_are_no_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ModelConfig(**{name: value})


@pytest.mark.parametrize(("config", "name"), [(DiffusionConfig, "timestep_respacing"), (DataConfig, "data_dir")])
def test_strings_are_strings(config: type[Config], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        config(**{name: 250})


def test_derived_values() -> None:
    assert ModelConfig().out_channels == 3
    assert ModelConfig(learn_sigma=True).out_channels == 6
    assert ModelConfig().heads_upsample == 4
    assert ModelConfig(num_heads_upsample=2).heads_upsample == 2
    assert SampleConfig().respacing is None
    assert SampleConfig(steps=50).respacing == "50"
    assert SampleConfig(timestep_respacing="ddim50").respacing == "ddim50"


def test_steps_and_respacing_together_are_refused() -> None:
    with pytest.raises(ValueError, match="steps and timestep_respacing"):
        SampleConfig(steps=50, timestep_respacing="50")


# image sizes and levels

TABLE = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
OTHERS = {28: (1, 2, 2), 48: (1, 2, 3, 4), 96: (1, 1, 2, 3, 4), 1024: (1, 1, 1, 1, 2, 2, 4, 4)}


@pytest.mark.parametrize(("size", "mult"), [*TABLE.items(), *OTHERS.items()])
def test_channel_mult_by_image_size(size: int, mult: tuple[int, ...]) -> None:
    assert channel_mult_for(size) == mult
    assert ModelConfig(image_size=size).multipliers == mult
    assert is_table_size(size) == (size in TABLE)


def test_512_pixels_begin_with_half_the_channels_where_the_norms_allow_it() -> None:
    assert ModelConfig(image_size=512, num_channels=192).widths[:2] == (96, 192)
    assert ModelConfig(image_size=512, num_channels=96).multipliers == (1, 1, 1, 2, 2, 4, 4)
    upsampler = ModelConfig(image_size=512, num_channels=192, small_size=128)  # guided-diffusion's
    assert upsampler.multipliers == TABLE[256]


def test_widths_of_fractional_multipliers() -> None:
    config = ModelConfig(num_channels=96, channel_mult=f"1, {4 / 3},{5 / 3}")
    assert config.widths == (96, 128, 160)
    assert ModelConfig(channel_mult=(1.0, 2)).to_dict()["channel_mult"] == [1, 2]
    for mult, gives in ((1.3, "166.4"), (0.1, "12.8"), (0.125, "16")):
        with pytest.raises(
            ValueError, match=rf"channel_mult {mult} gives a level {gives} channels: every width must be"
        ):
            ModelConfig(channel_mult=(1, mult))
    for wrong in ("1,half", (1, float("nan")), (1, float("inf")), (1, -0.5), (1, 0)):
        with pytest.raises(ValueError, match="channel_mult must be"):
            ModelConfig(channel_mult=wrong)


def test_heads_by_their_width() -> None:
    config = ModelConfig(num_channels=64, attention_resolutions="64,16", num_heads=4, num_heads_upsample=2)
    assert config.attention_heads == ((4, 4, 4), (2, 2))
    assert replace(config, num_head_channels=32).attention_heads == ((2, 6, 8), (2, 6))
    with pytest.raises(ValueError, match="num_head_channels 48 does not divide the 64 channels of a level with att"):
        replace(config, num_head_channels=48)
    with pytest.raises(ValueError, match="num_head_channels must be positive, or -1, not 0"):
        replace(config, num_head_channels=0)


@pytest.mark.parametrize("size", [4, 8, 16, 20, 28, 48])
def test_the_chosen_levels_make_a_model_that_runs(size: int) -> None:
    config = ModelConfig(image_size=size, num_channels=32, num_res_blocks=1)
    with torch.no_grad():
        out = build_model(config)(torch.zeros(1, 3, size, size), torch.zeros(1))
    assert out.shape == (1, 3, size, size)


@given(st.integers(32, 4096))
def test_sizes_that_fit_end_at_4_to_8_pixels(size: int) -> None:
    halvings = len(channel_mult_for(size)) - 1
    if size % 2**halvings == 0:
        assert 4 <= size >> halvings <= 8
        ModelConfig(image_size=size)


@settings(max_examples=200)
@given(st.integers(1, 3000), st.none() | st.lists(st.integers(1, 4), min_size=2, max_size=8))
def test_the_error_names_sizes_that_do_fit(size: int, mult: list[int] | None) -> None:
    factor = 2 ** (len(mult or channel_mult_for(size)) - 1)
    if size % factor == 0:
        assert ModelConfig(image_size=size, channel_mult=mult).image_size == size
        return
    with pytest.raises(ValueError, match=rf"^image_size {size} .* multiple of {factor}, such as ") as caught:
        ModelConfig(image_size=size, channel_mult=mult)
    match = re.search(r"such as (?:(\d+) or )?(\d+);", str(caught.value))
    assert match
    below, above = (int(group) if group else None for group in match.groups())
    assert above
    assert size < above < size + factor
    assert below is None if size < factor else below and size - factor < below < size
    for near in filter(None, (below, above)):
        assert ModelConfig(image_size=near, channel_mult=mult).image_size == near


@given(st.integers(3, 10), st.lists(st.integers(0, 11), max_size=4), st.integers(1, 4))
def test_attention_levels_are_the_originals_for_powers_of_two(log_size: int, log_r: list[int], levels: int) -> None:
    size, resolutions = 2**log_size, tuple(2**r for r in log_r)
    config = ModelConfig(image_size=size, attention_resolutions=resolutions, channel_mult=(1,) * levels)
    downsampled = {size // r for r in resolutions}  # the original's attention_ds
    assert config.attention_levels == {level for level in range(levels) if 2**level in downsampled}


@pytest.mark.parametrize(
    ("size", "resolutions", "levels"), [(96, "16,8", {3, 4}), (28, "16,8", {1, 2}), (48, "64", ())]
)
def test_attention_levels_at_other_sizes(size: int, resolutions: str, levels: Any) -> None:
    assert ModelConfig(image_size=size, attention_resolutions=resolutions).attention_levels == set(levels)


def test_heads_must_divide_the_levels_that_attend_only() -> None:
    widths = {"num_channels": 32, "channel_mult": (1, 3), "attention_resolutions": ()}
    assert ModelConfig(**widths, num_heads=3).num_heads == 3  # the middle block's 96 channels
    with pytest.raises(ValueError, match="num_heads 3 does not divide the 32 channels"):
        ModelConfig(**{**widths, "attention_resolutions": (64,)}, num_heads=3)


def test_heads_upsample_need_not_divide_the_middle_block() -> None:
    ModelConfig(num_channels=32, channel_mult=(2, 3), attention_resolutions=(64,), num_heads=1, num_heads_upsample=64)


# the schedule's length


@pytest.mark.parametrize("steps", [1, 2, 19, 20])
def test_short_linear_schedules_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"diffusion_steps {steps} .*at least 21.*cosine.*timestep_respacing"):
        DiffusionConfig(diffusion_steps=steps)
    assert DiffusionConfig(diffusion_steps=steps, noise_schedule="cosine").diffusion_steps == steps


def test_the_shortest_linear_schedule() -> None:
    assert DiffusionConfig(diffusion_steps=21).diffusion_steps == 21


@pytest.mark.parametrize("changes", [{"num_channels": 32 * 10**30}, {"channel_mult": (1, 2**60)}], ids=str)
def test_a_width_beyond_every_model_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^channel_mult \d+ gives a level more than 1,048,576 channels$"):
        ModelConfig(**{"image_size": 32, "num_channels": 32, **changes})


def test_names_separated_by_commas() -> None:
    both = (PictureSet.DIGITS, PictureSet.PHOTOGRAPHS)
    for value in ("photographs, digits,digits", ["digits", "photographs"], both):
        assert QualityConfig(set=value).set == both
    assert QualityConfig.from_dict(QualityConfig(set="digits").to_dict()).set == ("digits",)
    for value in ("faces", "", "digits,,photographs", (), 3, None, ["digits", 3]):
        said = refusal(lambda value=value: QualityConfig(set=value))
        assert said == f"set must be one or more of digits,photographs, not {value!r}"
