"""The recipes that are compared, as flags of ``fastdiff train``."""

from collections.abc import Mapping

from fastdiff.config import Contestant, PictureSet

Flags = Mapping[str, object]

_LEVELS = {"channel_mult": ""}  # the default of the image size
CPU_WIDTH = {"num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "8", **_LEVELS}

UNDONE: Mapping[str, Flags] = {
    "width": {"num_channels": 64, "num_res_blocks": 2, "attention_resolutions": "16,8"},
    "narrow levels": {"channel_mult": "1,2,2"},  # improved-diffusion's for 16 pixels, as many as there are patches
    "patches": {"patch_size": 1},
    "prediction": {"prediction": "epsilon"},
    "weighting": {"weighting": "none"},
    "schedule": {"noise_schedule": "linear"},
    "lr": {"lr": 1e-4, "lr_warmup_steps": 0},
    "decay": {"lr_anneal_steps": 0},
    "ema": {"ema_rate": "0.9999"},
    "grad clip": {"grad_clip": 0.0},
    "batch": {"batch_size": 16},
}
"""Each choice of the recipe auto, and the flags that undo it: improved-diffusion's defaults, but half its width.

What depends on a choice is undone with it: the rate with the width; x_0 and its weighting with patches, for which
they are chosen (pixels get v); patches and the weighting with x_0 (epsilon is for pixels)."""

_AS_BEFORE = {"grad_clip": 0.0, "ema_lengths": ""}
"""The flags that keep --recipe auto, which sets the decay by the number of updates, from adding what is not asked."""

_IMPROVED = {
    "recipe": "improved",
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
    "learn_sigma": True,
    "num_channels": 32,
    "num_res_blocks": 3,
    "lr": 1e-4,
    "batch_size": 32,
}
"""improved-diffusion's README for ImageNet-64 and CIFAR-10, whose model has 128 channels, for 8 GPUs, and batches of
128: at this width and batch a CPU makes as many updates in a minute as it can."""

_CONTRIBUTING = {"recipe": "auto", **CPU_WIDTH, **_AS_BEFORE, "noise_schedule": "cosine", "prediction": "x_start"}
_CONTRIBUTING |= {"lr": 1e-3}

_FLAGS: Mapping[Contestant, Mapping[PictureSet, Flags]] = {
    Contestant.IMPROVED: {
        PictureSet.DIGITS: {**_IMPROVED, "dropout": 0.3},
        PictureSet.PHOTOGRAPHS: _IMPROVED,
    },
    Contestant.CONTRIBUTING: {
        PictureSet.DIGITS: {**_CONTRIBUTING, "batch_size": 32, "lr_warmup_steps": 100, "ema_rate": "0.999"},
        PictureSet.PHOTOGRAPHS: {
            **_CONTRIBUTING,
            "flip": True,
            "batch_size": 16,
            "lr_warmup_steps": 50,
            "ema_rate": "0.99",
        },
    },
    Contestant.AUTO: {PictureSet.DIGITS: {}, PictureSet.PHOTOGRAPHS: {}},
}

EXPLAINED = {
    Contestant.IMPROVED: "improved-diffusion's published flags (4,000 steps, cosine, learned variance, three blocks a "
    "level, constant rate of 1e-4), 32 channels wide instead of 128 and in batches of 32 instead of 128",
    Contestant.CONTRIBUTING: "the flags of earlier experiments: cosine, x_0 predicted, a rate of 1e-3 with warm-up and "
    "decay, short averages",
    Contestant.AUTO: "fastdiff train without other flags",
}
"""What the contestants are, for the table."""


def flags_of(contestant: Contestant, pictures: PictureSet) -> Flags:
    """The flags of the contestant for a data set, without its length and seed."""
    return _FLAGS[contestant][pictures]
