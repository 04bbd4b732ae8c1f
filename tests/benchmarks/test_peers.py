"""The peers: of the right size, found where they are installed, loaded although what they do not need is missing."""

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastdiff.benchmarks import peers as module
from fastdiff.benchmarks.flops import Flops
from fastdiff.benchmarks.peers import PEERS, diffusers_unet, lucidrains_unet, missing, peers, standing_in
from fastdiff.benchmarks.workload import Workload, inputs
from fastdiff.config import DiffusionConfig, ModelConfig
from fastdiff.models import build_model

from .support import CPU, WORKLOAD

PACKAGE = "denoising_diffusion_pytorch"
SMALL = ModelConfig(image_size=32, num_channels=64, learn_sigma=True)
"""The model of the published comparisons."""


def test_diffusers_has_as_many_parameters_and_as_much_work() -> None:
    workload = Workload(SMALL, DiffusionConfig(), 2, torch.device("meta"))
    with torch.device("meta"):
        peer = diffusers_unet(workload)
    ours = sum(p.numel() for p in build_model(SMALL).parameters())
    assert peer.num_parameters == ours - 2 * 128  # its attention in the middle has no norm
    theirs = Flops.of_module(peer.module, peer.call, SMALL, 2, training=False)
    assert theirs.flops == pytest.approx(Flops.of(SMALL, 2, training=False).flops, rel=0.002)


def test_diffusers_computes_again_where_ours_does() -> None:
    again = dataclasses.replace(WORKLOAD, model=dataclasses.replace(WORKLOAD.model, use_checkpoint=True))
    assert [diffusers_unet(w).module.is_gradient_checkpointing for w in (WORKLOAD, again)] == [False, True]


def test_diffusers_predicts() -> None:
    x, t, _ = inputs(WORKLOAD)
    assert diffusers_unet(WORKLOAD).call(x, t.float()).shape == (2, 6, 8, 8)


@pytest.mark.skipif(
    not all(map(find_spec, PEERS["denoising-diffusion-pytorch"][0])),
    reason="denoising-diffusion-pytorch is not installed: no part of the extra test, since it pulls torchvision",
)
def test_lucidrains_predicts() -> None:
    x, t, _ = inputs(WORKLOAD)
    assert lucidrains_unet(WORKLOAD).call(x, t.float()).shape == (2, 6, 8, 8)
    workload = Workload(SMALL, DiffusionConfig(), 2, torch.device("meta"))
    with torch.device("meta"):
        assert 7.3e6 < lucidrains_unet(workload).num_parameters < 7.5e6  # 7.4 M, as it is known


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of that name whose import needs one that is missing and one that is broken."""
    modules = dict(sys.modules)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is missing')")
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "__init__.py").write_text("from .parts import Unet")
    (tmp_path / PACKAGE / "parts.py").write_text(
        "from torchvision import transforms as T, utils\n"
        "from ema_pytorch.deep.down import EMA\n"
        "import torch\n"
        "class Trainer(EMA): pass\n"
        "class Unet(torch.nn.Linear):\n"
        "    def __init__(self, dim, dim_mults, channels, out_dim, dropout):\n"
        "        super().__init__(dim, out_dim * len(dim_mults))\n"
    )
    for name in [n for n in sys.modules if n.partition(".")[0] in (PACKAGE, *module.UNUSED)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(module, "UNUSED", ("ema_pytorch", "torchvision"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] in (PACKAGE, "ema_pytorch", "torchvision")]:
        if name not in modules:
            del sys.modules[name]


def test_what_its_unet_does_not_need_may_be_missing_or_broken(fake: Path) -> None:
    before = list(sys.meta_path)
    peer = lucidrains_unet(WORKLOAD)
    assert peer.num_parameters == 33 * 6
    assert sys.meta_path == before
    left = [name for name in sys.modules if name.partition(".")[0] in (PACKAGE, "ema_pytorch", "torchvision")]
    assert left == []
    with pytest.raises(RuntimeError, match="nms is missing"):
        importlib.import_module("torchvision")


def test_what_it_does_need_must_be_there(fake: Path) -> None:
    (fake / PACKAGE / "parts.py").write_text("import surely_not_installed")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        lucidrains_unet(WORKLOAD)


def test_nothing_stands_in_after_an_error() -> None:
    before = list(sys.meta_path)
    with pytest.raises(ZeroDivisionError), standing_in(["no_such_package"]):
        1 / bool(importlib.import_module("no_such_package.below") is None)
    assert sys.meta_path == before
    assert "no_such_package" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_package")


def test_each_that_is_missing_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "einops" else name)
    assert list(peers(WORKLOAD)) == ["diffusers"]
    assert missing() == [
        "denoising-diffusion-pytorch is not installed and therefore left out: pip install --no-deps "
        "denoising-diffusion-pytorch einops"
    ]


def test_a_model_with_conditions_has_none() -> None:
    for extra in ({"class_cond": True}, {"small_size": 4}):
        model = ModelConfig.from_dict(WORKLOAD.model.to_dict() | extra)
        assert peers(dataclasses.replace(WORKLOAD, model=model, device=CPU)) == {}
