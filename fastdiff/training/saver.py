"""Writes checkpoints in the background while training continues."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff import checkpoint
from fastdiff.config import TrainConfig
from fastdiff.runtime.files import existing
from fastdiff.runtime.threads import one_thread
from fastdiff.training.ema import SNAPSHOT_SPACING

RETRY_DELAYS = (1.0, 5.0, 15.0)
"""Seconds between attempts to write a checkpoint."""

SLACK = 4 * 2**20
"""Bytes allowed for a checkpoint besides its tensors."""


@dataclass(frozen=True)
class CheckpointFile:
    """A file to write: tensors in host memory, which must not change any more."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]


class Saver:
    """Writes the checkpoints of a run, one at a time, on a background thread.

    A save that has started completes even if the process ends with an exception: the interpreter waits for the thread.
    A failure is permanent: every later call raises it.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, log: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.config = config
        self.log = log
        self.saved_step = 0  # of the newest checkpoint that this saver wrote
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver", initializer=one_thread)
        self._last: Future[None] | None = None

    def save(self, step: int, files: Sequence[CheckpointFile], ready: Callable[[], None] | None = None) -> None:
        """Start writing a step; waits for the previous save and raises its failure.

        The thread calls ``ready`` before it reads a tensor, to wait for copies from the device.

        The save fails with ValueError if a tensor is not finite, and with OSError if it cannot be written after all of
        RETRY_DELAYS. Earlier checkpoints are then unchanged.
        """
        self.wait()
        self._last = self._thread.submit(self._save, step, files, ready)

    def keep_averages(self, file: CheckpointFile, count: int, ready: Callable[[], None] | None = None) -> None:
        """Start writing a snapshot of the averages, of which the run keeps ``count``; otherwise as save.

        The oldest one goes before the new one comes; so does one of less than half a spacing before, which a run leaves
        that is planned again. A failure is logged: the averages of the checkpoints are enough to go on.
        """
        self.wait()
        self._last = self._thread.submit(self._keep_averages, file, count, ready)

    def _keep_averages(self, file: CheckpointFile, count: int, ready: Callable[[], None] | None) -> None:
        if ready is not None:
            ready()
        step = int(file.metadata["step"])
        try:
            if not all(tensor.isfinite().all() for tensor in file.tensors.values()):
                raise OSError("a weight is beyond the range of 16 bits")
            checkpoint.keep_snapshots(self.run_dir, int(step / SNAPSHOT_SPACING**0.5), count - 1)
            checkpoint.write_tensors(file.path, file.tensors, file.metadata)
        except OSError as error:
            self.log(f"warning: no snapshot of the averages of step {step}: {error}")

    def check(self) -> None:
        """Raise the failure of a failed save, without waiting for a running one."""
        if self.failed:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether a save has failed, without waiting for a running one."""
        return self._last is not None and self._last.done() and self._last.exception() is not None

    def wait(self) -> None:
        """Wait until the last save is on the disk; raises its failure."""
        if self._last is not None:
            self._last.result()

    def _save(self, step: int, files: Sequence[CheckpointFile], ready: Callable[[], None] | None) -> None:
        if step == self.saved_step:
            return  # while being rewritten the checkpoint would be incomplete
        if ready is not None:
            ready()
        self._refuse_nonfinite(step, files)
        for delay in (*RETRY_DELAYS, None):
            try:
                self._write(step, files)
                break
            except OSError as error:
                self._tidy()
                if delay is None:
                    raise OSError(
                        f"step {step} could not be saved in {self.run_dir.resolve()}: {error}; "
                        f"the last good checkpoint: {self.last_good()}"
                    ) from error
                self.log(f"warning: step {step} could not be saved: {error}; trying again in {delay:g} s")
                time.sleep(delay)
        self.saved_step = step
        self._tidy(prune=True)
        self.log(f"saved step {step} in {self.run_dir.resolve()}")

    def _write(self, step: int, files: Sequence[CheckpointFile]) -> None:
        checkpoint.remove_leftovers(self.run_dir)
        free_space_check(self.run_dir, sum(tensor.nbytes for file in files for tensor in file.tensors.values()))
        checkpoint.begin_step(self.run_dir, step)
        for file in files:
            checkpoint.write_tensors(file.path, file.tensors, file.metadata)
        checkpoint.write_manifest(self.run_dir, step, [file.path for file in files])

    def _refuse_nonfinite(self, step: int, files: Sequence[CheckpointFile]) -> None:
        for file in files:
            what = "optimizer's state" if file.metadata["kind"] == "optimizer" else "weights"
            for name, tensor in file.tensors.items():
                if tensor.is_floating_point() and tensor.numel():
                    low, high = tensor.aminmax()  # NaN if any is; isfinite() would allocate a mask
                    if not (low.isfinite() and high.isfinite()):
                        raise ValueError(
                            f"the {what} of step {step} are not finite and were not saved ({name}): lower --lr; "
                            f"the last good checkpoint: {self.last_good()}"
                        )

    def _tidy(self, prune: bool = False) -> None:
        """Remove unneeded files. A failure does not stop the run: the next save tries again."""
        try:
            if prune:
                self._prune()
            checkpoint.remove_leftovers(self.run_dir)
        except OSError as error:
            self.log(f"warning: old files could not be deleted: {error}")

    def _prune(self) -> None:
        keep, spared = self.config.keep_last, self.config.keep_every
        # Later steps are damaged ones that the run resumed before: ignore them.
        older = [step for step in checkpoint.saved_steps(self.run_dir) if step <= self.saved_step]
        best = checkpoint.best_step(self.run_dir)
        passing = [step for step in older if step != best and (not spared or step % spared)]
        for step in passing[:-keep] if keep else ():
            checkpoint.delete_step(self.run_dir, step)

    def last_good(self) -> Path | str:
        """The weights of the newest intact checkpoint, or a message that there is none."""
        for step in reversed(checkpoint.saved_steps(self.run_dir)):
            try:
                checkpoint.verify_step(self.run_dir, step)
            except ValueError:
                continue
            return checkpoint.model_path(self.run_dir, step)
        return "none was saved yet"


def free_space_check(run_dir: Path, needed: int) -> None:
    """OSError if the disk of ``run_dir``, which may not exist yet, has no room for a checkpoint of ``needed`` bytes."""
    free = shutil.disk_usage(existing(run_dir)).free
    if free < needed + SLACK:
        raise OSError(
            f"{run_dir} has no room for a checkpoint: it needs {_megabytes(needed + SLACK)}, {_megabytes(free)} are "
            "free; make room, or name another folder with --run-dir"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
