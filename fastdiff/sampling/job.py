"""A sampling job: draws images into files, with one process or many, and resumes if it was interrupted."""

import hashlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.checkpoint import Checkpoint, ClassifierCheckpoint, Lease, sha256
from fastdiff.config import Config, SampleConfig, TimeGrid
from fastdiff.runtime.device import Runtime, compiling
from fastdiff.runtime.distributed import World, launcher, restarted
from fastdiff.runtime.signals import StopRequest
from fastdiff.runtime.threads import Pace, one_thread
from fastdiff.runtime.words import duration
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.files import FRAMES, SampleFiles, png_names
from fastdiff.sampling.loop import Int64Array, StopSampling
from fastdiff.sampling.output import MOST_COLUMNS, columns_by_class, save_grid, save_trajectories
from fastdiff.sampling.plan import Plan
from fastdiff.sampling.time_grids import chosen_grid

_DIGITS = 16  # of the SHA-256 of a base sample's name and length

_ANSWER = "stopping after this step; finished images are kept"

_INTERVAL = 5.0
"""Seconds, at least, whose steps are compared with the first ones."""

OnProgress = Callable[[int, int, str], None]
"""Called with the number of image steps done, their total, and the speed as text."""


class Job:
    """Draws the images ``indices`` (N,) of a plan into files.

    ``settings`` are those of ``settings_of``: an unfinished job resumes only if its settings are equal.
    """

    def __init__(
        self,
        plan: Plan,
        indices: Int64Array,
        files: SampleFiles,
        settings: Mapping[str, Any],
        runtime: Runtime,
        world: World,
    ) -> None:
        self.plan = plan
        self.indices = indices
        self.labels = plan.labels(indices)
        self.class_names = plan.known.names if plan.known is not None else ()
        if files.png_dir is not None:
            # refuses names that are too long for a file
            png_names(indices[:1], None if self.labels is None else self.labels[:1], self.class_names)
        self.files = files
        self.settings = settings
        self.runtime = runtime
        self.world = world

    def run(self, log: Callable[[str], None], on_progress: OnProgress) -> int:
        """Draw the missing images and write the files; return the exit status, 128 + a signal's number if one came.

        Collective: every process writes its shards, and the first one the final files. If it fails with ValueError or
        OSError, finished images are kept and the same job resumes from them.
        """
        with ExitStack() as held:
            missing = self.world.from_main(lambda: self._open(held))
            with self._empty_folder_removed():
                mine = np.array_split(missing, self.world.size)[self.world.rank]
                engine = self.world.on_all(lambda: self.plan.engine(self.runtime, len(mine)))
                if len(missing) < len(self.indices):
                    log(f"resuming: {len(self.indices) - len(missing)} of {len(self.indices)} images are finished")
                engines = [part for part in (engine, engine.base) if isinstance(part, Engine)]
                if self.plan.config.time_grid is None and TimeGrid.TUNED in [part.grid for part in engines]:
                    log("time grid: the one tuned for this checkpoint, sampler and number of steps (--time-grid)")
                log(
                    f"drawing: {len(missing)} images of {self.plan.image_size} pixels, {engine.steps} "
                    f"{self.plan.config.sampler} steps, seed {self.plan.config.seed}; {self.world.describe()}, "
                    f"{self.runtime.describe(engine.calls)}"
                )
                if self.runtime.compiles(engine.calls):
                    log(compiling())
                if engine.steps > 250 and self.runtime.device.type == "cpu":
                    log("hint: fewer steps are faster, try --sampler dpm++ --steps 20")
                began = time.perf_counter()
                # held until all are done: a signal to all must not kill a process that waits for the others' status
                with StopRequest(_ANSWER) as stop:
                    status = self.world.on_all(lambda: self._draw(engine, mine, stop, log, on_progress))
                    status = max(self.world.all_gather_object(status))
                if status:
                    there = sum(map(len, self.files.shards.spans()))
                    log(
                        f"stopped by {signal.Signals(status - 128).name}: {there} of {len(self.indices)} images are "
                        f"finished, in {self.files.shards.folder}; {self.files.again} resumes the job"
                    )
                    return status
                speed = f", {len(missing) / (time.perf_counter() - began):.2f} images/s" if len(missing) else ""
                self.world.from_main(lambda: self._finish(engine, log, speed))
                return 0

    @contextmanager
    def _empty_folder_removed(self) -> Iterator[None]:
        """After a failure, remove the shards' folder if there is nothing to keep."""
        try:
            yield
        except Exception:
            # PNG files, if any, are known as the job's only while its folder exists
            if self.world.main and self.files.png_dir is None and not self.files.shards.spans():
                self.files.shards.remove()
            raise

    def _open(self, held: ExitStack) -> Int64Array:
        """Take the lease on the shards' folder, which ``held`` releases; return the positions still to be drawn."""
        shards, files = self.files.shards, self.files
        # if torchrun restarts the job, --overwrite has already taken effect
        again = restarted() and launcher() and Lease.begun_by(shards.folder) == launcher()
        new = not shards.folder.exists()
        try:
            held.enter_context(Lease(shards.folder, launcher(), shards.option))
            found = None if files.overwrite and not again else shards.settings()
            ours = {**self.settings, **files.manifest, "inputs": self._inputs()}
            if found is None:
                shards.begin(ours)
            elif difference := self._changed(found, ours):
                raise ValueError(
                    f"{shards.folder} holds an unfinished job with another {difference}: give the same flags to "
                    "resume it, name another --out, or start again with --overwrite"
                )
            elif found != ours:  # in what is still to be drawn
                shards.describe(ours)
        except OSError:
            if new:
                shards.remove()
            raise
        files.clean()
        return shards.missing(len(self.indices))

    def _inputs(self) -> list[str]:
        """A digest of each file of a folder of base samples; empty without one."""
        described = [] if self.plan.base is None else self.plan.base.described()
        return [hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:_DIGITS] for text in described]

    def _changed(self, found: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
        """The first setting in which the unfinished job ``found`` differs from this one; empty if it can go on.

        Of base samples in a folder only those count whose images are finished, and of the numbers those of these.
        """
        if not (found.get("inputs") and ours["inputs"]):
            return _difference({**found, "inputs": []}, {**ours, "inputs": []})  # an earlier version wrote none
        apart = ("inputs", "base_samples", "indices")
        rest = [{name: value for name, value in job.items() if name not in apart} for job in (found, ours)]
        if difference := _difference(*rest):
            return difference
        spans = self.files.shards.spans()
        done = np.concatenate([np.arange(0), *(np.arange(span.start, span.stop) for span in spans)])
        theirs, known = _numbers(found["indices"]), max((span.stop for span in spans), default=0)
        if known > min(len(theirs), len(self.indices)) or not np.array_equal(theirs[done], self.indices[done]):
            return _difference({"indices": found["indices"]}, {"indices": ours["indices"]})
        before, now = np.array(found["inputs"]), np.array(ours["inputs"])
        numbers = self.indices[done]
        other = np.flatnonzero(before[numbers % len(before)] != now[numbers % len(now)])
        return f"base_samples (that of image {numbers[other[0]]}, which is finished, has changed)" if len(other) else ""

    def _draw(
        self,
        engine: Engine,
        positions: Int64Array,
        stop: StopRequest,
        log: Callable[[str], None],
        on_progress: OnProgress,
    ) -> int:
        """Draw the images at the increasing ``positions``, saving each batch while the next one is drawn.

        Returns the exit status, which is not 0 if a signal stopped it before the last image.
        """
        if not len(positions):
            return 0
        labels = None if self.labels is None else self.labels[positions]
        total = len(positions) * self.world.size * engine.steps
        done = first = counted = 0
        began = since = 0.0
        pace = Pace("steps", on_cpu=self.runtime.device.type == "cpu")
        saving: Future[None] | None = None
        with (
            ThreadPoolExecutor(1, thread_name_prefix="shards", initializer=one_thread) as writer,
            ExitStack() as until_first_step,
        ):
            until_first_step.enter_context(stop.at_once())  # it may compile for minutes, and nothing is lost

            def on_step(images: int) -> None:
                nonlocal done, first, began, counted, since
                done = min(done + images * self.world.size, total)
                note, now = "", time.perf_counter()
                if began:
                    rate = (done - first) / (now - began)
                    note = f"{duration((total - done) / rate)} left  {rate / engine.steps:.2f} images/s"
                    if now - since >= _INTERVAL:
                        if (warning := pace.warning((done - counted) / (now - since))) is not None:
                            log(warning)
                        counted, since = done, now
                else:
                    until_first_step.close()
                    first, began = counted, since = done, now  # compilation is in the first step: no rate is made of it
                on_progress(done, total, note)
                if stop.received is not None:
                    raise StopSampling

            try:
                for images in engine.draw(self.indices[positions], labels, on_step):
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

    def _finish(self, engine: Engine, log: Callable[[str], None], speed: str) -> None:
        try:
            self._write(engine, log, speed)
        except OSError as error:
            where = self.files.shards.folder
            raise OSError(f"{error}: all images are in {where}, and {self.files.again} resumes the job") from error
        self.files.shards.remove()

    def _write(self, engine: Engine, log: Callable[[str], None], speed: str) -> None:
        files, labels = self.files, self.labels
        first = files.join(self.plan.image_size, self.indices, labels, self.class_names, self.settings)
        columns, names = None, None
        if labels is not None:
            shown = labels[: len(first)]
            names, columns = [self.class_names[label] for label in shown], columns_by_class(shown)
        if self.plan.ends is not None:
            columns = min(len(first), MOST_COLUMNS)  # from one endpoint to the other
        save_grid(files.grid, first, columns, names)
        log(f"wrote {files.out} and {files.grid}{speed}")
        if files.png_dir is not None:
            log(f"wrote {len(self.indices)} PNG files in {files.png_dir}")
        if files.trajectory is not None:
            chosen, most = slice(files.trajectory_images), FRAMES[files.trajectory.suffix]
            frames = engine.trajectories(self.indices[chosen], None if labels is None else labels[chosen], most)
            save_trajectories(files.trajectory, frames)
            log(f"wrote {files.trajectory}, the steps of image {', '.join(map(str, self.indices[chosen]))}")


def _difference(found: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first setting that differs, with both values; empty if none does."""
    for name in {**found, **ours}:
        theirs, own = found.get(name), ours.get(name)
        if isinstance(theirs, Mapping) and isinstance(own, Mapping):
            if inner := _difference(theirs, own):
                return f"{name}'s {inner}"
        elif theirs != own:
            told = [value.get("file") if isinstance(value, Mapping) else value for value in (theirs, own)]
            return f"{name} ({told[0]}, not {told[1]})"
    return ""


def settings_of(
    plan: Plan,
    indices: Int64Array,
    runtime: Runtime,
    model: Path,
    classifier: Path | None = None,
    guide: Path | None = None,
    super_res: Path | None = None,
    base_samples: Path | None = None,
) -> dict[str, Any]:
    """Everything that determines the images of a job, as values for JSON: the SHA-256 of each file that it reads or, of
    a folder's images, their names and sizes.
    """
    settings = plan.config.to_dict()
    del settings["batch_size"]  # does not determine the images, nor do device, kernels and torch.compile
    del settings["num_samples"]
    del settings["time_grid"]  # what it means is in the timesteps
    settings |= _grid(plan.checkpoint, plan.config)
    settings["indices"] = _ranges(indices)
    settings["class"] = ",".join(map(str, plan.classes)) or None
    settings["precision"] = str(runtime.precision)
    settings["model"] = _described(model, plan.checkpoint, plan.checkpoint.model_config)
    if classifier is None or plan.classifier is None:
        del settings["classifier_scale"]
    else:
        settings["classifier"] = _described(classifier, plan.classifier, plan.classifier.config)
    if plan.config.guidance_interval is None:
        del settings["guidance_interval"]
    if guide is not None and plan.guide is not None:
        settings["guide"] = _described(guide, plan.guide, plan.guide.model_config)
    if super_res is not None and plan.super_res is not None:
        settings["super_res"] = _described(super_res, plan.super_res, plan.super_res.model_config)
        settings["super_res"] |= _grid(plan.super_res, plan.config)
    if base_samples is not None:
        described = [] if plan.base is None else plan.base.described()
        settings["base_samples"] = _of_texts(base_samples, described) if described else _fingerprint(base_samples)
    if plan.ends is not None:
        settings["interpolate"] = [end if end.isdecimal() else _fingerprint(Path(end)) for end in plan.ends]
    return settings


def _described(path: Path, loaded: Checkpoint | ClassifierCheckpoint, architecture: Config) -> dict[str, Any]:
    process = {} if loaded.diffusion_config is None else loaded.diffusion_config.to_dict()
    about = {name: loaded.metadata[name] for name in ("ema_rate", "ema_length") if name in loaded.metadata}
    return {
        "file": path.name,
        "step": loaded.step,
        "sha256": sha256(path),
        **about,
        **architecture.to_dict(),
        **process,
    }


def _grid(checkpoint: Checkpoint, config: SampleConfig) -> dict[str, Any]:
    """The timesteps, unless they are the evenly spaced ones, which follow from the other settings."""
    grid, timesteps = chosen_grid(checkpoint, config)
    return {} if timesteps is None else {"time_grid": grid, "timesteps": timesteps}


def _fingerprint(path: Path) -> str:
    path = path.expanduser()
    return f"{path.name} {sha256(path)}"


def _of_texts(path: Path, texts: list[str]) -> str:
    digest = hashlib.sha256("\n".join(texts).encode(errors="surrogateescape"))
    return f"{path.expanduser().name} {digest.hexdigest()}"


def _ranges(numbers: Int64Array) -> str:
    """The numbers in the format of --indices: 17,42,100-199."""
    parts: list[list[int]] = []
    for number in numbers.tolist():
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _numbers(ranges: str) -> Int64Array:
    """The inverse of _ranges."""
    ends = [part.partition("-") for part in ranges.split(",")]
    return np.concatenate([np.arange(int(first), int(last or first) + 1) for first, _, last in ends])
