"""The suites: checked before they are timed, a figure for everything, and what is wrong without any."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import pytest
import torch
import torch._dynamo

from fastdiff.benchmarks import peers, suites
from fastdiff.benchmarks.candidates import Drawing, Job, job_of, stepping
from fastdiff.benchmarks.flops import Flops
from fastdiff.benchmarks.harness import Timing, peak_bytes
from fastdiff.benchmarks.ladder import PLAIN, Models, Rung, ladder, rivals
from fastdiff.benchmarks.roofline import Roofline
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.suites import Ceilings, against_diffusers, ceilings, measure, measure_step
from fastdiff.config import ModelConfig, Precision
from fastdiff.kernels import Backend
from fastdiff.runtime import device as runtime_device
from fastdiff.sampling import Loop
from fastdiff.training.ema import EMA

from .support import CPU, ROOFS, WORKLOAD, count_no_memory, known, measure_little


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that take no time, and memory that is not counted."""
    measure_little(monkeypatch)
    count_no_memory(monkeypatch, suites)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler, which would take minutes."""
    monkeypatch.setattr(runtime_device, "has_compiler", lambda _: False)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without peers."""
    monkeypatch.setattr(suites, "peers", lambda _: {})


@pytest.mark.parametrize("suite", ["unet", "train", "sample"])
def test_every_rung_and_peer_has_every_figure(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "peak_bytes", peak_bytes)
    rungs = ladder(suite, CPU)
    rows = measure(suite, Models(WORKLOAD), rungs, known, rounds=2)
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
    forward = Flops.of(WORKLOAD.model, 2, training=suite == "train").flops
    assert first.flops == forward * (3 if suite == "sample" else 1)


BY_CLASS = {"class_cond": True, "num_classes": 5}
EXTRAS = [
    BY_CLASS | {"small_size": 4},
    {"dropout": 0.5},
    *(pytest.param(extra, marks=pytest.mark.slow) for extra in (BY_CLASS, {"small_size": 4})),
]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("suite", ["unet", "train", "sample"])
def test_models_with_conditions_or_dropout(suite: str, extra: dict[str, object]) -> None:
    model = ModelConfig.from_dict(WORKLOAD.model.to_dict() | extra)
    rungs = ladder(suite, CPU)
    rows = measure(suite, Models(dataclasses.replace(WORKLOAD, model=model)), [rungs[0], rungs[-1]], known, rounds=1)
    assert [row.remark for row in rows[:2]] == ["", ""]
    assert all(row.timing for row in rows)


@pytest.mark.usefixtures("alone")
def test_a_wrong_one_has_no_time_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tolerance = {p: 1e-12 if p is Precision.BF16 else 1e-3 for p in Precision}
    monkeypatch.setattr("fastdiff.benchmarks.ladder.TOLERANCE", tolerance)
    plain = Rung("plain", PLAIN)
    wrong = Rung("+ bf16", dataclasses.replace(PLAIN, precision=Precision.BF16))
    rows = measure("train", Models(WORKLOAD), [plain, wrong, dataclasses.replace(plain, name="after")], known, rounds=1)
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
    plain, *others = measure("unet", Models(WORKLOAD), ladder("unet", CPU), known, rounds=1)
    assert (plain.timing, plain.failed) == (None, False)  # it is not wrong, only large
    assert plain.remark == "out of memory"
    assert all(row.timing is not None and str(row.as_dict()["speedup"]) == "nan" for row in others)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_round_of_samples_is_a_whole_batch(monkeypatch: pytest.MonkeyPatch, graphs: bool) -> None:
    taken: list[int] = []
    step = Loop.step
    monkeypatch.setattr(Loop, "step", lambda loop: (taken.append(loop.left), step(loop)))
    candidate = Models(WORKLOAD).inference(PLAIN)
    drawing = Drawing(WORKLOAD, candidate.call, candidate.runtime.kernels, graphs)
    for _ in range(3):
        taken.clear()
        pixels = drawing()
        assert taken == [3, 2, 1]
        assert (pixels.shape, pixels.dtype, pixels.device) == ((2, 8, 8, 3), torch.uint8, CPU)
    assert drawing.images.shape == (2, 3, 8, 8)


def broken(operation: str, change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernel of that name with other results; the reference stays right."""
    op = import_module(f"fastdiff.kernels.{operation}.op")
    right = op.IMPLEMENTATIONS[Backend.TORCH]

    def wrong(*args: object, **kwargs: object) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if t is None else change(t) for t in right(*args, **kwargs))

    monkeypatch.setitem(op.IMPLEMENTATIONS, Backend.TORCH, wrong)


def on_torch_kernels(suite: str) -> dict[str, Row]:
    """The rows of the rungs with the reference's and PyTorch's kernels, by name."""
    rungs = [rung for rung in ladder(suite, CPU) if rung.name != "+ bf16"]
    return {row.candidate: row for row in measure(suite, Models(WORKLOAD), rungs, known, rounds=1)}


@pytest.mark.usefixtures("alone")
def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken("diffusion_step", torch.zeros_like, monkeypatch)
    rows = on_torch_kernels("sample")
    assert rows["plain"].timing is not None
    wrong = rows["+ torch kernels"]
    assert (wrong.timing, wrong.failed) == (None, True)
    assert "in its images" in wrong.remark
    call, step = measure_step(Models(WORKLOAD), ladder("step", CPU)[-1], known, rounds=1)
    assert call.timing is not None
    assert (step.timing, step.failed) == (None, True)
    assert "in its step" in step.remark


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("factor", [0, math.nan])
def test_a_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    broken("diffusion_loss", lambda t: t * factor, monkeypatch)
    rows = on_torch_kernels("train")
    assert rows["plain"].timing is not None
    for name in ("+ torch kernels", "+ fused optimizer", "trainer"):
        assert (rows[name].timing, rows[name].failed) == (None, True), name


@pytest.mark.usefixtures("alone")
def test_an_optimizer_that_does_nothing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: None)
    for name, row in on_torch_kernels("train").items():
        assert (row.timing, row.failed) == (None, True), name
        assert "moves the weights by 0 times the learning rate" in row.remark, name


@pytest.mark.usefixtures("alone")
def test_an_average_that_stands_still_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EMA, "update", lambda ema: setattr(ema, "updates", ema.updates + 1))
    rows = on_torch_kernels("train")
    assert {name for name, row in rows.items() if row.timing} == {"plain", "+ channels_last", "+ torch kernels"}
    assert all("differs from the moving average" in rows[name].remark for name in ("+ fused optimizer", "trainer"))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("error", "remark", "failed"),
    [(torch.OutOfMemoryError("a lot"), "out of memory", False), (ValueError("a bug"), "ValueError: a bug", True)],
)
def test_one_that_fails_in_a_timed_round_is_dropped(
    monkeypatch: pytest.MonkeyPatch, error: Exception, remark: str, failed: bool
) -> None:
    calls = 0

    def build(suite: str, models: Models, rung: Rung, stack: ExitStack) -> Job:
        job = job_of(suite, models, rung, stack)

        def run() -> object:
            nonlocal calls
            calls += 1
            if calls == 4:  # after its memory was counted, the warm-up and a round
                raise error
            return job.run()

        return dataclasses.replace(job, run=run) if rung.name == "+ channels_last" else job

    monkeypatch.setattr(suites, "job_of", build)
    plain, dropped, after = measure("unet", Models(WORKLOAD), ladder("unet", CPU)[:3], known, rounds=3)
    assert (dropped.timing, dropped.remark, dropped.failed) == (None, remark, failed)
    assert after.timing is not None
    assert len(after.timing.seconds) == 3
    assert after.before is plain.timing


def test_on_a_gpu_it_says_what_else_was_there() -> None:
    row = suites._without_time(Row("unet", "", "plain", None), torch.OutOfMemoryError("a lot"), 3 * 2**29, ours=True)
    assert (row.remark, row.failed) == ("out of memory, with 1.5 GiB held by other candidates", False)
    assert suites._without_time(row, MemoryError(), 0, ours=True).remark == "out of memory"


@pytest.mark.usefixtures("alone")
def test_a_candidate_past_dynamos_limit_is_not_timed_as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(suite: str, models: Models, rung: Rung, stack: ExitStack) -> Job:
        job = job_of(suite, models, rung, stack)
        sizes = iter(range(2, 100))
        compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
        return dataclasses.replace(job, run=lambda: [compiled(torch.zeros(next(sizes))) for _ in range(9)])

    torch._dynamo.reset()
    monkeypatch.setattr(suites, "job_of", build)
    (row,) = measure("unet", Models(WORKLOAD), ladder("unet", CPU)[:1], known, rounds=1)
    assert (row.timing, row.failed) == (None, True)
    assert row.remark.startswith("FailOnRecompileLimitHit")


def test_peers_compute_as_pytorch_does_by_itself() -> None:
    gpu, found = torch.device("cuda"), []
    for precision in (Precision.FP32, Precision.TF32, None):
        suites._set_arithmetic(gpu, precision)
        found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    assert found == [("highest", False), ("high", True), ("highest", True)]
    assert found[-1] == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)


def test_a_peer_says_how_large_it_is() -> None:
    *_, row = measure("unet", Models(WORKLOAD), ladder("unet", CPU)[:1], known, rounds=1)[:2]
    assert row.candidate == "diffusers"
    theirs, ours = row.remark.split("; ours ")
    assert theirs.endswith(f" M parameters, {row.flops / 1e9:.4g} GFLOP")
    assert ours.endswith(f" M parameters, {Flops.of(WORKLOAD.model, 2, training=False).flops / 1e9:.4g} GFLOP")


def test_a_peer_that_does_not_run_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> peers.Peer:
        raise RuntimeError("no such\nlayer")

    monkeypatch.setattr(suites, "peers", lambda _: {"diffusers": broken})
    *_, peer = measure("unet", Models(WORKLOAD), ladder("unet", CPU)[:1], known, rounds=1)
    assert (peer.timing, peer.remark, peer.failed) == (None, "RuntimeError: no such layer", False)


@pytest.mark.usefixtures("alone")
def test_the_limit_is_that_of_the_precision() -> None:
    roofline = {**ROOFS, Precision.BF16: dataclasses.replace(ROOFS[Precision.BF16], bytes_per_s=1e6)}
    rungs = [Rung("plain", PLAIN), Rung("bf16", dataclasses.replace(PLAIN, precision=Precision.BF16))]
    plain, bf16 = measure("unet", Models(WORKLOAD), rungs, lambda: roofline, rounds=1)
    assert bf16.n_bytes == plain.n_bytes / 2
    assert bf16.limit_s == pytest.approx(bf16.n_bytes / 1e6)
    assert plain.limit_s == pytest.approx(plain.n_bytes / 1e9)


@pytest.mark.usefixtures("alone")
def test_memory_holds_weights_moments_and_an_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "peak_bytes", peak_bytes)
    rungs = [rung for rung in ladder("train", CPU) if rung.name in ("plain", "trainer")]
    models = Models(WORKLOAD)
    for row in measure("train", models, rungs, known, rounds=1):
        weights = 4 * models.num_parameters
        # and the gradients, which are there with the moments; activations are small here
        assert 5 * weights <= row.peak_gib * 2**30 < 8 * weights, row.candidate


def test_a_step_is_measured_beside_the_call_that_it_makes() -> None:
    models, rung = Models(WORKLOAD), ladder("step", CPU)[-1]
    call, step = measure_step(models, rung, known, rounds=5)  # more than the process has steps
    assert (call.candidate, step.candidate) == ("model call", "model call and step")
    assert call.timing is not None
    assert step.timing is not None
    assert step.n_bytes - call.n_bytes == 4 * 2 * 8 * 8 * (3 + 3 + 6)
    job = stepping(models, rung)
    for _ in range(4):
        job.run()


def test_rivals_take_the_same_step_by_single_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def compile(module: torch.nn.Module, *, dynamic: bool, mode: str) -> torch.nn.Module:
        modes.append(mode)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    (torch_kernels,) = rivals(CPU)
    tuned = dataclasses.replace(torch_kernels, name="max-autotune", mode="max-autotune")
    rows = measure_step(Models(WORKLOAD), ladder("step", CPU)[-1], known, 5, [torch_kernels, tuned])
    assert [row.candidate for row in rows[2:]] == ["torch kernels", "max-autotune"]
    assert modes == ["max-autotune"]
    for row in rows[2:]:
        assert row.timing is not None
        assert (row.n_bytes, row.before) == (rows[1].n_bytes, None)


def test_a_rival_that_computes_something_else_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: lambda x, *args, **kwargs: module(2 * x, *args, **kwargs))
    tuned = dataclasses.replace(rivals(CPU)[0], name="max-autotune", mode="max-autotune")
    *ours, rival = measure_step(Models(WORKLOAD), ladder("step", CPU)[-1], known, 1, [tuned])
    assert all(row.timing for row in ours)
    assert (rival.timing, rival.failed) == (None, False)
    assert rival.remark.startswith("ValueError: differs from the plain path")


def test_a_graph_that_changes_the_images_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Loop.step

    def wrong(loop: Loop) -> None:
        step(loop)
        if loop._graphs_wanted and loop.left == 1:  # on a GPU the graph is replayed from the second step on
            loop.x.mul_(1.5)

    monkeypatch.setattr(Loop, "step", wrong)
    _, row = measure_step(Models(WORKLOAD), ladder("step", CPU)[-1], known, rounds=1)
    assert (row.timing, row.failed) == (None, True)
    assert "in its step" in row.remark


def test_the_ceilings_are_those_of_the_precisions_in_use() -> None:
    rungs = [Rung("plain", PLAIN), Rung("same", PLAIN)]
    (found,) = ceilings(WORKLOAD, rungs, rounds=1).items()
    assert found[0] is Precision.FP32
    assert found[1].conv_flops_per_s > 0


@pytest.mark.usefixtures("alone")
def test_ceilings_that_find_no_room_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("a lot")

    monkeypatch.setattr(suites, "measure_roofline", full)
    found = ceilings(WORKLOAD, [Rung("plain", PLAIN)], rounds=1)
    assert str(found[Precision.FP32]).startswith("out of memory")
    (row,) = measure("unet", Models(WORKLOAD), ladder("unet", CPU)[:1], lambda: found, rounds=1)
    assert row.timing is not None
    assert math.isnan(row.limit_s)


def test_of_several_measurements_of_a_ceiling_the_best_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([Roofline(1, 30, 5, 2), Roofline(3, 20, 4, 2), Roofline(math.nan, math.nan)])
    monkeypatch.setattr(suites, "measure_roofline", lambda *_: next(seen))
    roofline = Ceilings(WORKLOAD, [Rung("plain", PLAIN)])
    assert roofline.best == {Precision.FP32: Roofline(1, 30, 5, 2)}
    assert roofline()[Precision.FP32] == Roofline(3, 30, 5, 2)
    assert roofline()[Precision.FP32] == roofline.best[Precision.FP32] == Roofline(3, 30, 5, 2)


def test_ceilings_that_cannot_be_measured_again_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(suites, "measure_roofline", lambda *_: Roofline(1, 30))
    roofline = Ceilings(WORKLOAD, [Rung("plain", PLAIN)])
    monkeypatch.setattr(suites, "measure_roofline", fails)
    assert roofline()[Precision.FP32].flops_per_s == 30
    with pytest.raises(RuntimeError, match="CUBLAS"):
        Ceilings(WORKLOAD, [Rung("plain", PLAIN)])


@pytest.mark.usefixtures("alone")
def test_the_ceilings_are_measured_when_all_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    timed_in_turn = suites.interleaved

    def interleaved(*arguments: Any) -> Any:
        events.append("timed")
        return timed_in_turn(*arguments)

    monkeypatch.setattr(suites, "interleaved", interleaved)
    (row,) = measure("unet", Models(WORKLOAD), ladder("unet", CPU)[:1], lambda: events.append("roofline") or ROOFS, 1)
    assert events == ["timed", "roofline"]
    assert row.limit_s > 0


def timed(name: str, seconds: float) -> Row:
    return Row("unet", "", name, Timing(name, [seconds] * 3, [1.0] * 3))


def test_a_slow_plain_path_is_told() -> None:
    assert against_diffusers([timed("plain", 1.0)]) == []
    fair = against_diffusers([timed("plain", 1.0), timed("diffusers", 0.95)])
    assert fair == ["plain path: 0.95 times as fast as diffusers' eager model"]
    slow = against_diffusers([timed("plain", 1.0), timed("diffusers", 0.5)])
    assert slow[1].startswith("warning: the plain path is slow")
    assert against_diffusers([timed("plain", 1.0), timed("diffusers", 0.91)])[1:] == []
    rounded = [timed("plain", 2.0), timed("+ tf32", 1.0), timed("diffusers", 1.0)]
    assert against_diffusers(rounded) == ["plain path in tf32: 1.00 times as fast as diffusers' eager model"]
    rounded[1] = dataclasses.replace(rounded[1], timing=None)
    assert against_diffusers(rounded) == []  # fp32 is no match for it
