"""guided-diffusion's classifiers: logits, the gradient that guides, every parameter's gradient, and training."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastdiff import DataConfig, RuntimeConfig
from fastdiff.config import ClassifierTrainConfig, RunConfig
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.distributed import World
from fastdiff.training import update as engine
from fastdiff.training.classification import Classification
from fastdiff.training.state import TrainState
from fastdiff.training.update import Updater

from .support import (
    DEVICE,
    ENGINES,
    assert_close,
    classifier_config,
    diffusion_config,
    golden,
    golden_classifier,
    golden_names,
    load,
    tensor,
)
from .test_unet import LAYOUTS, TOLERANCE, assert_gradients

KEYS = {"flags", "x", "t", "y", "logits", "log_probability", "grad_log_probability", "cross_entropy"}
KEYS |= {"grad_names", "grad_projection", "grad_norm"}
NAMES = [name for name in golden_names("classifier_*.npz") if "training" not in name]


def cases() -> list[Any]:
    """Every classifier in every engine and layout; Triton's interpreter takes long."""
    return [
        pytest.param(name, kernels, layout, marks=[pytest.mark.slow] if kernels == "triton" else [])
        for name, kernels, layout in itertools.product(NAMES, ("reference", "torch", "triton"), LAYOUTS)
    ]


@pytest.mark.parametrize(("name", "kernels", "memory_format"), cases())
def test_logits_and_gradients(name: str, kernels: str, memory_format: str) -> None:
    data = load(name)
    assert set(data) == KEYS
    classifier = golden_classifier(data["flags"], kernels, memory_format).eval()
    x, t, y = tensor(data["x"]).requires_grad_(), tensor(data["t"]), tensor(data["y"])
    logits = classifier(x, t)
    assert_close(logits, data["logits"], TOLERANCE, "logits")
    log_probability = F.log_softmax(logits, dim=-1)[torch.arange(len(y)), y]
    assert_close(log_probability, data["log_probability"], TOLERANCE, "log p(y | x_t)")
    (gradient,) = torch.autograd.grad(log_probability.sum(), x, retain_graph=True)
    assert_close(gradient, data["grad_log_probability"], TOLERANCE, "grad log p(y | x_t)")
    loss = F.cross_entropy(logits, y)
    assert abs(loss.item() - data["cross_entropy"]) <= TOLERANCE * data["cross_entropy"]
    loss.backward()
    assert_gradients(classifier, data)


@pytest.mark.parametrize(
    ("kernels", "memory_format"),
    [pytest.param(*engine, marks=[pytest.mark.slow] if engine[0] == "triton" else []) for engine in ENGINES],
)
def test_training(kernels: str, memory_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five AdamW steps by the engine's own update, at the golden timesteps and with the golden noise."""
    data = load("classifier_training.npz")
    assert set(data) == {"flags", "diffusion", "hyper", "x_start_u8", "t", "noise", "y", "losses"}
    on = RuntimeConfig(str(DEVICE), "fp32", "off", kernels, memory_format)
    train = ClassifierTrainConfig(batch_size=4, **data["hyper"])
    process = diffusion_config(data["diffusion"])
    config = RunConfig(classifier_config(data["flags"]), process, DataConfig(), train, on)
    runtime, world = Runtime.resolve(on), World()
    objective = Classification(config, runtime)
    classifier = golden(objective.build(runtime)).train()
    state = TrainState(config, classifier, objective, runtime.precision, world)
    update = Updater(config, state, objective, classifier, runtime.eager(classifier), world)

    found, losses = [], objective.losses
    monkeypatch.setattr(objective, "losses", lambda *args: found.append(losses(*args)) or found[-1])
    for images, t, noise, y in zip(data["x_start_u8"], data["t"], data["noise"], data["y"], strict=True):
        monkeypatch.setattr(engine, "draw", lambda *_, t=t: (tensor(t), torch.ones(len(t), device=DEVICE)))
        monkeypatch.setattr(engine, "philox_normal", lambda *_, noise=noise: tensor(noise))
        update(tensor(images), tensor(y))
    np.testing.assert_allclose([terms["loss"].tolist() for terms in found], data["losses"], rtol=TOLERANCE)
