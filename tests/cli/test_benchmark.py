"""fastdiff benchmark: it checks before it times, and writes rows that say where they come from."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdiff.benchmarks import command, ladder, suites
from fastdiff.benchmarks.rows import Row
from fastdiff.config import QualityConfig
from fastdiff.runtime import device as runtime_device

from ..benchmarks.support import count_no_memory, measure_little
from ..processes import finish
from .conftest import Cli
from .support import refused, start, succeeded

QUICK = ["--image-size", "8", "--num-channels", "32", "--num-res-blocks", "1", "--channel-mult", "1"]
ONCE = ["--batch-size", "2", "--rounds", "1", "--device", "cpu"]
PLAIN = ["--compile", "off"]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler, which would take minutes, and nothing but the measurement."""
    monkeypatch.setattr(runtime_device, "has_compiler", lambda _: False)
    measure_little(monkeypatch)
    count_no_memory(monkeypatch, suites)
    monkeypatch.setattr(suites, "peers", lambda _: {})


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_suite_adds_to_one_file(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, suite in (("data", "data"), ("growth", "growth")):
        monkeypatch.setattr(
            f"fastdiff.benchmarks.{module}.measure_{module}",
            lambda *_, suite=suite: iter([Row(suite, "a", "x", None), Row(suite, "b", "y", None)]),
        )
    few = [Row("features", "a", "x", None)]
    monkeypatch.setattr("fastdiff.benchmarks.features.measure_features", lambda *_: few)
    result = succeeded(cli("benchmark", *QUICK, *ONCE, *PLAIN, "--quick", "--csv", "deep/rows.csv"))
    succeeded(cli("benchmark", "growth", *QUICK, *ONCE, "--csv", "deep/rows.csv"))
    rows = rows_of("deep/rows.csv")
    suites = {"kernels", "unet", "train", "sample", "step", "data", "features", "growth"}
    assert {row["suite"] for row in rows} == suites
    operations = {row["workload"].split()[0] for row in rows if row["suite"] == "kernels"}
    assert operations == {"group_norm_silu", "attention", "diffusion_step", "diffusion_loss"}
    assert [row["candidate"] for row in rows if row["suite"] == "growth"] == ["x", "y"] * 2
    for suite in ("unet", "train", "sample"):
        plain, asked = (row["candidate"] for row in rows if row["suite"] == suite)
        assert plain == "plain"
        assert asked.startswith("asked: ")
    for row in rows:
        assert row["torch"]
        assert row["commit"]
        assert row["suite"] in ("data", "features", "growth") or float(row["median_s"]) > 0
        assert row["candidate"] != "plain" or float(row["speedup"]) == 1
    assert "measured here in fp32: copy" in result.out
    assert all(len(line) <= 100 for line in result.out.splitlines())


def test_without_a_choice_it_climbs_the_ladder(cli: Cli) -> None:
    flags = ("--preset", "cifar10_uncond", *QUICK, *ONCE, "--batch-size", "1,2")
    result = succeeded(cli("benchmark", "unet", *flags, "--csv", "rows.csv"))
    for size in (1, 2):
        workload = f"cifar10_uncond, batch {size}"  # the preset is named
        rungs = [row["candidate"] for row in rows_of("rows.csv") if row["workload"] == workload]
        assert rungs[:3] == ["plain", "+ channels_last", "+ torch kernels"]
    assert "× before" in result.out


def test_no_speed_from_a_red_check(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "TOLERANCE", {**ladder.TOLERANCE, "bf16": 1e-12})
    result = cli("benchmark", "unet", *QUICK, *ONCE, *PLAIN, "--precision", "bf16", "--csv", "rows.csv")
    assert result.status == 1
    plain, asked, *_ = rows_of("rows.csv")
    assert float(plain["median_s"]) > 0
    assert asked["median_s"] == asked["speedup"] == "nan"
    assert asked["remark"].startswith("ValueError: differs from the plain path by ")
    assert "not timed" in result.out


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is measured is an error."""

    def measured(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(suites, "ceilings", measured)
    return


@pytest.mark.usefixtures("untimed")
def test_files_are_looked_at_before_anything_is_timed(cli: Cli) -> None:
    Path("rows.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    refused(
        cli("benchmark", "unet", *QUICK, *ONCE, "--csv", "rows.csv"), r"^error: csv rows\.csv has different columns: "
    )
    refused(cli("benchmark", "unet", *QUICK, *ONCE, "--compare", "rows.csv"), "rows.csv holds no rows")
    refused(cli("benchmark", "unet", *QUICK, *ONCE, "--compare", "none.csv"), "none.csv does not exist: name")
    refused(cli("benchmark", "unet", *QUICK, *ONCE, "--chart", "chart.jpg"), "must end in .png")
    same = ["--csv", "a.png", "--chart", "./a.png"]
    refused(cli("benchmark", "unet", *QUICK, *ONCE, *same), "a.png is also the file of --csv: name another one")
    for path in ("/proc/a", "rows.csv/a"):
        refused(cli("benchmark", "unet", *QUICK, *ONCE, "--csv", f"{path}.csv"), "^error: csv .* cannot be written")
        refused(cli("benchmark", "unet", *QUICK, *ONCE, "--chart", f"{path}.png"), "^error: chart .* cannot be written")


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("suite", ["kernels", "step", "data", "features", "growth"])
def test_a_chart_of_nothing_is_refused_before_anything_is_timed(cli: Cli, suite: str) -> None:
    result = cli("benchmark", suite, *QUICK, *ONCE, "--chart", "a.png")
    refused(result, "chart shows unet, train, sample: measure one of them, or leave --chart out")


@pytest.mark.usefixtures("untimed")
def test_kernels_that_this_machine_has_not(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.kernels.backend.INTERPRETED", False)
    refused(
        cli("benchmark", "unet", *QUICK, *ONCE, "--kernels", "triton"), "^error: kernels triton: .*use auto or torch"
    )


@pytest.mark.parametrize("size", ["0", "1,-2", "many", ""])
def test_sizes_of_batches(cli: Cli, size: str) -> None:
    refused(cli("benchmark", "unet", *QUICK, "--batch-size", size), "batch_size must be")


def test_what_moved_and_a_chart(cli: Cli) -> None:
    flags = (*QUICK, *ONCE, *PLAIN, "--csv", "rows.csv")
    succeeded(cli("benchmark", "unet", *flags))
    result = succeeded(cli("benchmark", "unet", *flags, "--compare", "rows.csv", "--chart", "ladder.png"))
    assert Path("ladder.png").read_bytes().startswith(b"\x89PNG")
    assert "chart drawn to ladder.png" in result.out


def no_room(*_: object) -> Iterator[Row]:
    yield Row("data", "a", "x", None)
    raise OSError(28, "No space left on device", "/tmp/a.png")


def test_a_full_disk_costs_one_suite(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.benchmarks.data.measure_data", no_room)
    monkeypatch.setattr("fastdiff.benchmarks.growth.measure_growth", lambda *_: iter([Row("growth", "b", "y", None)]))
    monkeypatch.setattr("fastdiff.benchmarks.features.measure_features", lambda *_: [Row("features", "c", "z", None)])
    for module in ("_kernels", "_models"):
        monkeypatch.setattr(f"fastdiff.benchmarks.command.{module}", lambda *_: iter(()))
    result = cli("benchmark", *QUICK, *ONCE, "--csv", "rows.csv", "--chart", "a.png")
    assert (result.status, result.err) == (1, "")
    assert [(row["suite"], row["candidate"]) for row in rows_of("rows.csv")] == [
        ("data", "x"),
        ("data", "not measured"),
        ("features", "z"),
        ("growth", "y"),
    ]
    assert "not measured: [Errno 28] No space left on device: '/tmp/a.png'" in result.out
    assert "error: chart a.png: nothing to draw" in result.out  # what comes before the chart is there, too
    assert result.out.index("commit") < result.out.index("rows added to rows.csv") < result.out.index("error: chart")


def test_rows_that_cannot_be_kept_now_are_kept_with_the_next(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [Row("growth", name, name, None) for name in "abc"]
    monkeypatch.setattr("fastdiff.benchmarks.growth.measure_growth", lambda *_: iter(tables))
    real, errors = command.append_rows, [OSError("csv rows.csv cannot be written: No space left on device")]

    def append(*args: Any) -> None:
        if errors:
            raise errors.pop()
        real(*args)

    monkeypatch.setattr(command, "append_rows", append)
    result = succeeded(cli("benchmark", "growth", *QUICK, *ONCE, "--csv", "rows.csv"))
    assert [row["candidate"] for row in rows_of("rows.csv")] == ["a", "b", "c"]
    assert result.out.count("warning: csv rows.csv cannot be written: No space left on device") == 1
    errors += [OSError("csv rows.csv cannot be written: it is gone")] * 9
    result = cli("benchmark", "growth", *QUICK, *ONCE, "--csv", "rows.csv")
    assert result.status == 1
    assert "error: csv rows.csv cannot be written: it is gone: 3 rows are not saved" in result.out


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["ascii", "closed"])
def test_what_cannot_be_shown_is_kept(stdout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    little = (
        "from fastdiff.benchmarks import roofline, suites\n"
        "roofline.ENOUGH, roofline.SIDE, suites.peers = {'cpu': 1e6}, {'cpu': 64}, lambda _: {}"
    )
    process = start("benchmark", "unet", *QUICK, *ONCE, *PLAIN, "--csv", "rows.csv", cwd=tmp_path, before=little)
    assert process.stdout is not None
    if stdout == "closed":
        while "candidate" not in process.stdout.readline():
            pass
        process.stdout.close()
        assert process.stderr is not None
        with process.stderr:
            said = process.stderr.read()
        process.wait(100)
    else:
        result = succeeded(finish(process))
        assert "? first" in result.out
        said = result.err
    assert said == ""
    assert rows_of(f"{tmp_path}/rows.csv")[0]["candidate"] == "plain"


def test_quality_of_a_run(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[object] = []
    monkeypatch.setattr("fastdiff.benchmarks.quality.command.measure_run", lambda *args: seen.extend(args))
    flags = ("--set", "photographs", "--run", "runs/a", "--num-samples", "40", "--sampler", "ddim", "--device", "cpu")
    succeeded(cli("benchmark", "quality", *flags, "--quick"))
    config, machine, quick = seen
    expected = QualityConfig("photographs", str(Path("runs/a")), num_samples=40, sampler="ddim")
    assert (config, quick, machine.runtime.device.type) == (expected, True, "cpu")  # type: ignore[attr-defined]


def test_quality_refuses_what_it_does_not_read(cli: Cli) -> None:
    quality = ("benchmark", "quality", "--run", "runs/a")
    refused(cli(*quality, "--num-channels", "64"), "num_channels means nothing for quality: leave it out")
    refused(cli(*quality, "--csv", "rows.csv"), "csv means nothing for quality")
    refused(cli(*quality, "--set", "faces"), "set must be one or more of digits,photographs, not 'faces'")
    refused(cli(*quality), "run runs/a was trained on one set: name it with --set digits or photographs")
    refused(cli(*quality, "--num-samples", "5"), "num_samples must be at least 6, not 5")
    refused(cli("benchmark", "quality", "--seeds", "1,1"), "seeds must be different numbers")
    refused(cli("benchmark", "quality", "--minutes", "0"), "minutes must be above 0")
    refused(cli("benchmark", "quality", "--only", "steps"), "only must be one or more of updates,time,undone")
    refused(cli("benchmark", "unet", "--num-samples", "5"), "num_samples is a flag of quality, not of unet")
