"""The parts of gpu_check, small and on a CPU: they run, keep their rows and give their verdicts."""

import csv
import math
from pathlib import Path

import pytest

from fastdiff.benchmarks import gpu_check, updates
from fastdiff.benchmarks.cases import Case, norm_case
from fastdiff.presets import Preset

from .support import CPU, WORKLOAD, measure_little

TINY = Preset("a tiny model", {**WORKLOAD.model.to_dict(), **WORKLOAD.diffusion.to_dict()})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small case, and a small model in the place of the released one."""

    def cases(_: object) -> list[Case]:
        return [norm_case(2, 64, 8, gpu_check.torch.float32, "contiguous", on_gpu=False)]

    monkeypatch.setattr(gpu_check, "cases", cases)
    for module in (gpu_check, updates):
        monkeypatch.setattr(module, "preset_named", lambda _: TINY)
    measure_little(monkeypatch)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_the_updates_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "WAYS", (("bf16", "auto"),))
    updates.train(CPU, tmp_path / "rows.csv", math.inf)
    (row,) = rows_of(tmp_path / "rows.csv")
    assert float(row["images_per_s"]) > 0
    assert (row["kernels"], row["remark"]) == ("auto", "")
