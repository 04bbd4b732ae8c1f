"""A run that was stopped and resumed is the run that was not, bit for bit."""

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import save_checkpoint
from fastdiff.checkpoint import read_metadata, saved_steps
from fastdiff.training import Trainer
from fastdiff.training.resuming import init_from, resume

from .support import each_step, file, same, trainer, weights

EVERYTHING: dict[str, Any] = {
    "dropout": 0.1,
    "class_cond": True,
    "label_dropout": 0.3,
    "flip": True,
    "learn_sigma": True,
    "use_scale_shift_norm": False,
    "channel_mult": "1,1",
    "num_head_channels": 16,
    "resblock_updown": True,
    "use_new_attention_order": True,
    "schedule_sampler": "loss-second-moment",
    "diffusion_steps": 2,
    "batch_size": 8,
    "microbatch": 5,
    "lr": 1e-3,
    "lr_warmup_steps": 4,
    "lr_anneal_steps": 10,
    "weight_decay": 0.01,
    "grad_clip": 1.0,
    "ema_rate": "0.9999,0.5",
}
KINDS = ("model", "ema_0.9999_", "ema_0.5_", "opt")
Trained = Callable[[str, int], Trainer]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Trained:
    """Runs in a precision to a step, each trained once for all tests. Not to be written to."""

    @functools.cache
    def run(precision: str, steps: int) -> Trainer:
        subject = trainer(tmp_path_factory.mktemp("trained") / "run", shapes, precision, steps=steps, **EVERYTHING)
        subject.run()
        return subject

    return run


@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow), pytest.param("fp16", marks=pytest.mark.slow)]
)
def test_resume_is_exact(tmp_path: Path, shapes: Path, trained: Trained, precision: str) -> None:
    straight = trained(precision, 6)
    assert bool((straight.state.sampler.counts == 10).all())  # the loss history is at work
    assert np.ptp(straight.state.sampler.weights().numpy()) > 0
    shutil.copytree(trained(precision, 3).run_dir, tmp_path / "resumed")
    resumed = trainer(tmp_path / "resumed", shapes, precision, steps=6, **EVERYTHING)
    torch.manual_seed(99)  # as in another process
    resume(resumed)
    assert resumed.state.step == 3
    resumed.run()
    for kind in KINDS:
        (one, about), (other, about_other) = (
            file(run_dir / f"{kind}000006.safetensors") for run_dir in (straight.run_dir, resumed.run_dir)
        )
        assert same(one, other), kind
        assert about == about_other, kind
    assert not same(file(tmp_path / "resumed/model000003.safetensors")[0], one)


def test_what_is_resumed_is_all_of_it(tmp_path: Path, shapes: Path, trained: Trained) -> None:
    """Each part of the state matters: without it the resumed run ends elsewhere."""
    want = {kind: file(trained("fp32", 6).run_dir / f"{kind}000006.safetensors")[0] for kind in KINDS}
    shutil.copytree(trained("fp32", 3).run_dir, tmp_path / "run")

    def forget_moments(subject: Any) -> None:
        subject.state.optimizer.state.clear()

    def forget_losses(subject: Any) -> None:
        subject.state.sampler.counts[:] = 0

    def forget_averages(subject: Any) -> None:
        subject.state.emas[0].updates = 0

    for forget, kind in ((forget_moments, "model"), (forget_losses, "model"), (forget_averages, "ema_0.9999_")):
        subject = trainer(tmp_path / "run", shapes, steps=6, **EVERYTHING)
        subject.state.load(tmp_path / "run", 3)
        forget(subject)
        subject.run_dir = subject.saver.run_dir = tmp_path / forget.__name__
        subject.run_dir.mkdir()
        subject.run()
        assert not same(file(subject.run_dir / f"{kind}000006.safetensors")[0], want[kind]), forget.__name__


def test_an_average_that_is_added_starts_from_the_weights(tmp_path: Path, shapes: Path, trained: Trained) -> None:
    want = {kind: file(trained("fp32", 6).run_dir / f"{kind}000006.safetensors")[0] for kind in KINDS}
    run_dir = tmp_path / "run"
    shutil.copytree(trained("fp32", 3).run_dir, run_dir)
    subject = trainer(run_dir, shapes, steps=6, **EVERYTHING | {"ema_rate": "0.9999,0.9"})  # and one is removed
    said: list[str] = []
    subject.log = lambda line, **_: said.append(line)  # type: ignore[assignment]
    resume(subject)
    added = subject.state.emas[1]
    assert (added.rate, added.updates) == (0.9, 0)
    assert all(map(torch.equal, added.tensors(), subject.state.parameters))
    assert said == [
        "resumed at step 3",
        "warning: the EMA of rate 0.5 ends here: add the rate to --ema-rate to continue it",
        "the EMA of rate 0.9 is new: it starts from the weights",
    ]
    subject.run()
    for kind in ("model", "ema_0.9999_", "opt"):
        assert same(file(run_dir / f"{kind}000006.safetensors")[0], want[kind]), kind
    path = run_dir / "ema_0.9_000006.safetensors"
    average, _ = file(path)
    assert read_metadata(path, kind="model")["ema_updates"] == 3
    assert not same(average, want["model"])
    again = trainer(run_dir, shapes, steps=6, **EVERYTHING | {"ema_rate": "0.9999,0.9"})
    assert again.state.load(run_dir, 6) == []


def test_the_same_run_twice_is_the_same_and_another_seed_is_not(tmp_path: Path, shapes: Path, trained: Trained) -> None:
    for name, seed in (("b", 0), ("c", 1)):
        trainer(tmp_path / name, shapes, steps=3, seed=seed, **EVERYTHING).run()
    folders = (trained("fp32", 3).run_dir, tmp_path / "b", tmp_path / "c")
    a, b, c = (file(folder / "model000003.safetensors")[0] for folder in folders)
    assert same(a, b)
    assert not any(torch.equal(a[key], c[key]) for key in ("out.2.weight", "time_embed.0.weight"))


def test_progress_is_cut_back_and_goes_on(tmp_path: Path, shapes: Path) -> None:
    trainer(tmp_path, shapes, steps=4, save_interval=2).run()
    before = (tmp_path / "progress.csv").read_text().splitlines()
    for path in tmp_path.glob("*000004.safetensors"):
        path.unlink()  # as if killed before it was saved
    again = trainer(tmp_path, shapes, steps=6)
    resume(again)
    again.run()
    after = (tmp_path / "progress.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in after] == ["step", "1", "2", "3", "4", "5", "6"]
    assert after[:3] == before[:3]
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path, shapes: Path) -> None:
    trainer(tmp_path, shapes, steps=4, save_interval=1).run()
    (tmp_path / "manifest000004.json").unlink()  # killed before the last file
    for stem in ("ema_0.9999_000003", "opt000002"):
        path = tmp_path / f"{stem}.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
    subject = trainer(tmp_path, shapes, steps=4)
    resume(subject)
    assert subject.state.step == 1
    said = "\n".join(subject.log)
    assert "resume at step 4" not in said
    assert "warning: cannot resume at step 3" in said
    assert "ema_0.9999_000003.safetensors is damaged" in said
    assert "opt000002.safetensors is damaged" in said
    assert same(weights(subject), file(tmp_path / "model000001.safetensors")[0])
    for path in tmp_path.glob("opt*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 3 checkpoints in .* can be resumed"):
        resume(trainer(tmp_path, shapes))


def test_checkpoints_of_another_model_are_not_resumed(tmp_path: Path, shapes: Path) -> None:
    trainer(tmp_path, shapes, steps=1).run()
    with pytest.raises(ValueError, match=r"model000001\.safetensors has another architecture: time_embed\.0\.weight"):
        resume(trainer(tmp_path, shapes, num_channels=64))


def test_init_from_begins_the_averages_with_the_weights(tmp_path: Path, shapes: Path) -> None:
    source = trainer(tmp_path / "a", shapes, steps=2, lr=1e-2)
    source.run()
    for name in ("model000002.safetensors", "bare.pt"):
        if name == "bare.pt":
            torch.save(weights(source), tmp_path / "a" / name)
        subject = trainer(tmp_path / "b", shapes, seed=5)
        init_from(subject, tmp_path / "a" / name)
        assert subject.state.step == 0
        assert same(weights(subject), weights(source))
        average = dict(zip(subject.state.weights, subject.state.emas[0].tensors(), strict=True))
        assert same(average, weights(source))
    assert len(subject.state.optimizer.param_groups[0]["params"]) == len(subject.state.parameters)
    subject.run(each_step(lambda step: os.kill(os.getpid(), signal.SIGINT)))
    assert not same(weights(subject), weights(source))  # the optimizer holds the weights of the model


def test_init_from_another_architecture_is_refused(tmp_path: Path, shapes: Path) -> None:
    source = trainer(tmp_path / "a", shapes, num_channels=64)
    config = {"model_config": source.config.model, "diffusion_config": source.config.diffusion}
    path = save_checkpoint(tmp_path / "m.safetensors", source.model, **config)
    with pytest.raises(ValueError, match=r"num_channels is 64 in .*m\.safetensors and 32"):
        init_from(trainer(tmp_path / "b", shapes), path)


# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", ["in the update", "after the update"])
def test_a_signal_ends_the_run_with_the_last_update_saved(
    tmp_path: Path, shapes: Path, number: signal.Signals, status: int, when: str
) -> None:
    """Whenever it comes: most of the time of a small model's run lies between its updates."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    subject = trainer(tmp_path, shapes, steps=50)

    def send(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    if when == "in the update":
        subject.state.emas[0].update = lambda: send(subject.state.step)
        assert subject.run() == status
        assert subject.state.step == 3
    else:
        assert subject.run(each_step(send)) == status
        assert 2 <= subject.state.step <= 3
    assert saved_steps(tmp_path) == [subject.state.step]
    assert f"stopped by {number.name} at step {subject.state.step}, which is saved" in subject.log
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_signal_during_the_preview(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = trainer(tmp_path, shapes, steps=50, preview_interval=2)
    monkeypatch.setattr(subject, "_preview", lambda outputs: os.kill(os.getpid(), signal.SIGTERM))
    assert subject.run() == 143
    assert saved_steps(tmp_path) == [subject.state.step]
    assert subject.state.step >= 2


def test_a_signal_at_the_last_update_is_the_runs_end(tmp_path: Path, shapes: Path) -> None:
    subject = trainer(tmp_path, shapes, steps=2)
    assert subject.run(each_step(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)) == 0
    assert saved_steps(tmp_path) == [2]
