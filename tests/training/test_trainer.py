"""The optimisation, update by update."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import TrainConfig
from fastdiff.data import prefetch_to_device
from fastdiff.runtime import threads
from fastdiff.runtime.device import Runtime
from fastdiff.training import trainer as module
from fastdiff.training.resuming import resume
from fastdiff.training.trainer import learning_rate

from ..numerics import relative
from ..support import refusal
from .support import Lines, each_step, file, randomise, same, trainer, weights


def moments(path: Path) -> dict[str, torch.Tensor]:
    """AdamW's first moments; after one update a tenth of the gradient."""
    return {key: value.double() for key, value in file(path)[0].items() if key.startswith("exp_avg.")}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "progress.jsonl").read_text().splitlines()]


def test_the_loss_falls(tmp_path: Path, shapes: Path) -> None:
    flags = {"steps": 20, "lr": 3e-3, "batch_size": 8, "log_interval": 5, "class_cond": True}
    assert trainer(tmp_path, shapes, **flags).run() == 0
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    "flags", [{}, {"learn_sigma": True, "class_cond": True, "schedule_sampler": "loss-second-moment"}]
)
def test_microbatches_average_to_the_whole_batch(tmp_path: Path, shapes: Path, flags: dict[str, Any]) -> None:
    found = {}
    for size in (-1, 8, 5, 1):
        run_dir = tmp_path / str(size)
        randomise(trainer(run_dir, shapes, steps=1, batch_size=8, microbatch=size, **flags)).run()
        found[size] = moments(run_dir / "opt000001.safetensors")
        loss = rows(run_dir)[0]["loss"]
        assert loss == pytest.approx(rows(tmp_path / "-1")[0]["loss"], rel=1e-5)
    largest = max(float(m.abs().max()) for m in found[-1].values())
    assert largest > 0
    for size in (8, 5, 1):
        for key, whole in found[-1].items():
            # a bias before a norm has the gradient 0, of which only rounding is left: hence the second term
            limit = 1e-4 * float(whole.norm()) + 1e-6 * largest
            assert float((found[size][key] - whole).norm()) <= limit, (size, key)


def test_the_averages_are_those_of_the_weights_on_the_way(tmp_path: Path, shapes: Path) -> None:
    subject = trainer(tmp_path, shapes, steps=5, lr=1e-2, ema_rate="0.9,0.2", ema_warmup=True)
    expected = {rate: {k: v.double() for k, v in weights(subject).items()} for rate in (0.9, 0.2)}

    def follow(step: int) -> None:
        for rate, average in expected.items():
            r = min(rate, step / (step + 9))
            for key, value in weights(subject).items():
                average[key] = r * average[key] + (1 - r) * value.double()

    subject.run(each_step(follow))
    for rate, average in expected.items():
        saved, _ = file(tmp_path / f"ema_{rate}_000005.safetensors")
        assert saved.keys() == average.keys()
        for key, value in average.items():
            torch.testing.assert_close(saved[key].double(), value, rtol=1e-5, atol=1e-7)
    assert not same(file(tmp_path / "ema_0.9_000005.safetensors")[0], file(tmp_path / "model000005.safetensors")[0])


def test_learning_rates() -> None:
    constant, annealed = TrainConfig(lr=2.0), TrainConfig(lr=2.0, lr_anneal_steps=4)
    warm = TrainConfig(lr=2.0, lr_warmup_steps=4)
    both = TrainConfig(lr=2.0, lr_warmup_steps=2, lr_anneal_steps=4)
    steps = range(6)
    assert [learning_rate(constant, s) for s in steps] == [2] * 6
    assert [learning_rate(annealed, s) for s in steps] == [2, 1.5, 1, 0.5, 0, 0]  # the original's
    assert [learning_rate(warm, s) for s in steps] == [0.5, 1, 1.5, 2, 2, 2]
    assert [learning_rate(both, s) for s in steps] == [1, 1.5, 1, 0.5, 0, 0]


def test_the_optimizer_uses_the_learning_rate(tmp_path: Path, shapes: Path) -> None:
    """Adam's first step moves every weight by the rate; a step with the rate 0 moves none."""
    subject = randomise(trainer(tmp_path, shapes, steps=3, lr=0.5, lr_warmup_steps=5, lr_anneal_steps=2))
    at = [weights(subject)]
    subject.run(each_step(lambda step: at.append(weights(subject))))
    moved = (at[1]["out.2.weight"] - at[0]["out.2.weight"]).abs()
    assert float(moved.median()) == pytest.approx(0.1, rel=1e-3)
    assert same(at[3], at[2])
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx([0.1, 0.1, 0.0])


def test_weight_decay_is_decoupled(tmp_path: Path, shapes: Path) -> None:
    for decay in (0.0, 0.5):
        randomise(trainer(tmp_path / str(decay), shapes, steps=1, lr=0.1, weight_decay=decay)).run()
    initial = weights(randomise(trainer(tmp_path / "none", shapes)))
    without, with_decay = (file(tmp_path / f"{d}/model000001.safetensors")[0] for d in (0.0, 0.5))
    for key, start in initial.items():
        torch.testing.assert_close(with_decay[key], without[key] - 0.1 * 0.5 * start, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_clipped_to_the_norm(tmp_path: Path, shapes: Path) -> None:
    norms = {}
    for clip in (0.0, 1e-3, 1e6):
        randomise(trainer(tmp_path / str(clip), shapes, steps=1, grad_clip=clip)).run()
        found = moments(tmp_path / str(clip) / "opt000001.safetensors").values()
        norms[clip] = 10 * math.sqrt(sum(float((m**2).sum()) for m in found))
    reported = [rows(tmp_path / str(clip))[0]["grad_norm"] for clip in norms]
    assert reported == pytest.approx([norms[0.0]] * 3, rel=1e-3)  # the norm before it was clipped
    assert norms[1e6] == pytest.approx(norms[0.0])
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)


def test_fp16_scales_the_loss_and_takes_steps(tmp_path: Path, shapes: Path) -> None:
    subject = trainer(tmp_path, shapes, precision="fp16", steps=6, lr=1e-3, save_interval=3)
    before = weights(subject)
    subject.run()
    after, _ = file(tmp_path / "model000006.safetensors")
    assert all(value.dtype == torch.float32 for value in after.values())
    assert not same(before, after)
    scales = [row["lg_loss_scale"] for row in rows(tmp_path)]
    assert all(0 < scale <= 16 for scale in scales)
    again = trainer(tmp_path, shapes, precision="fp16", steps=6, lr=1e-3)
    resume(again)
    assert math.log2(again.state.scaler.get_scale()) == scales[-1]


def test_fp16_lowers_the_scale_after_an_overflow(tmp_path: Path, shapes: Path) -> None:
    subject = trainer(tmp_path, shapes, precision="fp16", steps=3, lr=1e-3)
    poison(subject, {1})
    at = [weights(subject)]
    subject.run(each_step(lambda step: at.append(weights(subject))))
    scales = [row["lg_loss_scale"] for row in rows(tmp_path)]
    assert scales[1] == scales[0] - 1
    assert same(at[1], at[2])
    assert not same(at[2], at[3])


def test_bf16_is_near_fp32_and_keeps_fp32_weights(tmp_path: Path, shapes: Path) -> None:
    for precision in ("fp32", "bf16"):
        randomise(trainer(tmp_path / precision, shapes, precision=precision, steps=1, batch_size=8)).run()
    one, other = (moments(tmp_path / p / "opt000001.safetensors") for p in ("fp32", "bf16"))
    assert not same(one, other)
    flat = [torch.cat([m.flatten() for m in found.values()]) for found in (one, other)]
    assert relative(flat[1], flat[0]) < 0.05
    saved, _ = file(tmp_path / "bf16/model000001.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values())


def test_keep_last_deletes_the_oldest_only_when_the_newest_is_whole(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = trainer(tmp_path, shapes, steps=4, save_interval=1, keep_last=2)
    subject.run()
    stems = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert stems == sorted(
        f"{kind}{step:06d}.safetensors" for kind in ("model", "ema_0.9999_", "opt") for step in (3, 4)
    )

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    again = trainer(tmp_path, shapes, steps=5, save_interval=1, keep_last=1)
    resume(again)
    monkeypatch.setattr("fastdiff.checkpoint.files.save_file", full)
    monkeypatch.setattr("fastdiff.training.saver.RETRY_DELAYS", (0.0, 0.0))
    with pytest.raises(OSError, match="No space left"):
        again.run()
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == stems


def test_keep_last_counts_no_damaged_checkpoint(tmp_path: Path, shapes: Path) -> None:
    """After a fall back, what is newly saved must not go while the damaged file of a later step stays."""
    trainer(tmp_path, shapes, steps=4, save_interval=2).run()
    path = tmp_path / "model000004.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    again = trainer(tmp_path, shapes, steps=3, keep_last=1)
    resume(again)
    assert again.state.step == 2
    again.run()
    last = trainer(tmp_path, shapes, steps=3)
    resume(last)
    assert last.state.step == 3


def poison(subject: Any, steps: set[int] | range) -> None:
    """Make the loss of these updates (counted from 0) NaN."""
    real = subject.objective.diffusion.training_losses

    def training_losses(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        terms = real(*args, **kwargs)
        if subject.state.step in steps:
            terms["loss"] = terms["loss"] * math.nan
        return terms

    subject.objective.diffusion.training_losses = training_losses


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path, shapes: Path) -> None:
    subject = trainer(tmp_path, shapes, steps=4, lr=1e-2, weight_decay=0.1, grad_clip=1.0)
    poison(subject, {0, 2})
    at, steps = [weights(subject)], []

    def follow(step: int) -> None:
        at.append(weights(subject))
        states = [state["step"] for state in subject.state.optimizer.state.values()]
        steps.append({float(count) for count in states})

    assert subject.run(each_step(follow)) == 0
    assert [same(a, b) for a, b in pairwise(at)] == [True, False, True, False]
    assert steps == [{0}, {1}, {1}, {2}]  # Adam's own count, which sets its bias correction
    saved, _ = file(tmp_path / "opt000004.safetensors")
    assert all(bool(value.isfinite().all()) for value in saved.values())
    assert rows(tmp_path)[0]["grad_norm"] is None
    assert rows(tmp_path)[1]["grad_norm"] > 0


def test_one_nan_does_not_spoil_the_loss_history(tmp_path: Path, shapes: Path) -> None:
    flags = {"schedule_sampler": "loss-second-moment", "diffusion_steps": 2, "batch_size": 12}
    subject = trainer(tmp_path, shapes, steps=8, **flags)
    poison(subject, {3})
    assert subject.run() == 0
    assert bool(subject.state.sampler.weights().isfinite().all())


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_run_that_has_come_to_nothing_stops(tmp_path: Path, shapes: Path, precision: str) -> None:
    subject = trainer(tmp_path, shapes, precision=precision, steps=100, log_interval=5, save_interval=2)
    poison(subject, range(4, 100))
    refusal(subject.run, r"not finite in the last \d+ updates: .*--lr.*last good.*model\d+")
    assert 25 <= subject.state.step - 4 <= 30
    for path in tmp_path.glob("*.safetensors"):
        assert all(bool(value.isfinite().all()) for value in file(path)[0].values()), path


def test_now_and_then_a_nan_does_not_stop_a_run(tmp_path: Path, shapes: Path) -> None:
    subject = trainer(tmp_path, shapes, steps=41)
    poison(subject, {step for step in range(41) if step % 20})
    assert subject.run() == 0


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, shapes: Path) -> None:
    trainer(tmp_path, shapes, steps=2).run()
    before = sorted(path.name for path in tmp_path.iterdir())
    subject = trainer(tmp_path, shapes, steps=3)
    resume(subject)
    with torch.no_grad():
        subject.state.parameters[3].view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="weights of step 3 are not finite and were not saved"):
        subject.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_super_resolution_sees_the_images_made_small(tmp_path: Path, shapes: Path) -> None:
    subject = trainer(tmp_path, shapes, steps=2, small_size=4, class_cond=True)
    seen = []
    real = subject.objective.diffusion.training_losses

    def training_losses(model: Any, x: torch.Tensor, t: Any, kwargs: dict[str, torch.Tensor], noise: Any) -> Any:
        seen.append((x, kwargs["low_res"]))
        return real(model, x, t, kwargs, noise)

    subject.objective.diffusion.training_losses = training_losses
    assert subject.run() == 0
    for x, low_res in seen:
        torch.testing.assert_close(low_res, x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)))
    assert np.isfinite([row["loss"] for row in rows(tmp_path)]).all()


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, shapes: Path) -> None:
    for use in (False, True):
        flags = {"use_checkpoint": use, "dropout": 0.1, "class_cond": True}
        randomise(trainer(tmp_path / str(use), shapes, steps=2, lr=1e-3, **flags)).run()
    one, other = (file(tmp_path / str(use) / "model000002.safetensors")[0] for use in (False, True))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)


class Seconds:
    """Stands in for the time module of the training loop, in which every update takes ``update`` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.update = 0.0, 0.5
        monkeypatch.setattr(module, "time", self)
        monkeypatch.setattr(module, "prefetch_to_device", self._batches)

    def perf_counter(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def _batches(self, data: Any, device: torch.device) -> Iterator[Any]:
        for batch in prefetch_to_device(data, device):
            self.wait(self.update)
            yield batch


def test_no_rate_is_made_of_the_compilation(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Seconds(monkeypatch)
    monkeypatch.setattr(Runtime, "compiles", lambda self, calls: True)
    monkeypatch.setattr(Runtime, "prepare", lambda self, model, calls: self.eager(model))
    monkeypatch.setattr(module, "warm_up", lambda *_: clock.wait(83))
    subject = trainer(tmp_path, shapes, steps=2, batch_size=4)
    assert isinstance(subject.log, Lines)
    assert "compiled in 1 min 23 s" in subject.log
    subject.run()
    assert [row["images_per_s"] for row in rows(tmp_path)] == [8.0, 8.0]


def test_a_run_that_others_slow_down_says_so_once(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, load = Seconds(monkeypatch), [1.0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "load_average", lambda: load[0])
    subject = trainer(tmp_path, shapes, steps=12, batch_size=4)
    assert isinstance(subject.log, Lines)

    def others(step: int) -> None:
        if step == 4:
            load[0], clock.update = 6.3, 4.0

    subject.run(each_step(others))
    (line,) = (line for line in subject.log if line.startswith("warning"))
    assert line.startswith("warning: updates take 8.0 times as long as at the start, and the load is 6.3 on 2 cores")
