"""Power-function averages: their formula, their snapshots, and averages of other lengths after training."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import TrainConfig, load_checkpoint
from fastdiff.checkpoint import (
    Fit,
    add_metadata,
    average_path,
    ema_path,
    exponent_of,
    find_checkpoint,
    model_path,
    optimizer_path,
    read_metadata,
    read_tensors,
    saved_steps,
    snapshot_path,
    snapshots,
    weights_of,
    write_manifest,
    write_tensors,
)
from fastdiff.checkpoint.averages import inner_products
from fastdiff.config import RunConfig
from fastdiff.training import Trainer
from fastdiff.training.ema import PowerAverage, snapshot_steps
from fastdiff.training.recipe import TimeLimit
from fastdiff.training.resuming import resume

from .support import each_step, same, trainer

STEPS = 240
OTHERS = (0.04, 0.06, 0.08, 0.11)
FLAGS: dict[str, Any] = {"lr": 1e-3, "ema_lengths": "0.05,0.1", "log_interval": 100, "diffusion_steps": 4}


def weights_of_updates(steps: int, length: float) -> np.ndarray[Any, Any]:
    """The share of each update's weights in an average after so many."""
    return np.diff((np.arange(steps + 1) / steps) ** (exponent_of(length) + 1))


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.28])
def test_the_length_is_the_deviation_of_the_profile(length: float) -> None:
    profile = weights_of_updates(200_000, length)
    t = (np.arange(200_000) + 0.5) / 200_000
    assert profile.sum() == pytest.approx(1)
    mean = profile @ t
    assert (profile @ (t - mean) ** 2) ** 0.5 == pytest.approx(length, rel=1e-5)


def test_the_paper_s_exponents() -> None:
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)  # table in appendix C
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("length", [0.02, 0.1, 0.28])
def test_an_update_is_the_closed_form(length: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 5))
    parameter = torch.nn.Parameter(torch.full((5,), 1e3))  # the initial weights do not count
    average = PowerAverage([parameter], length)
    for value in values:
        parameter.data.copy_(torch.from_numpy(value))
        average.update()
    expected = weights_of_updates(300, length) @ values
    np.testing.assert_allclose(average.tensors()[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_inner_products_are_integrals() -> None:
    steps, lengths = np.array([1.0, 0.9, 0.4, 0.4]), (0.05, 0.1, 0.2, 0.05)
    exponents = np.array([exponent_of(length) for length in lengths])
    tau = (np.arange(200_000) + 0.5) / 200_000
    parts = np.clip(1 - (tau / steps[:, None]) ** (exponents[:, None] + 1), 0, None)
    np.testing.assert_allclose(inner_products(steps, exponents, steps, exponents), parts @ parts.T / 200_000, rtol=1e-6)


def test_the_snapshots_lie_half_a_spacing_before_the_end_and_so_on() -> None:
    assert sorted(snapshot_steps(1000))[-3:] == [572, 716, 894]
    assert snapshot_steps(1) == set()
    assert all(0 < step < 7 for step in snapshot_steps(7))
    assert len(snapshot_steps(10**6)) == 16


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ({}, 0),
        ({"ema_lengths": "0.05,0.1"}, 2),
        ({"ema_lengths": 0.1}, 4),
        ({"ema_lengths": "0.05,0.1", "ema_snapshots": 5}, 5),
    ],
)
def test_as_many_snapshots_as_there_is_room_for(flags: dict[str, Any], kept: int) -> None:
    assert TrainConfig(**flags).snapshots_kept == kept


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"ema_lengths": "0.05,0.3"}, "ema_lengths must be above 0 and below 0.2887, not (0.05, 0.3)"),
        ({"ema_lengths": "0.05,0.05"}, "ema_lengths must be different lengths"),
        ({"ema_lengths": "0.05,0.1", "ema_snapshots": 0.5}, "ema_snapshots must be at least 1 for 2 lengths, or 0 for"),
        ({"ema_snapshots": -1}, "ema_snapshots must be at least 0, not -1.0"),
    ],
)
def test_bad_settings_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        TrainConfig(**flags)
    assert said in str(caught.value)


# A training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> tuple[Path, dict[float, dict[str, Tensor]]]:
    """A run, and averages of other lengths that were tracked beside it. Not to be written to."""
    subject = trainer(
        tmp_path_factory.mktemp("trained") / "run", shapes, steps=STEPS, save_interval=STEPS // 2, **FLAGS
    )
    tracked = {length: PowerAverage(subject.state.parameters, length) for length in OTHERS}
    sizes = []

    def update(step: int) -> None:
        for average in tracked.values():
            average.update()
        there = (subject.run_dir / "averages").rglob("*")
        sizes.append(sum(path.stat().st_size for path in there if path.is_file() and path.exists()))

    subject.run(each_step(update))
    assert max(sizes) <= 2 * model_path(subject.run_dir, STEPS).stat().st_size
    names = subject.state.weights
    found = {length: dict(zip(names, one.tensors(), strict=True)) for length, one in tracked.items()}
    return subject.run_dir, found


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    squares = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    return float((squares / sum(float(one.double().square().sum()) for one in theirs.values())) ** 0.5)


@pytest.fixture
def run_dir(trained: tuple[Path, object], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def test_an_average_has_no_time_grid_of_another(run_dir: Path) -> None:
    for path in weights_of(run_dir, STEPS):
        add_metadata(path, time_grids={"unipc": {}})
    path = find_checkpoint(run_dir, ema_length=OTHERS[0])
    assert "time_grids" not in read_tensors(path, kind="model")[1]
    add_metadata(path, time_grids={"unipc": {}})  # but may have its own, though no manifest knows it
    assert find_checkpoint(run_dir, ema_length=OTHERS[0]) == path
    assert "time_grids" in read_tensors(path, kind="model")[1]


@pytest.mark.parametrize("length", OTHERS)
def test_a_reconstructed_average_is_the_tracked_one(
    run_dir: Path, trained: tuple[Path, dict[float, dict[str, Tensor]]], length: float
) -> None:
    tracked = trained[1][length]
    path = find_checkpoint(run_dir, ema_length=length)
    assert path == average_path(run_dir, length, STEPS)
    state, metadata = read_tensors(path, kind="model")
    assert apart(state, tracked) < 1e-3
    assert apart(state, tracked) < metadata["ema_error"] < 1e-3  # as was to be expected
    assert metadata["ema_length"] == length
    # and it is not one of those that training kept
    nearest = min((0.05, 0.1), key=lambda other: abs(other - length))
    kept, about = read_tensors(find_checkpoint(run_dir, ema_length=nearest), kind="model")
    assert about["ema_updates"] == STEPS
    assert apart(kept, tracked) > 3 * apart(state, tracked)
    loaded = load_checkpoint(run_dir, ema_length=length)
    assert loaded.step == STEPS
    assert same(dict(loaded.model.state_dict()), state)


def test_an_earlier_step_has_its_own_averages(run_dir: Path) -> None:
    assert snapshots(run_dir) == [172, 215]
    assert Fit.of(run_dir, STEPS // 2).step == STEPS // 2
    path = find_checkpoint(f"{run_dir}@{STEPS // 2}", ema_length=0.05)
    assert read_metadata(path)["ema_updates"] == STEPS // 2


def test_without_snapshots_fewer_lengths_are_in_reach(run_dir: Path) -> None:
    assert Fit.of(run_dir, STEPS).reaches(0.07)
    shutil.rmtree(run_dir / "averages")
    (run_dir / f"manifest{STEPS // 2:06}.json").unlink()
    said = (
        r"^ema_length 0.2 cannot be reconstructed at step 240 of .*, only 0.0\d+ to .*: choose one of these, or train"
    )
    with pytest.raises(ValueError, match=said):
        find_checkpoint(run_dir, ema_length=0.2)


def test_what_has_no_averages_is_refused(run_dir: Path) -> None:
    file = ema_path(run_dir, 0.9999, STEPS)
    with pytest.raises(ValueError, match=r"^ema_length 0.1 selects a file in a run folder, and .* is not a folder$"):
        find_checkpoint(file, ema_length=0.1)
    with pytest.raises(ValueError, match="give one of them"):
        find_checkpoint(run_dir, ema_rate=0.9999, ema_length=0.1)
    with pytest.raises(ValueError, match=r"above 0 and below 0\.2887"):
        find_checkpoint(run_dir, ema_length=0.5)
    for path in run_dir.glob("average_*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no averages at step 240 .*: train with --ema-lengths 0\.05,0\.1$"):
        find_checkpoint(run_dir, ema_length=0.1)


def test_a_snapshot_of_another_model_is_told(run_dir: Path) -> None:
    path = snapshot_path(run_dir, 215)
    other = find_checkpoint(run_dir, ema_length=0.1)
    with pytest.raises(ValueError, match="is a file of the kind averages, not model"):
        load_checkpoint(path)
    shutil.copy(other, path)
    with pytest.raises(ValueError, match="is a file of the kind model, not averages"):
        find_checkpoint(run_dir, ema_length=0.07)


# Resuming


def everything(run_dir: Path) -> dict[str, bytes]:
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in run_dir.rglob("*.safetensors")}


def test_a_run_that_goes_on_has_the_same_averages(tmp_path: Path, shapes: Path) -> None:
    def run(name: str, stop: Callable[[int], None] = lambda step: None) -> Trainer:
        subject = trainer(tmp_path / name, shapes, steps=20, save_interval=8, **FLAGS)
        resume(subject)
        try:
            subject.run(each_step(stop))
        except SystemError:
            assert subject.state.step == 19
        return subject

    def killed(step: int) -> None:
        if step == 19:  # after the snapshot of step 18
            raise SystemError

    straight = run("straight")
    assert snapshots(straight.run_dir) == [14, 18]
    run("again", killed)
    (tmp_path / "again" / "manifest000019.json").unlink()  # as if the process had been killed
    for path in (tmp_path / "again").glob("*000019.safetensors"):
        path.unlink()
    assert saved_steps(tmp_path / "again") == [8, 16]
    assert snapshots(tmp_path / "again") == [14, 18]
    again = run("again")
    assert everything(again.run_dir) == everything(straight.run_dir)


def test_snapshots_of_a_run_that_is_planned_again_stay_apart(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = trainer(tmp_path, shapes, steps=100, **FLAGS | {"log_interval": 90})
    subject.limit = TimeLimit(1.0, (), auto=False)

    def again(_: TimeLimit, config: RunConfig, step: int) -> RunConfig:
        return replace(config, train=replace(config.train, steps=103)) if step == 90 else config

    monkeypatch.setattr(TimeLimit, "again", again)
    subject.run()
    assert {72, 89} <= snapshot_steps(100)
    assert snapshots(tmp_path) == [72, 92]  # not 89 and 92


def test_a_length_that_is_new_starts_from_the_weights(tmp_path: Path, shapes: Path) -> None:
    flags = {"save_interval": 3, "ema_rate": "0.9", "steps": 6}
    trainer(tmp_path, shapes, **flags | {"steps": 3, "ema_lengths": 0.05}).run()
    find_checkpoint(tmp_path, ema_length=0.05)
    shutil.copy(average_path(tmp_path, 0.05, 3), average_path(tmp_path, 0.06, 3))
    subject = trainer(tmp_path, shapes, **flags, ema_lengths=0.1)
    resume(subject)
    lines = list(subject.log)
    assert "warning: the average of length 0.05 ends here: add the length to --ema-lengths to continue it" in lines
    assert "the average of length 0.1 is new: it starts from the weights" in lines
    (average,) = subject.state.powers
    assert average.updates == 3
    for ours, parameter in zip(average.tensors(), subject.state.parameters, strict=True):
        assert torch.equal(ours, parameter)


def test_others_do_not_follow_from_an_average_that_began_late(tmp_path: Path, shapes: Path) -> None:
    flags = {"save_interval": 1, "ema_rate": "0.9"}
    trainer(tmp_path, shapes, **flags, steps=3).run()
    for steps in (4, 6):  # resumed twice
        subject = trainer(tmp_path, shapes, **flags, steps=steps, ema_lengths="0.05,0.1")
        resume(subject)
        subject.run()
    for length in (0.05, 0.1):
        for step in (4, 6):
            assert read_metadata(average_path(tmp_path, length, step))["ema_since"] == 3
    assert read_metadata(snapshot_path(tmp_path, 5))["ema_since"] == [3, 3]
    with pytest.raises(ValueError, match=r"has no averages at step 4 from which others follow, begun well before"):
        Fit.of(tmp_path, 4)
    # of the shorter one hardly anything is left of what it began with: (3 / 6)^18
    assert [(one.length, one.step) for one in Fit.of(tmp_path, 6).averages] == [(0.05, 6), (0.05, 5), (0.05, 5)]
    path = average_path(tmp_path, 0.1, 6)
    assert find_checkpoint(tmp_path, ema_length=0.1) == path  # it can be had as it is
    # a file of an earlier version does not say when it began
    state, about = read_tensors(path, kind="model")
    write_tensors(path, state, {key: value for key, value in about.items() if key != "ema_since"})
    write_manifest(tmp_path, 6, [*weights_of(tmp_path, 6), optimizer_path(tmp_path, 6)])
    assert [one.length for one in Fit.of(tmp_path, 6).averages if one.step == 6] == [0.05, 0.1]
    subject = trainer(tmp_path, shapes, **flags, steps=7, ema_lengths="0.05,0.1")
    resume(subject)
    assert [(one.updates, one.since) for one in subject.state.powers] == [(6, 3), (6, 0)]


def test_the_expected_error_is_that_of_a_random_walk(tmp_path: Path) -> None:
    """Of averages that began as late as is allowed: they are told from whole ones by no more than is expected."""
    steps, began, flags = 2000, {0.05: 1350, 0.1: 830}, {"kind": "any", "step": 2000}
    weights = torch.nn.Parameter(30 * torch.randn(4000, generator=(generator := torch.Generator().manual_seed(0))))
    late = {length: PowerAverage([weights], length) for length in began}
    whole = {length: PowerAverage([weights], length) for length in (0.06, 0.08, 0.11)}
    for step in range(1, steps + 1):
        weights.data += torch.randn(4000, generator=generator)
        for average in whole.values():
            average.update()
        for length, average in late.items():
            average.update()
            if step == began[length]:
                average.load([weights], step, since=step)
    paths = [average_path(tmp_path, length, steps) for length in late]
    for path, average in zip(paths, late.values(), strict=True):
        write_tensors(path, {"w": average.tensors()[0]}, flags | average.about)
    write_manifest(tmp_path, steps, paths)
    fit = Fit.of(tmp_path, steps)
    for length, average in whole.items():
        coefficients, expected = fit.coefficients(length)
        parts = zip(coefficients, late.values(), strict=True)
        found = sum((c * one.tensors()[0].double() for c, one in parts), torch.zeros(()))
        assert 0.3 < apart({"w": found}, {"w": average.tensors()[0]}) / expected < 1


def test_a_snapshot_that_cannot_be_written_ends_no_run(tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "averages").write_text("in the way")
    subject = trainer(tmp_path / "run", shapes, steps=3, **FLAGS)
    assert subject.run() == 0
    assert any(line.startswith("warning: no snapshot of the averages of step 2: ") for line in subject.log)
    assert saved_steps(tmp_path / "run") == [3]
