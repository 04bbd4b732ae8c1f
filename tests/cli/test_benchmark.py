"""fastdiff benchmark: it checks before it times, and writes rows that say where they come from."""

import csv

import pytest

from fastdiff.benchmarks import suites

from .conftest import Cli
from .support import refused, succeeded

QUICK = ["--image-size", "8", "--num-channels", "32", "--num-res-blocks", "1", "--channel-mult", "1"]
ONCE = ["--batch-size", "2", "--rounds", "1", "--compile", "off", "--device", "cpu"]


def test_every_suite_writes_a_row_a_candidate(cli: Cli) -> None:
    succeeded(cli("benchmark", *QUICK, *ONCE, "--csv", "deep/rows.csv"))
    succeeded(cli("benchmark", "unet", *QUICK, *ONCE, "--csv", "deep/rows.csv"))
    with open("deep/rows.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ours = [(row["suite"], row["candidate"]) for row in rows if row["candidate"] != "diffusers"]
    expected = [(suite, name) for suite in ("unet", "train", "sample") for name in ("plain", "fastdiff, eager")]
    expected += [("step", "model call"), ("step", "model call and step")]
    assert ours == [*expected, ("unet", "plain"), ("unet", "fastdiff, eager")]
    for row in rows:
        assert float(row["median_s"]) > 0
        assert row["torch"]
        assert row["commit"]
        assert row["candidate"] != "plain" or float(row["speedup"]) == 1


def test_kernels_have_rows_of_their_own(cli: Cli) -> None:
    result = cli("benchmark", "kernels", "--rounds", "1", "--device", "cpu", "--csv", "rows.csv")
    succeeded(result)
    assert "these are CPU figures" in result.out
    with open("rows_kernels.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["candidate"] for row in rows} >= {"reference", "torch"}
    assert {row["op"] for row in rows} == {"group_norm_silu", "attention", "diffusion_step", "diffusion_loss"}
    for row in rows:
        assert float(row["median_us"]) > 0
        assert row["commit"]


def test_no_speed_from_a_red_check(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "TOLERANCE", dict.fromkeys(suites.TOLERANCE, 1e-12))
    result = cli("benchmark", "unet", *QUICK, *ONCE, "--precision", "bf16")
    refused(result, "fastdiff, eager differs from the plain path by .*not timed")
    assert "median" not in result.out


def test_rows_of_other_columns_are_not_mixed(cli: Cli) -> None:
    with open("rows.csv", "w", encoding="utf-8") as file:
        file.write("a,b\n1,2\n")
    refused(cli("benchmark", "unet", *QUICK, *ONCE, "--csv", "rows.csv"), r"rows\.csv has other columns.*--csv")
