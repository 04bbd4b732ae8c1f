"""fastdiff.sample(): what the command line draws, as an array."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import load_checkpoint
from fastdiff.checkpoint import write_manifest
from fastdiff.sampling import save_npz
from fastdiff.sampling.output import save_png

from .support import CLASSES, NAMES, SMOOTH, UPPER, command, saved

PLACE: dict[str, Any] = {"device": "cpu", "precision": "fp32", "compile": "off"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cats.safetensors and upper.safetensors, which enlarges them; plain ones; small.npz."""
    folder = tmp_path_factory.mktemp("models")
    saved(folder / "cats.safetensors", **CLASSES, label_dropout=0.1, class_counts=[3, 0, 1])
    saved(folder / "upper.safetensors", **CLASSES, **UPPER)
    saved(folder / "smooth.safetensors", **{**SMOOTH, "diffusion_steps": 40})
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    save_npz(folder / "small.npz", [images], images.shape, arr_1=np.array([2, 0, 1]), class_names=NAMES)
    return folder


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("cats", {}, []),
        ("cats", {"num_samples": 5, "batch_size": 2, "seed": 2**64 - 1}, ["--num-samples", 5, "--seed", 2**64 - 1]),
        ("cats", {"indices": [7, 3, 2**40]}, ["--indices", f"7,3,{2**40}"]),
        ("cats", {"indices": range(3, 6), "classes": "dog"}, ["--indices", "3-5", "--class", "dog"]),
        ("cats", {"num_samples": 3, "classes": 2}, ["--num-samples", 3, "--class", 2]),
        ("cats", {"num_samples": 3, "classes": ["dog", 0]}, ["--num-samples", 3, "--class", "dog,0"]),
        ("cats", {"num_samples": 9, "class_mix": "data"}, ["--num-samples", 9, "--class-mix", "data"]),
        ("cats", {"num_samples": 2, "guidance_scale": 3}, ["--num-samples", 2, "--guidance-scale", 3]),
        ("cats", {"num_samples": 2, "sampler": "heun"}, ["--num-samples", 2, "--sampler", "heun"]),
        ("upper", {"base_samples": "small.npz"}, ["--base-samples", "small.npz"]),
        ("upper", {"base_samples": "small.npz", "num_samples": 2}, ["--base-samples", "small.npz", "--num-samples", 2]),
        ("upper", {"base_samples": "small.npz", "indices": [1]}, ["--base-samples", "small.npz", "--indices", 1]),
        ("cats", {"super_res": "upper.safetensors", "indices": [1, 5]}, ["--super-res", "upper.safetensors"]),
        ("smooth", {"interpolate": (4, "9"), "sampler": "ddim"}, ["--interpolate", 4, 9, "--sampler", "ddim"]),
    ],
    ids=str,
)
def test_it_draws_what_the_command_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, here: dict[str, Any], there: list[object]
) -> None:
    monkeypatch.chdir(folder)
    how = {"steps": 3, **PLACE, **here}
    images = fastdiff.sample(f"{name}.safetensors", **how)
    out = tmp_path / "a.npz"
    if "super_res" in here:
        there = [*there, "--indices", "1,5"]
    flags = ["--device", "cpu", "--precision", "fp32", "--compile", "off", "--steps", 3]
    command("sample", f"{name}.safetensors", *flags, *there, "--out", out)
    with np.load(out) as file:
        expected = file["arr_0"]
    assert (images.dtype, images.shape) == (np.uint8, expected.shape)
    assert np.abs(images.astype(int) - expected).max() <= 1
    again = fastdiff.sample(Path(f"{name}.safetensors"), **how)
    assert np.array_equal(images, again)


def test_pictures_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    for i in range(3):
        save_png(tmp_path / f"cat_{i}.png", np.full((8, 8, 3), 80 * i, np.uint8))
    (tmp_path / "cat_1.png").write_bytes(b"")
    how: dict[str, Any] = {**PLACE, "steps": 2, "base_samples": tmp_path}
    with pytest.raises(ValueError, match=r"1 of 3 images cannot be read: cat_1\.png \(empty file\).*--skip-unreadable"):
        fastdiff.sample(folder / "upper.safetensors", **how)
    images = fastdiff.sample(folder / "upper.safetensors", skip_unreadable=True, **how)
    (tmp_path / "cat_1.png").unlink()
    assert np.array_equal(images, fastdiff.sample(folder / "upper.safetensors", **how))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoints_model_is_left_as_it_is(folder: Path, precision: str) -> None:
    checkpoint, upper = (load_checkpoint(folder / f"{name}.safetensors") for name in ("cats", "upper"))
    checkpoint.model.train()
    for p in list(checkpoint.model.parameters())[::2]:
        p.requires_grad_(False)
    asked = [p.requires_grad for p in checkpoint.model.parameters()]
    before = [deepcopy(each.model.state_dict()) for each in (checkpoint, upper)]
    how: dict[str, Any] = {**PLACE, "precision": precision, "steps": 3}
    images = fastdiff.sample(checkpoint, 3, super_res=upper, **how)
    for each, state in zip((checkpoint, upper), before, strict=True):
        now = each.model.state_dict()
        assert {k: v.dtype for k, v in now.items()} == {k: v.dtype for k, v in state.items()}
        assert all(torch.equal(now[key], state[key]) for key in state)
        assert all(p.grad is None for p in each.model.parameters())
    assert checkpoint.model.training
    assert [p.requires_grad for p in checkpoint.model.parameters()] == asked
    assert checkpoint.diffusion.num_timesteps == 20
    files = [folder / f"{name}.safetensors" for name in ("cats", "upper")]
    assert np.array_equal(images, fastdiff.sample(files[0], 3, super_res=files[1], **how))


def test_a_run_folder_is_its_newest_average(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("model000002", 1), ("ema_0.99_000002", 2), ("ema_0.99_000001", 3)):
        saved(tmp_path / f"{name}.safetensors", seed=seed)
    for step in (1, 2):
        write_manifest(tmp_path, step, sorted(tmp_path.glob(f"*{step:06d}.safetensors")))
    expected = fastdiff.sample(tmp_path / "ema_0.99_000002.safetensors", 2, steps=2, **PLACE)
    assert np.array_equal(fastdiff.sample(str(tmp_path), 2, steps=2, **PLACE), expected)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"stesp": 3}, "sample has no setting stesp"),
        ({"num_samples": 3, "indices": [1]}, "num_samples and indices both say"),
        ({"indices": []}, "indices"),
        ({"indices": [-1]}, "indices"),
        ({"indices": [1.5]}, "indices"),
        ({"indices": [2**63]}, "indices"),
        ({"indices": 7}, "indices"),
        ({"num_samples": 0}, "num_samples must be positive"),
        ({"steps": 21}, "21 of 20"),
        ({"sampler": "euler"}, "sampler must be one of"),
        ({"classes": "eel"}, "class 'eel'"),
        ({"classes": ["cat", 3]}, "class '3'"),
        ({"device": "tpu"}, "device must be"),
        ({"interpolate": (1, 2), "sampler": "ddim"}, "interpolate: this model has classes"),
    ],
    ids=str,
)
def test_what_does_not_fit(folder: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fastdiff.sample(folder / "cats.safetensors", **{**PLACE, **how})


def test_no_images_of_base_samples(folder: Path) -> None:
    with pytest.raises(ValueError, match="num_samples must be positive"):
        fastdiff.sample(folder / "upper.safetensors", 0, base_samples=folder / "small.npz", **PLACE)


def test_every_step_can_be_watched(folder: Path) -> None:
    """p_sample_loop_progressive, from where sample begins, ends where sample does."""
    checkpoint = load_checkpoint(folder / "smooth.safetensors")
    from fastdiff.diffusion import Philox

    noise = Philox(5, torch.arange(2))
    steps = list(
        checkpoint.diffusion.p_sample_loop_progressive(checkpoint.model, (2, 3, 8, 8), noise=noise, step_noise=noise)
    )
    assert len(steps) == 40
    images = fastdiff.sample(checkpoint, 2, seed=5, **PLACE)
    from fastdiff.data import to_uint8

    assert np.abs(to_uint8(steps[-1]["sample"]).numpy().astype(int) - images).max() <= 1
