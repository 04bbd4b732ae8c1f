"""Checkpoints that are written while the training goes on."""

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

RETRY_DELAYS = (1.0, 5.0, 15.0)
"""Seconds between the attempts to write a checkpoint."""

SLACK = 4 * 2**20
"""Bytes of a checkpoint beside its tensors."""


@dataclass(frozen=True)
class CheckpointFile:
    """A file to be written: tensors in the host's memory that nobody changes any more."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]


class Saver:
    """Writes the checkpoints of a run, one at a time, on a thread of its own.

    A save that was begun is brought to its end even where the process ends in an exception: the interpreter waits for
    the thread. A failure stays: whatever is asked of the saver from then on raises it.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, log: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.config = config
        self.log = log
        # of the newest that this saver wrote or, once the caller says so, that the run goes on with
        self.saved_step = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._last: Future[None] | None = None

    def save(self, step: int, files: Sequence[CheckpointFile], ready: Callable[[], None] | None = None) -> None:
        """Begin to write a step; waits for the one before and raises its failure.

        ``ready`` is called on the thread before a tensor is read, to wait for copies from the device.

        The save fails with ValueError where a tensor is not finite, and with OSError where it cannot be written after
        all of RETRY_DELAYS. The checkpoints before it are then as they were.
        """
        self.wait()
        self._last = self._thread.submit(self._save, step, files, ready)

    def check(self) -> None:
        """Raise the failure of a save that has failed, without waiting for one that is under way."""
        if self.failed:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether a save has failed, without waiting for one that is under way."""
        return self._last is not None and self._last.done() and self._last.exception() is not None

    def wait(self) -> None:
        """Wait until what was begun is on the disk; raises its failure."""
        if self._last is not None:
            self._last.result()

    def _save(self, step: int, files: Sequence[CheckpointFile], ready: Callable[[], None] | None) -> None:
        if step == self.saved_step:
            return  # to write it again would be a time in which it is not whole
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
                    low, high = tensor.aminmax()  # NaN where there is one; isfinite() would need memory for each number
                    if not (low.isfinite() and high.isfinite()):
                        raise ValueError(
                            f"the {what} of step {step} are not finite and were not saved ({name}): lower --lr; "
                            f"the last good checkpoint: {self.last_good()}"
                        )

    def _tidy(self, prune: bool = False) -> None:
        """Remove what is not wanted. Where that fails the next save tries it again: no reason to stop a run."""
        try:
            if prune:
                self._prune()
            checkpoint.remove_leftovers(self.run_dir)
        except OSError as error:
            self.log(f"warning: old files could not be deleted: {error}")

    def _prune(self) -> None:
        keep, spared = self.config.keep_last, self.config.keep_every
        # Later steps are damaged ones that the run fell back from: they count for nothing.
        older = [step for step in checkpoint.saved_steps(self.run_dir) if step <= self.saved_step]
        passing = [step for step in older if not spared or step % spared]
        for step in passing[:-keep] if keep else ():
            checkpoint.delete_step(self.run_dir, step)

    def last_good(self) -> Path | str:
        """The weights of the newest whole checkpoint, or a word that there is none."""
        for step in reversed(checkpoint.saved_steps(self.run_dir)):
            try:
                checkpoint.verify_step(self.run_dir, step)
            except ValueError:
                continue
            return checkpoint.model_path(self.run_dir, step)
        return "none was saved yet"


def free_space_check(run_dir: Path, needed: int) -> None:
    """OSError where the disk of ``run_dir``, which may not exist yet, has no room for a checkpoint of so many bytes."""
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed + SLACK:
        raise OSError(
            f"{run_dir} has no room for a checkpoint: it needs {_megabytes(needed + SLACK)}, {_megabytes(free)} are "
            "free; make room, or name another folder with --run-dir"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
