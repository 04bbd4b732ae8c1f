"""Classifier-free guidance: two predictions in one call, and what it is refused on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdiff import SampleConfig
from fastdiff.models import NULL_CLASS
from fastdiff.sampling import Engine
from fastdiff.sampling.guidance import guided

from ..support import inputs
from .support import CLASSES, UPPER, drawn, loaded, plan, runtime

T = torch.tensor([3.0, 500.0, 999.0])
Y = torch.tensor([2, 0, 1])


class Counting:
    """A model that notes the sizes of its batches."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.sizes: list[int] = []

    @torch.no_grad()
    def __call__(self, x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        assert {len(timesteps), *map(len, conditions.values())} == {len(x)}
        self.sizes.append(len(x))
        return self.module(x, timesteps, **conditions)


@pytest.mark.parametrize("upper", [False, True], ids=["plain", "super-resolution"])
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_it_is_the_way_from_one_prediction_to_the_other(
    tmp_path: Path, scale: float, learn_sigma: bool, upper: bool
) -> None:
    """Ho & Salimans 2022, equation 6: (1 + w) with - w without, w = scale - 1, against two calls of their own."""
    model = Counting(loaded(tmp_path, **CLASSES, learn_sigma=learn_sigma, **(UPPER if upper else {})).model)
    given = {**inputs(model.module, 3), "timesteps": T, "y": Y}
    found = guided(model, scale)(**given)
    assert model.sizes == [6]
    having = model(**given)
    without = model(**{**given, "y": torch.full_like(Y, NULL_CLASS)})
    w = scale - 1
    expected = (1 + w) * having[:, :3] - w * without[:, :3]
    torch.testing.assert_close(found[:, :3], expected, rtol=0, atol=2e-5)
    assert (having - without)[:, :3].abs().max() > 0.01
    if learn_sigma:
        assert (having - without)[:, 3:].abs().max() > 0.01
        torch.testing.assert_close(found[:, 3:], having[:, 3:], rtol=0, atol=2e-5)
    assert found.shape == having.shape


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "heun"])
@pytest.mark.parametrize("predict_xstart", [False, True])
def test_the_engines_images(tmp_path: Path, sampler: str, predict_xstart: bool) -> None:
    """One call on twice the batch a step; the images are those of a model that combines two calls of its own."""
    subject = loaded(tmp_path, **CLASSES, label_dropout=0.1)
    config = subject.diffusion_config.from_dict(subject.diffusion_config.to_dict() | {"predict_xstart": predict_xstart})
    subject = type(subject)(**{**vars(subject), "diffusion_config": config})
    labels = np.array([0, 1, 2, 1])

    def images(scale: float) -> tuple[np.ndarray, list[int]]:
        how = SampleConfig(sampler=sampler, steps=5, guidance_scale=scale, batch_size=4)
        engine = Engine(subject, how, runtime(), 4)
        engine._model = model = Counting(engine._module)
        return drawn(engine, 4, labels), model.sizes

    calls = 9 if sampler == "heun" else 5
    plain, sizes = images(1.0)
    assert sizes == [4] * calls
    strong, sizes = images(3.0)
    assert sizes == [8] * calls
    assert np.abs(strong.astype(int) - plain).max() > 5

    class Twice(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
            having = subject.model(x, timesteps, y=y)
            without = subject.model(x, timesteps, y=torch.full_like(y, NULL_CLASS))
            return 3 * having - 2 * without

    engine = Engine(subject, SampleConfig(sampler=sampler, steps=5, batch_size=4), runtime(), 4)
    engine._model = Twice()
    assert np.abs(drawn(engine, 4, labels).astype(int) - strong).max() <= 1


def test_scale_0_draws_without_classes(tmp_path: Path) -> None:
    subject = loaded(tmp_path, **CLASSES, label_dropout=0.1)
    engine = Engine(subject, SampleConfig(steps=5, guidance_scale=0.0), runtime(), 4)
    one, other = (drawn(engine, 4, np.full(4, label)) for label in (0, 2))
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, r"^guidance_scale 1\.5: this model was trained without classes \(class_cond\)$"),
        (CLASSES, r"^guidance_scale 1\.5: this model was trained without label dropout.*--label-dropout 0\.1$"),
        ({**CLASSES, "label_dropout": 0.0}, r"trained without label dropout"),
    ],
)
def test_refused_where_nothing_is_known_of_no_class(tmp_path: Path, flags: dict[str, Any], said: str) -> None:
    subject = loaded(tmp_path, **flags)
    for scale in (1.5, 0.0):
        with pytest.raises(ValueError, match=said.replace(r"1\.5", f"{scale:g}")):
            plan(subject, SampleConfig(guidance_scale=scale))
    plan(subject, SampleConfig(guidance_scale=1.0))


def test_a_cascade_guides_where_it_can(tmp_path: Path) -> None:
    """It is the base that decides what the image shows: the other one need not have been trained for it."""
    base = loaded(tmp_path, **CLASSES, label_dropout=0.1)
    config = SampleConfig(guidance_scale=2.0)
    for dropout in ({}, {"label_dropout": 0.1}):
        upper = loaded(tmp_path, **CLASSES, **UPPER, **dropout)
        upsampler = plan(base, config, super_res=upper).engine(runtime(), 1)
        assert isinstance(upsampler.base, Engine)
        assert upsampler.base.config.guidance_scale == 2.0
        assert upsampler.config.guidance_scale == (2.0 if dropout else 1.0)
    with pytest.raises(ValueError, match="trained without label dropout"):
        plan(loaded(tmp_path, **CLASSES), config, super_res=upper)
