"""Which timesteps a job takes: the flags', a named grid's or the checkpoint's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiff import SampleConfig, sample
from fastdiff.config import MetricsConfig, TimeGrid
from fastdiff.diffusion import build_diffusion
from fastdiff.diffusion.time_grids import grid_timesteps
from fastdiff.sampling import Engine, save_npz
from fastdiff.sampling.job import settings_of
from fastdiff.sampling.time_grids import chosen_grid

from .support import PROCESS, UPPER, command, drawn, loaded, plan, runtime, saved

OWN = [0, 2, 7, 19]
TUNED: dict[str, Any] = {"time_grids": {"unipc": {"4": {"timesteps": OWN}}}}


def timesteps(checkpoint: Any, **flags: Any) -> tuple[TimeGrid, list[int]]:
    engine = Engine(checkpoint, SampleConfig(**flags), runtime(), 1)
    return engine.grid, engine.diffusion.timestep_map.tolist()


@pytest.mark.parametrize("grid", ["log-snr", "karras", "quadratic"])
def test_a_named_grid_is_the_processs(tmp_path: Path, grid: str) -> None:
    expected = grid_timesteps(build_diffusion(PROCESS).alphas_cumprod, 5, TimeGrid(grid))
    assert timesteps(loaded(tmp_path), steps=5, time_grid=grid) == (grid, expected)
    assert expected != [0, 5, 10, 14, 19]
    # of the whole process, however the checkpoint is respaced
    assert timesteps(loaded(tmp_path, timestep_respacing="7"), steps=5, time_grid=grid) == (grid, expected)


def test_the_checkpoints_own_grid_is_the_default(tmp_path: Path) -> None:
    subject = loaded(tmp_path, **TUNED)
    even = [0, 6, 13, 19]
    assert timesteps(subject, steps=4, sampler="unipc") == ("tuned", OWN)
    assert timesteps(subject, steps=4, sampler="unipc", time_grid="tuned") == ("tuned", OWN)
    assert timesteps(subject, steps=4, sampler="unipc", time_grid="uniform") == ("uniform", even)
    assert timesteps(subject, steps=4, sampler="dpm++") == ("uniform", even)
    assert timesteps(subject, steps=3, sampler="unipc")[0] == "uniform"
    assert timesteps(subject, timestep_respacing="4", sampler="unipc") == ("uniform", even)
    assert timesteps(subject, sampler="unipc") == ("uniform", list(range(20)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"steps": 4, "time_grid": "tuned"},
            r"^time_grid tuned: this checkpoint has none for 4 steps of ddpm; fastdiff",
        ),
        ({"steps": 3, "sampler": "unipc", "time_grid": "tuned"}, r"none for 3 steps of unipc"),
        ({"steps": 21, "time_grid": "karras"}, r"^steps 21: the process has 20 timesteps$"),
    ],
)
def test_a_grid_that_does_not_exist(tmp_path: Path, flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chosen_grid(loaded(tmp_path, **TUNED), SampleConfig(**flags))


def test_the_noise_of_ddim_has_no_tuned_grid(tmp_path: Path) -> None:
    subject = loaded(tmp_path, time_grids={"ddim": {"4": {"timesteps": OWN}}})
    assert timesteps(subject, steps=4, sampler="ddim")[0] == "tuned"
    assert timesteps(subject, steps=4, sampler="ddim", eta=1.0)[0] == "uniform"
    with pytest.raises(ValueError, match="none for 4 steps of ddim with eta"):
        timesteps(subject, steps=4, sampler="ddim", eta=1.0, time_grid="tuned")


@pytest.mark.parametrize(
    "grids",
    [
        7,
        {"unipc": 3},
        {"unipc": {"4": [0, 1, 2, 19]}},
        {"unipc": {"4": {"timesteps": "0123"}}},
        {"unipc": {"4": {"timesteps": [0, 2, 7]}}},
        {"unipc": {"4": {"timesteps": [0, 7, 2, 19]}}},
        {"unipc": {"4": {"timesteps": [-1, 2, 7, 19]}}},
        {"unipc": {"4": {"timesteps": [0, 2, 7, 18]}}},
        {"unipc": {"4": {"timesteps": [0, 2, 7, 20]}}},
        {"unipc": {"4": {"timesteps": [0, True, 7, 19]}}},
    ],
)
def test_a_damaged_grid_is_refused(tmp_path: Path, grids: Any) -> None:
    subject = loaded(tmp_path, time_grids=grids)
    with pytest.raises(ValueError, match=r"^time_grids: the checkpoint's grid for 4 steps of unipc is damaged: use"):
        timesteps(subject, steps=4, sampler="unipc")
    for grid in ("uniform", "karras"):
        assert timesteps(subject, steps=4, sampler="unipc", time_grid=grid)[0] == grid


def test_a_comparison_takes_no_tuned_grid_unless_asked(tmp_path: Path) -> None:
    subject = loaded(tmp_path, time_grids={"dpm++": {"20": {"timesteps": list(range(20))}}})
    assert chosen_grid(subject, SampleConfig(sampler="dpm++", steps=20))[0] == "tuned"
    for config in (MetricsConfig(), MetricsConfig.from_flags({"num_samples": 5})):
        assert chosen_grid(subject, config) == ("uniform", None)
    assert chosen_grid(subject, MetricsConfig(time_grid="tuned"))[0] == "tuned"
    assert MetricsConfig.from_flags({"sampler": "ddim"}, base=MetricsConfig()).steps is None


@pytest.mark.parametrize("flags", [{}, {"time_grid": "karras"}], ids=str)
def test_a_comparison_of_a_short_process_takes_all_its_timesteps(tmp_path: Path, flags: dict[str, Any]) -> None:
    config = MetricsConfig.from_flags(flags)
    assert config.within(20) == config
    assert chosen_grid(loaded(tmp_path, diffusion_steps=15), config.within(15)) == ("uniform", None)
    assert config.within(15).respacing is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"time_grid": "karras"}, r"^time_grid karras spreads the timesteps of steps: give steps$"),
        ({"time_grid": "uniform", "timestep_respacing": "10"}, r"spreads .* give steps, not timestep_respacing$"),
        ({"time_grid": "even", "steps": 4}, r"^time_grid must be one of uniform, log-snr, karras, quadratic, tuned"),
    ],
)
def test_contradictions(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SampleConfig(**flags)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++3m", "unipc", "ipndm", "heun"])
def test_an_image_is_the_same_in_any_batch(tmp_path: Path, sampler: str) -> None:
    path = saved(tmp_path / "m.safetensors")
    how: dict[str, Any] = {
        "sampler": sampler,
        "steps": 5,
        "time_grid": "quadratic",
        "device": "cpu",
        "precision": "fp32",
    }
    whole = sample(path, 5, batch_size=5, **how)
    alone = sample(path, indices=[4, 1], batch_size=1, **how)
    assert np.abs(alone.astype(int) - whole[[4, 1]].astype(int)).max() <= 2
    other = sample(path, 5, **how | {"time_grid": "uniform"})
    assert not np.array_equal(other, whole)


def test_a_jobs_settings_hold_the_timesteps(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", **TUNED)

    def settings(**flags: Any) -> dict[str, Any]:
        subject = plan(loaded(tmp_path, **TUNED), SampleConfig(sampler="unipc", **flags))
        return json.loads(json.dumps(settings_of(subject, np.arange(2), runtime(), path)))

    tuned = settings(steps=4)
    assert (tuned["time_grid"], tuned["timesteps"]) == ("tuned", OWN)
    assert settings(steps=4, time_grid="tuned") == tuned
    karras = settings(steps=4, time_grid="karras")
    assert (karras["time_grid"], karras["timesteps"][-1]) == ("karras", 19)
    # as earlier versions wrote them
    for even in ({"steps": 4, "time_grid": "uniform"}, {"steps": 3}, {}):
        assert not {"time_grid", "timesteps"} & set(settings(**even))


def test_an_unfinished_job_goes_on_with_its_grid_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "m.safetensors", **TUNED)
    how = ("sample", path, "--num-samples", 4, "--batch-size", 2, "--device", "cpu", "--sampler", "unipc", "--steps", 4)
    out = tmp_path / "s.npz"
    command(*how, "--out", tmp_path / "whole.npz")
    said = capsys.readouterr().out
    assert "time grid: the one tuned for this checkpoint, sampler and number of steps (--time-grid)" in said
    assert "4 unipc steps" in said

    class Killed(Exception):
        pass

    from fastdiff.sampling.files import SampleFiles

    with pytest.MonkeyPatch.context() as patch:
        keep = SampleFiles.keep
        kept: list[int] = []

        def once(*args: Any) -> None:
            if kept:
                raise Killed
            kept.append(1)
            keep(*args)

        patch.setattr(SampleFiles, "keep", once)
        with pytest.raises(Killed):
            command(*how, "--out", out)
    with pytest.raises(ValueError, match=r"another time_grid \(tuned, not quadratic\)"):
        command(*how, "--out", out, "--time-grid", "quadratic")
    with pytest.raises(ValueError, match=r"another time_grid \(tuned, not None\)"):
        command(*how, "--out", out, "--time-grid", "uniform")
    command(*how, "--out", out)
    assert "resuming: 2 of 4 images are finished" in capsys.readouterr().out
    with np.load(out) as found, np.load(tmp_path / "whole.npz") as whole:
        assert np.array_equal(found["arr_0"], whole["arr_0"])
        assert json.loads(str(found["settings"]))["timesteps"] == OWN


def test_each_model_of_a_cascade_has_its_own(tmp_path: Path) -> None:
    base, upper = loaded(tmp_path), loaded(tmp_path, **UPPER, **TUNED)
    subject = plan(base, SampleConfig(sampler="unipc", steps=4), super_res=upper)
    engine = subject.engine(runtime(), 2)
    assert engine.grid is TimeGrid.TUNED
    assert isinstance(engine.base, Engine)
    assert engine.base.grid is TimeGrid.UNIFORM
    assert drawn(engine, 2).shape == (2, 16, 16, 3)
    paths = [saved(tmp_path / "b.safetensors"), saved(tmp_path / "u.safetensors", **UPPER, **TUNED)]
    settings = settings_of(subject, np.arange(2), runtime(), paths[0], super_res=paths[1])
    assert "timesteps" not in settings
    assert settings["super_res"]["timesteps"] == OWN


def test_base_samples_are_enlarged_on_the_grid(tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    save_npz(tmp_path / "small.npz", [images], images.shape)
    config = SampleConfig(sampler="unipc", steps=4)
    subject = plan(loaded(tmp_path, **UPPER, **TUNED), config, base_samples=tmp_path / "small.npz")
    assert subject.engine(runtime(), 2).diffusion.timestep_map.tolist() == OWN
