"""Pipeline folders for diffusers: a UNet2DModel and a scheduler represent the model and its diffusion process.

Settings that diffusers cannot express raise ValueError; differences in the result are returned as notes.
"""

import inspect
import itertools
import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.config import MOST_TIMESTEPS, NUM_CLASSES, DiffusionConfig, ModelConfig, NoiseSchedule, Prediction
from fastdiff.diffusion import GaussianDiffusion, ModelMeanType
from fastdiff.diffusion.schedule import Float64Array, betas_of
from fastdiff.interop.unet2d import attending, our_state, unet_options, unet_state
from fastdiff.runtime.words import first_line

_WEIGHTS = "diffusion_pytorch_model.safetensors"
WRITTEN = frozenset(
    ("model_index.json", "unet/config.json", f"unet/{_WEIGHTS}", "scheduler/scheduler_config.json"),
)
"""The files of a pipeline's folder."""

_SCALED = 1000
"""The range that rescaled timesteps are scaled to."""


class Scheduler(StrEnum):
    """The diffusers scheduler that will sample."""

    DDIM = "ddim"
    DDPM = "ddpm"


_PREDICTION_TYPES = {Prediction.EPSILON: "epsilon", Prediction.X_START: "sample", Prediction.V: "v_prediction"}


def installed() -> ModuleType:
    """The diffusers package; ValueError, naming the extra, if it is not installed."""
    try:
        import diffusers
    except ImportError:
        raise ValueError("diffusers is not installed: pip install diffusers (extra 'diffusers')") from None
    return diffusers


def is_folder(path: Path) -> bool:
    """Whether this is a diffusers folder, complete or not."""
    return (path / "model_index.json").exists() or (path / "unet").is_dir()


def scheduler_options(config: DiffusionConfig, scheduler: Scheduler, learn_sigma: bool) -> dict[str, Any]:
    """The scheduler's options; ValueError, with the reason, if the model's timesteps would not be integers."""
    if config.prediction is Prediction.FLOW:
        raise ValueError("diffusers' DDPM and DDIM schedulers cannot express prediction flow")
    betas = _betas(config)
    options = {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": _PREDICTION_TYPES[config.prediction],
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
    if scheduler is Scheduler.DDIM:
        return options | {"set_alpha_to_one": True}
    fixed = "fixed_small" if config.sigma_small else "fixed_large"
    return options | {"variance_type": "learned_range" if learn_sigma else fixed}


def _is_respaced(config: DiffusionConfig) -> bool:
    """Whether only 1,000 of the steps are written, because the model takes timesteps scaled to 0..1000."""
    return config.rescale_timesteps and config.diffusion_steps != _SCALED


def _betas(config: DiffusionConfig) -> Float64Array:
    """The betas of the steps whose model timestep is an integer: diffusers supports integer timesteps only."""
    betas = betas_of(config)
    if not _is_respaced(config):
        return betas
    stride, rest = divmod(config.diffusion_steps, _SCALED)
    if rest:
        raise ValueError(
            f"diffusers cannot express rescale_timesteps with diffusion_steps {config.diffusion_steps}: its timesteps "
            "are integers; a multiple of 1000 works, as does a model trained with --no-rescale-timesteps"
        )
    kept = range(0, config.diffusion_steps, stride)
    return GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.START_X, use_timesteps=kept).betas


def _schedule(betas: Float64Array, prediction: Prediction) -> dict[str, Any]:
    """The DiffusionConfig fields of the noise schedule with these betas in diffusers; empty if none has them."""
    counts = range(_SCALED, 11 * _SCALED, _SCALED) if len(betas) == _SCALED else [len(betas)]
    terminal = [False] if prediction is Prediction.EPSILON else [False, True]
    for steps, schedule, zero in itertools.product(counts, NoiseSchedule, terminal):
        fields: dict[str, Any] = {
            "diffusion_steps": steps,
            "noise_schedule": schedule,
            "rescale_timesteps": len(betas) == _SCALED,
        } | ({"zero_terminal_snr": True} if zero else {})
        try:
            ours = _betas(DiffusionConfig(prediction=prediction, **fields))
        except ValueError:  # a linear schedule of too few steps
            continue
        if np.allclose(betas, ours, rtol=1e-4, atol=0):  # diffusers rounds them to fp32
            return fields
    return {}


def write(
    folder: Path, state: Mapping[str, Tensor], model: ModelConfig, diffusion: DiffusionConfig, scheduler: Scheduler
) -> list[str]:
    """Write a pipeline folder; returns a note for each difference. ValueError if diffusers cannot express the model."""
    diffusers = installed()
    learn_sigma = model.learn_sigma and scheduler is Scheduler.DDPM
    options = unet_options(model, learn_sigma)
    process = scheduler_options(diffusion, scheduler, learn_sigma)
    with torch.device("meta"):
        unet = diffusers.UNet2DModel(**options)
    unet.load_state_dict(unet_state(state, model, learn_sigma), assign=True)
    name = scheduler.upper()
    pipeline = getattr(diffusers, f"{name}Pipeline")(unet, getattr(diffusers, f"{name}Scheduler")(**process))
    pipeline.save_pretrained(folder)
    return list(_notes(model, diffusion, scheduler))


def _notes(model: ModelConfig, diffusion: DiffusionConfig, scheduler: Scheduler) -> Iterator[str]:
    steps = diffusion.diffusion_steps
    if _is_respaced(diffusion):
        yield (
            f"the {steps} steps became 1000, every {steps // _SCALED}th, in trained_betas: diffusers gives a model "
            "integer timesteps only"
        )
    if diffusion.timestep_respacing:
        yield f"timestep_respacing {diffusion.timestep_respacing} is not written: use num_inference_steps"
    usual = DiffusionConfig()
    if training := [
        name for name in ("use_kl", "rescale_learned_sigmas") if vars(diffusion)[name] != vars(usual)[name]
    ]:
        yield f"not written, since only training uses it: {', '.join(training)}"
    if scheduler is Scheduler.DDIM:
        if diffusion.sigma_small:
            yield "sigma_small is not written: DDIM does not use it; --scheduler ddpm keeps it"
        if model.learn_sigma:
            yield "the learned variance is dropped: DDIM does not use it; --scheduler ddpm keeps it"
        yield "to match fastdiff's DDIM samples, call the pipeline with use_clipped_model_output=True"
    if model.class_cond:
        yield f"{scheduler.upper()}Pipeline gives no class labels: call the UNet2DModel with class_labels yourself"


def load_unet(folder: Path) -> Any:
    """Load the UNet2DModel in a folder with diffusers itself, in evaluation mode."""
    return installed().UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()


def read(folder: Path) -> tuple[dict[str, Tensor], ModelConfig, dict[str, Any]]:
    """Read a pipeline folder: state dict, model configuration, and the DiffusionConfig fields that it determines.

    ValueError, in one line, if a file is missing or damaged, or the model or its prediction is not of this family.
    """
    config = _model_config(folder / "unet" / "config.json")
    weights = folder / "unet" / _WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{weights} does not exist (only safetensors are read)")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged or incomplete ({first_line(error)})") from None
    if (key := next((key for key, tensor in tensors.items() if not tensor.is_floating_point()), None)) is not None:
        raise ValueError(f"{weights} holds no weights: {key} has dtype {tensors[key].dtype}")
    # Check this before building a model: the options come from an untrusted file.
    first, blocks = tensors.get("conv_in.weight", torch.empty(0)), config.num_res_blocks * len(config.multipliers)
    if first.shape[:1] != (config.num_channels,) or blocks > len(tensors):
        raise ValueError(f"{weights} does not match the model that {folder / 'unet' / 'config.json'} describes")
    try:
        state = our_state(tensors, config)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{weights} {first_line(error, limit=500)}") from None
    return state, config, read_process(folder, config)


def _json(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _model_config(path: Path) -> ModelConfig:
    """The model that a UNet2DModel's options describe; ValueError naming the first option that this family lacks."""
    options = _json(path)
    if options.get("_class_name") != "UNet2DModel":
        raise ValueError(f"{path}: _class_name {options.get('_class_name')!r} is not UNet2DModel")
    defaults = inspect.signature(installed().UNet2DModel.__init__).parameters
    options = {name: option.default for name, option in defaults.items() if name != "self"} | options
    try:
        widths, dim = options["block_out_channels"], options["attention_head_dim"]
        attends = [kind == "AttnDownBlock2D" for kind in options["down_block_types"]]
        alike = {width for width, at in zip(widths, attends, strict=True) if at} <= {widths[-1]}
        resized = options["downsample_type"] == "resnet"
        if dim is None:
            heads: dict[str, Any] = {"num_heads": 1}
        else:
            heads = {"num_head_channels": dim} if resized or not alike else {"num_heads": widths[-1] // dim}
        config = ModelConfig(
            image_size=options["sample_size"],
            num_channels=widths[0],
            num_res_blocks=options["layers_per_block"],
            channel_mult=tuple(width / widths[0] for width in widths),
            **heads,
            resblock_updown=resized,
            attention_resolutions=tuple(options["sample_size"] >> level for level, at in enumerate(attends) if at),
            dropout=float(options["dropout"]),
            learn_sigma=options["out_channels"] == 6,
            class_cond=options["num_class_embeds"] is not None,
            num_classes=options["num_class_embeds"] or NUM_CLASSES,
            use_scale_shift_norm=options["resnet_time_scale_shift"] == "scale_shift",
        )
        wanted = unet_options(config, config.learn_sigma)
    except (LookupError, TypeError, ArithmeticError, AttributeError):
        raise ValueError(f"{path} is damaged: its options do not describe a model") from None
    except ValueError as error:
        raise ValueError(f"{path}: its options do not describe a model of this family: {error}") from None
    if dim == widths[-1] and wanted["attention_head_dim"] is None and len(attending(config)) == 1:
        wanted["attention_head_dim"] = dim
    if options["attn_norm_num_groups"] is None and not config.use_scale_shift_norm:
        wanted["attn_norm_num_groups"] = None  # diffusers then uses norm_num_groups
    for name, value in wanted.items():
        if options[name] != value:
            raise ValueError(f"{path}: {name} is {options[name]!r}, but {value!r} in the models of this family")
    return config


def read_process(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """The DiffusionConfig fields that a folder's scheduler determines; errors as read's."""
    path = folder / "scheduler" / "scheduler_config.json"
    options = _json(path)
    predicts, kind = options.get("prediction_type", "epsilon"), options.get("_class_name")
    if predicts not in _PREDICTION_TYPES.values():
        raise ValueError(f"{path}: prediction_type {predicts!r} is none of {', '.join(_PREDICTION_TYPES.values())}")
    prediction = next(ours for ours, theirs in _PREDICTION_TYPES.items() if theirs == predicts)
    fields: dict[str, Any] = {"prediction": prediction, "learn_sigma": model.learn_sigma}
    if kind not in ("DDIMScheduler", "DDPMScheduler"):
        return fields
    if kind == "DDPMScheduler":
        variance = str(options.get("variance_type", "fixed_small"))
        if model.learn_sigma and variance != "learned_range":
            raise ValueError(f"{path}: variance_type is {variance!r}, but 'learned_range' in the models of this family")
        fields["sigma_small"] = variance.startswith("fixed_small")
    if type(count := options.get("num_train_timesteps", 1000)) is int and count > MOST_TIMESTEPS:
        raise ValueError(f"{path}: num_train_timesteps must be at most {MOST_TIMESTEPS:,}, not {count}")
    try:
        betas = getattr(installed(), kind).from_config(options).betas.double().numpy()
        if betas.ndim != 1:
            raise ValueError("trained_betas")
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        raise ValueError(f"{path} is damaged: its options do not describe a scheduler") from None
    return fields | _schedule(betas, prediction)
