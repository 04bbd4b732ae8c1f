"""Files that are whole or absent."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastdiff import checkpoint, load_checkpoint

from .support import names, save


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
        monkeypatch.setattr("fastdiff.checkpoint.files.save_file", half_written)
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


def test_a_file_of_a_newer_version_is_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for key in ("fastdiff-3", "fastdiff-10"):
        save_file({"a": torch.zeros(2)}, path, metadata={key: "{}"})
        with pytest.raises(ValueError, match=r"m\.safetensors was made by a newer fastdiff: upgrade"):
            load_checkpoint(path)
    for key in ("fastdiff-0", "fastdiff-2a", "newer-fastdiff-2"):
        save_file({"a": torch.zeros(2)}, path, metadata={key: "{}"})
        with pytest.raises(ValueError, match="not a fastdiff checkpoint"):
            load_checkpoint(path)


def test_safetensors_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"theirs\.safetensors is a safetensors file, but not a fastdiff checkpoint"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a fastdiff checkpoint"):
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
    with pytest.raises(ValueError, match=r"^no checkpoint in .*: train a model first"):
        load_checkpoint(tmp_path)


def test_an_optimizer_file_is_named_as_one(tmp_path: Path) -> None:
    path = checkpoint.write_tensors(tmp_path / "opt.safetensors", {"a": torch.zeros(2)}, {"kind": "optimizer"})
    with pytest.raises(ValueError, match=r"opt\.safetensors is a file of the kind optimizer.*ema_"):
        load_checkpoint(path)
