"""The judge: it learns, is kept, says how good it is, and judges nothing if that is not enough."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.benchmarks.quality import judge as judge_module
from fastdiff.benchmarks.quality.judge import Judge, Network, open_judge, share_named, train
from fastdiff.benchmarks.quality.pictures import PARTS, read_pictures, write_pictures

from ...support import refusal
from .support import COLOURED, COLOURS

Open = Callable[..., Judge]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    write_pictures(COLOURED, folder)
    open_judge(COLOURED, folder, tell=lambda _: None)
    return folder


def opened(folder: Path, said: list[str] | None = None) -> Judge:
    return open_judge(COLOURED, folder, tell=[].append if said is None else said.append)


def test_it_names_what_it_has_not_learned(data: Path) -> None:
    judge = opened(data)
    assert judge.accuracy == 1
    assert judge.class_names == tuple(COLOURS)
    held_out = read_pictures(data / "held_out")
    found = judge(torch.from_numpy(held_out.images).permute(0, 3, 1, 2))
    assert found.features.shape == (len(held_out.images), 96)
    assert found.probabilities is not None
    assert found.probabilities.argmax(1).tolist() == held_out.labels.tolist()
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(len(held_out.images)))


def test_an_image_is_judged_alone(data: Path) -> None:
    judge, images = opened(data), torch.from_numpy(read_pictures(data / "train").images).permute(0, 3, 1, 2)
    together = judge(images).features
    alone = torch.cat([judge(image[None]).features for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_it_is_kept_until_its_images_change(data: Path) -> None:
    said: list[str] = []
    first = opened(data, said)
    assert not said
    image = data / "reference" / "red_00.png"
    before, kept = image.read_bytes(), (data / "judge.safetensors").read_bytes()
    try:
        image.write_bytes((data / "reference" / "red_01.png").read_bytes())
        again = opened(data, said)
    finally:
        image.write_bytes(before)
        (data / "judge.safetensors").write_bytes(kept)
    assert said == ["training the judge of colours on 36 real images ..."]
    assert again.sha256 == first.sha256  # it learned the same


def test_a_poor_judge_is_refused(data: Path, tmp_path: Path) -> None:
    for part in PARTS:
        (tmp_path / part).mkdir()
        for path in (data / part).iterdir():
            colour, number = path.stem.split("_")
            wrong = {"red": "blue", "blue": "red"}.get(colour, colour) if part == "held_out" else colour
            (tmp_path / part / f"{wrong}_{number}.png").write_bytes(path.read_bytes())
    said = refusal(lambda: opened(tmp_path))
    assert said.startswith("the judge of colours names 33.3% of 24 held-out real images rightly, less than 98%")
    assert not (tmp_path / "judge.safetensors").exists()


def test_training_is_its_own_and_leaves_the_generators_alone(data: Path) -> None:
    learned = read_pictures(data / "train")
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = Network(3, 8)
        before = torch.get_rng_state()
        train(network, learned, flips=True, updates=3)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(network.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not network.training


def test_which_part_is_checked() -> None:
    assert COLOURED.judge_checked_on == "held_out"
    assert replace(COLOURED, judge_learns="held_out").judge_checked_on == "train"


@pytest.mark.parametrize("flips", [False, True])
def test_images_are_moved_a_little(flips: bool) -> None:
    images = torch.zeros(400, 3, 16, 16, dtype=torch.uint8)
    images[:, :, 6:10, 2:4] = 255  # left of the middle
    moved = judge_module._moved(images, flips, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() <= 255
    bright = (moved > 128).float().sum((1, 2))  # (N, W)
    centre = (bright * torch.arange(16)).sum(1) / bright.sum(1)
    mirrored = (centre > 8).float().mean()
    assert 0.4 < mirrored < 0.6 if flips else mirrored == 0


def test_share_named() -> None:
    assert share_named(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])) == 0.75


def test_networks_halve_to_four_pixels() -> None:
    for size in (32, 64):
        network = Network(4, size)
        images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        assert network.layers(images.float()).shape == (2, 96, 4, 4)
        assert partial(network)(images)[1].shape == (2, 4)
