"""A super-resolution model is trained on small images with noise, the same whatever the batches that they come in."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdiff import TrainConfig
from fastdiff.config import RunConfig
from fastdiff.training.objective import with_conditioning_noise
from fastdiff.training.update import Updater

from .support import run_config, trainer

MANY = 4000


def noise_of(level: float, numbers: Tensor, seed: int = 0) -> Tensor:
    config = TrainConfig(conditioning_noise=level, seed=seed)
    return with_conditioning_noise(config, torch.zeros(len(numbers), 3, 4, 4), numbers)


def test_the_deviation_is_uniform_up_to_the_level() -> None:
    found = noise_of(0.5, torch.arange(MANY)).flatten(1).std(dim=1)  # of 48 values: within a tenth or so
    assert abs(float(found.mean()) - 0.25) < 0.01
    assert float(found.max()) < 0.5 * 1.5
    shares = [float((found < 0.5 * q).double().mean()) for q in (0.25, 0.5, 0.75)]
    assert all(abs(share - q) < 0.04 for share, q in zip(shares, (0.25, 0.5, 0.75), strict=True))


def test_it_hangs_on_seed_and_sample_alone() -> None:
    whole = noise_of(0.3, torch.arange(50))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:7]
    assert torch.equal(noise_of(0.3, order), whole[order])
    assert not torch.equal(noise_of(0.3, torch.arange(50), seed=1), whole)
    torch.testing.assert_close(noise_of(0.6, torch.arange(50)), 2 * whole)


def test_the_model_is_given_it(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[float, list[Tensor]] = {0.0: [], 0.5: []}
    for level, found in seen.items():
        run = trainer(tmp_path / str(level), shapes, steps=1, small_size=4, conditioning_noise=level)
        update = Updater(run.config, run.state, run.objective, run.module, run.forward, run.world)
        real = run.model.forward

        def forward(x: Tensor, t: Tensor, *args: object, low_res: Tensor, found: list[Tensor] = found, real=real):  # type: ignore[no-untyped-def]
            found.append(low_res)
            return real(x, t, low_res=low_res)

        monkeypatch.setattr(run.model, "forward", forward)
        images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        update(images, None)
    clean, noisy = seen[0.0][0], seen[0.5][0]
    torch.testing.assert_close(noisy - clean, noise_of(0.5, torch.arange(4)), rtol=0, atol=1e-6)
    assert 0 < float((noisy - clean).std()) < 0.5


def test_it_needs_a_super_resolution_model(shapes: Path) -> None:
    with pytest.raises(ValueError, match=r"conditioning_noise 0\.1 is for super-resolution models: give --small-size"):
        run_config(shapes, conditioning_noise=0.1)
    assert isinstance(run_config(shapes, conditioning_noise=0.1, small_size=4), RunConfig)


@pytest.mark.parametrize("level", [-0.1, 2.1])
def test_levels_out_of_range(level: float) -> None:
    with pytest.raises(ValueError, match="conditioning_noise must be between 0 and 2"):
        TrainConfig(conditioning_noise=level)
