"""A file says what its SHA-256 is, and a manifest those of a step's files and its own: no bit may change."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.checkpoint import (
    files,
    load_checkpoint,
    manifest_path,
    model_path,
    read_tensors,
    verify_file,
    verify_step,
    write_manifest,
    write_tensors,
)

from .support import save

TENSORS = {"w": torch.arange(40.0), "b": torch.ones(3)}
ABOUT = {"kind": "optimizer", "step": 3, "said": "a longer text, with ümlauts"}
EVERY = [pytest.param(True, marks=pytest.mark.slow), False]


def flipped(path: Path, every: bool) -> Iterator[int]:
    """Flip bits of a file, one at a time: every one, or one of each byte."""
    whole = path.read_bytes()
    for byte in range(len(whole)):
        for bit in range(8) if every else [byte % 8]:
            damaged = bytearray(whole)
            damaged[byte] ^= 1 << bit
            path.write_bytes(damaged)
            # a clock's tick may be longer than this takes: another time, as any other change would have
            os.utime(path, ns=(0, 10**15 + 8 * byte + bit))
            yield byte
    path.write_bytes(whole)


@pytest.mark.parametrize("every", EVERY)
def test_every_byte_of_a_file(tmp_path: Path, every: bool) -> None:
    path = write_tensors(tmp_path / "a.safetensors", TENSORS, ABOUT)
    for _ in flipped(path, every):
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            read_tensors(path, "optimizer")
    tensors, about = read_tensors(path, "optimizer")
    assert about == ABOUT
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("every", EVERY)
def test_every_byte_of_a_manifest(tmp_path: Path, every: bool) -> None:
    paths = [write_tensors(model_path(tmp_path, 3), TENSORS, ABOUT)]
    paths.append(write_tensors(tmp_path / "opt000003.safetensors", TENSORS, ABOUT))
    write_manifest(tmp_path, 3, paths)
    for _ in flipped(manifest_path(tmp_path, 3), every):
        with pytest.raises(ValueError, match=r"damaged|newer fastdiff"):
            verify_step(tmp_path, 3)
        with pytest.raises(ValueError, match=r"damaged|newer fastdiff"):
            verify_file(paths[0])
    verify_step(tmp_path, 3)
    verify_file(paths[0])


def test_a_file_of_before_is_read(tmp_path: Path) -> None:
    """It says no SHA-256; beside its manifest, which may be one of before too, it is checked all the same."""
    new = save(tmp_path / "new.safetensors", step=3)
    path = model_path(tmp_path, 3)
    _, about = read_tensors(new, "model")
    save_file(load_file(new), path, metadata={"fastdiff-1": json.dumps(about)})
    write_manifest(tmp_path, 3, [path])
    manifest = json.loads(manifest_path(tmp_path, 3).read_text())
    del manifest["sha256"]
    manifest_path(tmp_path, 3).write_text(json.dumps({**manifest, "format": "fastdiff-1"}, indent=2) + "\n")
    assert load_checkpoint(path).step == 3
    with path.open("rb+") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"model000003\.safetensors is damaged: its SHA-256 does not match"):
        load_checkpoint(path)
    manifest_path(tmp_path, 3).unlink()
    assert load_checkpoint(path).step == 3


def test_a_file_is_read_for_its_sha256_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run folder by the manifest, elsewhere by its own; until it changes."""
    read: list[str] = []
    real = files._hash
    monkeypatch.setattr(files, "_hash", lambda path, *more: read.append(path.name) or real(path, *more))
    path = save(model_path(tmp_path, 3))
    monkeypatch.setattr(files, "_CLOCK_TICK", 0)  # it is as new as a file can be
    read.clear()
    for _ in range(2):
        load_checkpoint(path)
        files.sha256(path)
    assert read == [path.name] * 2  # its own, and that of all its bytes
    write_manifest(tmp_path, 3, [path])
    load_checkpoint(path)
    assert len(read) == 2
    os.utime(path, (1, 1))
    load_checkpoint(path)
    assert len(read) == 3
