"""What plain PyTorch code does with a model: its weights are contiguous unless they are asked for in channels_last."""

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

from fastdiff import DiffusionConfig, ModelConfig, build_model, load_checkpoint, sample
from fastdiff.checkpoint import save_checkpoint
from fastdiff.models import UNet

CONFIG = ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(4,))


@pytest.fixture
def model() -> UNet:
    torch.manual_seed(0)
    model = build_model(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)  # those of the last layers are zero at first
    return model


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 50.0])


def test_weights_are_saved_and_flattened(model: UNet, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["out.2.weight"], model.state_dict()["out.2.weight"])
    flat = parameters_to_vector(model.parameters())
    vector_to_parameters(2 * flat, model.parameters())
    assert torch.equal(torch.cat([p.view(-1) for p in model.parameters()]), 2 * flat)


def test_a_model_is_pickled_and_copied(model: UNet) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        expected = model(*inputs())
        assert torch.equal(loaded(*inputs()), expected)
        assert torch.equal(copy.deepcopy(model)(*inputs()), expected)


def test_lbfgs_and_pruning(model: UNet) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2, lr=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(*inputs()).square().mean()
        loss.backward()
        return loss

    before = optimizer.step(closure).item()  # type: ignore[no-untyped-call]
    assert closure().item() < before
    convolutions = [(layer, "weight") for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
    prune.global_unstructured(convolutions, pruning_method=prune.L1Unstructured, amount=0.5)
    assert torch.isfinite(model(*inputs())).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own use
def test_jvp_and_vmap(model: UNet) -> None:
    x, t = inputs()
    direction = torch.ones_like(x)
    with torch.no_grad():
        y, derivative = torch.func.jvp(lambda x: model(x, t), (x,), (direction,))
        step = (model(x + 1e-2 * direction, t) - model(x - 1e-2 * direction, t)) / 2e-2
        each = torch.func.vmap(lambda x, t: model(x[None], t[None])[0])(x, t)
    torch.testing.assert_close(derivative, step, rtol=1e-2, atol=1e-3 * float(step.abs().max()))
    torch.testing.assert_close(each, y)


def test_the_engine_lays_a_loaded_model_out(model: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that was loaded contiguous is sampled in channels_last, and not modified."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, model_config=CONFIG, diffusion_config=DiffusionConfig(diffusion_steps=30))
    checkpoint = load_checkpoint(path)
    seen: list[bool] = []
    run = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, *rest: seen.append(self.channels_last) or run(self, *rest))
    images = sample(checkpoint, 1, steps=2, device="cpu", precision="fp32", compile="off")
    assert seen == [True] * 2
    assert not checkpoint.model.channels_last
    assert (images == sample(path, 1, steps=2, device="cpu", precision="fp32", compile="off")).all()


def test_channels_last_is_asked_for() -> None:
    model = build_model(CONFIG, memory_format="channels_last")
    weight = model.out[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert model.lay_out("contiguous").out[2].weight.is_contiguous()
