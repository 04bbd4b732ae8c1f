"""The sampling part of gpu_check: checked before it is timed, marks by the worst figure, and going on where it was."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.benchmarks import sampling
from fastdiff.benchmarks.sampling import COLUMNS, MARKS, ON_CPU, Way, launches, measure, sample, verdicts
from fastdiff.benchmarks.suites import Workload
from fastdiff.config import DiffusionConfig, Kernels, ModelConfig

CPU = torch.device("cpu")
WORKLOAD = Workload(
    ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult=(1,), learn_sigma=True),
    DiffusionConfig(diffusion_steps=6, noise_schedule="cosine", learn_sigma=True),
    2,
    CPU,
)


def test_ours_and_a_rival_have_a_row_each() -> None:
    ours, rival = measure(WORKLOAD, ON_CPU)
    assert (ours["candidate"], rival["candidate"]) == ("fastdiff", "not compiled")
    assert list(ours) == list(rival)
    for row in (ours, rival):
        assert row["remark"] == ""
        assert float(str(row["step_s"])) > 0
    assert ours["levels_off"] == 0


def test_a_rival_that_computes_something_else_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TOLERANCE", dict.fromkeys(sampling.TOLERANCE, 0.0))
    ours, rival = measure(WORKLOAD, [Way("original", Kernels.REFERENCE, "none")])
    assert float(str(ours["step_s"])) > 0
    assert math.isnan(float(str(rival["step_s"])))
    assert str(rival["remark"]).startswith("ValueError: original differs from fastdiff by ")


def test_images_that_a_graph_changes_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling._Batch, "levels_off", lambda *_: 3)
    (row,) = measure(WORKLOAD, ON_CPU)  # nothing to compare the rival with
    assert row["remark"] == "ValueError: the graph's images are 3 levels from those without it: not timed"


def test_launches_are_counted_whoever_asks_for_them() -> None:
    counts = {"cudaGraphLaunch": 20, "cudaStreamIsCapturing": 4, "aten::copy_": 9, "Memcpy HtoD": 1}
    assert launches(counts) == (20, 0)
    others = {"cudaLaunchKernel": 3, "cuLaunchKernelEx": 2, "cudaMemcpyAsync": 1, "cudaMemsetAsync": 1}
    assert launches(counts | others) == (20, 7)
    assert launches({"hipGraphLaunch": 20, "hipExtModuleLaunchKernel": 2}) == (20, 2)


def row(candidate: str, batch_size: int = 1, ratio: float = 1.0, **values: object) -> dict[str, str]:
    good = dict.fromkeys(COLUMNS, 1.0) | {"other_launches": 0.0, "remark": "no wait for the device"}
    about = {"image_size": 64, "batch_size": batch_size, "candidate": candidate}
    return {name: str(value) for name, value in (about | good | {"ratio_to_ours": ratio} | values).items()}


def test_the_marks_are_judged_by_the_faster_rival() -> None:
    rows = [row("fastdiff"), row("max-autotune", ratio=1.5), row("max-autotune-no-cudagraphs", ratio=2.5)]
    rows += [row("fastdiff, torch kernels", ratio=1.1), row("max-autotune", 256, ratio=1.2)]
    batches = dict(zip(MARKS, verdicts(rows), strict=False))
    assert (batches[1].worst, batches[1].where) == (1.5, "64 pixels, batch 1, max-autotune")
    assert batches[256].worst == 1.2
    assert str(batches[256]).startswith("met")
    assert math.isnan(batches[16].worst)


def test_what_has_no_time_misses_its_mark() -> None:
    found = verdicts([row("fastdiff", step_s=math.nan, remark="OutOfMemoryError: a lot")])
    assert found[0].worst == 0
    assert found[0].where == "64 pixels, batch 1: OutOfMemoryError: a lot"
    found = verdicts([row("fastdiff"), row("max-autotune", ratio=math.nan)])
    assert math.isnan(found[0].worst)  # a rival that does not run is no rival


@pytest.mark.parametrize(
    ("values", "launch", "wait"),
    [
        ({}, 1, 1),
        ({"other_launches": 0.05}, 0, 1),
        ({"graph_launches": 0.0}, 0, 1),
        ({"remark": "waits for the device: called a synchronizing CUDA operation"}, 1, 0),
    ],
)
def test_one_launch_and_no_wait(values: dict[str, object], launch: int, wait: int) -> None:
    *_, launched, waited = verdicts([row("fastdiff"), row("fastdiff", 16, **values)])
    assert (launched.worst, waited.worst) == (launch, wait)


def test_it_goes_on_where_it_was_out_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def fake(*_: Any) -> Iterator[dict[str, object]]:
        for way in (sampling.OURS, *ON_CPU):
            measured.append(way.name)
            yield {"image_size": 32, "batch_size": 1, "candidate": way.name, **dict.fromkeys(COLUMNS, math.nan)} | {
                "remark": ""
            }

    monkeypatch.setattr(sampling, "measure", fake)
    path = tmp_path / "rows.csv"
    for deadline, expected in ((0, ["fastdiff"]), (math.inf, ["fastdiff", "not compiled"]), (math.inf, [])):
        measured.clear()
        sample(CPU, path, deadline)
        assert measured == expected
    with path.open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 3
