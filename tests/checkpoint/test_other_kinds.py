"""Files that are no checkpoints are named as what they are."""

import gzip
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastdiff import load_checkpoint


def write(path: Path, kind: str) -> None:
    if kind == "safetensors":
        save_file({"a": torch.zeros(1)}, path)
    elif kind == "torch":
        torch.save({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(
            {
                "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                "html": b"\n<!DOCTYPE html>\n<html></html>",
                "gzip": gzip.compress(b"weights"),
            }[kind]
        )


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("model.pt", "lfs", "is a Git LFS pointer, not the file itself: fetch that with git lfs pull"),
        ("model.safetensors", "lfs", "is a Git LFS pointer, not the file itself: fetch that with git lfs pull"),
        ("model.pt", "html", "is a web page, not the file itself: download that"),
        ("model.safetensors", "html", "is a web page, not the file itself: download that"),
        ("model.pt", "gzip", "is compressed: unpack it with gunzip"),
        ("model.pt", "safetensors", "is a safetensors file: rename it to end in .safetensors"),
        ("model.safetensors", "torch", "is a PyTorch file: rename it to end in .pt"),
    ],
)
def test_it_is_named(name: str, kind: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path, kind)
    with pytest.raises(ValueError, match=f"{name} {said}$"):
        load_checkpoint(path)
