"""A training that is killed again and again ends as one that never was."""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdiff import checkpoint
from fastdiff.checkpoint import Lease
from fastdiff.data.shapes import write_shapes
from fastdiff.training.resuming import resume

from ..support import trainer
from .child import fork, wait

FLAGS: dict[str, Any] = {
    "save_interval": 2,
    "keep_last": 2,
    "dropout": 0.1,
    "schedule_sampler": "loss-second-moment",
    "diffusion_steps": 2,
    "ema_rate": "0.9999,0.5",
    "ema_lengths": "0.05,0.1",
    "lr": 1e-3,
}
STEPS_A_LIFE = 6
TIMED = {"images_per_s", "data_wait", "memory_gib", "mfu"}


def train(run_dir: Path, data: Path, steps: int, tell: Callable[[], object] = lambda: None) -> int:
    """Go on with the run, or begin it; calls ``tell`` when it is about to train and after each update."""
    with Lease(run_dir):
        subject = trainer(run_dir, data, steps=steps, **FLAGS)
        resume(subject)
        tell()
        return subject.run(lambda step, steps, note: tell())


def undisturbed(run_dir: Path, data: Path, steps: int) -> dict[int, str]:
    """Train to the end; the manifest of every step that was saved on the way."""
    kept = run_dir.with_name("manifests")
    kept.mkdir()
    real = checkpoint.write_manifest

    def write_manifest(folder: Path, step: int, paths: list[Path]) -> None:
        real(folder, step, paths)
        shutil.copy(checkpoint.manifest_path(folder, step), kept / str(step))

    def work() -> int:
        checkpoint.write_manifest = write_manifest  # type: ignore[assignment]
        return train(run_dir, data, steps)

    assert wait(fork(work)) == 0
    return {int(path.name): path.read_text() for path in kept.iterdir()}


def killed(run_dir: Path, data: Path, steps: int, rng: random.Random) -> int:
    """Begin a process and kill it soon after so many updates, or before it trains; what became of it."""
    reading, writing = os.pipe()

    def work() -> int:
        os.close(reading)
        return train(run_dir, data, steps, lambda: os.write(writing, b"x"))

    child = fork(work)
    os.close(writing)
    updates = rng.randint(-1, 10)
    for _ in range(updates + 1):
        os.read(reading, 1)  # returns at once where the process has ended
    time.sleep(rng.uniform(0, 0.05 if updates >= 0 else 0.5))
    os.kill(child, signal.SIGKILL)
    os.close(reading)
    return wait(child)


def check(run_dir: Path, manifests: dict[int, str]) -> int:
    """The newest step, of which, as of all others, every bit must be that of the undisturbed run; 0 where none is."""
    steps = checkpoint.saved_steps(run_dir) if run_dir.exists() else []
    for step in checkpoint.snapshots(run_dir):
        checkpoint.read_tensors(checkpoint.snapshot_path(run_dir, step), "averages")
    for step in steps:
        checkpoint.verify_step(run_dir, step)
        assert checkpoint.manifest_path(run_dir, step).read_text() == manifests[step], f"step {step} differs"
        checkpoint.read_tensors(checkpoint.optimizer_path(run_dir, step), "optimizer")
        checkpoint.load_checkpoint(checkpoint.find_checkpoint(run_dir))
    return max(steps, default=0)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The history of a run, without what depends on the machine."""
    found = [json.loads(line) for line in (run_dir / "progress.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in found]


def random_kills(folder: Path, kills: int) -> Counter[str]:
    """Kill a run ``kills`` times and let it finish; how often it was saving, and had saved since the last time."""
    data, straight, run_dir = folder / "data", folder / "straight", folder / "run"
    write_shapes(data, 12, 8, seed=0)
    steps = STEPS_A_LIFE * kills
    manifests = undisturbed(straight, data, steps)
    assert len(manifests) == steps // 2
    rng = random.Random(0)
    counted = Counter(kills=0, while_saving=0, advanced=0)
    newest = 0
    while counted["kills"] < kills:
        status = killed(run_dir, data, steps, rng)
        before, newest = newest, check(run_dir, manifests)
        assert newest >= before, "a step that was saved is gone"
        if newest == steps:  # too soon: begin again
            shutil.rmtree(run_dir)
            newest = 0
            continue
        assert status == -signal.SIGKILL, status
        counted["kills"] += 1
        counted["advanced"] += newest > before
        counted["while_saving"] += any(run_dir.glob(".unfinished*"))
    assert wait(fork(lambda: train(run_dir, data, steps))) == 0
    assert check(run_dir, manifests) == steps
    assert rows(run_dir) == rows(straight)
    ours, theirs = ({str(path.relative_to(place)) for path in place.rglob("*")} for place in (run_dir, straight))
    assert ours == theirs, ours ^ theirs
    for step in checkpoint.snapshots(straight):
        same_bytes = {checkpoint.snapshot_path(place, step).read_bytes() for place in (run_dir, straight)}
        assert len(same_bytes) == 1, f"the snapshot of step {step} differs"
    return counted
