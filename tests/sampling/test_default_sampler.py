"""The sampler of a model for which none is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastdiff
from fastdiff.config import SampleConfig
from fastdiff.sampling.plan import with_sampler

from .support import command, loaded, saved

LONG = {"diffusion_steps": 40}
AUTO = {"run_config": {"recipe": "auto"}}
FLOW = {"prediction": "flow", "predict_xstart": False, "noise_schedule": "linear"}


@pytest.mark.parametrize(
    ("about", "flags", "expected"),
    [
        ({}, {}, ("ddpm", None)),
        ({"run_config": {"recipe": "improved"}}, {}, ("ddpm", None)),
        (AUTO, {}, ("dpm++", 20)),
        (AUTO, {"steps": None, "timestep_respacing": None}, ("dpm++", 20)),
        (AUTO | {"diffusion_steps": 20}, {}, ("dpm++", None)),
        (AUTO | {"timestep_respacing": "5"}, {}, ("dpm++", None)),
        (AUTO, {"steps": 7}, ("dpm++", 7)),
        ({}, {"steps": 7}, ("ddpm", 7)),
        (AUTO, {"sampler": "heun"}, ("heun", None)),
        (AUTO, {"timestep_respacing": "4"}, ("dpm++", None)),
        (FLOW, {}, ("dpm++", 20)),
        (FLOW, {"steps": 3}, ("dpm++", 3)),
    ],
    ids=str,
)
def test_it(tmp_path: Path, about: dict[str, Any], flags: dict[str, Any], expected: tuple[str, int | None]) -> None:
    config = SampleConfig.from_flags(with_sampler(flags, loaded(tmp_path, **LONG | about)))
    assert (config.sampler, config.steps) == expected


def test_the_command_says_it_and_python_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "m.safetensors", **LONG | AUTO)
    plain = ("--num-samples", 2, "--device", "cpu", "--compile", "off", "--precision", "fp32")
    command("sample", path, "--out", "a.npz", *plain)
    assert "sampler: dpm++, 20 steps (or give --sampler)" in capsys.readouterr().out
    command("sample", path, "--out", "b.npz", *plain, "--sampler", "dpm++", "--steps", 20)
    with np.load("a.npz") as first, np.load("b.npz") as second:
        assert np.array_equal(first["arr_0"], second["arr_0"])
        in_python = fastdiff.sample(path, 2, device="cpu", compile="off", precision="fp32")
        assert np.array_equal(in_python, first["arr_0"])


def test_a_flow_has_no_ancestral_steps(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", **LONG | FLOW)
    said = "sampler ddpm: the model predicts a flow, which has no ancestral steps: use --sampler dpm\\+\\+ or ddim"
    with pytest.raises(ValueError, match=said):
        fastdiff.sample(path, 2, sampler="ddpm", device="cpu")
    assert fastdiff.sample(path, 2, device="cpu", compile="off").shape == (2, 8, 8, 3)
