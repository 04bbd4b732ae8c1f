"""Augmentation: what is done to an image, what the model is told of it, and that a sample knows nothing of it."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import DataConfig, ModelConfig, build_model, load_checkpoint
from fastdiff.config import RunConfig
from fastdiff.models import UNet
from fastdiff.training.augmentation import augmented, crops, transforms, warped, whole
from fastdiff.training.resuming import resume
from fastdiff.training.update import Updater

from ..support import inputs
from .support import TINY, file, randomise, run_config, same, trainer

MANY = torch.arange(20_000)
IDENTITY = torch.eye(3)[:2]


def smooth(count: int, size: int) -> Tensor:
    """Images (N, 3, size, size) of a few waves, the same ones at every size."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(count, 3, 5, 5, generator=generator)
    place = (torch.arange(size) + 0.5) / size
    basis = torch.stack([torch.cos(math.pi * k * place) for k in range(5)])  # mirrored at the edges
    return torch.einsum("ncij,iy,jx->ncyx", waves, basis, basis) / 20


def near(found: Tensor, expected: Tensor, atol: float = 0.02) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def about(found: float, expected: float, spread: float, count: int = len(MANY)) -> None:
    """Within five standard errors of a mean."""
    assert abs(found - expected) < 5 * spread / count**0.5, (found, expected)


@pytest.mark.parametrize("probability", [0.12, 0.5, 1.0])
def test_each_transform_has_its_probability_and_its_parameters(probability: float) -> None:
    _, told = transforms(0, MANY, probability)
    told = told.double()
    assert told.shape == (len(MANY), 9)
    done = torch.stack([*told[:, :3].unbind(1), told[:, 4], told[:, 5], told[:, 7]], dim=1) != 0
    for i, chance in enumerate([probability / 2] * 2 + [probability] * 4):
        about(float(done[:, i].double().mean()), chance, 0.5)
    chances = [probability / 2] * 2 + [probability] * 4
    for i in range(6):
        for j in range(i):  # independent of each other
            about(float((done[:, i] & done[:, j]).double().mean()), chances[i] * chances[j], 0.5)
    assert set(told[:, :2].unique().tolist()) == {0, 1}
    turned = told[done[:, 3]][:, 3:5] + torch.tensor([1.0, 0.0])
    near(turned.norm(dim=1), torch.ones(len(turned), dtype=torch.float64), 1e-5)
    pulled = told[done[:, 4]][:, 5:7]
    for numbers, deviation in (
        (told[done[:, 2]][:, 2], 1.0),
        *((part, 0.5**0.5) for part in (*turned.unbind(1), *pulled.unbind(1))),
        *((part, 1.0) for part in told[done[:, 5]][:, 7:].unbind(1)),
    ):
        about(float(numbers.mean()), 0, deviation, len(numbers))
        about(float(numbers.square().mean()), deviation**2, 1.5, len(numbers))


def test_nothing_is_done_at_probability_0() -> None:
    matrices, told = transforms(0, MANY, 0.0)
    assert not told.any()
    assert torch.equal(matrices, IDENTITY.expand(len(MANY), 2, 3))


def test_it_hangs_on_seed_and_sample_alone() -> None:
    x = smooth(50, 8)
    for crop in (1.0, 0.7):
        images, told = augmented(x, 8, 3, MANY[:50], crop=crop, probability=0.5)
        order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:7]
        some, told_of_some = augmented(x[order], 8, 3, order, crop=crop, probability=0.5)
        assert torch.equal(told_of_some, told[order])
        near(some, images[order], 1e-6)
        assert not torch.equal(augmented(x, 8, 4, MANY[:50], crop=crop, probability=0.5)[1], told)


def test_what_is_told_is_what_is_done() -> None:
    """The matrices from the told numbers alone, as the inverse of translate stretch rotate scale mirror."""
    matrices, told = transforms(7, MANY[:500], 0.7)

    def rotation(angle: float) -> np.ndarray:
        return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])

    for matrix, (x, y, a, cosine, sine, along, slant, c, d) in zip(matrices, told.double().tolist(), strict=True):
        mirror = np.diag([1 - 2 * x, 1 - 2 * y, 1.0])
        scale = np.diag([2 ** (0.2 * a)] * 2 + [1.0])
        turn = rotation(math.atan2(sine, cosine + 1))
        factor, direction = 2 ** (0.2 * math.hypot(along, slant)), math.atan2(slant, along) / 2
        stretch = rotation(direction) @ np.diag([factor, 1 / factor, 1.0]) @ rotation(-direction)
        shift = np.array([[1, 0, 2 * c / 8], [0, 1, 2 * d / 8], [0, 0, 1]])  # an image is two wide
        expected = np.linalg.inv(shift @ stretch @ turn @ scale @ mirror)[:2]
        np.testing.assert_allclose(matrix.double().numpy(), expected, rtol=0, atol=2e-5)


def moved(x: Tensor, rows: list[list[float]], size: int | None = None) -> Tensor:
    return warped(x, torch.tensor(rows).expand(len(x), 2, 3), x.shape[2] if size is None else size)


def test_a_picture_is_moved_as_its_matrix_says() -> None:
    x = smooth(4, 32)
    near(moved(x, IDENTITY.tolist()), x)
    near(moved(x, [[-1, 0, 0], [0, 1, 0]]), x.flip(3))
    near(moved(x, [[1, 0, 0], [0, -1, 0]]), x.flip(2))
    near(moved(x, [[0, 1, 0], [-1, 0, 0]]), x.rot90(1, dims=(3, 2)))  # x is along the last dimension
    near(moved(x, [[1, 0, 8 / 32 * 2], [0, 1, 0]])[..., :24], x[..., 8:])  # the source is to the right
    beyond = moved(x, [[1, 0, 8 / 32 * 2], [0, 1, 0]])[..., 24:]
    near(beyond, x[..., 24:].flip(3))  # and beyond the edge is its mirror image
    near(moved(x, [[1, 0, 0], [0, 1, 0]], 16), smooth(4, 16))
    near(whole(x, 16), smooth(4, 16))
    assert whole(x, 32) is x


def test_a_smaller_picture_has_no_moire() -> None:
    """A chessboard of single pixels becomes grey, whereas bilinear sampling of every 1.5th pixel beats."""
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1).expand(1, 3, 64, 64)
    inside = slice(14, 50)  # mirrored at its edge, it is no chessboard there
    assert moved(board, [[1.5, 0, 0], [0, 1.5, 0]])[..., inside, inside].abs().max() < 0.05
    grid = torch.nn.functional.affine_grid(1.5 * IDENTITY[None], [1, 3, 64, 64], align_corners=False)
    plain = torch.nn.functional.grid_sample(board, grid, padding_mode="reflection", align_corners=False)
    assert plain[..., inside, inside].abs().max() > 0.2


def test_no_pixel_leaves_the_range_and_untouched_images_stay() -> None:
    x = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    images, told = augmented(x, 8, 0, MANY[:400], crop=1.0, probability=0.12)
    assert images.abs().max() == 1
    untouched = (told == 0).all(dim=1)
    assert 100 < untouched.sum() < 300
    assert torch.equal(images[untouched], x[untouched])
    assert (images[~untouched] != x[~untouched]).flatten(1).any(dim=1).all()
    images, _ = augmented(x, 6, 0, MANY[:400], crop=0.75, probability=1.0)
    assert images.shape == (400, 3, 6, 6)
    assert images.isfinite().all()
    assert images.abs().max() <= 1


@pytest.mark.parametrize("smallest", [0.5, 0.8])
def test_crops_are_uniform_and_within_the_image(smallest: float) -> None:
    share, centre = (part.double() for part in crops(0, MANY, smallest))
    assert smallest <= share.min()
    assert share.max() <= 1
    about(float(share.mean()), (1 + smallest) / 2, (1 - smallest) / 12**0.5)
    assert (centre.abs() + share[:, None]).max() <= 1 + 1e-6
    place = centre / (1 - share[:, None])
    assert place.abs().max() <= 1
    for part in place.unbind(1):
        about(float(part.mean()), 0, 1 / 3**0.5)
        about(float(part.square().mean()), 1 / 3, 0.3)
    about(float((place[:, 0] * place[:, 1]).mean()), 0, 1 / 3)


def test_a_crop_is_a_part_of_the_picture() -> None:
    """And a share of 16 / 20 of 20 pixels gives 16 without a loss of detail."""
    x = smooth(6, 20)
    share, centre = crops(5, MANY[:6], 0.8)
    found, told = augmented(x, 16, 5, MANY[:6], crop=0.8, probability=0.0)
    assert not told.any()
    fine = smooth(6, 2000)
    for i in range(6):
        side = round(float(share[i]) * 2000)
        left, top = (round((1 + float(c) - float(share[i])) * 1000) for c in centre[i])
        part = fine[i : i + 1, :, top : top + side, left : left + side]
        near(found[i : i + 1], torch.nn.functional.interpolate(part, 16, mode="area"), 0.03)


def model_of(**flags: Any) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult=(1,), **flags))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("flags", [{}, {"class_cond": True, "num_classes": 3}, {"small_size": 4}], ids=str)
def test_a_model_that_is_told_nothing_is_the_plain_one(flags: dict[str, Any]) -> None:
    told, plain = model_of(augment_dim=9, **flags), model_of(**flags)
    state = told.state_dict()
    assert state.pop("augment_emb.weight").shape == (128, 9)
    plain.load_state_dict(state)  # the other keys and shapes are the same
    given, nothing = inputs(told, 2), torch.zeros(2, 9)
    with torch.no_grad():
        expected = plain(**given)
        assert torch.equal(told(**given), expected)
        assert torch.equal(told(**given, augment=nothing), expected)
        something = told(**given, augment=torch.tensor([[1.0, *[0] * 8], [0] * 9]))
    assert (something - expected)[0].abs().max() > 1e-3
    near(something[1], expected[1], 1e-6)
    with pytest.raises(ValueError, match=r"^the model has augment_dim 0: pass no augment$"):
        plain(**given, augment=nothing)


def updated(run_dir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> list[dict[str, Tensor]]:
    """What a model is given in an update of four images in micro-batches of three."""
    subject = trainer(run_dir, shapes, steps=1, microbatch=3, **flags)
    seen: list[dict[str, Tensor]] = []
    real = subject.model.forward

    def forward(x: Tensor, t: Tensor, **given: Tensor) -> Tensor:
        seen.append({"x": x, "t": t, **given})
        return real(x, t, **given)

    monkeypatch.setattr(subject.model, "forward", forward)
    images = torch.from_numpy(np.asarray(subject.dataset.images[:4]))
    update = Updater(subject.config, subject.state, subject.objective, subject.module, subject.forward, subject.world)
    update(images, None)
    return seen


def test_what_an_update_gives_to_the_model(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = updated(tmp_path / "0", shapes, monkeypatch)
    assert [set(given) for given in plain] == [{"x", "t"}] * 2
    told = updated(tmp_path / "1", shapes, monkeypatch, augment=0.9)
    _, expected = transforms(0, torch.arange(4), 0.9)
    assert torch.equal(torch.cat([given["augment"] for given in told]), expected)
    assert not torch.equal(told[0]["x"], plain[0]["x"])
    assert torch.equal(told[0]["t"], plain[0]["t"])
    # a super-resolution model enlarges what is augmented
    seen = [updated(tmp_path / f"{p}", shapes, monkeypatch, augment=p, small_size=4)[0] for p in (0.2, 0.9)]
    assert not torch.equal(seen[0]["low_res"], seen[1]["low_res"])
    cropped = updated(tmp_path / "2", shapes, monkeypatch, random_crop=0.5)
    assert [set(given) for given in cropped] == [{"x", "t"}] * 2
    assert cropped[0]["x"].shape == (3, 3, 8, 8)


def test_held_out_images_are_whole_and_as_they_are(tmp_path: Path, shapes: Path) -> None:
    subject = trainer(tmp_path, shapes, augment=1.0, random_crop=0.5)
    assert subject.dataset.images.shape[1:] == (16, 16, 3)
    images = torch.from_numpy(np.asarray(subject.dataset.images[:4]))
    x_start, conditions = subject.objective.inputs(images, None, None)
    assert conditions == {}
    near(x_start, torch.nn.functional.interpolate(images.permute(0, 3, 1, 2) / 127.5 - 1, 8, mode="area"), 0.5)
    assert x_start.shape == (4, 3, 8, 8)


HOW: dict[str, Any] = {"augment": 0.5, "random_crop": 0.75, "lr": 1e-2, "batch_size": 8, "ema_rate": "0.9"}


def test_a_run_is_resumed_exactly_and_drawn_from(tmp_path: Path, shapes: Path) -> None:
    straight = randomise(trainer(tmp_path / "straight", shapes, steps=4, save_interval=2, **HOW))
    straight.run()
    (tmp_path / "resumed").mkdir()
    for path in straight.run_dir.glob("*0002.*"):
        shutil.copy(path, tmp_path / "resumed")
    again = trainer(tmp_path / "resumed", shapes, steps=4, **HOW)
    resume(again)
    assert again.state.step == 2
    again.run()
    name = "model000004.safetensors"
    one, other = (file(run_dir / name)[0] for run_dir in (straight.run_dir, again.run_dir))
    assert same(one, other)
    assert one["augment_emb.weight"].abs().max() > 0
    assert load_checkpoint(straight.run_dir / name).model_config.augment_dim == 9


def test_the_configuration_of_a_run(shapes: Path) -> None:
    config = run_config(shapes, augment=0.1)
    assert config.model.augment_dim == 9  # type: ignore[union-attr]
    assert run_config(shapes).model.augment_dim == 0  # type: ignore[union-attr]
    assert RunConfig.from_dict(config.to_dict()) == config
    assert run_config(shapes, random_crop=0.75, image_size=16).decoded_size == 22
    assert run_config(shapes).decoded_size == TINY["image_size"]
    old = config.to_dict()
    for part, name in (("data", "augment"), ("data", "random_crop"), ("model", "augment_dim")):
        del old[part][name]  # an earlier version's
    assert RunConfig.from_dict(old) == run_config(shapes)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"augment": -0.1}, "augment must be between 0 and 1, not -0.1"),
        ({"augment": 1.5}, "augment must be between 0 and 1, not 1.5"),
        ({"random_crop": 0.1}, "random_crop must be between 0.25 and 1, not 0.1"),
        ({"random_crop": 1.1}, "random_crop must be between 0.25 and 1, not 1.1"),
    ],
)
def test_values_out_of_range(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        DataConfig(**how)
    with pytest.raises(ValueError, match=r"^augment_dim must be 0 or 9, not 3$"):
        ModelConfig(augment_dim=3)
