"""What a crash leaves; ``python -m tests.training.crashes`` prints the figures of docs/reliability.md.

A folder holds step 2. A process saves step 4 and deletes step 2, and is hit at one call that changes a file. After it
every step that counts as saved must be what it was meant to be, and the next save must leave nothing else behind.
"""

import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastdiff import TrainConfig, checkpoint
from fastdiff.data.shapes import write_shapes
from fastdiff.training import saver
from fastdiff.training.saver import CheckpointFile, Saver

from ..support import same, trainer
from . import shim
from .child import fork, wait
from .kills import random_kills
from .shim import WRITES, Hit

SAVED, FAILED = 0, 10  # exit statuses of a process that saves

Files = Callable[[Path, int], list[CheckpointFile]]


def small(run_dir: Path, step: int) -> list[CheckpointFile]:
    """A weight and its moment."""
    w = torch.arange(1000.0) * step
    described = {"kind": "model", "model_config": {}, "diffusion_config": {}, "step": step}
    return [
        CheckpointFile(checkpoint.model_path(run_dir, step), {"w": w}, described),
        CheckpointFile(checkpoint.optimizer_path(run_dir, step), {"m": w / 2}, {"kind": "optimizer", "step": step}),
    ]


def real(folder: Path) -> Files:
    """The files of a training: weights, two averages, optimizer; each step's numbers are its own."""
    data, run_dir = folder / "data", folder / "trained"
    assert wait(fork(lambda: _train(data, run_dir))) == 0
    kinds = {"model": "model", "ema_0.9999_": "model", "ema_0.5_": "model", "opt": "optimizer"}
    read = {kind: checkpoint.read_tensors(run_dir / f"{kind}000002.safetensors", kinds[kind]) for kind in kinds}

    def files(run_dir: Path, step: int) -> list[CheckpointFile]:
        return [
            CheckpointFile(
                run_dir / f"{kind}{step:06d}.safetensors",
                {name: tensor + step for name, tensor in tensors.items()},
                {**metadata, "step": step},
            )
            for kind, (tensors, metadata) in read.items()
        ]

    return files


def _train(data: Path, run_dir: Path) -> None:
    write_shapes(data, 12, 8, seed=0)
    flags = {"schedule_sampler": "loss-second-moment", "ema_rate": "0.9999,0.5"}
    trainer(run_dir, data, steps=2, **flags).run()


def save(run_dir: Path, files: Files, step: int, at: int = 0, hit: Hit = Hit.NOTHING) -> int:
    """Save a step in another process, hit at a call; what became of the process."""

    def work() -> int:
        saver.RETRY_DELAYS = (0.0, 0.0)
        subject = Saver(run_dir, TrainConfig(keep_last=1), lambda line: None)
        written = files(run_dir, step)
        shim.arm(run_dir, at, hit)
        subject.save(step, written)
        try:
            subject.wait()
        except OSError:
            return FAILED
        (run_dir.parent / "calls").write_text("\n".join(shim.calls()))
        return SAVED

    return wait(fork(work))


def snapshot(run_dir: Path, step: int) -> CheckpointFile:
    """A snapshot of one average."""
    about = {"kind": "averages", "step": step, "ema_lengths": [0.1]}
    return CheckpointFile(checkpoint.snapshot_path(run_dir, step), {"0.1": torch.arange(1000.0).half() + step}, about)


def keep(run_dir: Path, step: int, at: int = 0, hit: Hit = Hit.NOTHING) -> int:
    """Write a snapshot, of which one is kept, in another process, hit at a call; what became of the process."""

    def work() -> int:
        subject = Saver(run_dir, TrainConfig(), lambda line: None)
        shim.arm(run_dir, at, hit)
        subject.keep_averages(snapshot(run_dir, step), count=1)
        subject.wait()
        (run_dir.parent / "calls").write_text("\n".join(shim.calls()))
        return SAVED

    return wait(fork(work))


def snapshot_cases(folder: Path, stride: int) -> str:
    """Hit a snapshot at its calls: those that are there are whole, and the next one leaves nothing else behind."""
    base, run_dir = folder / "base", folder / "run"
    assert keep(base, 2) == SAVED
    shutil.copytree(base, run_dir)
    assert keep(run_dir, 4) == SAVED
    shutil.rmtree(run_dir)
    calls = (folder / "calls").read_text().split()
    cases = [(at, hit) for at in range(1, len(calls) + 1) for hit in list(Hit)[1:]]
    cases = [(at, hit) for at, hit in cases if hit is not Hit.KILLED_HALFWAY or calls[at - 1] in WRITES][::stride]
    for at, hit in cases:
        shutil.copytree(base, run_dir)
        status = keep(run_dir, 4, at, hit)
        assert status == (-signal.SIGKILL if hit.name.startswith("KILLED") else SAVED), (hit, at, status)
        there = checkpoint.snapshots(run_dir)
        assert there in ([], [2], [4]), (hit, at, there)
        for step in there:
            wanted = snapshot(run_dir, step)
            tensors, metadata = checkpoint.read_tensors(wanted.path, "averages")
            assert metadata == wanted.metadata
            assert same(tensors, dict(wanted.tensors))
        checkpoint.remove_leftovers(run_dir)  # as a run that goes on from there
        assert keep(run_dir, 6) == SAVED
        left = [path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*")]
        assert sorted(left) == ["averages", "averages/000006.safetensors"], (hit, at, left)
        shutil.rmtree(run_dir)
    shutil.rmtree(base)
    return f"A snapshot of the averages was hit {len(cases)} times: those that were there were whole."


def check(run_dir: Path, files: Files) -> list[int]:
    """Every saved step must load as it was meant to be; returns the steps."""
    steps = checkpoint.saved_steps(run_dir)
    assert steps, "no checkpoint is left"
    for step in steps:
        checkpoint.verify_step(run_dir, step)
        for file in files(run_dir, step):
            tensors, metadata = checkpoint.read_tensors(file.path, file.metadata["kind"])
            assert metadata == file.metadata
            assert same(tensors, dict(file.tensors)), file.path
    return steps


def one_case(folder: Path, base: Path, files: Files, at: int, hit: Hit) -> tuple[int, int]:
    """Hit a save and look at what is left: what became of the process, and the newest whole step."""
    run_dir = folder / "run"
    shutil.copytree(base, run_dir)
    status = save(run_dir, files, 4, at, hit)
    newest = check(run_dir, files)[-1]
    if hit.name.startswith("KILLED"):
        assert status == -signal.SIGKILL, status
    elif hit in (Hit.ENOSPC, Hit.EIO):
        assert (status, newest) == (SAVED, 4), status  # the next attempt succeeds
    else:
        assert status == FAILED or (status, newest) == (SAVED, 4), status
    after = 4 if newest == 2 and at % 2 else 6  # as a run that goes on from there; it may save at other steps
    assert save(run_dir, files, after) == SAVED
    assert check(run_dir, files) == [after]
    wanted = {file.path.name for file in files(run_dir, after)} | {checkpoint.manifest_path(run_dir, after).name}
    left = {path.name for path in run_dir.iterdir()}
    assert left == wanted, left ^ wanted
    shutil.rmtree(run_dir)
    return status, newest


def all_cases(folder: Path, files: Files, stride: int) -> Iterator[tuple[str, ...]]:
    """Rows of the table: what was hit how often, and what was left."""
    base = folder / "base"
    assert save(base, files, 2) == SAVED
    shutil.copytree(base, folder / "run")
    assert save(folder / "run", files, 4) == SAVED
    shutil.rmtree(folder / "run")
    calls = (folder / "calls").read_text().split()
    counted = Counter(calls)
    print(f"{len(calls)} calls: {', '.join(f'{count} {name}' for name, count in sorted(counted.items()))}")
    for i, hit in enumerate(list(Hit)[1:]):
        where = [n for n, name in enumerate(calls, start=1) if hit is not Hit.KILLED_HALFWAY or name in WRITES]
        found: Counter[tuple[int, int]] = Counter()
        chosen = where[i % stride :: stride] or where[:1]
        for at in chosen:
            try:
                found[one_case(folder, base, files, at, hit)] += 1
            except Exception as error:
                raise AssertionError(f"{hit.name} at call {at}, {calls[at - 1]}: {error}") from error
        newest = Counter(step for _, step in found.elements())
        loud = sum(count for (status, _), count in found.items() if status == FAILED)
        yield hit.name.lower().replace("_", " "), *map(str, (len(chosen), newest[2], newest[4], loud))
    shutil.rmtree(base)


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    short = "--short" in sys.argv
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        subjects = [("two small files", small)]
        if not short:  # the saver does not know what its files hold, and the training that is killed has these
            subjects.append(("the four files of a training", real(folder)))
        for title, files in subjects:
            print(f"\nA save of {title}, after which the step before is deleted: ", end="")
            rows = list(all_cases(folder, files, 36 if short else 1))
            print("\n| hit | times | step 2 is the newest, whole | step 4 is | failed loudly |\n|---|---|---|---|---|")
            for row in rows:
                print(f"| {' | '.join(row)} |")
        print(f"\n{snapshot_cases(folder, 24 if short else 1)}")
        found = random_kills(folder, 1 if short else 100)
        print(
            f"\nA training was killed {found['kills']} times, {found['while_saving']} of them in the middle of a save; "
            f"{found['advanced']} times it had saved another step since the last time. "
            "Every checkpoint it left and its end are those of the training that was not killed, bit for bit."
        )


if __name__ == "__main__":
    main()
