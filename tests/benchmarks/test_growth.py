"""How the cost grows: what is measured along each axis, where it ends, and why."""

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch

from fastdiff.benchmarks import growth, ladder, runs
from fastdiff.benchmarks.candidates import Job
from fastdiff.benchmarks.growth import Axis, measure_growth
from fastdiff.benchmarks.harness import peak_bytes
from fastdiff.benchmarks.ladder import Models, Rung
from fastdiff.benchmarks.roofline import Roofline
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.workload import Workload
from fastdiff.config import Compile, DiffusionConfig, ModelConfig, Precision, RuntimeConfig

from .support import count_no_memory

TINY = Workload(
    ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult=(1,), learn_sigma=True),
    DiffusionConfig(diffusion_steps=6, noise_schedule="cosine", learn_sigma=True),
    4,
    torch.device("cpu"),
)
FP32 = RuntimeConfig(precision=Precision.FP32)
BATCH, SIDE, CHANNELS = (
    replace(axis, quick=sizes) for axis, sizes in zip(growth.AXES, [(1, 2), (8, 16), (32, 64)], strict=True)
)


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of a test, ceilings and memory that are not measured, and no further processes."""
    count_no_memory(monkeypatch, growth)
    monkeypatch.setattr(growth, "AXES", (BATCH, SIDE, CHANNELS))
    monkeypatch.setattr(growth, "measure_processes", lambda *_: [])
    monkeypatch.setattr(growth, "ceilings", lambda *_: dict.fromkeys(Precision, Roofline(1e12, 1e15, 1e15)))


def measured(*axes: Axis, monkeypatch: pytest.MonkeyPatch, ours: RuntimeConfig = FP32) -> list[Row]:
    monkeypatch.setattr(growth, "AXES", axes)
    return list(measure_growth(TINY, ours, quick=True))


def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the forward passes is seen in their rows."""
    real = growth.job_of

    def job(suite: str, *args: Any) -> Job:
        return Job(lambda: None, lambda: ()) if suite == "train" else real(suite, *args)

    monkeypatch.setattr(growth, "job_of", job)


@pytest.mark.slow
def test_both_passes_along_every_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "peak_bytes", peak_bytes)
    rows = list(measure_growth(TINY, FP32, quick=True))
    kinds = ("forward", "training step")
    about = ("by batch: 8 pixels, 32 channels", "by side: batch 2, 32 channels", "by channels: batch 2, 8 pixels")
    names = (("batch 1", "batch 2"), ("8 pixels", "16 pixels"), ("32 channels", "64 channels"))
    expected = [
        (f"{kind} {what}", name) for kind in kinds for what, pair in zip(about, names, strict=True) for name in pair
    ]
    assert [(row.workload, row.candidate) for row in rows] == expected
    for smaller, larger in zip(rows[::2], rows[1::2], strict=True):
        assert smaller.timing is not None
        assert larger.timing is not None
        assert len(larger.timing.seconds) == 3
        assert smaller.timing.median > 0
        assert smaller.flops < larger.flops
        assert 0 < smaller.limit_s < larger.limit_s
        assert 0 < smaller.peak_gib < larger.peak_gib
        assert math.isnan(float(str(larger.as_dict()["speedup"])))
        assert (smaller.suite, smaller.remark, smaller.failed) == ("growth", "", False)
        axis = larger.workload.partition(" by ")[2].partition(":")[0]
        assert larger.remark.startswith(f"time ~ {axis}^")
        assert math.isfinite(float(larger.remark.partition("^")[2]))
    forward, training = rows[0], rows[6]
    assert (forward.images, rows[1].images) == (1, 2)
    assert training.flops > 2.5 * forward.flops
    parameters = 4 * sum(p.numel() for p in ladder.build_model(TINY.model).parameters()) / 2**30
    assert forward.peak_gib > parameters
    assert training.peak_gib > 5 * parameters  # weights, gradients, two moments, an average


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("PATIENCE", 0.0, r"batch 2 would take about \d+ s"),
        ("available_memory", lambda: 0, "batch 2 would need about 0 GiB of memory"),
    ],
)
def test_it_ends_before_a_size_that_is_too_much(
    name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, name, value)
    rows = measured(BATCH, monkeypatch=monkeypatch)
    assert [row.candidate for row in rows] == ["batch 1"] * 2
    for row in rows:
        assert re.fullmatch(reason, row.remark)
    assert all(row.timing and len(row.timing.seconds) == (1 if name == "PATIENCE" else 3) for row in rows)


def test_it_ends_where_the_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    without_training(monkeypatch)
    real = growth.job_of

    def job(suite: str, models: Models, rung: Rung, stack: ExitStack, workload: Workload) -> Job:
        if suite == "unet" and workload.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(suite, models, rung, stack, workload)

    monkeypatch.setattr(growth, "job_of", job)
    rows = [r for r in measured(replace(BATCH, quick=(1, 2, 3)), monkeypatch=monkeypatch) if "forward" in r.workload]
    assert [row.candidate for row in rows] == ["batch 1", "batch 2"]
    assert rows[1].remark.startswith("time ~ batch^")
    assert rows[1].remark.endswith("; batch 3: out of memory")
    (row,) = measured(replace(BATCH, quick=(3, 4)), monkeypatch=monkeypatch)[:1]
    assert (row.candidate, row.timing, row.failed, row.remark) == ("batch 3", None, False, "batch 3: out of memory")


def test_what_is_wrong_has_no_time_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "TOLERANCE", dict.fromkeys(ladder.TOLERANCE, -1.0))
    rows = measured(BATCH, CHANNELS, monkeypatch=monkeypatch)
    assert [row.candidate for row in rows] == ["batch 1", "32 channels"] * 2
    for row in rows:
        assert (row.timing, row.failed) == (None, True)
        assert row.remark.startswith("ValueError: differs from the plain path")


def test_a_size_that_makes_no_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    without_training(monkeypatch)
    rows = measured(replace(CHANNELS, quick=(32, 48, 64)), monkeypatch=monkeypatch)[:3]
    assert [row.candidate for row in rows] == ["32 channels", "64 channels", "48 channels"]
    assert rows[1].remark.startswith("time ~ channels^")
    assert (rows[2].timing, rows[2].failed) == (None, False)
    assert rows[2].remark.startswith("num_channels must be a multiple of 32")


@pytest.mark.parametrize(
    ("asked", "used"), [(Compile.AUTO, Compile.OFF), (Compile.OFF, Compile.OFF), (Compile.ON, Compile.ON)]
)
def test_compiled_only_where_it_is_asked_for(asked: Compile, used: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def job(suite: str, models: Models, rung: Rung, stack: ExitStack, workload: Workload) -> Job:
        seen.append((rung.config.compile, rung.config.precision, rung.config.device))
        return Job(lambda: None, lambda: ())

    monkeypatch.setattr(growth, "job_of", job)
    measured(BATCH, monkeypatch=monkeypatch, ours=replace(FP32, compile=asked))
    assert seen == [(used, Precision.FP32, "cpu")] * 4


class TestProcesses:
    @pytest.fixture(autouse=True)
    def _real(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(growth, "AXES", ())
        monkeypatch.setattr(growth, "ceilings", lambda *_: dict.fromkeys(Precision, Roofline(1e12, 1e15, 1e15)))

    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Mapping[str, str]]]:
        """What is started, in the place of which a run is found that was twice as fast with two processes."""
        started = []

        @contextmanager
        def run(command: list[str], output: IO[str], env: Mapping[str, str]) -> Iterator[SimpleNamespace]:
            started.append((command, env))
            processes = int(command[command.index("--standalone") + 1].partition("=")[2])
            folder = Path(command[command.index("--run_dir") + 1])
            folder.mkdir()
            speeds = [1.0, 7.0 * processes, 8.0 * processes, 9.0 * processes]
            lines = [json.dumps({"images_per_s": speed, "memory_gib": 0.5}) for speed in speeds]
            (folder / "progress.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            yield SimpleNamespace(wait=lambda: 0)

        monkeypatch.setattr(runs, "child", run)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
        return started

    def test_one_and_two_share_the_cores(self, started: list[tuple[list[str], Mapping[str, str]]]) -> None:
        rows = list(measure_growth(replace(TINY, batch_size=5), FP32, quick=True))
        assert {row.workload for row in rows} == {"training by processes: 8 pixels, 32 channels, batch 4"}
        assert [row.candidate for row in rows] == ["1 process", "2 processes"]
        assert [row.timing and row.timing.median for row in rows] == [4 / 8, 4 / 16]  # without the first line
        assert rows[1].remark == "2.00× of 1 process; they share the cores; memory of the first process"
        assert rows[1].peak_gib == 0.5
        assert [env["OMP_NUM_THREADS"] for _, env in started] == ["8", "4"]
        for command, _ in started:
            words = " ".join(command)
            for said in (
                "--learn_sigma True",
                "--channel_mult 1 ",
                "--precision fp32",
                "--compile off",
                "--device cpu",
            ):
                assert said in words
            assert "None" not in words

    def test_a_run_that_fails_is_the_remark(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said = "W1123 torchrun\nprocess 1: error: there is no room\nTraceback: ...\n"

        @contextmanager
        def run(command: list[str], output: IO[str], env: Mapping[str, str]) -> Iterator[SimpleNamespace]:
            output.write(said)
            yield SimpleNamespace(wait=lambda: 1)

        monkeypatch.setattr(runs, "child", run)
        (row,) = measure_growth(TINY, FP32, quick=True)
        assert (row.candidate, row.timing, row.failed) == ("1 process", None, True)
        assert row.remark == "process 1: error: there is no room"

    @pytest.mark.slow
    def test_they_train(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        rows = list(measure_growth(TINY, FP32, quick=True))
        assert [row.remark for row in rows if row.failed] == []
        assert all(row.timing and row.timing.median > 0 and row.peak_gib > 0 for row in rows)
        assert len(rows) == 2
        assert not list(tmp_path.iterdir())  # nothing of torchrun's is left
