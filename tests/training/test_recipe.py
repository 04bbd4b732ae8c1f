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
from fastdiff.training import recipe, trainer
from fastdiff.training.recipe import TimeLimit
from fastdiff.training.update import learning_rate

from ..processes import launch

WORKER = Path(__file__).with_name("worker.py")

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
    return recipe.decided(config, flags, images, device, processes, timed=False)[0]


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
    assert filled({"patch_size": 1, "image_size": 64}).model.widths == (32, 32, 64, 64, 128)
    assert filled({"image_size": 28}).model.multipliers == (1, 1, 2)
    assert filled({}, device=GPU).model.channel_mult is None
    assert filled({"channel_mult": "0.5,1,2"}).model.widths == (32, 64, 128)
    assert filled({"image_size": 256}).diffusion.noise_shift == 4
    assert filled({"image_size": 32}).diffusion.noise_shift == 1
    assert filled({}, processes=3).train.batch_size % 3 == 0
    assert [recipe.ema_rate(steps) for steps in (100, 2_000, 10_000, 10**6)] == [0.99, 0.995, 0.999, 0.9999]


def test_a_model_for_a_cpu_has_patches() -> None:
    """And predicts x_0 then; where a flag keeps it from that, it has none."""
    sizes = {size: filled({"image_size": size}) for size in (16, 28, 32, 48, 64, 96, 128)}
    assert [c.model.patch_size for c in sizes.values()] == [1, 1, 2, 2, 4, 4, 4]
    assert all(c.diffusion.predict_xstart == (c.model.patch_size > 1) for c in sizes.values())
    assert [c.diffusion.weighting == "sigmoid" for c in sizes.values()] == [
        c.model.patch_size > 1 for c in sizes.values()
    ]
    assert filled({"image_size": 64, "weighting": "none"}).diffusion.weighting == "none"
    assert sizes[32].model.widths == sizes[64].model.widths == (32, 32, 64)
    for flags in ({"prediction": "v"}, {"predict_xstart": False}, {"prediction": "flow"}, {"use_kl": True}):
        assert filled({"image_size": 64, **flags}).model.patch_size == 1
    assert filled({"image_size": 64, "predict_xstart": True}).model.patch_size == 4
    for levels, patches in (("1,2,2", 4), ("1,1,2", 4), ("1,2,2,2", 1), ("", 1)):  # down to 2; the originals'
        assert filled({"image_size": 64, "channel_mult": levels}).model.patch_size == patches
    assert filled({"image_size": 64}, device=GPU).model.patch_size == 1
    of_a_gpu = filled({"image_size": 256, "patch_size": 4}, device=GPU)
    assert of_a_gpu.diffusion.predict_xstart
    assert of_a_gpu.model.multipliers == filled({"image_size": 64}, device=GPU).model.multipliers
    given = filled({"image_size": 64, "patch_size": 4, "prediction": "v"})
    assert (given.model.patch_size, given.diffusion.prediction, given.diffusion.weighting) == (4, "v", "none")
    two = filled({"image_size": 64, "diffusion_steps": 2, "noise_schedule": "cosine"})
    assert (two.model.patch_size, two.diffusion.weighting) == (4, "none")  # the sigmoid's slope needs three timesteps


def test_what_is_chosen_may_be_given() -> None:
    """Each flag as the log says it changes nothing else."""
    for size in (16, 32, 64):
        config, chosen = recipe.decided(RunConfig.from_flags({"image_size": size}), set(), 500, CPU, 1, timed=False)
        for name, value in chosen.items():
            again = filled({"image_size": size, name: value})
            assert (again.model, again.diffusion, again.train) == (config.model, config.diffusion, config.train), name


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_the_width_has_whole_heads(device: torch.device) -> None:
    for flags in ({"num_head_channels": 64}, {"num_heads": 8, "num_heads_upsample": 16}):
        filled({"image_size": 32, **flags}, device=device)  # refused without
    assert filled({"num_head_channels": 64}, 5_000, GPU).model.num_channels == 128  # not 96


def test_a_model_of_patches_is_trained_and_drawn_from(tmp_path: Path, shapes: Path) -> None:
    run = tmp_path / "run"
    fastdiff.train(shapes, run, steps=2, show=None, **QUICK | {"image_size": 16, "patch_size": 2})
    fastdiff.train(run_dir=run, resume=True, steps=3, show=None)
    config = config_of(run)
    assert (config.model.patch_size, config.diffusion.predict_xstart) == (2, True)
    assert (config.diffusion.weighting, config.diffusion.sigmoid_bias) == ("sigmoid", -2)
    assert fastdiff.sample(run, 2, sampler="dpm++", steps=3, device="cpu").shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match=r"patch_size is 2 in .* and 1 on the command line"):
        fastdiff.train(shapes, tmp_path / "other", init_from=run, patch_size=1, steps=1, show=None)
    tuned = fastdiff.train(shapes, tmp_path / "other", init_from=run, steps=1, show=None, device="cpu", compile="off")
    assert tuned.model_config.patch_size == 2


def test_the_line_says_flags_that_can_be_given(tmp_path: Path, shapes: Path) -> None:
    lines: list[str] = []
    flags = {name: value for name, value in QUICK.items() if name != "num_res_blocks"}
    fastdiff.train(shapes, tmp_path / "a", steps=1, class_cond=True, show=lines.append, **flags)
    (line,) = (line for line in lines if line.startswith("recipe auto: "))
    words = line.removeprefix("recipe auto: ").partition(";")[0].replace("--", "").split()
    given = {words[i].replace("-", "_"): words[i + 1] for i in range(0, len(words), 2)}
    assert {"num_res_blocks", "prediction", "lr", "ema_rate"} <= set(given)
    assert not {"num_channels", "steps"} & set(given)
    values = {name: json.loads(v) if re.fullmatch(r"-?\d+(\.\d+)?(e-\d+)?", v) else v for name, v in given.items()}
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


def test_a_longer_run_decays_until_its_new_end(tmp_path: Path, shapes: Path) -> None:
    fastdiff.train(shapes, tmp_path, steps=2, show=None, **QUICK)
    assert config_of(tmp_path).train.lr_anneal_steps == 2
    fastdiff.train(run_dir=tmp_path, resume=True, steps=4, show=None)
    assert config_of(tmp_path).train.lr_anneal_steps == 4
    assert learning_rate(config_of(tmp_path).train, 3) > 0
    fastdiff.train(run_dir=tmp_path, resume=True, steps=5, lr_anneal_steps=4, show=None)
    assert config_of(tmp_path).train.lr_anneal_steps == 4
    fastdiff.train(run_dir=tmp_path, resume=True, steps=6, show=None)  # it no longer ends with the run
    assert config_of(tmp_path).train.lr_anneal_steps == 4


def test_a_process_without_a_signal_at_its_end_gets_a_prediction(tmp_path: Path, shapes: Path) -> None:
    lines: list[str] = []
    fastdiff.train(shapes, tmp_path, steps=1, zero_terminal_snr=True, show=lines.append, **QUICK)
    assert config_of(tmp_path).diffusion.prediction == "v"
    assert any("--prediction v" in line for line in lines)
    with pytest.raises(ValueError, match="use prediction v or x_start"):
        fastdiff.train(shapes, tmp_path / "a", zero_terminal_snr=True, prediction="epsilon", show=None, **QUICK)


def test_the_batch_divides_among_any_number_of_processes(tmp_path: Path, shapes: Path) -> None:
    """improved-diffusion's 16 images do not. The processes plan the updates together."""
    flags = {name: value for name, value in QUICK.items() if name != "batch_size"}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--data-dir", str(shapes), "--minutes", "0.05", "--log-interval", "3"]
    words += ["--run-dir", "run"]
    ended = launch(WORKER, ["train", *words], tmp_path, {"XDG_CACHE_HOME": str(tmp_path)}, 3)
    assert ended.status == 0, ended
    assert config_of(tmp_path / "run").train.batch_size == 12
    words += ["--run-dir", "other", "--parallel", "fsdp", "--microbatch", "auto"]
    ended = launch(WORKER, ["train", *words], tmp_path, {"XDG_CACHE_HOME": str(tmp_path)}, 3)
    assert ended.status == 1, ended  # the launcher's, of processes that ended with 2
    assert "microbatch auto: not with --parallel fsdp" in ended.err, ended


def test_a_time_limit_counts_from_where_a_run_of_others_was(tmp_path: Path, shapes: Path) -> None:
    fastdiff.train(shapes, tmp_path / "a", steps=40, recipe="improved", show=None, **QUICK)
    lines: list[str] = []
    path = tmp_path / "a/model000040.safetensors"
    again = {"data_dir": shapes, "run_dir": tmp_path / "b", "resume_checkpoint": path, "minutes": 0.01}
    found = fastdiff.train(**again, show=lines.append, device="cpu", compile="off", batch_size=12)
    assert found.step > 40
    assert not any("more steps" in line for line in lines)


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


def test_the_speed_counts_where_no_line_is_logged(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial passes said a hundredth of what an update takes."""
    monkeypatch.setattr(trainer, "seconds_per_update", lambda *_: 1e-5)
    looked: list[int] = []
    real = TimeLimit.again

    def again(self: TimeLimit, config: RunConfig, step: int) -> RunConfig:
        looked.append(step)
        return real(self, config, step)

    monkeypatch.setattr(TimeLimit, "again", again)
    flags = QUICK | {"minutes": 0.02, "log_interval": 10**6, "save_interval": 10**6}
    found = fastdiff.train(shapes, tmp_path, show=None, **flags)
    assert looked[:2] == [1, 4]
    assert all(step & (step - 1) == 0 for step in looked[:-1])  # the last update is logged
    assert found.step < 20_000


def test_a_timed_run_is_compiled_or_not_whatever_its_length_becomes(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastdiff.train(shapes, tmp_path, minutes=0.01, show=None, **QUICK | {"compile": "auto"})
    assert config_of(tmp_path).runtime.compile == "off"


def test_a_short_timed_run_is_not_compiled_however_many_updates_it_has(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "seconds_per_update", lambda *_: 1e-5)  # as if tens of thousands would follow
    lines: list[str] = []
    fastdiff.train(shapes, tmp_path, minutes=0.02, show=lines.append, **QUICK | {"compile": "auto"})
    assert config_of(tmp_path).runtime.compile == "off"
    assert any(line.startswith("on: ") and ", eager, " in line for line in lines)


def test_a_full_disk_does_not_stop_a_timed_run(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = trainer.write_config, list[int]()
    monkeypatch.setattr(trainer, "seconds_per_update", lambda *_: 1e-4)  # too few: the number will change

    def write(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise OSError("No space left on device")
        real(*arguments)

    monkeypatch.setattr(trainer, "write_config", write)
    lines: list[str] = []
    found = fastdiff.train(shapes, tmp_path, minutes=0.02, show=lines.append, **QUICK | {"log_interval": 2})
    assert len(calls) > 1
    assert any("warning: config.json keeps" in line for line in lines)
    assert found.metadata["run_config"]["train"]["steps"] == found.step


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
