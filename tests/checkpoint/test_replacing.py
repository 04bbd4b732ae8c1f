"""A checkpoint's file that is replaced: its tensors stay, and its step is whole at every moment."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.checkpoint import (
    add_metadata,
    best_path,
    find_checkpoint,
    manifest_path,
    model_path,
    optimizer_path,
    read_metadata,
    read_tensors,
    sha256,
    verify_file,
    verify_step,
    write_manifest,
    write_tensors,
)
from fastdiff.checkpoint import steps as steps_module

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}
ABOUT = {"kind": "model", "model_config": {}, "diffusion_config": {}, "step": 5, "class_names": [], "ema_rate": 0.9}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    paths = [
        write_tensors(model_path(tmp_path, 5), TENSORS, ABOUT),
        write_tensors(optimizer_path(tmp_path, 5), TENSORS, {"kind": "optimizer"}),
    ]
    write_manifest(tmp_path, 5, paths)
    said = {"checkpoint": paths[0].name, "step": 5, "sha256": sha256(paths[0]), "value": 1.5}
    best_path(tmp_path).write_text(json.dumps(said))
    return tmp_path


def test_the_rest_of_a_step_stays(run: Path) -> None:
    path, other = model_path(run, 5), optimizer_path(run, 5)
    before = other.read_bytes()
    add_metadata(path, time_grids={"unipc": {}}, step=6)
    tensors, metadata = read_tensors(path, "model", verified=verify_file(path))
    assert metadata == {**ABOUT, "time_grids": {"unipc": {}}, "step": 6}
    assert {key: value.tolist() for key, value in tensors.items()} == {k: v.tolist() for k, v in TENSORS.items()}
    assert other.read_bytes() == before
    verify_step(run, 5)
    files = json.loads(manifest_path(run, 5).read_text())["files"]
    assert files[path.name] == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    assert sorted(p.name for p in run.iterdir()) == sorted([path.name, other.name, "manifest000005.json", "best.json"])


def test_it_stays_the_best(run: Path) -> None:
    add_metadata(model_path(run, 5), more=1)
    assert find_checkpoint(f"{run}@best") == model_path(run, 5)
    assert json.loads(best_path(run).read_text())["value"] == 1.5


def test_another_best_and_a_damaged_one_stay_as_they_are(run: Path) -> None:
    for text in ('{"checkpoint": "ema_0.9_000005.safetensors", "sha256": "0"}', "[1]", "nothing", '{"sha256": 3}'):
        best_path(run).write_text(text)
        add_metadata(model_path(run, 5), more=text)
        assert best_path(run).read_text() == text
    best_path(run).unlink()
    add_metadata(model_path(run, 5), more=1)
    assert not best_path(run).exists()


def test_a_file_of_its_own(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "model000005.safetensors", TENSORS, ABOUT)
    add_metadata(path, more=[1])
    assert read_metadata(path)["more"] == [1]
    read_tensors(path, "model")  # whose SHA-256 is right
    path = write_tensors(tmp_path / "mine.safetensors", TENSORS, ABOUT)
    add_metadata(path, more=[2])
    assert read_tensors(path, "model")[1]["more"] == [2]
    assert len(list(tmp_path.iterdir())) == 2


class Killed(BaseException):
    pass


def test_a_killed_process_leaves_a_whole_step(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after every file that appears, and once more if the same is done again from there."""
    path, replace, outcomes = model_path(run, 5), Path.replace, []
    for again in range(8):
        for after in (False, True):
            count = 0

            def dying(self: Path, target: Path, until: int = again, late: bool = after) -> Any:
                nonlocal count
                count += 1
                if count <= until:
                    return replace(self, target)
                if late:
                    replace(self, target)
                raise Killed

            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", dying)
                try:
                    add_metadata(path, tried=[again, after])
                except Killed:
                    pass
                else:
                    outcomes.append(again)
            verify_step(run, 5)
            tried = read_tensors(path, "model", verified=verify_file(path))[1].get("tried")
            assert tried is None or tried[0] <= again
    assert outcomes  # it was killed at every file, and then completed
    assert read_metadata(path)["tried"] == [7, True]
    assert steps_module._NEXT not in manifest_path(run, 5).read_text()


def test_a_damaged_file_is_not_replaced(run: Path) -> None:
    path = model_path(run, 5)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        add_metadata(path, more=1)
    assert path.read_bytes() == bytes(data)


def test_a_manifest_accepts_no_third_file(run: Path) -> None:
    path = model_path(run, 5)
    said = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    other = {"bytes": path.stat().st_size, "sha256": "0" * 64}
    files = json.loads(manifest_path(run, 5).read_text())["files"]
    for entry, whole in (
        ({**said, "next": other}, True),
        ({**other, "next": said}, True),
        ({**other, "next": other}, False),
    ):
        steps_module._write_manifest(run, 5, {**files, path.name: entry})
        if whole:
            verify_step(run, 5)
        else:
            with pytest.raises(ValueError, match="SHA-256 does not match"):
                verify_step(run, 5)
    steps_module._write_manifest(run, 5, {**files, path.name: {**said, "next": 3}})
    with pytest.raises(ValueError, match=r"manifest000005\.json is damaged"):
        verify_step(run, 5)


def test_what_may_not_be_written_is_refused(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "model.safetensors", TENSORS, ABOUT)
    path.chmod(0o444)
    with pytest.raises(ValueError, match=r"model\.safetensors is read-only: copy it"):
        add_metadata(path, more=1)
    torch.save(TENSORS, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds tensors only: fastdiff convert"):
        add_metadata(tmp_path / "model.pt", more=1)
