"""diffusers itself loads what is written for it, and its model and schedulers do what ours do."""

import inspect
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff import DiffusionConfig, ModelConfig, build_diffusion, build_model
from fastdiff.interop.diffusers import Scheduler, load_unet, read, write
from fastdiff.interop.unet2d import our_state, unet_options, unet_state
from fastdiff.models import UNet
from fastdiff.presets import PRESETS

from ..numerics import relative
from ..support import refusal
from .support import random_model

CIFAR = ModelConfig(image_size=32, num_channels=128, num_res_blocks=3, learn_sigma=True)
SMALL = ModelConfig(image_size=32, num_channels=32, num_res_blocks=1, learn_sigma=True)
AT_64 = ModelConfig(image_size=64, num_channels=32, num_res_blocks=1, attention_resolutions="8")
TINY = ModelConfig(image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,1", attention_resolutions="8")
GUIDED = ModelConfig(
    image_size=64,
    num_channels=64,
    num_res_blocks=1,
    learn_sigma=True,
    channel_mult=(1, 2, 1.5),
    attention_resolutions=(32, 16),
    num_head_channels=32,
    resblock_updown=True,
    use_new_attention_order=True,
)
COSINE = DiffusionConfig(diffusion_steps=4000, noise_schedule="cosine", learn_sigma=True)
LINEAR = DiffusionConfig()


CONFIGS = {
    "cifar10-heads": SMALL,
    "64-at-8": AT_64,
    "one-head": replace(AT_64, use_scale_shift_norm=False, num_heads=1, attention_resolutions=(32, 8)),
    "no-level-attends": replace(TINY, num_res_blocks=2, attention_resolutions=()),
    "guided": GUIDED,
    "guided-one-head": replace(
        GUIDED, num_head_channels=-1, num_heads=1, use_scale_shift_norm=False, attention_resolutions=(16,)
    ),
}
# every pair: both schedulers and both kinds of model in each architecture, and with each other
PAIRS = {
    (name, scheduler, (scheduler is Scheduler.DDIM) is (name in ("cifar10-heads", "one-head")))
    for name in CONFIGS
    for scheduler in Scheduler
}


@pytest.mark.parametrize(
    ("name", "scheduler", "class_cond"),
    [
        pytest.param(*case, marks=[] if case in PAIRS else [pytest.mark.slow])
        for case in itertools.product(CONFIGS, Scheduler, (False, True))
    ],
)
def test_the_output_is_the_same(tmp_path: Path, name: str, scheduler: Scheduler, class_cond: bool) -> None:
    config = replace(CONFIGS[name], class_cond=class_cond, num_classes=10)
    process = replace(COSINE, learn_sigma=config.learn_sigma)
    model = random_model(config)
    write(tmp_path / "x", model.state_dict(), config, process, scheduler)
    unet = load_unet(tmp_path / "x")
    x = torch.randn(2, 3, config.image_size, config.image_size)
    t, y = torch.tensor([3.0, 870.0]), torch.tensor([0, 9]) if class_cond else None
    with torch.no_grad():
        ours, theirs = model(x, t, y), unet(x, t, y).sample
    channels = 6 if config.learn_sigma and scheduler is Scheduler.DDPM else 3
    assert theirs.shape == (2, channels, *x.shape[2:])
    assert relative(theirs, ours[:, :channels]) < 1e-4


def test_the_released_cifar10_model_is_one_of_theirs() -> None:
    """52 million parameters, heads of 64 at both levels."""
    with torch.device("meta"):
        model, unet = build_model(CIFAR), diffusers.UNet2DModel(**unet_options(CIFAR, True))
    assert unet.config.attention_head_dim == 64
    theirs = {key: value.shape for key, value in unet.state_dict().items()}
    assert {key: value.shape for key, value in unet_state(model.state_dict(), CIFAR, True).items()} == theirs
    assert sum(p.numel() for p in unet.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_the_released_cifar10_model(tmp_path: Path) -> None:
    model = random_model(CIFAR)
    write(tmp_path / "x", model.state_dict(), CIFAR, COSINE, Scheduler.DDPM)
    unet = load_unet(tmp_path / "x")
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500.0])
    with torch.no_grad():
        assert relative(unet(x, t).sample, model(x, t)) < 1e-4


def from_noise(noise: Tensor) -> Callable[..., Tensor]:
    """In place of the noise that a pipeline draws first."""
    return lambda *_, **__: noise.clone()


def uint8(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).int()


def calm(config: ModelConfig) -> UNet:
    """A model whose outputs are of the size of noise, so that a run neither bursts nor is clipped everywhere."""
    model = random_model(config)
    x = torch.randn(4, 3, config.image_size, config.image_size)
    with torch.no_grad():
        model.out[2].weight /= model(x, torch.linspace(0, 999, 4)).std()
    return model


@pytest.mark.parametrize(
    ("process", "inner"),  # a random model's x_0 from its noise is mostly clipped; its own x_0 is not
    [
        pytest.param(COSINE, 0.1, id="rescaled-4000-cosine"),
        pytest.param(LINEAR, 0.1, id="1000-linear"),
        pytest.param(replace(LINEAR, diffusion_steps=400, rescale_timesteps=False), 0.1, id="400"),
        pytest.param(replace(COSINE, predict_xstart=True), 0.6, id="x_0"),
        pytest.param(replace(LINEAR, prediction="v", zero_terminal_snr=True), 0.3, id="v"),
    ],
)
def test_ten_steps_of_ddim_draw_the_same_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: DiffusionConfig, inner: float
) -> None:
    config = replace(TINY, learn_sigma=process.learn_sigma)
    model = calm(config)
    write(tmp_path / "x", model.state_dict(), config, process, Scheduler.DDIM)
    noise = torch.randn(2, 3, 16, 16)
    ours = build_diffusion(replace(process, timestep_respacing="ddim10")).ddim_sample_loop(
        model, noise.shape, noise=noise, eta=0.0
    )
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "x", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(sys.modules[diffusers.DDIMPipeline.__module__], "randn_tensor", from_noise(noise))
    theirs = pipeline(2, num_inference_steps=10, use_clipped_model_output=True, output_type="pt").images * 2 - 1
    assert (ours.abs() < 0.99).float().mean() > inner
    assert (uint8(ours) - uint8(theirs)).abs().max() <= 2


@pytest.mark.parametrize(
    ("config", "process", "variance"),
    [
        (replace(TINY, learn_sigma=True), COSINE, "learned_range"),
        (TINY, replace(LINEAR, sigma_small=True, predict_xstart=True), "fixed_small"),
        (TINY, LINEAR, "fixed_large"),
    ],
)
def test_ddpm_steps_are_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ModelConfig, process: DiffusionConfig, variance: str
) -> None:
    model = calm(config)
    write(tmp_path / "x", model.state_dict(), config, process, Scheduler.DDPM)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "x", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.variance_type == variance
    draws = [torch.randn(1, 3, 16, 16) for _ in range(11)]
    ours = build_diffusion(replace(process, timestep_respacing="ddim10")).p_sample_loop(
        model, (1, 3, 16, 16), noise=draws[0], step_noise=draws[1:]
    )
    queue = iter(draws)
    for cls in (diffusers.DDPMPipeline, diffusers.DDPMScheduler):
        monkeypatch.setattr(sys.modules[cls.__module__], "randn_tensor", lambda *_, **__: next(queue).clone())
    theirs = pipeline(1, num_inference_steps=10, output_type="pt").images * 2 - 1
    assert (uint8(ours) - uint8(theirs)).abs().max() <= 2


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    config = replace(TINY, learn_sigma=True, class_cond=True, num_classes=3, channel_mult=(1, 1), num_heads=2)
    state = random_model(config).state_dict()
    processes = [
        COSINE,
        replace(LINEAR, learn_sigma=True, diffusion_steps=2000, predict_xstart=True),
        replace(LINEAR, learn_sigma=True, diffusion_steps=50, rescale_timesteps=False),
    ]
    for i, process in enumerate(processes):
        write(tmp_path / str(i), state, config, process, Scheduler.DDPM)
        theirs, model, fields = read(tmp_path / str(i))
        assert model == config
        assert DiffusionConfig(**fields) == process
        assert list(theirs) == list(state)
        assert all(torch.equal(theirs[key], state[key]) for key in state)


def test_a_model_that_resizes_in_residual_blocks_comes_back_in_the_older_order(tmp_path: Path) -> None:
    """diffusers has q, k and v apart: their order is not in the folder."""
    model = random_model(GUIDED)
    write(tmp_path / "x", model.state_dict(), GUIDED, COSINE, Scheduler.DDPM)
    theirs, config, _ = read(tmp_path / "x")
    assert config == replace(GUIDED, use_new_attention_order=False)
    back = build_model(config).eval()
    back.load_state_dict(theirs)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, theirs[key])}
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in moved} == {"qkv"}
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500.0])
    with torch.no_grad():
        assert relative(back(x, t), model(x, t)) < 1e-6


def test_the_released_models_of_guided_diffusion() -> None:
    """Those whose heads are all 64 channels wide are UNet2DModels; the others are refused with the reason."""
    refused = {
        "128x128_diffusion": "4 heads of 128 and 192 and 256 channels",
        "512x512_diffusion": r"channel_mult 0\.5,1,1,2,2,4,4",
        "64_256_upsampler": "a super-resolution model",
        "128_512_upsampler": "a super-resolution model",
    }
    for name, preset in PRESETS.items():
        config = preset.config(ModelConfig)
        if not config.resblock_updown:
            continue
        if name in refused:
            refusal(lambda config=config: unet_options(config, True), f"diffusers cannot express {refused[name]}")
            continue
        with torch.device("meta"):
            model, unet = build_model(config), diffusers.UNet2DModel(**unet_options(config, True))
        theirs = {key: value.shape for key, value in unet.state_dict().items()}
        assert {key: value.shape for key, value in unet_state(model.state_dict(), config, True).items()} == theirs, name


def test_without_the_variance_three_outputs_come_back(tmp_path: Path) -> None:
    config = replace(TINY, learn_sigma=True)
    state = random_model(config).state_dict()
    write(tmp_path / "x", state, config, COSINE, Scheduler.DDIM)
    theirs, model, fields = read(tmp_path / "x")
    assert model == replace(config, learn_sigma=False)
    assert DiffusionConfig(**fields) == replace(COSINE, learn_sigma=False)
    assert torch.equal(theirs["out.2.weight"], state["out.2.weight"][:3])


def test_betas_of_no_named_schedule_leave_the_process_open(tmp_path: Path) -> None:
    write(tmp_path / "x", random_model(TINY).state_dict(), TINY, LINEAR, Scheduler.DDIM)
    path = tmp_path / "x" / "scheduler" / "scheduler_config.json"
    options = json.loads(path.read_text())
    options["trained_betas"][5] *= 1.1
    path.write_text(json.dumps(options))
    assert read(tmp_path / "x")[2] == {"prediction": "epsilon", "learn_sigma": False}


def test_diffusers_own_folders_are_read(tmp_path: Path) -> None:
    """A model that was never ours, with diffusers' own schedule by name."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "x")
    state, config, fields = read(tmp_path / "x")
    assert (config.num_heads, config.attention_levels, config.use_scale_shift_norm) == (8, {1}, False)
    assert DiffusionConfig(**fields) == DiffusionConfig(sigma_small=True)
    ours = random_model(config)
    ours.load_state_dict(state)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        assert relative(unet(x, t).sample, ours(x, t)) < 1e-4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_resolutions": (16, 8)}, r"4 heads of 24 and 32 channels: it has one head dimension"),
        ({"num_heads_upsample": 2}, "num_heads_upsample 2 beside num_heads 4"),
        ({"channel_mult": (2, 2, 2, 2)}, "channel_mult 2,2,2,2: .* starts with 1 works"),
        ({"num_channels": 64, "channel_mult": (0.5, 1, 1, 2)}, r"channel_mult 0\.5,1,1,2: .* starts with 1 works"),
        ({"patch_size": 2}, r"patch_size 2: .*convert to \.pt"),
        ({"small_size": 16}, r"a super-resolution model: .*convert to \.pt"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=f"diffusers cannot express {reason}"):
        unet_options(replace(AT_64, **changes), False)


@pytest.mark.parametrize("steps", [1500, 500])
def test_scaled_timesteps_that_are_not_whole_are_refused(tmp_path: Path, steps: int) -> None:
    process = replace(LINEAR, diffusion_steps=steps)
    with pytest.raises(ValueError, match=f"rescale_timesteps with diffusion_steps {steps}: .*timesteps are integers"):
        write(tmp_path / "x", random_model(TINY).state_dict(), TINY, process, Scheduler.DDIM)
    assert not (tmp_path / "x").exists()


def test_every_option_of_diffusers_model_is_set() -> None:
    """A default of another version of diffusers changes nothing."""
    options = inspect.signature(diffusers.UNet2DModel.__init__).parameters.keys() - {"self", "num_train_timesteps"}
    assert options <= unet_options(TINY, False).keys()


def change(path: Path, **options: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    unet, scheduler = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    write(folder, random_model(TINY).state_dict(), TINY, LINEAR, Scheduler.DDIM)
    files = {path: path.read_bytes() for path in (unet, scheduler, weights)}
    tensors = load_file(weights)
    transposed = {**tensors, "conv_out.weight": tensors["conv_out.weight"].transpose(0, 1).contiguous()}
    whole_numbers = {**tensors, "conv_out.bias": tensors["conv_out.bias"].long()}
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: unet.write_text("{"), r"unet/config\.json is damaged: it is not a JSON"),
        (lambda: unet.write_text("[1]"), r"unet/config\.json is damaged: it is not a JSON object"),
        (lambda: unet.write_bytes(b"\xff\xfe"), r"unet/config\.json is damaged"),
        (lambda: unet.write_text("[" * 100_000), r"unet/config\.json is damaged"),
        (unet.unlink, r"unet/config\.json cannot be read \(No such file"),
        (lambda: change(scheduler, num_train_timesteps=2**31), "num_train_timesteps must be at most 1,000,000"),
        (lambda: change(unet, _class_name="UNet2DConditionModel"), "'UNet2DConditionModel' is not UNet2DModel"),
        (lambda: change(unet, block_out_channels=[]), "its options do not describe a model"),
        (lambda: change(unet, block_out_channels=[0, 0]), "its options do not describe a model"),
        (
            lambda: change(unet, block_out_channels=[32, 40], attention_head_dim=None),
            "channel_mult 1.25 gives a level 40 channels: every width must be a multiple of 32",
        ),
        (lambda: change(unet, freq_shift=1), "freq_shift is 1, but 0 in the models"),
        (lambda: change(unet, downsample_padding=0), "downsample_padding is 0"),
        (lambda: change(unet, down_block_types=["DownBlock2D", "ResnetDownsampleBlock2D"]), "down_block_types"),
        (lambda: change(unet, attention_head_dim=12), "attention_head_dim is 12|does not divide"),
        (lambda: change(unet, attention_head_dim=0), "its options do not describe a model"),
        (
            lambda: change(unet, downsample_type="resnet", upsample_type="resnet"),
            "down_block_types is .*, but .*ResnetDownsampleBlock2D",
        ),
        (lambda: change(unet, attention_head_dim=-1), "num_heads must be positive, not -32"),
        (
            lambda: change(unet, downsample_type="resnet", attention_head_dim=-1),
            "num_heads 4 does not|down_block_types is",
        ),
        (lambda: change(unet, in_channels=4), "in_channels is 4"),
        (lambda: change(unet, layers_per_block=2), r"safetensors has no down_blocks\.0\.resnets\.1"),
        (lambda: change(unet, num_class_embeds=3), r"safetensors has no class_embedding\.weight"),
        (weights.unlink, r"safetensors does not exist"),
        (lambda: weights.write_bytes(b"{}"), r"safetensors is damaged or incomplete"),
        (lambda: save_file(transposed, weights), r"has conv_out\.weight as \(32, 3, 3, 3\) instead of \(3, 32, 3, 3\)"),
        (lambda: save_file(whole_numbers, weights), r"holds no weights: conv_out\.bias has dtype torch\.int64"),
        (lambda: change(unet, block_out_channels=[10**12 * 32, 10**13 * 32]), "more than 1,048,576 channels"),
        (lambda: change(unet, block_out_channels=[32, 32 * 10**14]), "more than 1,048,576 channels"),
        (lambda: change(unet, layers_per_block=10**6), "does not match the model that"),
        (lambda: save_file({**tensors, "more": torch.zeros(1)}, weights), "safetensors has more, which"),
        (scheduler.unlink, r"scheduler_config\.json cannot be read"),
        (lambda: change(scheduler, prediction_type="flow_prediction"), "'flow_prediction' is none of"),
        (lambda: change(scheduler, trained_betas="some"), r"scheduler_config\.json is damaged"),
        (lambda: change(unet, num_class_embeds=10**30), "num_classes must be at most 1,000,000, not 10"),
        (lambda: change(scheduler, trained_betas=0.5), r"scheduler_config\.json is damaged"),
        (lambda: change(scheduler, trained_betas=[[0.5]]), r"scheduler_config\.json is damaged"),
    ]
    for damage, message in cases:
        damage()
        refusal(lambda: read(folder), message)
        for path, content in files.items():
            path.write_bytes(content)
    read(folder)


def test_names_are_a_bijection() -> None:
    for config in (
        replace(CIFAR, num_channels=32),
        replace(AT_64, class_cond=True, use_scale_shift_norm=False),
        replace(GUIDED, use_scale_shift_norm=False),
        replace(GUIDED, use_new_attention_order=False, class_cond=True),
    ):
        state = random_model(config).state_dict()
        theirs = unet_state(state, config, config.learn_sigma)
        assert sum(v.numel() for v in theirs.values()) == sum(v.numel() for v in state.values())
        back = our_state(theirs, config)
        assert all(torch.equal(back[key], state[key]) for key in state)


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"diffusers is not installed: pip install diffusers \(extra 'diffusers'\)"):
        write(tmp_path / "x", {}, TINY, LINEAR, Scheduler.DDIM)
