"""State dicts of the released models, and models whose every weight has an effect."""

from typing import Any

import torch
from torch import Tensor

from fastdiff import ModelConfig, build_model
from fastdiff.models import UNet

from ..parity.support import load_json
from ..support import randomise

_GUIDED = load_json("state_dicts_guided.json")


def _architectures() -> dict[str, Any]:
    """Both projects have a model called lsun_bedroom; guided-diffusion's has the architecture of another one."""
    found = {"lsun_uncond" if k == "lsun_bedroom" else k: entry for k, entry in load_json("state_dicts.json").items()}
    own = {name: entry for name, entry in _GUIDED.items() if isinstance(entry["state_dict"], dict)}
    return found | {name: entry for name, entry in own.items() if not name.endswith("classifier")}


GOLDEN = _architectures()
"""By architecture: flags, parameter count, every key with its shape; the diffusion models of both projects."""

CLASSIFIERS = {name: entry for name, entry in _GUIDED.items() if name.endswith("classifier")}
"""The same of guided-diffusion's classifiers."""

ARCHITECTURE = {
    "imagenet64_uncond_vlb": "imagenet64_uncond",
    "cifar10_uncond_vlb": "cifar10_uncond",
    "lsun_uncond_lr2e-5": "lsun_uncond",
    **dict.fromkeys(("lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"), "256x256_diffusion_uncond"),
}
"""The presets whose architecture in GOLDEN has another name."""


def meta_state(name: str) -> dict[str, Tensor]:
    """The golden keys and shapes, without memory."""
    shapes = (GOLDEN | CLASSIFIERS)[name]["state_dict"]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def random_model(config: ModelConfig, seed: int = 0) -> UNet:
    """A model without a layer that is zero."""
    torch.manual_seed(seed)
    return randomise(build_model(config).eval(), only_zeros=True)
