"""The checkpoints of a run folder: a step is saved when its manifest is."""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastdiff import checkpoint
from fastdiff.checkpoint import (
    begin_step,
    delete_step,
    find_checkpoint,
    manifest_path,
    remove_leftovers,
    saved_steps,
    verify_step,
    write_manifest,
)
from fastdiff.runtime.files import replacing

from .support import names


def touch(folder: Path, *stems: str, when: int | None = None) -> list[Path]:
    """Files of a few bytes of their own, without a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.safetensors" for stem in stems]
    for path in paths:
        path.write_text(path.name)
        if when is not None:
            os.utime(path, (when, when))
    return paths


def saved(folder: Path, *steps: int, when: int | None = None) -> None:
    """Whole steps."""
    for step in steps:
        stems = f"model{step:06d}", f"ema_0.9999_{step:06d}", f"opt{step:06d}"
        write_manifest(folder, step, touch(folder, *stems, when=when))


def test_saved_steps_are_those_with_a_manifest(tmp_path: Path) -> None:
    saved(tmp_path, 10, 2, 1234567)
    touch(tmp_path, "model000020", "ema_0.9999_000020", "opt000020")
    for name in ("manifest12.json", "manifest000030.json.tmp", "mymanifest000040.json", "manifest000050"):
        (tmp_path / name).touch()
    assert saved_steps(tmp_path) == [2, 10, 1234567]
    assert saved_steps(tmp_path / "nowhere") == []


def test_the_manifest_says_length_and_hash(tmp_path: Path) -> None:
    saved(tmp_path, 500)
    manifest = json.loads((tmp_path / "manifest000500.json").read_text())
    assert manifest.keys() == {"format", "step", "files", "sha256"}
    assert (manifest["format"], manifest["step"]) == (checkpoint.FORMAT, 500)
    assert sorted(manifest["files"]) == [name for name in names(tmp_path) if name.endswith(".safetensors")]
    assert manifest["files"]["model000500.safetensors"] == {
        "bytes": 23,
        "sha256": "634ec32ebaa4158ce09961bee8e42d2e7a46283e44a954145584fd8700164c70",
    }
    verify_step(tmp_path, 500)


def test_what_is_not_as_it_was_saved_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 500)
    path = tmp_path / "ema_0.9999_000500.safetensors"
    whole = path.read_bytes()
    for damaged, says in (
        (whole[:-1], f"has {len(whole) - 1} bytes instead of {len(whole)}"),
        (whole + b"x", f"has {len(whole) + 1} bytes"),
        (b"E" + whole[1:], "its SHA-256 does not match the saved one"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"ema_0\.9999_000500\.safetensors is damaged: .*{says}"):
            verify_step(tmp_path, 500)
    path.unlink()
    with pytest.raises(ValueError, match=r"ema_0\.9999_000500\.safetensors is missing$"):
        verify_step(tmp_path, 500)
    path.mkdir()
    with pytest.raises(ValueError, match=r"ema_0\.9999_000500\.safetensors"):
        verify_step(tmp_path, 500)
    with pytest.raises(ValueError, match=r"manifest000600\.json is missing: step 600 was not saved completely"):
        verify_step(tmp_path, 600)


def change(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | values)


FILE = {"bytes": 3, "sha256": "0"}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: "", "is damaged"),
        (lambda text: text[:-3], "is damaged"),
        (lambda text: "\0" * len(text), "is damaged"),
        (lambda text: "[" * 100_000, "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: "1" * 5000, "is damaged"),
        (lambda text: "{}", "is damaged"),
        (change(files={}), "is damaged"),
        (change(files=[]), "is damaged"),
        (change(files={"a": 3}), "is damaged"),
        (change(files={"a": {"bytes": "3", "sha256": "0"}}), "is damaged"),
        (change(files={"../a": FILE}), "is damaged"),
        (change(files={"/etc/hosts": FILE}), "is damaged"),
        (change(files={"a\\b": FILE}), "is damaged"),
        (change(step=501), "is damaged"),
        (change(format="fastdiff-0"), "is damaged"),
        (change(format=None), "is damaged"),
        (change(format="fastdiff-3"), "made by a newer fastdiff: upgrade"),
        (change(format="fastdiff-3", files=None), "made by a newer fastdiff: upgrade"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, damage: Callable[[str], str], says: str) -> None:
    saved(tmp_path, 500)
    path = manifest_path(tmp_path, 500)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=rf"manifest000500\.json (was )?{says}"):
        verify_step(tmp_path, 500)
    before = names(tmp_path)
    assert saved_steps(tmp_path) == [500]  # so that whoever resumes says a word about it
    assert remove_leftovers(tmp_path) == []
    assert names(tmp_path) == before  # the weights may still be good


def test_delete_step_takes_every_file_of_the_step(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    touch(tmp_path, "ema_0.5_000010", "mymodel000010")
    delete_step(tmp_path, 10)
    kept = [f"{kind}000020.safetensors" for kind in ("ema_0.9999_", "model", "opt")]
    assert names(tmp_path) == sorted([*kept, "manifest000020.json", "mymodel000010.safetensors"])
    verify_step(tmp_path, 20)


def test_a_step_that_is_half_deleted_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 10)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            delete_step(tmp_path, 10)
    assert saved_steps(tmp_path) == []
    assert len(remove_leftovers(tmp_path)) == 3
    assert names(tmp_path) == []


def test_leftovers_are_what_was_begun_and_not_ended(tmp_path: Path) -> None:
    """Weights that someone put into the folder, or whose manifest someone lost, are not ours to delete."""
    saved(tmp_path, 10)
    touch(tmp_path, "model000005", "ema_0.9999_000005", "opt000005", "mine")
    (tmp_path / ".notes.tmp").touch()
    kept = names(tmp_path)
    begin_step(tmp_path, 20)
    touch(tmp_path, "model000020", "opt000020")
    (tmp_path / ".model000020.safetensors.a1b2c3d_.tmp").mkdir()
    (tmp_path / ".model000020.safetensors.a1b2c3d_.tmp/.tmpXyZ").touch()
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews/.a.png.12345678.tmp").mkdir()
    assert remove_leftovers(tmp_path) == [
        ".a.png.12345678.tmp",
        ".model000020.safetensors.a1b2c3d_.tmp",
        "model000020.safetensors",
        "opt000020.safetensors",
    ]
    assert names(tmp_path) == sorted([*kept, "previews"])
    assert names(tmp_path / "previews") == []


def test_a_step_that_is_whole_stays_whatever_mark_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_step(tmp_path, 10)
    paths = touch(tmp_path, "model000010", "opt000010")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # as if killed before it
        write_manifest(tmp_path, 10, paths)
    assert ".unfinished000010" in names(tmp_path)
    assert remove_leftovers(tmp_path) == []
    assert names(tmp_path) == ["manifest000010.json", "model000010.safetensors", "opt000010.safetensors"]


def test_what_this_process_is_writing_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing(Path("config.json")) as temporary:
        assert remove_leftovers(tmp_path) == remove_leftovers(Path()) == []
        temporary.write_text("{}")
    assert names(tmp_path) == ["config.json"]
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_a_preview_is_drawn_while_the_saver_removes_leftovers(tmp_path: Path) -> None:
    ended = threading.Event()

    def remove() -> None:
        while not ended.is_set():
            remove_leftovers(tmp_path)

    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(remove)
        try:
            for i in range(200):
                with replacing(tmp_path / "previews" / f"{i}.png") as temporary:
                    temporary.write_text("png")
        finally:
            ended.set()
        removing.result()
    assert len(names(tmp_path / "previews")) == 200


def test_a_step_that_is_written_again_is_not_measured_by_its_old_manifest(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    begin_step(tmp_path, 10)
    assert names(tmp_path) == [".unfinished000010"]
    saved(tmp_path, 10)
    verify_step(tmp_path, 10)


def test_find_checkpoint_takes_the_newest_runs_slowest_average(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    touch(runs / "old", "model000900", "ema_0.9999_000900", "opt000900", when=1000)
    touch(runs / "new", "model000010", "ema_0.9_000010", "ema_0.9999_000010", "ema_0.999_000010", when=1900)
    touch(runs / "new", "model000020", "ema_0.9_000020", "ema_0.9999_000020", "ema_0.999_000020", when=2000)
    touch(runs / "new", "opt000020", when=3000)
    write_manifest(runs / "new", 20, list((runs / "new").glob("*000020.safetensors")))
    (runs / "file.txt").touch()
    (runs / "empty").mkdir()
    assert find_checkpoint(None, runs) == runs / "new/ema_0.9999_000020.safetensors"
    assert find_checkpoint(runs / "old", runs) == runs / "old/ema_0.9999_000900.safetensors"
    assert find_checkpoint(runs / "old/model000900.safetensors", runs) == runs / "old/model000900.safetensors"
    touch(runs / "plain", "model000003", when=4000)
    assert find_checkpoint(None, runs) == runs / "plain/model000003.safetensors"


def test_find_checkpoint_passes_over_a_step_that_was_not_saved_to_its_end(tmp_path: Path) -> None:
    """A process killed between two files of a step leaves the raw weights without their average."""
    saved(tmp_path, 10)
    touch(tmp_path, "model000020")
    assert find_checkpoint(tmp_path) == tmp_path / "ema_0.9999_000010.safetensors"


def test_find_checkpoint_in_vain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint in any folder of .*fastdiff train"):
        find_checkpoint(None, tmp_path / "runs")
    touch(tmp_path / "runs/a", "opt000010")
    with pytest.raises(
        ValueError, match=r"no checkpoint in .*runs/a: train a model first \(fastdiff train or train-classifier\)"
    ):
        find_checkpoint(tmp_path / "runs/a")
