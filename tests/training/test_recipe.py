"""The recipe of a new run: what it chooses, what it leaves alone, and how long a run with a time limit is."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.checkpoint import read_metadata
from fastdiff.config import RunConfig
from fastdiff.training import recipe
from fastdiff.training.recipe import TimeLimit

CPU, GPU = torch.device("cpu"), torch.device("cuda")
QUICK: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "diffusion_steps": 30,
    "batch_size": 12,
    "device": "cpu",
    "compile": "off",
    "precision": "fp32",
    "preview_interval": 0,
    "attention_resolutions": "",
}


def filled(flags: dict[str, Any], images: int = 500, device: torch.device = CPU, processes: int = 1) -> RunConfig:
    config = RunConfig.from_flags(flags)
    chosen = recipe.model_and_process(config, flags, images, device, processes)
    config = RunConfig.from_flags(chosen, base=config)
    return RunConfig.from_flags(recipe.schedule(config, flags), base=config)


def config_of(run_dir: Path) -> RunConfig:
    values = json.loads((run_dir / "config.json").read_text())
    values.pop("environment", None)
    return RunConfig.from_dict(values)


@pytest.mark.parametrize(
    "flags",
    [
        {"num_channels": 64, "lr": 1e-5, "ema_rate": (0.5,), "batch_size": 3, "grad_clip": 0.0},
        {"prediction": "epsilon", "weighting": "none", "noise_schedule": "linear"},
        {"predict_xstart": False},
        {"predict_xstart": True},
        {"use_kl": True},
        {"learn_sigma": True, "class_cond": True, "label_dropout": 0.0},
        {"lr_anneal_steps": 0, "lr_warmup_steps": 0, "steps": 10},
        {"small_size": 16, "image_size": 128},
        {"prediction": "flow"},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_given_flags_stay(flags: dict[str, Any], device: torch.device) -> None:
    config = filled(flags, device=device)
    for name, value in flags.items():
        part = next(part for part in (config.model, config.diffusion, config.train) if hasattr(part, name))
        assert getattr(part, name) == value, name


def test_what_it_depends_on() -> None:
    small, large = filled({}, 500, GPU), filled({}, 10**6, GPU)
    assert small.model.num_channels < large.model.num_channels == 128
    assert small.train.lr > large.train.lr
    assert filled({}).model.num_channels == 32
    assert filled({"image_size": 256}).diffusion.noise_shift == 4
    assert filled({"image_size": 32}).diffusion.noise_shift == 1
    assert filled({}, processes=3).train.batch_size % 3 == 0
    assert [recipe.ema_rate(steps) for steps in (100, 2_000, 10_000, 10**6)] == [0.99, 0.995, 0.999, 0.9999]


def test_the_line_says_flags_that_can_be_given(tmp_path: Path, shapes: Path) -> None:
    lines: list[str] = []
    flags = {name: value for name, value in QUICK.items() if name != "num_res_blocks"}
    fastdiff.train(shapes, tmp_path / "a", steps=1, class_cond=True, show=lines.append, **flags)
    (line,) = (line for line in lines if line.startswith("recipe auto: "))
    words = line.removeprefix("recipe auto: ").partition(";")[0].replace("--", "").split()
    given = {words[i].replace("-", "_"): words[i + 1] for i in range(0, len(words), 2)}
    assert {"num_res_blocks", "prediction", "lr", "ema_rate"} <= set(given)
    assert not {"num_channels", "steps"} & set(given)
    values = {name: json.loads(v) if re.fullmatch(r"\d+(\.\d+)?(e-\d+)?", v) else v for name, v in given.items()}
    again = RunConfig.from_flags({**flags, "class_cond": True, "steps": 1, **values})
    found, stored = config_of(tmp_path / "a"), read_metadata(tmp_path / "a/model000001.safetensors")["run_config"]
    for part in ("diffusion", "train"):
        assert getattr(again, part) == getattr(found, part)
    assert found.recipe == stored["recipe"] == "auto"
    assert f"{found.train.lr:g}" == given["lr"]


def test_a_resumed_run_does_not_decide_again(tmp_path: Path, shapes: Path) -> None:
    fastdiff.train(shapes, tmp_path, steps=2, show=None, **QUICK)
    before = config_of(tmp_path)
    lines: list[str] = []
    fastdiff.train(run_dir=tmp_path, resume=True, steps=3, minutes=None, show=lines.append)
    after = config_of(tmp_path)
    assert not any("recipe" in line for line in lines)
    assert (after.train.steps, before.train.steps) == (3, 2)
    assert after.to_dict() | {"train": {}} == before.to_dict() | {"train": {}}
    assert after.train.lr_anneal_steps == before.train.lr_anneal_steps == 2


class Watch:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(recipe.time, "perf_counter", lambda: self.now)


def planned(limit: TimeLimit, seconds: float, **flags: Any) -> RunConfig:
    return limit.planned(RunConfig.from_flags({"preview_interval": 0, **flags}), seconds)[0]


def test_updates_follow_their_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is given 1,000 s ends within 2% before them, however slow it becomes."""
    watch = Watch(monkeypatch)
    limit = TimeLimit(1000.0, (), auto=True)
    config = planned(limit, 0.5)
    assert 1700 < config.train.steps < 2000
    assert config.train.lr_anneal_steps == config.train.steps
    seen, step = {config.train.steps}, 0
    while step < config.train.steps:
        step += 1
        watch.now += 0.7 if watch.now < 300 else 1.5 if watch.now < 700 else 0.4
        if step % 10 == 0:
            config = limit.again(config, step)
            assert config.train.lr_anneal_steps == config.train.steps
            seen.add(config.train.steps)
    assert 940 < watch.now < 1000
    assert 2 < len(seen) < 100  # not with every line


def test_a_given_decay_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    limit = TimeLimit(100.0, {"lr_anneal_steps"}, auto=True)
    config = planned(limit, 0.1, lr_anneal_steps=77)
    watch.now = 1.0
    config = limit.again(config, 1)
    watch.now = 50.0
    config = limit.again(config, 11)
    assert config.train.lr_anneal_steps == 77
    assert config.train.steps < 30


@pytest.mark.parametrize("auto", [True, False])
def test_a_run_with_a_time_limit(tmp_path: Path, shapes: Path, auto: bool) -> None:
    lines: list[str] = []
    kind = "auto" if auto else "improved"
    found = fastdiff.train(shapes, tmp_path, minutes=0.02, recipe=kind, log_interval=2, show=lines.append, **QUICK)
    config = config_of(tmp_path)
    assert found.step == config.train.steps < 200_000
    assert config.train.lr_anneal_steps == (config.train.steps if auto else 0)
    assert any(line.startswith("time: about ") for line in lines)
    assert read_metadata(tmp_path / f"model{found.step:06}.safetensors")["run_config"]["train"] == (
        config.train.to_dict()
    )
    said: list[str] = []
    again = fastdiff.train(run_dir=tmp_path, resume=True, minutes=5, show=said.append)
    assert again.step == found.step
    assert any("minutes has no effect" in line for line in said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"minutes": 0}, "minutes must be above 0"),
        ({"minutes": float("nan")}, "minutes must be finite"),
        ({"minutes": 3, "steps": 5}, "minutes and steps both set the length of the run"),
        ({"recipe": "best"}, "recipe must be one of auto, improved"),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, shapes: Path, flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fastdiff.train(shapes, tmp_path / "r", show=None, **flags)
    assert not (tmp_path / "r").exists()
