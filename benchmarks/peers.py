"""Other libraries' models for the same work, as they come: eager, contiguous, PyTorch's default fp32, their modules."""

import importlib
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock

from torch import Tensor, nn

from fastdiff.benchmarks.workload import Workload

LUCIDRAINS = "denoising_diffusion_pytorch"
UNUSED = ("accelerate", "ema_pytorch", "pytorch_fid", "scipy", "torchvision", "tqdm")
"""Packages that denoising-diffusion-pytorch imports for its trainer and metrics; its Unet does not need them."""


@dataclass(frozen=True)
class Peer:
    """A peer's module, and a function that predicts with it as our model does."""

    module: nn.Module
    call: Callable[[Tensor, Tensor], Tensor]

    @property
    def num_parameters(self) -> int:
        """The number of learned parameters."""
        return sum(p.numel() for p in self.module.parameters())


def diffusers_unet(workload: Workload) -> Peer:
    """UNet2DModel with the same widths, blocks and attention; with scale and shift its middle attention has no norm."""
    from diffusers import UNet2DModel

    model = workload.model
    attends = [level in model.attention_levels for level in range(len(model.multipliers))]
    plain, resize = ("Resnet{}sampleBlock2D", "resnet") if model.resblock_updown else ("{}Block2D", "conv")
    unet: Any = UNet2DModel(
        sample_size=model.image_size,
        in_channels=3,
        out_channels=model.out_channels,
        layers_per_block=model.num_res_blocks,
        block_out_channels=model.widths,
        down_block_types=tuple("AttnDownBlock2D" if a else plain.format("Down") for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else plain.format("Up") for a in reversed(attends)),
        downsample_type=resize,
        upsample_type=resize,
        attention_head_dim=model.widths[-1] // model.heads_of(model.widths[-1]),
        resnet_time_scale_shift="scale_shift" if model.use_scale_shift_norm else "default",
        dropout=model.dropout,
    )
    unet.to(workload.device)
    if model.use_checkpoint:
        unet.enable_gradient_checkpointing()
    return Peer(unet, lambda x, timesteps: unet(x, timesteps).sample)


def lucidrains_unet(workload: Workload) -> Peer:
    """denoising-diffusion-pytorch's Unet with the same width and levels, and with its blocks, two per level."""
    model = workload.model
    unet = _lucidrains()(
        dim=model.num_channels,
        dim_mults=model.multipliers,
        channels=3,
        out_dim=model.out_channels,
        dropout=model.dropout,
    ).to(workload.device)
    return Peer(unet, unet)


PEERS: dict[str, tuple[tuple[str, ...], Callable[[Workload], Peer], str]] = {
    "diffusers": (("diffusers",), diffusers_unet, "pip install diffusers"),
    "denoising-diffusion-pytorch": (
        (LUCIDRAINS, "einops"),
        lucidrains_unet,
        "pip install --no-deps denoising-diffusion-pytorch einops",
    ),
}
"""By the name in the tables: the required packages, the builder, and the install command."""


def peers(workload: Workload) -> dict[str, Callable[[Workload], Peer]]:
    """The builders of the installed peers; none for a conditional model, because peers take conditions differently."""
    if workload.model.class_cond or workload.model.small_size:
        return {}
    return {name: build for name, (packages, build, _) in PEERS.items() if all(map(find_spec, packages))}


def missing() -> list[str]:
    """A line for each peer that is not installed."""
    return [
        f"{name} is not installed and therefore left out: {command}"
        for name, (packages, _, command) in PEERS.items()
        if not all(map(find_spec, packages))
    ]


def _lucidrains() -> Callable[..., Any]:
    """The class Unet, even if other imports of the package are missing or broken."""
    try:
        return importlib.import_module(LUCIDRAINS).Unet
    except Exception:  # a torchvision built for another torch fails in various ways
        with standing_in([name for name in UNUSED if not _can_import(name)]):
            found = importlib.import_module(LUCIDRAINS).Unet
        _forget([LUCIDRAINS])  # other code must not find the incomplete package
        return found


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def _forget(packages: Collection[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


@contextmanager
def standing_in(packages: Collection[str]) -> Iterator[None]:
    """Within this context the packages and their submodules are mocks."""
    finder = _StandIns(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget(packages)


class _StandIns(MetaPathFinder, Loader):
    def __init__(self, packages: Collection[str]) -> None:
        self._packages = packages

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in self._packages else None

    def create_module(self, _: ModuleSpec) -> Any:
        return MagicMock()

    def exec_module(self, _: object) -> None:
        """A mock has every name already."""
