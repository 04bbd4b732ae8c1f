"""Several processes train as one does, and what is killed goes on as if nothing had been."""

import csv
import itertools
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import SampleConfig, load_checkpoint
from fastdiff.checkpoint import average_path, read_tensors, snapshot_path, verify_step
from fastdiff.data.shapes import SHAPES
from fastdiff.sampling import generate, save_grid

from ..cli.support import refused
from ..processes import Result, launch
from ..sampling.support import command
from .support import digests

WORKER = Path(__file__).with_name("worker.py")
MODEL = [
    *("--image-size", "8", "--num-channels", "32", "--num-res-blocks", "1", "--channel-mult", "1"),
    *("--attention-resolutions", "", "--diffusion-steps", "4", "--noise-schedule", "cosine"),
    *("--class-cond", "--learn-sigma"),
    *("--compile", "off", "--device", "cpu", "--preview-interval", "0", "--log-interval", "1"),
    *("--batch-size", "16", "--ema-rate", "0.9999,0.5", "--lr", "1e-3", "--flip", "--recipe", "improved"),
]
LEARNING = ["--schedule-sampler", "loss-second-moment", "--label-dropout", "0.3"]
# after four steps, where the runs go on, the sampler weighs the timesteps by what it has seen
EVERYTHING = [*LEARNING, "--dropout", "0.1", "--save-interval", "2", "--steps", "6"]
MEASURED = ("images_per_s", "mfu", "data_wait", "memory_gib")


def train(
    processes: int,
    run_dir: str,
    *args: str,
    cwd: Path,
    data: Path,
    status: int = 0,
    torchrun: Sequence[str] | None = None,
    **environment: str,
) -> Result:
    """``fastdiff train`` alone or as several processes, through a worker that can be told to come to harm."""
    flags = ["train", "--data-dir", str(data), "--run-dir", run_dir, *MODEL, *args]
    environment = {"XDG_CACHE_HOME": str(cwd / "cache"), **environment}
    result = launch(WORKER, flags, cwd, environment, processes, torchrun)
    assert result.status == status, result
    return result


Straight = Callable[..., Path]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Straight:
    """Runs that come to no harm, or to that which is given, each trained once for all tests. Not to be written to."""
    folder = tmp_path_factory.mktemp("straight")
    found: dict[object, Path] = {}

    def run(processes: int, *args: str, **environment: str) -> Path:
        key = processes, args, tuple(environment.items())
        if key not in found:
            name = str(len(found))
            train(processes, name, *args, cwd=folder, data=shapes, **environment)
            found[key] = folder / name
        return found[key]

    return run


def hashes(run_dir: Path, step: int) -> dict[str, str]:
    found = digests(run_dir, step)
    assert len(found) == 4, found  # weights, two averages, optimizer
    return found


def rows(run_dir: Path) -> list[dict[str, str]]:
    """progress.csv without what a clock has measured."""
    with (run_dir / "progress.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("processes", "precision"),
    [
        pytest.param(1, "fp32", marks=pytest.mark.slow),  # test_resume.py has it without a process of its own
        (2, "fp32"),
        pytest.param(1, "bf16", marks=pytest.mark.slow),  # which a processor without it does slowly
        pytest.param(2, "bf16", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_straight_on(
    tmp_path: Path, shapes: Path, straight: Straight, processes: int, precision: str
) -> None:
    """6 steps at once; 5 steps, SIGKILL, and on to 6. The last checkpoint before the end is that of step 4."""
    flags = [*EVERYTHING, "--precision", precision, "--ema-lengths", "0.1"]
    whole = straight(processes, *flags)
    common = {"cwd": tmp_path, "data": shapes}
    killed = 1 if processes > 1 else -9
    train(processes, "killed", *flags, status=killed, KILL_AFTER_STEP="5", **common)
    assert (tmp_path / "killed/progress.csv").read_text().splitlines()[-1].startswith("5,")
    result = train(processes, "killed", "--resume", **common)
    assert "resumed at step 4\n" in result.out
    assert digests(whole, 6) == digests(tmp_path / "killed", 6)
    assert len(digests(whole, 6)) == 5  # weights, three averages, optimizer
    for step in (3, 4, 5):
        assert snapshot_path(whole, step).read_bytes() == snapshot_path(tmp_path / "killed", step).read_bytes()
    assert rows(whole) == rows(tmp_path / "killed")
    assert [row["step"] for row in rows(tmp_path / "killed")] == [str(step) for step in range(1, 7)]


@pytest.mark.parametrize(
    "names",
    [
        ("one", "ddp", "fsdp_parts"),
        pytest.param(("guided", "guided_fsdp"), marks=pytest.mark.slow),
        pytest.param(("one", "fsdp", "parts"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_two_processes_train_as_one_does_and_fsdp_as_ddp(tmp_path: Path, shapes: Path, names: tuple[str, ...]) -> None:
    """For three steps losses and gradient norms are equal to 1e-5, with micro-batches as without."""
    flags = [*LEARNING, "--precision", "fp32", "--steps", "3", "--spike-guard", "50", "--grad-clip", "1"]
    flags += ["--batch-size", "8", "--ema-lengths", "0.1", "--augment", "0.5"]  # 4 on each of two, as 3 and 1
    guided = ["--channel-mult", "1,1", "--resblock-updown", "--use-new-attention-order", "--num-head-channels", "16"]
    kinds: dict[str, tuple[int, list[str]]] = {
        "one": (1, []),
        "ddp": (2, []),
        "fsdp": (2, ["--parallel", "fsdp"]),
        "parts": (2, ["--microbatch", "3"]),
        "fsdp_parts": (2, ["--parallel", "fsdp", "--microbatch", "3", "--use-checkpoint"]),
        "guided": (1, guided),
        "guided_fsdp": (2, [*guided, "--parallel", "fsdp", "--microbatch", "3", "--use-checkpoint"]),
    }
    found = {}
    for name in names:
        processes, more = kinds[name]
        train(processes, name, *flags, *more, cwd=tmp_path, data=shapes)
        found[name] = rows(tmp_path / name)
    averages = {
        name: read_tensors(average_path(tmp_path / name, 0.1, 3), "model")[0]
        | read_tensors(snapshot_path(tmp_path / name, 2), "averages")[0]
        for name in names
    }
    for name, tensors in averages.items():
        assert tensors["0.1"].dtype == torch.float16
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, averages[names[0]][key], rtol=1e-3, atol=2e-4, msg=f"{name}: {key}")
    compared = ("loss", "mse", "vb", *(f"loss_q{q}" for q in range(4)), "grad_norm")
    for name, step in itertools.product(found, range(3)):
        ours, one = found[name][step], found[names[0]][step]
        assert ours["skipped"] == "0"
        for column in compared:
            assert (ours[column] == "") == (one[column] == ""), (name, column)
            if one[column]:
                assert float(ours[column]) == pytest.approx(float(one[column]), rel=1e-5, abs=1e-7), (
                    name,
                    step,
                    column,
                )


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_draw_previews_from_the_weights_that_they_save(
    tmp_path: Path, shapes: Path, parallel: str
) -> None:
    """Raw weights and averages that are far apart, each drawn by two processes and, from its file, by one."""
    flags = ["--precision", "fp32", "--steps", "3", "--preview-interval", "3", "--lr", "4e-2", "--no-ema-warmup"]
    train(2, "run", *flags, "--parallel", parallel, cwd=tmp_path, data=shapes)
    pictures = {}
    for name in ("model", "ema_0.5_", "ema_0.9999_"):
        loaded = load_checkpoint(tmp_path / f"run/{name}000003.safetensors")
        config = SampleConfig(num_samples=16, sampler="ddim")
        drawn = generate(
            loaded.model,
            loaded.diffusion,
            config,
            image_size=8,
            device=torch.device("cpu"),
            labels=np.arange(16) % 4,
        )
        names = [*SHAPES] * 4
        save_grid(tmp_path / "expected.png", np.concatenate(list(drawn)), 4, names)
        expected = np.asarray(Image.open(tmp_path / "expected.png")).astype(int)
        preview = "raw" if name == "model" else name.strip("_")
        pictures[name] = np.asarray(Image.open(tmp_path / f"run/previews/000003_{preview}.png")).astype(int)
        assert np.abs(pictures[name] - expected).max() <= 2, name
    assert np.abs(pictures["model"] - pictures["ema_0.9999_"]).max() > 20


@pytest.mark.parametrize(
    ("parallel", "torchrun"),
    [("ddp", False), *(pytest.param(p, True, marks=pytest.mark.slow) for p in ("ddp", "fsdp"))],
)
def test_the_death_of_one_process_is_mended_by_a_restart(
    tmp_path: Path, shapes: Path, straight: Straight, parallel: str, torchrun: bool
) -> None:
    """kill -9 of one of two: both are started again, as torchrun does it or by it, and end with the same bits."""
    flags = [*EVERYTHING, "--precision", "fp32", *(["--parallel", parallel] if parallel != "ddp" else [])]
    flags += ["--ema-lengths", "0.1"]
    whole = straight(2, *flags)
    common = {"cwd": tmp_path, "data": shapes, "KILL_AFTER_STEP": "5", "KILL_RANK": "1"}
    if torchrun:
        result = train(2, "killed", *flags, torchrun=["--max-restarts=2", "--monitor-interval=0.2"], **common)
    else:
        for count, status in (("0", 1), ("1", 0)):
            started = {"TORCHELASTIC_RUN_ID": "job 7", "TORCHELASTIC_RESTART_COUNT": count}
            result = train(2, "killed", *flags, status=status, **started, **common)
    assert "torchrun restarted this process: resuming the run" in result.out
    assert "resumed at step 4\n" in result.out
    assert digests(whole, 6) == digests(tmp_path / "killed", 6)
    assert len(digests(whole, 6)) == 5  # weights, three averages, optimizer
    for step in (3, 4, 5):
        assert snapshot_path(whole, step).read_bytes() == snapshot_path(tmp_path / "killed", step).read_bytes()
    assert rows(whole) == rows(tmp_path / "killed")


def test_a_restart_takes_nobody_elses_run(tmp_path: Path, shapes: Path) -> None:
    """torchrun starts again what ended because the folder holds a run: that makes the run none of its own."""
    train(1, "run", "--precision", "fp32", "--steps", "1", cwd=tmp_path, data=shapes)
    before = hashes(tmp_path / "run", 1)
    for count in ("0", "1"):
        started = {"TORCHELASTIC_RUN_ID": "job 7", "TORCHELASTIC_RESTART_COUNT": count}
        flags = ["--precision", "fp32", "--steps", "9"]
        result = train(1, "run", *flags, cwd=tmp_path, data=shapes, status=2, **started)
        refused(result, "^error: run already holds a run: use --resume")
    assert hashes(tmp_path / "run", 1) == before
    assert not list((tmp_path / "run").glob("*9.safetensors"))


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path: Path, shapes: Path, number: str, status: int) -> None:
    """Only one of them is told; all leave at the same step, with it saved, and the exit status of the signal."""
    harm = {"SIGNAL_AFTER_STEP": "5", "SIGNAL": number, "KILL_RANK": "1", "STATUS_FILE": str(tmp_path / "status")}
    flags = ["--precision", "fp32", "--steps", "1000"]
    result = train(2, "run", *flags, cwd=tmp_path, data=shapes, status=1, **harm)
    stopped = re.search(rf"stopped by {number} at step (\d+), which is saved", result.out)
    assert stopped, result
    step = int(stopped[1])
    assert 5 <= step <= 8
    assert {(tmp_path / f"status{rank}").read_text() for rank in (0, 1)} == {f"{status} {step}"}
    verify_step(tmp_path / "run", step)
    hashes(tmp_path / "run", step)


NAN_AT_2 = {"NAN_AT_UPDATES": "2", "KILL_RANK": "1"}
WITH_A_NAN = ["--precision", "fp32", "--save-interval", "3", "--steps", "5", "--log-interval", "5"]


def test_a_nan_on_one_process_skips_the_update_on_all(tmp_path: Path, shapes: Path, straight: Straight) -> None:
    """A NaN in the gradient of one process at update 2; in another run there and at every one after, which ends it."""
    once = straight(2, *WITH_A_NAN, **NAN_AT_2)
    assert [row["skipped"] for row in rows(once)] == ["1"]
    log = (once / "log.txt").read_text()
    assert re.search(r"1 of the last updates skipped; the last one was update 2; its samples .*: \d+ \w+\.png \(", log)
    flags = ["--precision", "fp32", "--save-interval", "5"]
    harm = {"NAN_AT_UPDATES": "2-999", "KILL_RANK": "1"}
    result = train(2, "always", *flags, "--steps", "99", cwd=tmp_path, data=shapes, status=1, **harm)
    (line,) = (line for line in result.err.splitlines() if "error:" in line)
    assert re.search(r"not finite in the last 25 updates: .*the last good checkpoint: always/model\d+", line)
    assert {row["step"]: row["skipped"] for row in rows(tmp_path / "always")[:3]} == {"1": "0", "2": "1", "3": "1"}
    again = train(1, "always", "--resume", "--steps", "27", cwd=tmp_path, data=shapes)
    assert "resumed at step 25\n" in again.out


def test_what_was_skipped_before_a_checkpoint_is_told_after_it(
    tmp_path: Path, shapes: Path, straight: Straight
) -> None:
    """A line of the log that began before the process did, on as many processes and on others."""
    train(2, "run", *WITH_A_NAN, cwd=tmp_path, data=shapes, KILL_AFTER_STEP="4", status=1, **NAN_AT_2)
    (whole,) = rows(straight(2, *WITH_A_NAN, **NAN_AT_2))
    for processes in (1, 2):
        resumed = f"resumed by {processes}"
        shutil.copytree(tmp_path / "run", tmp_path / resumed)
        again = train(processes, resumed, *WITH_A_NAN, "--resume", cwd=tmp_path, data=shapes)
        assert "resumed at step 3\n" in again.out
        assert "1 of the last updates skipped; the last one was update 2, before this run was resumed" in again.out
        (row,) = rows(tmp_path / resumed)
        if processes == 2:
            assert row == whole
        assert float(row["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-5)
        assert row["skipped"] == whole["skipped"] == "1"


def test_bad_input_is_told_once(tmp_path: Path, shapes: Path) -> None:
    """Whatever the number of processes, one line says it."""

    def lines(*args: str) -> list[str]:
        result = train(2, "run", "--precision", "fp32", *args, cwd=tmp_path, data=shapes, status=1)
        return [line for line in result.err.splitlines() if "error:" in line]

    (line,) = lines("--batch-size", "5")
    assert line == ("error: batch_size 5 does not divide among 2 processes: use 4 or 6, or --batch-size-per-process")
    assert not (tmp_path / "run").exists()
    (line,) = lines("--parallel", "fsdp", "--microbatch", "auto")
    assert "microbatch auto: not with --parallel fsdp" in line
    (line,) = lines("--device", "cuda:1")
    assert "device" in line


def test_processes_that_do_not_find_each_other_say_so(tmp_path: Path, shapes: Path) -> None:
    """The second of two never comes."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    flags = ["--precision", "fp32", "--timeout", "1"]
    refused(
        train(1, "run", *flags, cwd=tmp_path, data=shapes, status=2, **environment, **port),
        r"process 0 of 2 on \S+ did not find the others within 1 s .*127.0.0.1:29555.*GLOO_SOCKET_IFNAME",
    )


@pytest.mark.slow
def test_one_process_compiled_with_ddp(tmp_path: Path, shapes: Path) -> None:
    """torch.compile around DDP computes what is computed without it (aot_eager: the compiler itself is slow here)."""
    flags = ["--precision", "fp32", "--steps", "3", "--microbatch", "4"]
    train(2, "eager", *flags, cwd=tmp_path, data=shapes)
    train(2, "compiled", *flags, "--compile", "on", cwd=tmp_path, data=shapes, COMPILE_BACKEND="aot_eager")
    for ours, eager in zip(rows(tmp_path / "compiled"), rows(tmp_path / "eager"), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(eager["loss"]), rel=1e-5)
        assert float(ours["grad_norm"]) == pytest.approx(float(eager["grad_norm"]), rel=1e-4)


def test_alone_no_process_group_is_made(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **_: made.append(args))
    flags = ["--data-dir", shapes, "--run-dir", tmp_path / "run", *MODEL, "--precision", "fp32", "--steps", "1"]
    command("train", *flags, "--batch-size", 4)
    assert (tmp_path / "run/model000001.safetensors").exists()
    assert made == []
