"""The suites: checked before they are timed, a figure for everything, and what is wrong without any."""

import dataclasses
from contextlib import ExitStack

import pytest
import torch

from fastdiff.benchmarks import peers, suites
from fastdiff.benchmarks.harness import Timing
from fastdiff.benchmarks.jobs import Job, job_of, stepping
from fastdiff.benchmarks.ladder import PLAIN, Models, Rung, ladder
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.suites import against_diffusers, ceilings, measure, measure_step
from fastdiff.benchmarks.work import Work
from fastdiff.config import ModelConfig, Precision
from fastdiff.runtime import device as runtime_device

from .support import CPU, ROOFS, WORKLOAD


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler, which would take minutes."""
    monkeypatch.setattr(runtime_device, "_has_compiler", lambda _: False)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without peers."""
    monkeypatch.setattr(suites, "peers", lambda _: {})


@pytest.mark.parametrize("suite", ["unet", "train", "sample"])
def test_every_rung_and_peer_has_every_figure(suite: str) -> None:
    rungs = ladder(suite, CPU)
    rows = measure(suite, Models(WORKLOAD), rungs, ROOFS, rounds=2)
    assert [row.candidate for row in rows] == [r.name for r in rungs] + list(peers.peers(WORKLOAD))
    for row in rows:
        values = row.as_dict()
        for name in ("median_s", "speedup", "images_per_s", "gflop", "gbyte", "share_of_limit", "peak_gib"):
            assert float(str(values[name])) > 0, (row.candidate, name)
        assert values["rounds"] == 2
        assert not row.failed
    first, *others = rows
    assert first.before is None
    assert first.as_dict()["speedup"] == 1
    for row, below in zip(others, rows, strict=False):
        assert (row.before is below.timing) == (row.candidate not in peers.PEERS), row.candidate
    assert str(WORKLOAD) in first.workload
    assert ("3 DDIM steps" in first.workload) == (suite == "sample")
    forward = Work.of(WORKLOAD.model, 2, training=suite == "train").flops
    assert first.flops == forward * (3 if suite == "sample" else 1)


@pytest.mark.parametrize("extra", [{"class_cond": True, "num_classes": 5}, {"small_size": 4}])
@pytest.mark.parametrize("suite", ["unet", "train", "sample"])
def test_models_with_conditions(suite: str, extra: dict[str, object]) -> None:
    model = ModelConfig.from_dict(WORKLOAD.model.to_dict() | extra)
    rungs = ladder(suite, CPU)
    rows = measure(suite, Models(dataclasses.replace(WORKLOAD, model=model)), [rungs[0], rungs[-1]], ROOFS, rounds=1)
    assert [row.remark for row in rows] == ["", ""]
    assert all(row.timing for row in rows)


@pytest.mark.usefixtures("alone")
def test_a_wrong_one_has_no_time_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tolerance = {p: 1e-12 if p is Precision.BF16 else 1e-3 for p in Precision}
    monkeypatch.setattr("fastdiff.benchmarks.ladder.TOLERANCE", tolerance)
    plain = Rung("plain", PLAIN)
    wrong = Rung("+ bf16", dataclasses.replace(PLAIN, precision=Precision.BF16))
    rows = measure("train", Models(WORKLOAD), [plain, wrong, dataclasses.replace(plain, name="after")], ROOFS, rounds=1)
    assert [row.failed for row in rows] == [False, True, False]
    assert rows[1].timing is None
    assert rows[1].remark.startswith("ValueError: differs from the plain path by ")
    assert rows[1].remark.endswith("not timed")
    assert rows[2].before is rows[0].timing  # the last one that has a time


@pytest.mark.usefixtures("alone")
def test_without_a_first_one_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(suite: str, models: Models, rung: Rung, stack: ExitStack) -> Job:
        if rung.name == "plain":
            raise torch.OutOfMemoryError("a lot")
        return job_of(suite, models, rung, stack)

    monkeypatch.setattr(suites, "job_of", build)
    plain, *others = measure("unet", Models(WORKLOAD), ladder("unet", CPU), ROOFS, rounds=1)
    assert (plain.timing, plain.failed) == (None, False)  # it is not wrong, only large
    assert plain.remark == "OutOfMemoryError: a lot"
    assert all(row.timing is not None and str(row.as_dict()["speedup"]) == "nan" for row in others)


def test_a_peer_that_does_not_run_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> peers.Peer:
        raise RuntimeError("no such\nlayer")

    monkeypatch.setattr(suites, "peers", lambda _: {"diffusers": broken})
    *_, peer = measure("unet", Models(WORKLOAD), ladder("unet", CPU)[:1], ROOFS, rounds=1)
    assert (peer.timing, peer.remark, peer.failed) == (None, "RuntimeError: no such layer", False)


def test_the_limit_is_that_of_the_precision() -> None:
    roofs = {**ROOFS, Precision.BF16: dataclasses.replace(ROOFS[Precision.BF16], bytes_per_s=1e6)}
    rungs = [Rung("plain", PLAIN), Rung("bf16", dataclasses.replace(PLAIN, precision=Precision.BF16))]
    plain, bf16, *_ = measure("unet", Models(WORKLOAD), rungs, roofs, rounds=1)
    assert bf16.n_bytes == plain.n_bytes / 2
    assert bf16.limit_s == pytest.approx(bf16.n_bytes / 1e6)
    assert plain.limit_s == pytest.approx(plain.n_bytes / 1e9)


def test_memory_holds_weights_moments_and_an_average() -> None:
    rungs = [rung for rung in ladder("train", CPU) if rung.name in ("plain", "trainer")]
    models = Models(WORKLOAD)
    for row in measure("train", models, rungs, ROOFS, rounds=1)[:2]:
        weights = 4 * models.num_parameters
        # and the gradients, which are there with the moments; activations are small here
        assert 5 * weights <= row.peak_gib * 2**30 < 8 * weights, row.candidate


def test_a_step_is_measured_beside_the_call_that_it_makes() -> None:
    models, rung = Models(WORKLOAD), ladder("step", CPU)[-1]
    call, step = measure_step(models, rung, ROOFS, rounds=5)  # more than the process has steps
    assert (call.candidate, step.candidate) == ("model call", "model call and step")
    assert call.timing is not None
    assert step.timing is not None
    assert step.n_bytes - call.n_bytes == 4 * 2 * 8 * 8 * (3 + 3 + 6)
    job = stepping(WORKLOAD, models.inference(rung.config))
    for _ in range(4):
        job.run()


def test_the_ceilings_are_those_of_the_precisions_in_use() -> None:
    rungs = [Rung("plain", PLAIN), Rung("same", PLAIN)]
    (found,) = ceilings(WORKLOAD, rungs, rounds=1).items()
    assert found[0] is Precision.FP32
    assert found[1].conv_flops_per_s > 0


def timed(name: str, seconds: float) -> Row:
    return Row("unet", "", name, Timing(name, [seconds] * 3, [1.0] * 3))


def test_a_slow_plain_path_is_told() -> None:
    assert against_diffusers([timed("plain", 1.0)]) == []
    fair = against_diffusers([timed("plain", 1.0), timed("diffusers", 0.95)])
    assert fair == ["plain path: 0.95 times as fast as diffusers' eager model"]
    slow = against_diffusers([timed("plain", 1.0), timed("diffusers", 0.5)])
    assert slow[1].startswith("warning: the plain path is slow")
