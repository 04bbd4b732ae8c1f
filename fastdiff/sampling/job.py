"""A job of sampling: images into files, by one process or many, in one go or in several."""

import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from fastdiff.checkpoint import Lease
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.distributed import World, launcher, restarted
from fastdiff.runtime.signals import StopRequest
from fastdiff.runtime.words import duration
from fastdiff.sampling.classes import names_of
from fastdiff.sampling.files import FRAMES, Files, png_names
from fastdiff.sampling.generate import Int64Array, Stopped
from fastdiff.sampling.output import save_grid, save_trajectory
from fastdiff.sampling.pipeline import Pipeline
from fastdiff.sampling.plan import Plan

MOST_COLUMNS = 16
"""A grid has a column for each class where there are no more of them."""

_ANSWER = "stopping after this step; what is finished is kept"

OnProgress = Callable[[int, int, str], None]
"""Told how many of how many images' steps are done, and the speed in words."""


class Job:
    """Draws the images ``indices`` (N,) of a plan into files.

    ``settings`` is all that decides what they are, as JSON can hold it: an unfinished job goes on where they are equal.
    """

    def __init__(
        self,
        plan: Plan,
        indices: Int64Array,
        files: Files,
        settings: Mapping[str, Any],
        runtime: Runtime,
        world: World,
    ) -> None:
        self.plan = plan
        self.indices = indices
        self.labels = plan.labels(indices)
        self.class_names = names_of(plan.checkpoint)
        if files.png_dir is not None:
            png_names(
                indices[:1], None if self.labels is None else self.labels[:1], self.class_names
            )  # refuses names that are too long for a file
        self.files = files
        self.settings = settings
        self.runtime = runtime
        self.world = world

    def run(self, log: Callable[[str], None], on_progress: OnProgress) -> int:
        """Draw what is missing and write the files; returns the exit status, 128 and a signal's number if one came.

        Collective; the first process writes the files, every one its shards. ValueError or OSError where it cannot be
        done: what is finished is kept, and the same job goes on with it.
        """
        with ExitStack() as held:
            missing = self.world.from_main(lambda: self._open(held))
            try:
                return self._fill(missing, log, on_progress)
            except Exception:
                # nothing came of it, unless there are PNG files, which are its own only as long as it is there
                if self.world.main and self.files.png_dir is None and not self.files.shards.spans():
                    self.files.shards.remove()
                raise

    def _fill(self, missing: Int64Array, log: Callable[[str], None], on_progress: OnProgress) -> int:
        mine = np.array_split(missing, self.world.size)[self.world.rank]
        pipeline = self.world.together(lambda: self.plan.pipeline(self.runtime, len(mine)))
        if len(missing) < len(self.indices):
            log(f"going on: {len(self.indices) - len(missing)} of {len(self.indices)} images are there")
        log(
            f"drawing: {len(missing)} images of {self.plan.image_size} pixels, {pipeline.steps} "
            f"{self.plan.config.sampler} steps, seed {self.plan.config.seed}; {self.world.describe()}, "
            f"{self.runtime.describe(pipeline.engine.calls)}"
        )
        if pipeline.steps > 250 and self.runtime.device.type == "cpu":
            log("hint: fewer steps are faster, try --sampler dpm++ --steps 20")
        began = time.perf_counter()
        # until all are done: a signal to all must not end one that waits for the others before they can say so
        with StopRequest(_ANSWER) as stop:
            status = self.world.together(lambda: self._draw(pipeline, mine, stop, on_progress))
            status = max(self.world.gathered(status))
        if status:
            there = sum(map(len, self.files.shards.spans()))
            log(
                f"stopped by {signal.Signals(status - 128).name}: {there} of {len(self.indices)} images are finished, "
                f"in {self.files.shards.folder}; {self.files.again} goes on"
            )
            return status
        speed = f", {len(missing) / (time.perf_counter() - began):.2f} images/s" if len(missing) else ""
        self.world.from_main(lambda: self._finish(pipeline, log, speed))
        return 0

    def _open(self, held: ExitStack) -> Int64Array:
        """The positions that are still to be drawn, the folder for the shards being held from here on."""
        shards, files = self.files.shards, self.files
        # where torchrun starts the job once more, what was to be overwritten has been
        again = restarted() and launcher() and Lease.begun_by(shards.folder) == launcher()
        new = not shards.folder.exists()
        try:
            held.enter_context(Lease(shards.folder, launcher(), option="--out"))
            found = None if files.overwrite and not again else shards.settings()
            if found is None:
                shards.begin({**self.settings, **files.manifest})
            elif difference := _difference(found, {**self.settings, **files.manifest}):
                raise ValueError(
                    f"{shards.folder} holds an unfinished job with another {difference}: give the same flags to go on "
                    "with it, name another --out, or begin anew with --overwrite"
                )
        except OSError:
            if new:
                shards.remove()
            raise
        files.clean()
        return shards.missing(len(self.indices))

    def _draw(self, pipeline: Pipeline, positions: Int64Array, stop: StopRequest, on_progress: OnProgress) -> int:
        """Draw the images at ``positions``, increasing, each batch being kept while the next is drawn.

        Returns the exit status, not 0 where it was stopped before the last one.
        """
        if not len(positions):
            return 0
        labels = None if self.labels is None else self.labels[positions]
        meter = _Meter(on_progress, len(positions) * self.world.size, pipeline.steps)
        saving: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="shards") as writer:

            def on_step(images: int) -> None:
                meter.step(images * self.world.size)
                if stop.received is not None:
                    raise Stopped

            try:
                for images in pipeline.draw(self.indices[positions], labels, on_step):
                    if saving is not None:
                        saving.result()
                    here, positions = np.split(positions, [len(images)])
                    saving = writer.submit(self.files.keep, here, images, self._names(here))
            finally:
                if saving is not None:
                    saving.result()
        return 128 + stop.received if stop.received is not None and len(positions) else 0

    def _names(self, positions: Int64Array) -> list[str]:
        labels = None if self.labels is None else self.labels[positions]
        return png_names(self.indices[positions], labels, self.class_names)

    def _finish(self, pipeline: Pipeline, log: Callable[[str], None], speed: str) -> None:
        try:
            self._write(pipeline, log, speed)
        except OSError as error:
            where = self.files.shards.folder
            raise OSError(f"{error}: the images are all in {where}, and {self.files.again} goes on") from error
        self.files.shards.remove()

    def _write(self, pipeline: Pipeline, log: Callable[[str], None], speed: str) -> None:
        files, labels = self.files, self.labels
        first = files.join(self.plan.image_size, self.indices, labels, self.class_names, self.settings)
        columns, names = None, None
        if labels is not None:
            shown = labels[: len(first)]
            names = [self.class_names[label] for label in shown]
            in_turn = len(np.unique(shown))
            if 1 < in_turn <= MOST_COLUMNS and np.array_equal(shown[in_turn:], shown[:-in_turn]):
                columns = in_turn
        if self.plan.ends is not None:
            columns = min(len(first), MOST_COLUMNS)  # from one end to the other
        save_grid(files.grid, first, columns, names)
        log(f"wrote {files.out} and {files.grid}{speed}")
        if files.png_dir is not None:
            log(f"wrote {len(self.indices)} PNG files in {files.png_dir}")
        if files.trajectory is not None:
            label = None if labels is None else int(labels[0])
            most = FRAMES[files.trajectory.suffix]
            save_trajectory(files.trajectory, pipeline.trajectory(int(self.indices[0]), label, most))
            log(f"wrote {files.trajectory}, how image {self.indices[0]} came about")


def _difference(found: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first setting that differs, with both values; empty where none does."""
    for name in {**found, **ours}:
        theirs, own = found.get(name), ours.get(name)
        if isinstance(theirs, Mapping) and isinstance(own, Mapping):
            if inner := _difference(theirs, own):
                return f"{name}'s {inner}"
        elif theirs != own:
            told = [value.get("file") if isinstance(value, Mapping) else value for value in (theirs, own)]
            return f"{name} ({told[0]}, not {told[1]})"
    return ""


class _Meter:
    """Tells how far the loop is, and how fast it goes."""

    def __init__(self, tell: OnProgress, images: int, steps: int) -> None:
        self._tell = tell
        self._total, self._steps = images * steps, steps
        self._done = 0
        self._began = time.perf_counter()

    def step(self, images: int) -> None:
        """So many images have taken one more step."""
        self._done = min(self._done + images, self._total)
        seconds = time.perf_counter() - self._began
        left = seconds / self._done * (self._total - self._done)
        speed = self._done / self._steps / seconds
        self._tell(self._done, self._total, f"{speed:.2f} images/s, {duration(left)} left")
