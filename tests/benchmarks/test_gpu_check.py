"""The parts of gpu_check, small and on a CPU: they run, keep their rows and give their verdicts."""

import csv
import math
from pathlib import Path

import pytest

from fastdiff.benchmarks import gpu_check
from fastdiff.benchmarks.cases import Case, norm_case
from fastdiff.benchmarks.targets import sampling_verdicts
from fastdiff.presets import Preset

from .support import CPU, WORKLOAD, measure_little

TINY = Preset("a tiny model", {**WORKLOAD.model.to_dict(), **WORKLOAD.diffusion.to_dict()})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small case, and a small model in the place of the released one."""

    def cases(_: object) -> list[Case]:
        return [norm_case(2, 64, 8, gpu_check.torch.float32, "contiguous", on_gpu=False)]

    monkeypatch.setattr(gpu_check, "cases", cases)
    monkeypatch.setattr(gpu_check, "preset_named", lambda _: TINY)
    measure_little(monkeypatch)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_check.targets(CPU, tmp_path / "rows.csv", math.inf)
    rows = rows_of(tmp_path / "rows.csv")
    assert {row["workload"].split(",")[0] for row in rows} == {"group_norm_silu forward", "group_norm_silu backward"}
    assert "of limit" in (out := capsys.readouterr().out)
    assert "diffusion_step, share of the floor: nan" in out


def test_the_training_step_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_check.model(CPU, tmp_path / "rows.csv", math.inf)
    rows = rows_of(tmp_path / "rows.csv")
    assert [row["candidate"] for row in rows] == ["+ fused optimizer"]
    assert all(float(row["median_s"]) > 0 for row in rows)
    assert "training step against torch's kernels, compiled: nan" in capsys.readouterr().out
    gpu_check.model(CPU, tmp_path / "late.csv", 0)
    assert [row["remark"] for row in rows_of(tmp_path / "late.csv")] == ["time was up before it was built"]


def test_a_sampling_step_goes_on_where_it_was_out_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    gpu_check.sample(CPU, path, 0)
    assert "time is up" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "RESERVE", 0)
    ticks = iter([*[0.0] * 3, 2.0])  # the part, ours twice, and the rival
    with monkeypatch.context() as late:
        late.setattr("time.monotonic", lambda: next(ticks, 3.0))
        gpu_check.sample(CPU, path, 1.0)
    rows = {row["candidate"]: row for row in rows_of(path)}
    assert [row["remark"] for row in rows.values()] == ["", "", "time was up before it was built"]
    gpu_check.sample(CPU, path, math.inf)
    assert len(rows_of(path)) == 6
    assert all(float(row["median_s"]) > 0 for row in rows_of(path)[3:])
    gpu_check.sample(CPU, path, math.inf)
    assert len(rows_of(path)) == 6
    assert "sampling step, batch 1, against max-autotune: nan" in capsys.readouterr().out


def row(candidate: str, batch: int = 1, seconds: float = 1.0, remark: str = "") -> dict[str, str]:
    workload = f"imagenet64_uncond, batch {batch}"
    return {"workload": workload, "candidate": candidate, "median_s": str(seconds), "remark": remark}


ALONE = "graph launches 1, others 0, no wait for the device"


def test_sampling_is_judged_by_the_faster_rival() -> None:
    rows = [
        row("model call and step", remark=ALONE),
        row("max-autotune", seconds=1.5),
        row("torch kernels", seconds=1.1),
    ]
    rows += [row("max-autotune-no-cudagraphs", seconds=2.5)]
    rows += [row("model call and step", 256, remark=ALONE), row("max-autotune", 256, 1.2)]
    one, sixteen, many, alone, waits = sampling_verdicts(rows)
    assert (one.worst, one.where) == (1.5, "imagenet64_uncond, batch 1, max-autotune")
    assert many.worst == 1.2
    assert str(many).startswith("met")
    assert math.isnan(sixteen.worst)
    assert (alone.worst, waits.worst) == (1, 1)


def test_a_step_without_a_time_misses_its_mark() -> None:
    missed, *_ = sampling_verdicts([row("model call and step", seconds=math.nan, remark="out of memory")])
    assert (missed.worst, missed.where) == (0, "imagenet64_uncond, batch 1: out of memory")
    unknown, *_ = sampling_verdicts([row("model call and step"), row("max-autotune", seconds=math.nan)])
    assert math.isnan(unknown.worst)  # a rival that does not run is no rival


@pytest.mark.parametrize(
    ("remark", "launch", "wait"),
    [
        (ALONE, 1, 1),
        ("graph launches 1, others 0.05, no wait for the device", 0, 1),
        ("graph launches 0, others 400, no wait for the device", 0, 1),
        ("graph launches 1, others 0, waits for the device: called a synchronizing CUDA operation", 1, 0),
    ],
)
def test_one_launch_and_no_wait(remark: str, launch: int, wait: int) -> None:
    *_, launched, waited = sampling_verdicts([row("model call and step", 16, remark=remark)])
    assert (launched.worst, waited.worst) == (launch, wait)
