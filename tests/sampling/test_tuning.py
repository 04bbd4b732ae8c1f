"""The search for a checkpoint's time grid, and the command that stores it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import load_checkpoint, sample
from fastdiff.checkpoint import manifest_path, model_path, read_metadata, verify_step, write_manifest
from fastdiff.cli.app import app
from fastdiff.config import Sampler, TimeGrid, TuneConfig
from fastdiff.runtime.lease import Lease
from fastdiff.sampling.tuning import Tuning, neighbours

from .support import CLASSES, UPPER, command, loaded, runtime, saved
from .test_guidance import Counting

FEW: dict[str, Any] = {"steps": 4, "num_samples": 5, "batch_size": 3, "reference_steps": 40, "clip_denoised": False}
FAR = {"diffusion_steps": 60}
"""Of a model whose few steps are far from its many ones: there is something to gain, more than any rounding."""
FLAGS = ("--steps", 4, "--num-samples", 5, "--reference-steps", 40, "--device", "cpu", "--precision", "fp32")


def searched(start: tuple[int, ...], error: Any) -> tuple[int, ...]:
    tried = {start: error(start)}
    for grid in neighbours(start, error):
        tried[grid] = error(grid)
    return min(tried, key=lambda grid: tried[grid])


@pytest.mark.parametrize("start", [(0, 333, 666, 999), (0, 1, 2, 999), (996, 997, 998, 999), (10, 500, 501, 999)])
def test_the_search_ends_at_the_best_grid(start: tuple[int, ...]) -> None:
    wanted = np.array([3, 120, 400, 999])
    assert searched(
        start,
        lambda grid: (
            float((np.sqrt(np.array(grid) + 1) - np.sqrt(wanted + 1)) @ np.ones(4)) ** 2
            + float(((np.array(grid) - wanted) ** 2).sum())
        ),
    ) == (3, 120, 400, 999)


def test_every_grid_of_the_search_is_one() -> None:
    rng = np.random.default_rng(0)
    errors: dict[tuple[int, ...], float] = {}
    count = 0
    for grid in neighbours((0, 1, 10, 11, 19), lambda grid: errors.setdefault(grid, rng.random())):
        assert len(grid) == 5
        assert sorted(set(grid)) == list(grid)
        assert (grid[0] >= 0, grid[-1]) == (True, 19)
        count += 1
    best = min(errors, key=lambda grid: errors[grid])
    near = [grid for grid in errors if sum(abs(a - b) for a, b in zip(grid, best, strict=True)) == 1]
    assert count > 10
    assert near  # it ends only when the nearest ones were tried


def tuned(tmp_path: Path, flags: dict[str, Any] | None = None, **config: Any) -> Tuning:
    subject = Tuning(loaded(tmp_path, **(flags or FAR)), TuneConfig(**FEW | config), runtime())
    assert subject.run(lambda *_: None, lambda: False)
    return subject


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler.DDIM,
        *(pytest.param(s, marks=pytest.mark.slow) for s in Sampler if not s.stochastic and s is not Sampler.DDIM),
    ],
)
def test_a_better_grid_is_found_for_every_sampler(tmp_path: Path, sampler: Sampler) -> None:
    found = tuned(tmp_path, sampler=sampler, trials=15).found
    start = min(found.errors[grid] for grid in found.named.values())
    assert found.errors[found.best] < start
    assert set(found.named) == set(TimeGrid) - {TimeGrid.TUNED}
    assert len(found.errors) <= 15 + 4


def test_the_error_is_that_of_the_images(tmp_path: Path) -> None:
    """As fastdiff.sample draws them on this grid and on the reference's, though it rounds pixels."""
    subject = tuned(tmp_path, CLASSES, trials=1, clip_denoised=True)
    path = saved(tmp_path / "m.safetensors", **CLASSES)
    how: dict[str, Any] = {"sampler": "unipc", "device": "cpu", "precision": "fp32"}
    exact = sample(path, 6, steps=20, time_grid="quadratic", **how).astype(float)  # all that the process has
    for grid in (TimeGrid.UNIFORM, TimeGrid.KARRAS):
        found = sample(path, 6, steps=4, time_grid=grid, **how).astype(float)
        error = subject.found.errors[subject.found.named[grid]]
        assert error > 5
        assert np.sqrt(((exact - found) ** 2).mean()) == pytest.approx(error, abs=1)  # each is rounded by 1/2 at most


@pytest.mark.slow
def test_the_search_is_the_same_in_any_batches_and_again(tmp_path: Path) -> None:
    first, again, other = (tuned(tmp_path, trials=6, num_samples=6, batch_size=size).found for size in (6, 6, 3))
    assert first.errors == again.errors
    for grid in first.named.values():
        assert first.errors[grid] == pytest.approx(other.errors[grid], rel=1e-3)


@pytest.mark.slow
def test_a_stored_grid_is_a_start(tmp_path: Path) -> None:
    grid = tuned(tmp_path, trials=10).found.best
    more = FAR | {"time_grids": {"unipc": {"4": {"timesteps": list(grid)}}}}
    found = tuned(tmp_path, more, trials=1).found
    assert found.named[TimeGrid.TUNED] == grid
    damaged = FAR | {"time_grids": {"unipc": {"4": {"timesteps": [3, 2, 1, 0]}}}}
    assert TimeGrid.TUNED not in tuned(tmp_path, damaged, trials=1).found.named


def test_the_cost_is_an_upper_bound(tmp_path: Path) -> None:
    subject = tuned(tmp_path, trials=3)
    assert subject.images == (40 + 7 * 4) * 6
    assert subject.model_calls == (40 + 7 * 4) * 2
    assert "6 images: 40 steps that count as exact, then at most 7 grids of 4 unipc steps; 408 images" in subject.cost
    assert len(subject.found.errors) <= 7


@pytest.mark.parametrize("sampler", ["unipc", "heun"])
def test_no_more_images_go_through_the_model(tmp_path: Path, sampler: str) -> None:
    subject = Tuning(loaded(tmp_path, **FAR), TuneConfig(**FEW | {"sampler": sampler, "trials": 3}), runtime())
    subject._model = model = Counting(subject._model)
    assert subject.run(lambda *_: None, lambda: False)
    less = 7 * len(subject._batches) if sampler == "heun" else 0  # heun's last step is one call
    assert len(subject.found.errors) == 7
    assert len(model.sizes) == subject.model_calls - less
    assert sum(model.sizes) == subject.images - less * 3


def test_stopping(tmp_path: Path) -> None:
    subject = Tuning(loaded(tmp_path, **FAR), TuneConfig(**FEW), runtime())
    assert not subject.run(lambda *_: None, lambda: len(subject.found.errors) == 6)
    assert len(subject.found.errors) == 6
    subject = Tuning(loaded(tmp_path, **FAR), TuneConfig(**FEW), runtime())
    assert not subject.run(lambda *_: None, lambda: True)
    assert not subject.found.errors


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"sampler": "dpm++-sde"}, r"^sampler dpm\+\+-sde adds noise"),
        ({"steps": 1}, r"^steps must be at least 2, not 1$"),
        ({"steps": 40, "reference_steps": 40}, r"^reference_steps must be above steps, which is 40, not 40$"),
        ({"num_samples": 0}, r"^num_samples must be positive"),
        ({"trials": -1}, r"^trials must be positive"),
    ],
)
def test_settings_that_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TuneConfig(**config)


def test_models_that_cannot_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^this model enlarges images of 8 pixels"):
        Tuning(loaded(tmp_path, **UPPER), TuneConfig(**FEW), runtime())
    with pytest.raises(ValueError, match=r"^steps 30: the process has 20 timesteps$"):
        Tuning(loaded(tmp_path), TuneConfig(steps=30), runtime())
    subject = Tuning(loaded(tmp_path), TuneConfig(**FEW), runtime())
    subject._model = lambda x, t: x * torch.nan
    with pytest.raises(ValueError, match="not finite"):
        subject.run(lambda *_: None, lambda: False)


def test_the_command_stores_what_sampling_then_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    path = saved(model_path(run, 7), **CLASSES, **FAR, class_counts=[1, 2, 3])
    write_manifest(run, 7, [path])
    before = read_metadata(path)
    command("tune-steps", run, *FLAGS, "--trials", 3)
    said = capsys.readouterr().out
    assert "cost: 5 images: 40 steps that count as exact, then at most 7 grids of 4 unipc steps" in said
    assert " uniform " in said
    assert f"stored in {path}" in said
    command("tune-steps", run, *FLAGS, "--trials", 1, "--sampler", "dpm++3m")
    command("tune-steps", run, *FLAGS[2:], "--trials", 1, "--steps", 3)
    metadata = read_metadata(path)
    grids = metadata.pop("time_grids")
    assert metadata == before
    assert {sampler: list(steps) for sampler, steps in grids.items()} == {"unipc": ["4", "3"], "dpm++3m": ["4"]}
    assert set(grids["unipc"]["4"]) == {"timesteps", "error", "uniform_error", "images"}
    assert grids["unipc"]["4"]["error"] <= grids["unipc"]["4"]["uniform_error"]
    assert f"grid: {','.join(map(str, grids['unipc']['4']['timesteps']))}\n" in said
    verify_step(run, 7)
    out = tmp_path / "s.npz"
    command("sample", run, "--num-samples", 2, "--sampler", "unipc", "--steps", 4, "--device", "cpu", "--out", out)
    with np.load(out) as file:
        assert json.loads(str(file["settings"]))["timesteps"] == grids["unipc"]["4"]["timesteps"]
    # and a conversion keeps it
    app(["convert", str(run), str(tmp_path / "c.safetensors")], standalone_mode=False)
    assert load_checkpoint(tmp_path / "c.safetensors").metadata["time_grids"] == grids
    capsys.readouterr()
    app(["convert", str(run), str(tmp_path / "c.pt")], standalone_mode=False)
    assert "the time grids of fastdiff tune-steps are not written" in capsys.readouterr().out


def test_a_signal_keeps_the_best_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m.safetensors", **FAR)
    drawn, after = Tuning._drawn, 7

    def counting(self: Tuning, *args: Any) -> Any:
        nonlocal after
        after -= 1
        if after == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn(self, *args)

    monkeypatch.setattr(Tuning, "_drawn", counting)
    words = list(map(str, ("tune-steps", path, *FLAGS)))
    assert app(words, standalone_mode=False) == 128 + signal.SIGTERM
    stored = read_metadata(path)["time_grids"]["unipc"]["4"]
    assert len(stored["timesteps"]) == 4
    after, before = 3, path.read_bytes()
    assert app(words, standalone_mode=False) == 128 + signal.SIGTERM
    assert path.read_bytes() == before  # not even the named ones were compared


def test_a_signal_after_named_grids_that_coincide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = {"unipc": {"4": {"timesteps": [0, 20, 39, 59]}}}
    path = saved(tmp_path / "m.safetensors", **FAR, time_grids=grids)
    subject = Tuning(load_checkpoint(path), TuneConfig(**FEW), runtime())
    assert subject.found.named[TimeGrid.TUNED] == subject.found.named[TimeGrid.UNIFORM]
    drawn, calls = Tuning._drawn, 0

    def counting(self: Tuning, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # after the exact images and four grids
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn(self, *args)

    monkeypatch.setattr(Tuning, "_drawn", counting)
    assert app(list(map(str, ("tune-steps", path, *FLAGS))), standalone_mode=False) == 128 + signal.SIGTERM
    assert "error" in read_metadata(path)["time_grids"]["unipc"]["4"]


def test_what_cannot_be_stored_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuning, "run", None)
    path = saved(tmp_path / "m.safetensors")
    path.chmod(0o444)
    with pytest.raises(ValueError, match=r"m\.safetensors is read-only"):
        command("tune-steps", path, *FLAGS)
    torch.save({}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt holds tensors only: fastdiff convert"):
        command("tune-steps", tmp_path / "m.pt", *FLAGS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^tune-steps runs in one process"):
        command("tune-steps", tmp_path / "m.safetensors", *FLAGS)


def test_a_run_in_training_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuning, "run", None)
    path = saved(model_path(tmp_path, 7))
    write_manifest(tmp_path, 7, [path])
    assert manifest_path(tmp_path, 7).exists()
    with Lease(tmp_path), pytest.raises(ValueError, match=r"is in use by process .*: stop it, or name another"):
        command("tune-steps", tmp_path, *FLAGS)
