"""Which updates are skipped, against an oracle in plain Python, and what a run does and says about it."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import TrainConfig
from fastdiff.data import batch_indices
from fastdiff.training import guard as guard_module
from fastdiff.training.guard import RATE, WARM, Guard
from fastdiff.training.resuming import resume
from fastdiff.training.trainer import Trainer

from .support import each_step, file, same, trainer, weights

CPU = torch.device("cpu")
FINE = torch.tensor(1.0)


def judged(guard: Guard, step: int, loss: float, norm: float = 1.0) -> bool:
    """Whether the update is skipped, in which four samples have this mean loss."""
    losses = loss * torch.tensor([0.5, 1.5, 1.0, 1.0])
    skip = guard.judge(step, torch.tensor(norm), losses, torch.mean)
    assert skip.dtype is torch.float32  # what a fused optimizer takes as found_inf
    assert skip.shape == ()
    assert float(skip) in (0.0, 1.0)
    return bool(skip)


class Oracle:
    """The rule with Python's numbers: the mean is the weighted sum of the losses over the sum of its weights."""

    def __init__(self, factor: float, warm: int) -> None:
        self.factor, self.warm = factor, warm
        self.kept: list[float] = []
        self.in_a_row = 0

    def judge(self, loss: float, norm: float) -> bool:
        skip = not math.isfinite(norm)
        if self.factor and len(self.kept) >= self.warm:
            ages = [RATE**age for age in reversed(range(len(self.kept)))]
            mean = sum(w * value for w, value in zip(ages, self.kept, strict=True)) / sum(ages)
            skip |= loss > self.factor * mean
        if not skip:
            self.kept.append(loss)
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_a_norm_that_is_not_finite_is_skipped(norm: float, factor: float) -> None:
    guard = Guard(factor, CPU)
    assert not judged(guard, 0, 1.0)
    assert judged(guard, 1, 1.0, norm)
    assert not judged(guard, 2, 1.0)


def test_without_a_factor_no_loss_is_a_spike() -> None:
    guard = Guard(0.0, CPU)
    assert not any(judged(guard, step, 1.0) for step in range(WARM + 1))
    assert not judged(guard, WARM + 1, 1e30)


def test_nothing_is_a_spike_before_there_is_a_mean() -> None:
    guard = Guard(2.0, CPU)
    for step in range(WARM - 1):
        assert not judged(guard, step, 1.0)
    assert not judged(guard, WARM - 1, 2.5)  # the WARM-th that is taken in
    assert not judged(guard, WARM, 1.9)
    assert judged(guard, WARM + 1, 2.5)


def test_what_was_skipped_warms_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "WARM", 3)
    guard = Guard(2.0, CPU)
    for step in range(2):
        assert not judged(guard, step, 1.0)
    for step in range(2, 6):
        assert judged(guard, step, 1.0, math.nan)
    assert not judged(guard, 6, 50.0)  # only two were seen


def test_a_spike_does_not_move_the_mean() -> None:
    """Else one spike would be the measure of the next, or a NaN of all."""
    guard = Guard(2.0, CPU)
    for step in range(WARM):
        judged(guard, step, 1.0)
    before = guard.state()[1:3].clone()
    for step, loss in enumerate((2.1, 1e30, math.inf), start=WARM):
        assert judged(guard, step, loss)
    assert judged(guard, 200, math.nan, math.nan)
    assert torch.equal(guard.state()[1:3], before)
    assert not judged(guard, 201, 1.99)
    assert judged(guard, 202, 2.1)


def test_the_mean_is_not_drawn_to_the_zero_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "WARM", 1)
    guard = Guard(1.5, CPU)
    assert not judged(guard, 0, 4.0)
    assert not judged(guard, 1, 5.9)  # a hundredth of 4 would make a spike of it
    assert judged(guard, 2, 7.6)


@settings(max_examples=60, deadline=None)
@given(
    factor=st.sampled_from([0.0, 1.5, 4.0]),
    warm=st.integers(0, 12),
    updates=st.lists(st.tuples(st.sampled_from([0.25, 0.9, 1.1, 3.0, 60.0]), st.booleans()), min_size=1, max_size=50),
)
def test_it_is_the_oracles_rule(factor: float, warm: int, updates: list[tuple[float, bool]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard_module, "WARM", max(warm, 1))
        guard, oracle = Guard(factor, CPU), Oracle(factor, max(warm, 1))
        for step, (loss, finite) in enumerate(updates):
            loss *= 1 + 1e-3 * (step % 7)  # no ties, where float32 and float64 may differ
            norm = 1.0 if finite else math.inf
            assert judged(guard, step, loss, norm) == oracle.judge(loss, norm), step
            assert int(guard.in_a_row) == oracle.in_a_row


def test_in_a_row_counts_until_the_next_good_update() -> None:
    guard, counts = Guard(0.0, CPU), []
    for step, norm in enumerate([1, math.nan, math.inf, math.nan, 1, math.nan, 1]):
        judged(guard, step, 1.0, norm)
        counts.append(int(guard.in_a_row))
    assert counts == [0, 1, 2, 3, 0, 1, 0]


def test_step_and_losses_are_those_of_the_last_skipped_update() -> None:
    guard = Guard(0.0, CPU)
    assert int(guard.step) == -1
    for step, norm in enumerate([1, math.nan, 1, math.nan, 1]):
        guard.judge(step, torch.tensor(float(norm)), torch.tensor([step, 10.0 + step]), torch.mean)
    assert int(guard.step) == 3
    assert guard.losses.tolist() == [3, 13]
    guard.judge(5, torch.tensor(math.nan), torch.tensor([1.0, math.nan, 3.0]), torch.mean)  # as large as a last batch
    assert int(guard.step) == 5
    assert guard.losses.tolist() == [1, pytest.approx(math.nan, nan_ok=True), 3]


def test_a_state_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "WARM", 5)
    guard = Guard(2.0, CPU)
    for step, loss in enumerate([1.0, 1.2, 0.8, 1.1, 0.9, 9.0]):
        judged(guard, step, loss)
    state = guard.state()
    other = Guard(2.0, CPU)
    other.load_state(state.clone())
    for step, loss in enumerate([9.0, 1.9, 2.3, 1.0, 5.0], start=6):
        assert judged(other, step, loss) == judged(guard, step, loss)
        assert torch.equal(other.state(), guard.state())
    assert float(state[0]) == 1  # a copy: later updates do not change it
    assert not torch.equal(state, guard.state())


def test_the_mean_over_the_processes_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not this process's own: all must skip the same updates."""
    monkeypatch.setattr(guard_module, "WARM", 1)
    guard = Guard(2.0, CPU)
    guard.judge(0, FINE, torch.ones(2), lambda losses: losses.mean())
    assert bool(guard.judge(1, FINE, torch.ones(2), lambda losses: (losses.mean() + 9) / 2))
    assert not bool(guard.judge(2, FINE, torch.full((2,), 9.0), lambda losses: (losses.mean() - 7) / 2))


def test_judging_asks_for_no_value() -> None:
    """On the device that has none: asking for one, or a shape that depends on one, is an error there."""
    meta = torch.device("meta")
    guard = Guard(2.0, meta)
    skip = guard.judge(3, torch.empty((), device=meta), torch.empty(4, device=meta), torch.mean)
    assert skip.is_meta
    assert guard.state().is_meta


# Through the trainer


def changing(subject: Trainer, change: dict[int, Any]) -> None:
    """Change the losses of these updates, counted from 0."""
    real = subject.objective.diffusion.training_losses

    def training_losses(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        terms = real(*args, **kwargs)
        if (how := change.get(subject.state.step)) is not None:
            terms["loss"] = how(terms["loss"])
        return terms

    subject.objective.diffusion.training_losses = training_losses  # type: ignore[method-assign]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "progress.jsonl").read_text().splitlines()]


def warnings_of(subject: Trainer) -> list[str]:
    return [line for line in subject.log if line.startswith("warning: ")]


def unmoved(subject: Trainer, steps: int) -> list[bool]:
    """Run, and say of each update whether it left the weights as they were."""
    at = [weights(subject)]
    assert subject.run(each_step(lambda step: at.append(weights(subject)))) == 0
    assert len(at) == steps + 1
    return [same(one, other) for one, other in pairwise(at)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_spike_is_skipped_and_its_samples_are_named(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(guard_module, "WARM", 3)
    subject = trainer(tmp_path, shapes, precision, steps=6, lr=1e-4, weight_decay=0.1, spike_guard=20.0)
    if precision == "fp16":  # a scale at which the spike does not overflow, for which it would be skipped anyway
        subject.state.scaler.load_state_dict(subject.state.scaler.state_dict() | {"scale": 1.0})
    worst = torch.tensor([100.0, 400.0, 300.0, 200.0])
    changing(subject, {4: lambda loss: loss / loss.detach() * worst})
    assert unmoved(subject, 6) == [False] * 4 + [True, False]
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 0, 0, 0, 1, 0]
    assert {float(state["step"]) for state in subject.state.optimizer.state.values()} == {5}
    assert subject.state.scaler.get_scale() == 1  # no overflow: the scale is not to blame
    (said,) = warnings_of(subject)
    indices, _ = batch_indices(12, 4, subject.config.train.seed, 4)
    names = subject.dataset.names
    order = [(indices[i], names[indices[i]], worst[i]) for i in (1, 2, 3, 0)]
    listed = ", ".join(f"{index} {name} ({float(loss):.3g})" for index, name, loss in order)
    assert said.startswith("warning: 1 of the last updates skipped; the last one was update 5; ")
    assert said.endswith(f"; its samples with the largest losses: {listed}")
    assert all(re.fullmatch(r"\w+\.png", name) for name in names)


def test_by_default_a_spike_is_trained_on(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrainConfig().spike_guard == 0
    monkeypatch.setattr(guard_module, "WARM", 1)
    subject = trainer(tmp_path, shapes, steps=4, lr=1e-4)
    changing(subject, {2: lambda loss: 1e6 * loss})
    assert unmoved(subject, 4) == [False] * 4
    assert [row["skipped"] for row in rows(tmp_path)] == [0] * 4
    assert not warnings_of(subject)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_infinite_loss_with_a_finite_gradient_is_skipped(tmp_path: Path, shapes: Path, precision: str) -> None:
    subject = trainer(tmp_path, shapes, precision, steps=3, lr=1e-4)
    changing(subject, {1: lambda loss: loss + torch.tensor([0, math.inf, 0, 0])})
    assert unmoved(subject, 3) == [False, True, False]
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 1, 0]
    assert all(row["loss"] > 0 for row in (rows(tmp_path)[0], rows(tmp_path)[2]))
    (said,) = warnings_of(subject)
    second = batch_indices(12, 4, 0, 1)[0][1]  # of the batch: the one whose loss it was
    assert f"update 2; its samples with the largest losses: {second} {subject.dataset.names[second]} (inf)" in said


def test_the_skipped_one_may_be_before_the_checkpoint_and_the_line_after_it(tmp_path: Path, shapes: Path) -> None:
    """Then the losses are not known any more."""
    subject = trainer(tmp_path, shapes, steps=4, log_interval=4, save_interval=2)
    changing(subject, {1: lambda loss: math.nan * loss})
    subject.run()
    for path in tmp_path.glob("*000004*"):
        path.unlink()
    again = trainer(tmp_path, shapes, steps=4, log_interval=4)
    resume(again)
    assert again.run() == 0
    assert rows(tmp_path)[-1]["skipped"] == 1
    (said,) = warnings_of(again)
    assert said == "warning: 1 of the last updates skipped; the last one was update 2, before this run was resumed"


def test_spikes_that_do_not_end_stop_the_run_as_spikes(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "WARM", 3)
    subject = trainer(tmp_path, shapes, steps=60, log_interval=5, save_interval=2, spike_guard=20.0)
    changing(subject, {step: lambda loss: 1e4 * loss for step in range(6, 60)})
    with pytest.raises(ValueError, match=r"last 29 updates.*last good checkpoint: .*model\d+") as error:
        subject.run()
    assert "not finite" not in str(error.value)
    saved, _ = file(max(tmp_path.glob("model*.safetensors")))
    assert same(saved, weights(subject))
