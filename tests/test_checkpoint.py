"""Checkpoints: whole or absent, and with everything in them that is needed to use them."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastdiff import DiffusionConfig, ModelConfig, build_model, checkpoint, load_checkpoint, save_checkpoint
from fastdiff.checkpoint import delete_step, find_checkpoint, replacing, saved_steps

MODEL = ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult=(1,), class_cond=True, num_classes=3)
DIFFUSION = DiffusionConfig(diffusion_steps=20, noise_schedule="cosine", timestep_respacing="5")


def save(path: Path, config: ModelConfig = MODEL, **metadata: Any) -> Path:
    torch.manual_seed(0)
    return save_checkpoint(path, build_model(config), model_config=config, diffusion_config=DIFFUSION, **metadata)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    model = build_model(MODEL)
    path = tmp_path / "new" / "m.safetensors"
    described = {"model_config": MODEL, "diffusion_config": DIFFUSION, "step": 12, "class_names": ("a", "b", "c")}
    assert save_checkpoint(path, model, **described, ema_rate=0.99) == path
    loaded = load_checkpoint(str(path))
    assert (loaded.model_config, loaded.diffusion_config) == (MODEL, DIFFUSION)
    assert (loaded.step, loaded.class_names, loaded.metadata["ema_rate"]) == (12, ("a", "b", "c"), 0.99)
    assert loaded.diffusion.num_timesteps == 5
    assert not loaded.model.training
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_metadata_are_plain_json_with_the_widths_written_out(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", replace(MODEL, channel_mult=None))
    with safe_open(path, framework="pt") as file:
        (text,) = file.metadata().values()
    metadata = json.loads(text)
    assert metadata["kind"] == "model"
    assert metadata["model_config"]["channel_mult"] == [1, 2, 2]  # 8 pixels have no entry in the original's table
    assert metadata["diffusion_config"]["noise_schedule"] == "cosine"
    assert load_checkpoint(path).model_config.channel_mult == (1, 2, 2)


def test_device_and_kernels_are_the_readers_choice(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors")
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 2])
    outputs = [load_checkpoint(path, kernels=kernels).model(x, t, y) for kernels in ("reference", "torch")]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_file_is_not_overruled_by_another_process(tmp_path: Path) -> None:
    """A checkpoint knows its process; another one is for bare state dicts."""
    path = save(tmp_path / "m.safetensors")
    other = DiffusionConfig(diffusion_steps=1000)
    try:
        loaded = load_checkpoint(path, diffusion_config=other)
    except ValueError:
        return  # a refusal would do too
    assert loaded.diffusion_config == DIFFUSION


@pytest.mark.parametrize("when", ["writing", "syncing", "renaming"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path = save(tmp_path / "m.safetensors", step=1)
    before = path.read_bytes()

    def half_written(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    if when == "writing":
        monkeypatch.setattr(checkpoint, "save_file", half_written)
    elif when == "syncing":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match=r"No space left|Input/output"):
        save(path, step=2)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["m.safetensors"]
    with pytest.raises(OSError, match=r"No space left|Input/output"):
        save(tmp_path / "new.safetensors")
    assert names(tmp_path) == ["m.safetensors"]


def test_an_interrupted_write_leaves_the_old_file_too(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            assert temporary.parent == path.parent  # on the same disk, or it could not be renamed
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        real_sync(handle)

    def replace(path: Path, target: Path) -> Path:
        order.append("rename")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save(tmp_path / "m.safetensors")
    assert order == ["file", "rename", "folder"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_a_file_has_the_umasks_mode(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        path = save(tmp_path / "m.safetensors")
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_bare_state_dict_needs_its_configurations(tmp_path: Path) -> None:
    model = build_model(MODEL)
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    for given in ({}, {"model_config": MODEL}, {"diffusion_config": DIFFUSION}):
        with pytest.raises(ValueError, match=r"model\.pt is a bare state dict: .*--preset"):
            load_checkpoint(path, **given)
    loaded = load_checkpoint(path, model_config=MODEL, diffusion_config=DIFFUSION)
    assert (loaded.model_config, loaded.diffusion_config, loaded.step) == (MODEL, DIFFUSION, 0)
    assert loaded.class_names == ()
    assert torch.equal(loaded.model.state_dict()["out.0.weight"], model.state_dict()["out.0.weight"])
    with pytest.raises(ValueError, match=r"another architecture: label_emb\.weight is \(3, 128\) in the file and \(4"):
        load_checkpoint(path, model_config=replace(MODEL, num_classes=4), diffusion_config=DIFFUSION)
    with pytest.raises(ValueError, match=r"another architecture: label_emb\.weight is \(3, 128\) in the file and abs"):
        load_checkpoint(path, model_config=replace(MODEL, class_cond=False), diffusion_config=DIFFUSION)


def test_safetensors_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"theirs\.safetensors is a safetensors file, but not one of fastdiff's"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not one of fastdiff's"):
        load_checkpoint(path)
    for text in ("[1, 2]", '{"kind": 3}', '{"kind": "model"}', "{}", "nonsense", '{"model_config": {}}'):
        save_file({"a": torch.zeros(2)}, path, metadata={checkpoint.FORMAT: text})
        with pytest.raises(ValueError, match=r"theirs\.safetensors"):
            load_checkpoint(path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "m.safetensors"
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"m\.safetensors is damaged or incomplete"):
            load_checkpoint(path)
    with pytest.raises(ValueError, match=r"nowhere\.safetensors does not exist"):
        load_checkpoint(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="is not a file"):
        load_checkpoint(tmp_path)


def test_an_optimizer_file_is_named_as_one(tmp_path: Path) -> None:
    path = checkpoint.write_tensors(tmp_path / "opt.safetensors", {"a": torch.zeros(2)}, {"kind": "optimizer"})
    with pytest.raises(ValueError, match=r"opt\.safetensors is a file of the kind optimizer.*ema_"):
        load_checkpoint(path)


def touch(folder: Path, *stems: str, when: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem in stems:
        path = folder / f"{stem}.safetensors"
        path.touch()
        if when is not None:
            os.utime(path, (when, when))


def test_saved_steps_are_those_with_weights_and_optimizer(tmp_path: Path) -> None:
    touch(tmp_path, "model000010", "opt000010", "model000002", "opt000002", "model000020", "opt000030")
    touch(tmp_path, "ema_0.9_000040", "mymodel000050", "opt000050", "model1234567", "opt1234567", "model12", "opt12")
    assert saved_steps(tmp_path) == [2, 10, 1234567]
    assert saved_steps(tmp_path / "nowhere") == []


def test_delete_step_takes_every_file_of_the_step(tmp_path: Path) -> None:
    touch(tmp_path, "model000010", "opt000010", "ema_0.9999_000010", "ema_0.5_000010", "model000020", "opt000020")
    delete_step(tmp_path, 10)
    assert names(tmp_path) == ["model000020.safetensors", "opt000020.safetensors"]


def test_a_step_that_is_half_deleted_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "model000010", "opt000010", "ema_0.9999_000010")
    real, removed = Path.unlink, []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        delete_step(tmp_path, 10)
    assert saved_steps(tmp_path) == []


def test_find_checkpoint_takes_the_newest_runs_slowest_average(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    touch(runs / "old", "model000900", "ema_0.9999_000900", "opt000900", when=1000)
    touch(runs / "new", "model000010", "ema_0.9_000010", "ema_0.9999_000010", "ema_0.999_000010", when=1900)
    touch(runs / "new", "model000020", "ema_0.9_000020", "ema_0.9999_000020", "ema_0.999_000020", when=2000)
    touch(runs / "new", "opt000020", when=3000)
    (runs / "file.txt").touch()
    (runs / "empty").mkdir()
    assert find_checkpoint(None, runs) == runs / "new/ema_0.9999_000020.safetensors"
    assert find_checkpoint(runs / "old", runs) == runs / "old/ema_0.9999_000900.safetensors"
    assert find_checkpoint(runs / "old/model000900.safetensors", runs) == runs / "old/model000900.safetensors"
    touch(runs / "plain", "model000003", when=4000)
    assert find_checkpoint(None, runs) == runs / "plain/model000003.safetensors"


def test_find_checkpoint_passes_over_a_step_that_was_not_saved_to_its_end(tmp_path: Path) -> None:
    """A process killed between two files of a step leaves the raw weights without their average."""
    touch(tmp_path, "model000010", "ema_0.9999_000010", "opt000010", "model000020")
    assert find_checkpoint(tmp_path) == tmp_path / "ema_0.9999_000010.safetensors"


def test_find_checkpoint_in_vain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint in any folder of .*fastdiff train"):
        find_checkpoint(None, tmp_path / "runs")
    touch(tmp_path / "runs/a", "opt000010")
    with pytest.raises(ValueError, match=r"no checkpoint in .*runs/a"):
        find_checkpoint(tmp_path / "runs/a")
