"""The released models of improved-diffusion and guided-diffusion, and the recipe of a 128x128 fork, as tables.

A preset maps flag names to values; a flag given together with ``--preset`` overrides it. The flags are those of the
projects' READMEs, one preset per released checkpoint. guided-diffusion's presets have its files' names, and the learning
rates, batch sizes and lengths of Dhariwal & Nichol 2021, appendix I (tables 11 to 13).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from fastdiff.config import Config, DiffusionConfig, ModelConfig, with_multipliers

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Preset:
    """A preset's description and its flags."""

    about: str
    flags: Mapping[str, Any]

    def values_for(self, config: type[Config]) -> dict[str, Any]:
        """The preset's flags that are fields of ``config``."""
        names = {f.name for f in fields(config)}  # type: ignore[arg-type]  # every Config is a dataclass
        return {name: value for name, value in self.flags.items() if name in names}

    def config(self, kind: type[C]) -> C:
        """The preset's configuration of this kind; fields that it does not set have their defaults."""
        return kind.from_dict(self.values_for(kind))


_IMAGENET64 = {"image_size": 64, "num_channels": 128, "num_res_blocks": 3, "learn_sigma": True}
_IMAGENET64_COND = {**_IMAGENET64, "num_channels": 192, "class_cond": True}
_CIFAR10 = {"image_size": 32, "num_channels": 128, "num_res_blocks": 3, "learn_sigma": True, "dropout": 0.3}
_UPSAMPLE = {
    "image_size": 256,
    "small_size": 64,
    "num_channels": 192,
    "num_res_blocks": 2,
    "learn_sigma": True,
    "class_cond": True,
}
_LSUN = {
    "image_size": 256,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 1,
    "learn_sigma": True,
    "use_scale_shift_norm": False,
    "attention_resolutions": (16,),
}
_FORK_128 = {
    "image_size": 128,
    "num_channels": 192,
    "num_res_blocks": 2,
    "attention_resolutions": (32, 16),
    "dropout": 0.1,
    "learn_sigma": True,
    "use_scale_shift_norm": True,
    "class_cond": False,
}

_ADM = {
    "num_res_blocks": 2,
    "learn_sigma": True,
    "class_cond": True,
    "attention_resolutions": (32, 16, 8),
    "resblock_updown": True,
}
_ADM_64 = {
    **_ADM,
    "image_size": 64,
    "num_channels": 192,
    "num_res_blocks": 3,
    "num_head_channels": 64,
    "use_new_attention_order": True,
    "dropout": 0.1,
}
_ADM_128 = {**_ADM, "image_size": 128, "num_channels": 256, "num_heads": 4}
_ADM_256 = {**_ADM, "image_size": 256, "num_channels": 256, "num_head_channels": 64}
_ADM_512 = {**_ADM_256, "image_size": 512}
_ADM_LSUN = {**_ADM_256, "class_cond": False, "dropout": 0.1}
_ADM_64_256 = {**_ADM, "image_size": 256, "small_size": 64, "num_channels": 192, "num_heads": 4}
_ADM_128_512 = {
    **_ADM,
    "image_size": 512,
    "small_size": 128,
    "num_channels": 192,
    "num_head_channels": 64,
    "attention_resolutions": (32, 16),
}

_COSINE = {"diffusion_steps": 4000, "noise_schedule": "cosine"}
_LINEAR = {"diffusion_steps": 4000, "noise_schedule": "linear"}
_LINEAR_1000 = {"diffusion_steps": 1000, "noise_schedule": "linear"}
_COSINE_1000 = {"diffusion_steps": 1000, "noise_schedule": "cosine"}
_UNSCALED = {"rescale_learned_sigmas": False, "rescale_timesteps": False}
_VLB = {"use_kl": True, "schedule_sampler": "loss-second-moment"}


_ADM_CLASSIFIER = {
    "rescale_timesteps": False,  # a classifier is given the steps' own numbers
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": (32, 16, 8),
    "classifier_pool": "attention",
    "classifier_resblock_updown": True,
    "classifier_use_scale_shift_norm": True,
}
_CLASSIFIER_64 = {**_ADM_CLASSIFIER, "image_size": 64, "classifier_depth": 4}
_CLASSIFIER_128 = {**_ADM_CLASSIFIER, "image_size": 128}
_CLASSIFIER_256 = {**_ADM_CLASSIFIER, "image_size": 256}
_CLASSIFIER_512 = {**_ADM_CLASSIFIER, "image_size": 512}


def _optimised(lr: float, batch_size: int) -> dict[str, Any]:
    return {"lr": lr, "batch_size": batch_size}


def _annealed(weight_decay: float, steps: int) -> dict[str, Any]:
    return {"weight_decay": weight_decay, "lr_anneal_steps": steps}


# fmt: off
PRESETS: Mapping[str, Preset] = {
    # improved-diffusion
    "imagenet64_uncond":        Preset("ImageNet 64x64, hybrid loss",                        _IMAGENET64      | _COSINE                   | _optimised(1e-4, 128)),
    "cifar10_uncond":           Preset("CIFAR-10, hybrid loss",                              _CIFAR10         | _COSINE                   | _optimised(1e-4, 128)),
    "imagenet64_cond":          Preset("ImageNet 64x64, class-conditional, 270M parameters", _IMAGENET64_COND | _COSINE | _UNSCALED       | _optimised(3e-4, 2048)),
    "upsample_256":             Preset("64x64 to 256x256, class-conditional",                _UPSAMPLE        | _LINEAR | _UNSCALED       | _optimised(3e-4, 256)),
    "lsun_uncond":              Preset("LSUN bedrooms 256x256, lr 1e-4",                     _LSUN            | _LINEAR_1000 | _UNSCALED  | _optimised(1e-4, 128)),
    "lsun_uncond_lr2e-5":       Preset("LSUN bedrooms 256x256, lr 2e-5",                     _LSUN            | _LINEAR_1000 | _UNSCALED  | _optimised(2e-5, 128)),
    "imagenet64_uncond_vlb":    Preset("ImageNet 64x64, variational bound",                  _IMAGENET64      | _COSINE | _VLB            | _optimised(1e-4, 128)),
    "cifar10_uncond_vlb":       Preset("CIFAR-10, variational bound",                        _CIFAR10         | _COSINE | _VLB            | _optimised(1e-4, 128)),
    "fork_128":                 Preset("128x128, the fork's recipe",                         _FORK_128        | _LINEAR                   | _optimised(1e-4, 16)
                                       | {"precision": "fp16", "save_interval": 20_000}),
    # guided-diffusion
    "64x64_diffusion":          Preset("ImageNet 64x64, class-conditional, 296M parameters", _ADM_64      | _COSINE_1000 | _UNSCALED      | _optimised(3e-4, 2048)),
    "128x128_diffusion":        Preset("ImageNet 128x128, class-conditional",                _ADM_128     | _LINEAR_1000 | _UNSCALED      | _optimised(1e-4, 256)),
    "256x256_diffusion":        Preset("ImageNet 256x256, class-conditional",                _ADM_256     | _LINEAR_1000 | _UNSCALED      | _optimised(1e-4, 256)),
    "256x256_diffusion_uncond": Preset("ImageNet 256x256, unconditional",                    _ADM_256     | _LINEAR_1000 | _UNSCALED      | _optimised(1e-4, 256)
                                       | {"class_cond": False}),
    "512x512_diffusion":        Preset("ImageNet 512x512, class-conditional",                _ADM_512     | _LINEAR_1000 | _UNSCALED      | _optimised(1e-4, 256)),
    "64_256_upsampler":         Preset("64x64 to 256x256, class-conditional",                _ADM_64_256  | _LINEAR_1000 | _UNSCALED      | _optimised(1e-4, 256)),
    "128_512_upsampler":        Preset("128x128 to 512x512, class-conditional",              _ADM_128_512 | _LINEAR_1000 | _UNSCALED      | _optimised(1e-4, 256)),
    "lsun_bedroom":             Preset("LSUN bedrooms 256x256",                              _ADM_LSUN    | _LINEAR_1000 | _UNSCALED      | _optimised(1e-4, 256)),
    "lsun_cat":                 Preset("LSUN cats 256x256",                                  _ADM_LSUN    | _LINEAR_1000 | _UNSCALED      | _optimised(1e-4, 256)),
    "lsun_horse":               Preset("LSUN horses 256x256",                                _ADM_LSUN    | _LINEAR_1000 | _UNSCALED      | _optimised(1e-4, 256)),
    "lsun_horse_nodropout":     Preset("LSUN horses 256x256, no dropout",                    _ADM_LSUN    | _LINEAR_1000 | _UNSCALED      | _optimised(1e-4, 256)
                                       | {"dropout": 0.0}),
}
"""The diffusion models."""

CLASSIFIER_PRESETS: Mapping[str, Preset] = {
    "64x64_classifier":         Preset("classifier of noisy ImageNet 64x64",                 _CLASSIFIER_64  | _COSINE_1000 | _optimised(6e-4, 1024) | _annealed(0.2, 300_000)),
    "128x128_classifier":       Preset("classifier of noisy ImageNet 128x128",               _CLASSIFIER_128 | _LINEAR_1000 | _optimised(3e-4, 256)  | _annealed(0.05, 300_000)),
    "256x256_classifier":       Preset("classifier of noisy ImageNet 256x256",               _CLASSIFIER_256 | _LINEAR_1000 | _optimised(3e-4, 256)  | _annealed(0.05, 500_000)),
    "512x512_classifier":       Preset("classifier of noisy ImageNet 512x512",               _CLASSIFIER_512 | _LINEAR_1000 | _optimised(3e-4, 256)  | _annealed(0.05, 500_000)),
}
"""guided-diffusion's classifiers."""
# fmt: on


def preset_named(name: str, presets: Mapping[str, Preset] = PRESETS) -> Preset:
    """The preset called ``name`` in PRESETS or CLASSIFIER_PRESETS.

    ValueError if there is none: it lists the valid names, those nearest to ``name``, and says what it is if it is in
    the other table.
    """
    if name in presets:
        return presets[name]
    if name in CLASSIFIER_PRESETS:
        raise ValueError(f"preset {name} is a classifier, and a diffusion model is wanted: one of {', '.join(presets)}")
    if name in PRESETS:
        raise ValueError(f"preset {name} is a diffusion model, and a classifier is wanted: one of {', '.join(presets)}")
    near = " or ".join(difflib.get_close_matches(name, presets, 2))
    meant = f"; did you mean {near}?" if near else ""
    raise ValueError(f"preset must be one of {', '.join(presets)}, not {name!r}{meant}")


def with_preset(
    flags: Mapping[str, Any], name: str | None, *only: type[Config], presets: Mapping[str, Preset] = PRESETS
) -> dict[str, Any]:
    """The preset's flags, overridden by ``flags``; with ``only``, just the preset's flags for these configurations."""
    if name is None:
        return dict(flags)
    known = preset_named(name, presets)
    chosen = {k: v for kind in only for k, v in known.values_for(kind).items()} if only else dict(known.flags)
    if "num_heads" in flags and "num_head_channels" in chosen:
        chosen["num_head_channels"] = -1  # it would go before num_heads
    return chosen | dict(flags)


def described_by(name: str | None) -> dict[str, Any]:
    """Every field of the preset's ModelConfig and DiffusionConfig: its model has the defaults of all other flags, too.

    Empty without a preset.
    """
    if name is None:
        return {}
    known = preset_named(name)
    return {**known.config(DiffusionConfig).to_dict(), **with_multipliers(known.config(ModelConfig)).to_dict()}
