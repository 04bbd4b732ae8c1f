"""The contest of recipes: every run once, each in a process of its own, and on from where it was stopped."""

import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from fastdiff.benchmarks.quality import contest, measure
from fastdiff.benchmarks.quality.command import compare_recipes
from fastdiff.benchmarks.quality.contest import REAL, Contest, command_of, entries
from fastdiff.benchmarks.quality.contestants import UNDONE, flags_of
from fastdiff.benchmarks.quality.table import markdown
from fastdiff.benchmarks.rows import number, read_rows
from fastdiff.checkpoint import saved_steps
from fastdiff.config import (
    Contestant,
    DataConfig,
    DiffusionConfig,
    Mode,
    ModelConfig,
    PictureSet,
    QualityConfig,
    Recipe,
    RunConfig,
    StartConfig,
    TrainConfig,
    with_multipliers,
)
from fastdiff.training import recipe
from fastdiff.training.run_folder import read_config

from ...processes import Job
from ...support import refusal
from .support import COLOURED, SIZE, TINY, Means, machine

Train = Callable[[Sequence[str]], None]


def forked(command: Sequence[str]) -> None:
    """In the place of contest.train, with a process that starts at once."""
    assert command[1:4] == ["-m", "fastdiff", "train"]
    result = Job(None, command[3:], Path.cwd()).finish()
    if result.status:
        raise ChildProcessError(result.err)


def never(command: Sequence[str]) -> None:
    """In the place of contest.train where all is trained already."""
    pytest.fail(f"it is trained already: {command}")


def make_tiny(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(contest, "SOURCES", dict.fromkeys(PictureSet, COLOURED))
    patch.setattr(contest, "flags_of", lambda name, _: TINY | {"lr": {"improved": 1e-4}.get(name, 1e-3)})
    patch.setattr(contest, "UNDONE", {"rate": TINY | {"lr": 1e-5}})
    patch.setattr(contest, "train", forked)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of auto."""
    folder = tmp_path_factory.mktemp("contest")
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch)
        Contest(few(folder, contestants="auto"), machine([]), quick=True).run()
    return folder


@pytest.fixture
def one(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QualityConfig:
    """What asks for the run of auto alone, which is trained already."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(contest, "train", never)
    return few(tmp_path, contestants="auto")


def few(tmp_path: Path, **changed: object) -> QualityConfig:
    settings = {"set": "digits", "contestants": "improved,auto", "seeds": "3", "only": "updates", "updates": 2}
    settings |= {"num_samples": 12, "steps": 2, "out_dir": str(tmp_path / "out")}
    return QualityConfig.from_flags(settings | changed)


def test_every_run_has_its_row(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (before, auto) = read_rows(tmp_path / "out" / "quality.csv")
    config = few(tmp_path, only="updates,undone")
    rows = Contest(config, machine([]), quick=True).run()
    assert (rows[0], rows[2]) == (before, auto)  # which were there
    names = [(row["contestant"], row["seed"]) for row in rows]
    runs = [("improved", "3"), ("auto", "3"), ("auto without rate", "3")]
    assert names == [(REAL, "0"), *runs]
    assert sorted(rows, key=str) == sorted(read_rows(tmp_path / "out" / "quality.csv"), key=str)
    for row in rows[1:]:
        assert (row["updates"], row["samples"], row["sampler"], row["steps"]) == ("2", "12", "dpm++", "2")
        assert number(row, "seconds") > 0
        assert number(row, "fd") > number(rows[0], "fd")
        assert row["commit"]
        assert float(row["judge_accuracy"]) == 1
    assert float(rows[0]["accuracy"]) == 1
    assert "--lr 0.0001" in rows[1]["flags"]
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures" / "digits").iterdir())
    drawn = ("undone-2-auto-without-rate-3", "updates-2-auto-3", "updates-2-improved-3")
    digests = (rows[3]["recipe"], rows[2]["recipe"], rows[1]["recipe"])
    assert pictures == [f"{name}-{digest}.png" for name, digest in zip(drawn, digests, strict=True)]
    written = (tmp_path / "out" / "quality.csv").read_bytes()
    assert Contest(config, machine([]), quick=True).run() == rows  # nothing is left to do
    assert (tmp_path / "out" / "quality.csv").read_bytes() == written


def test_it_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "SAVE_EVERY", 2)

    def killed(command: Sequence[str]) -> None:
        job = Job(None, command[3:], Path.cwd())
        run_dir = Path(command[command.index("--run-dir") + 1])
        job.wait_for(lambda: bool(saved_steps(run_dir)))
        job.kill()
        raise KeyboardInterrupt

    config = few(tmp_path, contestants="auto", updates=24)
    monkeypatch.setattr(contest, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        Contest(config, machine([]), quick=True).run()
    assert [row["contestant"] for row in read_rows(tmp_path / "out" / "quality.csv")] == [REAL]
    (run_dir,) = (tmp_path / "out" / "runs" / "digits" / "updates-24").glob("auto-3-*")
    reached = saved_steps(run_dir)[-1]
    assert 0 < reached < 24

    monkeypatch.setattr(contest, "train", forked)
    _, row = Contest(config, machine([]), quick=True).run()
    assert (row["contestant"], row["updates"]) == ("auto", "24")
    assert math.isnan(number(row, "seconds"))  # those of its first part are unknown
    assert f"resumed at step {reached}" in (run_dir / "log.txt").read_text()


class Asked(Exception):
    """A training was asked for, by this command."""


def ask(command: Sequence[str]) -> None:
    raise Asked(*command)


@pytest.mark.parametrize("changed", ["flags", "recipe"])
def test_what_would_be_trained_otherwise_now_is_trained_again(
    changed: str, one: QualityConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the old name of the run the row of its old settings would pass for one of the new."""
    if changed == "flags":
        monkeypatch.setattr(contest, "flags_of", lambda *_: TINY | {"lr": 2e-3})
    else:
        chosen = recipe.model_and_process
        monkeypatch.setattr(recipe, "model_and_process", lambda *about: chosen(*about) | {"grad_clip": 0.5})
    monkeypatch.setattr(contest, "train", ask)
    with pytest.raises(Asked) as asked:
        Contest(one, machine([]), quick=True).run()
    run_dir = Path(asked.value.args[asked.value.args.index("--run-dir") + 1])
    (before,) = run_dir.parent.iterdir()  # which is left alone
    assert run_dir.name.startswith("auto-3-")
    assert run_dir != before


def test_the_digest_is_of_what_was_trained(one: QualityConfig) -> None:
    _, row = read_rows(Path(one.out_dir) / "quality.csv")
    (run_dir,) = (Path(one.out_dir) / "runs" / "digits" / "updates-2").iterdir()
    trained = read_config(run_dir)
    (entry,), subject = entries(one), Contest(one, machine([]), quick=True)
    expected = contest.decided(entry, subject._bench(entry.set), machine([]).runtime)
    assert run_dir.name == f"auto-3-{contest.digest_of(expected)}"
    assert row["recipe"] == contest.digest_of(expected)
    assert trained.diffusion == expected.diffusion
    assert replace(trained.train, seed=0) == expected.train
    assert replace(trained.model, num_classes=expected.model.num_classes) == with_multipliers(expected.model)


def test_equal_time_is_not_that_of_a_run_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would go on without a limit, to a number of updates that was guessed before."""
    begun: list[Path] = []

    def stopped(command: Sequence[str]) -> None:
        run_dir = Path(command[command.index("--run-dir") + 1])
        assert "--minutes" in command
        assert not run_dir.exists()
        run_dir.mkdir(parents=True)
        (run_dir / "config.json").write_text("{}")
        begun.append(run_dir)
        raise KeyboardInterrupt

    monkeypatch.setattr(contest, "train", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Contest(few(tmp_path, contestants="auto", only="time"), machine([]), quick=True).run()
    assert begun[0] == begun[1]


def test_a_measurement_that_was_stopped_trains_nothing_again(one: QualityConfig) -> None:
    path = Path(one.out_dir) / "quality.csv"
    before = read_rows(path)
    path.unlink()
    assert Contest(one, machine([]), quick=True).run() == before


def test_other_samples_and_a_full_measurement_are_other_rows(
    one: QualityConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "NLL_IMAGES", 3)
    monkeypatch.setattr(measure, "NLL_STEPS", 5)
    first = Contest(one, machine([]), quick=True).run()
    more = Contest(few(tmp_path, contestants="auto", num_samples=40), machine([]), quick=True).run()
    assert [row["samples"] for row in (*first, *more)] == ["12", "12", "36", "40"]  # there are 36 real images
    monkeypatch.setattr(measure, "open_extractor", lambda device: refuse())
    part = Contest(one, machine([]), quick=False).run()
    assert part[1]["measured_with"] == f"{first[1]['measured_with']} bits/dim-3x5"
    assert number(part[1], "bits_per_dim") > 0
    assert math.isnan(number(part[1], "fd_efficientnet"))
    monkeypatch.setattr(measure, "open_extractor", lambda device: Means())
    full = Contest(one, machine([]), quick=False).run()
    assert "efficientnet-means" in full[1]["measured_with"].split()
    assert number(full[1], "fd_efficientnet") > 0
    assert Contest(one, machine([]), quick=True).run() == full  # it has all that is asked for


def refuse() -> None:
    raise ValueError("the weights are missing")


def test_a_training_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "flags_of", lambda *_: TINY | {"label_file": "missing.csv"})
    with pytest.raises(ChildProcessError, match=r"missing\.csv"):
        Contest(few(tmp_path), machine([]), quick=True).run()
    assert [row["contestant"] for row in read_rows(tmp_path / "out" / "quality.csv")] == [REAL]


def test_the_process_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint('error: no images')\nsys.exit(2)")
    with pytest.raises(ChildProcessError, match=r"program.py: error: no images"):
        contest.train([sys.executable, str(program)])
    program.write_text("")
    contest.train([sys.executable, str(program)])


def test_a_file_of_other_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "quality.csv").write_text("a,b\n1,2\n")
    assert "has different columns" in refusal(lambda: Contest(few(tmp_path), machine([]), quick=True))


def test_entries() -> None:
    found = entries(QualityConfig(seeds="5,6", only="time,undone", minutes=2.5))
    assert len(found) == 2 * (2 * 3 + 1 + 1)
    assert len({entry.folder(Path("out"), "ab") for entry in found}) == len(found)
    assert {entry.length for entry in found} == {2.5, 300}
    (one,) = (entry for entry in found if entry.key == ("digits", "time", "improved", "6", "2.5"))
    assert one.folder(Path("out"), "ab") == Path("out/runs/digits/time-2.5/improved-6-ab")
    assert [entry.seed for entry in found if entry.mode is Mode.UNDONE] == [5, 5]


def test_commands(tmp_path: Path) -> None:
    config = QualityConfig(seeds="7", only="time", contestants="auto", set="digits")
    (entry,) = entries(config)
    words = command_of(entry, tmp_path, Path("data"), SIZE, machine([]).runtime)
    assert words[1:4] == ["-m", "fastdiff", "train"]
    flags = dict(zip(words[4:], [*words[5:], ""], strict=True))
    assert (flags["--minutes"], flags["--seed"], flags["--image-size"], flags["--lr"]) == ("10", "7", "8", "0.001")
    assert "--class-cond" in flags
    assert "--steps" not in flags
    (tmp_path / "config.json").write_text("{}")
    resumed = command_of(entry, tmp_path, Path("data"), SIZE, machine([]).runtime)[4:]
    assert resumed[:7] == ["--resume", "--run-dir", str(tmp_path), "--data-dir", "data", "--device", "cpu"]
    assert resumed[7:11] == ["--precision", "fp32", "--compile", "off"]


def test_the_table(tmp_path: Path) -> None:
    blank = {"set": "digits", "mode": "updates", "length": "300", "samples": "2000", "sampler": "dpm++", "steps": "20"}
    blank |= {"machine": "a CPU", "torch": "2.13", "commit": "abc", "judge_accuracy": "0.99", "bits_per_dim": "nan"}
    blank |= {"precision": "0.5", "recall": "0.5", "fd_efficientnet": "nan", "parameters": "5000000"}

    def row(contestant: str, seed: int, accuracy: float, fd: float, mode: str = "updates") -> dict[str, str]:
        measured = {"accuracy": str(accuracy), "fd": str(fd), "updates": "300", "seconds": str(100 + seed)}
        return blank | {"contestant": contestant, "seed": str(seed), "mode": mode} | measured

    rows = [row(REAL, 0, 1, 0.01), row("improved", 0, 0.2, 30), row("auto", 0, 0.9, 3)]
    rows[0]["samples"], rows[1]["commit"] = "1497", "def"
    rows += [row("improved", 1, 0.3, 40), row("auto", 1, 1, 4), row("auto without lr", 0, 0.5, 6, "undone")]
    equal, undone, explained = markdown(rows).split("\n\n**")[0], *markdown(rows).split("\n\n")[-2:]
    lines = equal.splitlines()
    assert lines[0].startswith("**digits, 300 updates**: mean of the seeds 0, 1; 2,000 samples in 20 steps of dpm++, ")
    assert "dpm++, 1,497 real images; " in lines[0]
    assert "the judge names 99.0% of held-out real images rightly; a CPU, torch 2.13, commit abc and def." in lines[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == ["", "accuracy", "FD", "precision", "recall", "updates", "seconds", "parameters"]
    assert cells[2] == [REAL, "100.0%", "0.010", "0.500", "0.500", "", "", ""]
    assert cells[3] == ["improved", "25.0%", "35.000", "0.500", "0.500", "300", "100", "5,000,000"]
    assert cells[4][:3] == ["auto", "95.0%", "3.500"]
    assert len({len(line) for line in lines[2:]}) == 1
    assert [line.split("|")[1].strip() for line in undone.splitlines()[2:]] == [REAL, "auto", "auto without lr"]
    assert "90.0%" in undone  # of the same seed
    assert explained.startswith("- improved: improved-diffusion's published flags")


def test_the_table_is_written(one: QualityConfig) -> None:
    said: list[str] = []
    compare_recipes(one, machine(said), quick=True)
    text = (Path(one.out_dir) / "quality.md").read_text()
    assert set(text.splitlines()) <= set(said)
    assert "| auto" in text


def by_auto(flags: Mapping[str, object], size: int = 32) -> tuple[dict[str, object], set[str]]:
    """The settings of the recipe auto on a CPU, with these flags, by name; and what it chooses itself."""
    given = {"data_dir": "data", "image_size": size, "class_cond": True, "steps": 300} | dict(flags)
    config, chosen = recipe.decided(RunConfig.from_flags(given), set(given), 1500, torch.device("cpu"), 1, timed=False)
    parts = (config.model, config.diffusion, config.train)
    return {f.name: getattr(part, f.name) for part in parts for f in fields(part)}, {*chosen}


@pytest.mark.parametrize("name", PictureSet)
def test_contestants(name: PictureSet) -> None:
    known = {
        f.name for kind in (DataConfig, DiffusionConfig, ModelConfig, StartConfig, TrainConfig) for f in fields(kind)
    }
    for one in Contestant:
        assert set(flags_of(one, name)) <= known
    assert by_auto(flags_of(Contestant.CONTRIBUTING, name))[1] == {"lr_anneal_steps"}
    assert flags_of(Contestant.IMPROVED, name)["recipe"] == Recipe.IMPROVED
    assert not flags_of(Contestant.AUTO, name)


def test_each_choice_of_auto_is_undone() -> None:
    tracked = {"ema_lengths"}  # more averages, which change neither the training nor the average that is drawn from
    undone = {flag for flags in UNDONE.values() for flag in flags}
    assert undone | {"sigmoid_bias"} == by_auto({})[1] - tracked  # the bias is undone with the weighting


WITH_IT = {
    "width": {"lr"},
    "patches": {"prediction", "predict_xstart", "weighting", "sigmoid_bias", "channel_mult"},
    "prediction": {"predict_xstart", "patch_size", "weighting", "sigmoid_bias", "channel_mult"},
    "weighting": {"sigmoid_bias"},
}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", UNDONE)
def test_one_choice_at_a_time_is_undone(name: str, size: int) -> None:
    """And what depends on it: all else is as it is with auto."""
    auto, without = by_auto({}, size)[0], by_auto(UNDONE[name], size)[0]
    assert {key for key in auto if auto[key] != without[key]} == set(UNDONE[name]) | WITH_IT.get(name, set())
