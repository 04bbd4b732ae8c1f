"""The training loop, on one process or many."""

import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff import checkpoint
from fastdiff.config import Compile, RunConfig
from fastdiff.data import Dataset, batch_indices, batches, prefetch_to_device
from fastdiff.data.batches import Batch
from fastdiff.models import UNet, forward_flops
from fastdiff.runtime.device import Runtime, compiling
from fastdiff.runtime.distributed import Agreement, SaidElsewhere, World
from fastdiff.runtime.signals import StopRequest
from fastdiff.runtime.threads import Pace
from fastdiff.runtime.throughput import peak_flops, peak_memory_gib
from fastdiff.runtime.words import duration, printable
from fastdiff.training.classification import Classification
from fastdiff.training.ema import snapshot_steps
from fastdiff.training.fitting import choose_microbatch, seconds_per_update, warm_up
from fastdiff.training.held_out import HeldOut, Rows, measure, summary
from fastdiff.training.metrics import ProgressFiles
from fastdiff.training.objective import Denoising
from fastdiff.training.parallel import parallelise
from fastdiff.training.preview import save_previews
from fastdiff.training.recipe import TimeLimit
from fastdiff.training.run_folder import Log, Shown, Silence, write_config
from fastdiff.training.saver import Saver, free_space_check
from fastdiff.training.state import TrainState
from fastdiff.training.trackers import Sink, open_sinks
from fastdiff.training.update import Updater, learning_rate, micro_batches

MAX_SKIPPED_STEPS = 25
"""Consecutive skipped updates that end the run, checked once per log interval. fp16's initial search for a loss scale,
which halves it from 2^16, skips fewer."""

OFFENDERS = 8
"""Number of samples of a skipped update that the log names."""

OnUpdate = Callable[[int, int, str], None]


@dataclass
class Clock:
    """Times the updates since the last line of the log, excluding checkpoints and previews between them."""

    images: int = 0
    waited: float = 0.0
    paused: float = 0.0
    began: float = field(default_factory=lambda: time.perf_counter())

    def read(self) -> dict[str, float]:
        """Images per second, and the fraction of the time spent waiting for data."""
        seconds = max(time.perf_counter() - self.began - self.paused, 1e-9)
        return {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}


class Trainer:
    """Trains the run in ``run_dir`` until its last update or a signal.

    ``among`` are the rows of the dataset to train on, by default all; ``held_out`` are images to measure the model on.
    ``limit`` is the time that the run has: then the number of updates follows their speed. ``environment`` is what
    config.json and the checkpoints then say about the process, as JSON-compatible values.

    Every process of ``world`` creates one and calls the same methods; rank 0 writes the run folder.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        runtime: Runtime,
        run_dir: Path,
        log: Log | Shown | Silence,
        world: World | None = None,
        among: Rows | None = None,
        held_out: HeldOut | None = None,
        limit: TimeLimit | None = None,
    ) -> None:
        # Draw initial weights on the CPU, so that they are equal for every device and process.
        torch.manual_seed(config.train.seed)
        self.world = world or World()
        self.dataset = dataset
        self.among = np.arange(len(dataset.images)) if among is None else among
        self.held_out = held_out
        self.runtime = runtime
        self.run_dir = run_dir
        self.log = log
        self.environment: dict[str, Any] = {}
        self.device = runtime.device
        self.objective = (Classification if config.classifies else Denoising)(config, runtime)
        self.model = self.objective.build(runtime).train()
        if self.device.type == "cuda":
            # A resumed run must match an uninterrupted one bit for bit, but cuDNN may sum in any order.
            torch.backends.cudnn.deterministic = True
        if config.train.microbatch == "auto":
            found = choose_microbatch(config, self.model, self.objective, runtime, self.world)
            config = replace(config, train=replace(config.train, microbatch=found))
            log(f"microbatch auto: {found} images in a forward pass")
        self.limit = limit
        self.config = config
        if limit is not None:
            self.config = config = self._timed(config, limit)
            left = self.world.from_main(lambda: limit.deadline - time.perf_counter())
            settled = Compile.ON if runtime.compiles(self.model_calls, left) else Compile.OFF  # however long it becomes
            self.runtime = runtime = replace(runtime, compile=settled)
            self.config = config = replace(config, runtime=replace(config.runtime, compile=settled))
        with self._explained():
            self.module = parallelise(self.model, self.device, self.world, config.train.parallel)
            self.forward = runtime.prepare(self.module, self.model_calls)
            if compiles := runtime.compiles(self.model_calls):
                log(compiling())
            began = time.perf_counter()
            if self.world.size > 1 or compiles:  # before the first update: no rate is made of it, and Ctrl-C ends it
                warm_up(config, self.objective, self.module, self.forward, self.world)
            if compiles:
                log(f"compiled in {duration(time.perf_counter() - began)}")
        self.state = TrainState(config, self.model, self.objective, runtime.precision, self.world)
        self.saver = Saver(run_dir, config.train, log)
        self._snapshot_step = 0
        self._pace = Pace("updates", on_cpu=self.device.type == "cpu")
        self._peak_images_per_s: float | None = None  # unknown
        if (peak := peak_flops(self.device, runtime.precision)) is not None:
            flops_per_image = 3 * forward_flops(config.model)  # backward is two forwards
            self._peak_images_per_s = peak * self.world.size / flops_per_image

    def _timed(self, config: RunConfig, limit: TimeLimit) -> RunConfig:
        """The configuration with as many updates as there is time for, by the speed of a few passes. Collective."""
        model = self.model.to(self.device)
        with self.world.explained("use --microbatch auto"):
            seconds = seconds_per_update(config, self.objective, model, self.runtime.eager(model), self.world)
        config, line = self.world.from_main(lambda: limit.planned(config, seconds))
        self.log(line)
        return config

    @property
    def model_calls(self) -> int:
        """Forward passes of the whole run, so that a resumed run makes the same decision to compile."""
        return self.config.train.steps * len(micro_batches(self.config.train, self.world.size))

    def run(self, on_update: OnUpdate | None = None) -> int:
        """Train; returns the process's exit status.

        Calls ``on_update(step, steps, note)`` after each update, with a note every log_interval.

        The status is 0 at the run's end, 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, all with the last
        update saved.
        """
        state, world = self.state, self.world
        outputs = world.on_all(lambda: self._open_outputs() if world.main else [])
        update, train = self._updater(), self.config.train
        agreement, clock, stopped_by = Agreement(world), Clock(), 0
        snapshots = snapshot_steps(train.steps) if train.snapshots_kept else frozenset()

        def due(interval: int) -> bool:
            return interval > 0 and (state.step % interval == 0 or state.step == train.steps)

        with (
            StopRequest() as stop,
            ExitStack() as outputs_closed,
            closing(self._batches()) as data,
            self._no_update_lost(),
            self._explained(),
        ):
            for output in outputs:
                outputs_closed.callback(output.close)
            while state.step < train.steps and not stopped_by:
                asked = time.perf_counter()
                images, labels = next(data)
                clock.waited += time.perf_counter() - asked
                update(images, labels)
                clock.images += train.batch_size
                note = ""
                measures = self.held_out is not None and due(self.held_out.interval)
                if due(train.log_interval) or measures:
                    note = self._report(outputs, clock, measures)
                    clock = Clock()
                if self.limit is not None and (note or self._is_early(self.limit)) and self._replanned(self.limit):
                    update, train = self._updater(), self.config.train
                    snapshots = snapshot_steps(train.steps) if train.snapshots_kept else frozenset()
                if on_update is not None:
                    on_update(state.step, train.steps, note)
                paused = time.perf_counter()
                if state.step in snapshots:
                    self._keep_averages()
                if due(train.save_interval):
                    self._save()
                if due(train.preview_interval):
                    self._preview(outputs)
                clock.paused += time.perf_counter() - paused
                # Every process learns the maxima one step later, so that all stop at the same step.
                stopped_by, failed = agreement.exchange(stop.received or 0, self.saver.failed)
                if failed:
                    self.saver.check()
                    raise SaidElsewhere("the first process could not save")
            agreement.settle()
        if stopped_by and state.step < train.steps:
            self.log(f"stopped by {signal.Signals(stopped_by).name} at step {state.step}, which is saved")
            return 128 + stopped_by  # the shell's convention for a process ended by a signal
        return 0

    def _updater(self) -> Updater:
        return Updater(self.config, self.state, self.objective, self.module, self.forward, self.world)

    def _is_early(self, limit: TimeLimit) -> bool:
        """Whether the speed is to be looked at though there is no line for the log, which may be rare; waits for it."""
        done = self.state.step - limit.start
        if done == 2 or done & (done - 1):  # after 1, 4, 8, 16, ... updates
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return True

    def _replanned(self, limit: TimeLimit) -> bool:
        """Whether the number of updates changed, as their speed asks. Collective."""
        config = self.world.from_main(lambda: limit.again(self.config, self.state.step))
        if config == self.config:
            return False
        self.config = self.state.config = config
        if self.world.main:
            try:
                write_config(config, self.run_dir, self.environment)
            except OSError as error:  # the next checkpoint has the number of updates, too
                self.log(f"warning: config.json keeps its former number of updates: {error}")
        return True

    def rehearsed(self) -> str:
        """One line about memory and speed, from passes of a batch without an update. Collective."""
        train = self.config.train
        with self._explained():
            seconds = seconds_per_update(self.config, self.objective, self.module, self.forward, self.world)
        speed = train.batch_size / seconds
        left = duration((train.steps - self.state.step) * train.batch_size / speed)
        eager = "" if self.runtime.compiles(self.model_calls) else " eagerly,"
        # AdamW allocates its two moments in the first update
        memory = peak_memory_gib(self.device) + 8 * sum(p.numel() for p in self.state.parameters) / 2**30
        return (
            f"dry run: {speed:.1f} images/s{eager} without data and optimizer, about {left} for {train.steps} updates, "
            f"{memory:.2f} GiB; nothing was trained, and the run folder is as it was"
        )

    def _batches(self) -> Generator[Batch, None, None]:
        """This process's part of the batches from the state's step on, on the device."""
        train, world = self.config.train, self.world
        share = train.batch_size // world.size
        rows = slice(world.rank * share, (world.rank + 1) * share)
        pin = self.device.type == "cuda"
        data = batches(
            self.dataset,
            self.config.data,
            train.batch_size,
            train.seed,
            self.state.step,
            among=self.among,
            rows=rows,
            pin=pin,
        )
        return prefetch_to_device(data, self.device)

    def _open_outputs(self) -> list[Sink]:
        for name in checkpoint.remove_leftovers(self.run_dir):
            self.log(f"removed {name}, which a killed process left behind")
        if (count := self.config.train.snapshots_kept) > 0:  # later ones are of updates that come again
            checkpoint.keep_snapshots(self.run_dir, self.state.step, count)
        # approximately a checkpoint: weights, EMAs and two Adam moments in fp32
        free_space_check(self.run_dir, 4 * self.state.num_parameters * (3 + len(self.state.averages)))
        sinks = open_sinks(self.config.train, self.run_dir, self.config.to_dict(), self.log)
        write_config(self.config, self.run_dir, self.environment)
        return [ProgressFiles(self.run_dir, self.state.step, self.log, self.objective.columns), *sinks]

    def _report(self, outputs: Sequence[Sink], clock: Clock, measures: bool) -> str:
        """Log the metrics and return the progress note; ValueError after too many skipped updates in a row.

        If it ``measures`` they include those of the held-out images.
        """
        state, train = self.state, self.config.train
        row: dict[str, float] = {"step": state.step, "samples": state.step * train.batch_size}
        row |= state.sums.read(self.world.all_reduce)
        row |= {"lr": learning_rate(train, state.step - 1), **clock.read()}
        row["memory_gib"] = peak_memory_gib(self.device)
        if self._peak_images_per_s is not None:
            row["mfu"] = row["images_per_s"] / self._peak_images_per_s
        if state.scaler.is_enabled():
            row["lg_loss_scale"] = float(np.log2(state.scaler.get_scale()))
        if measures:
            row |= self._measure(row["loss"])
        for output in outputs:
            output.write(row)
        left = (train.steps - state.step) * train.batch_size / row["images_per_s"]
        accuracy = f"accuracy {row['acc1']:.1%}  " if "acc1" in row else ""
        terms = [f"{name} {row[name]:.4f}" for name in ("mse", "vb") if name in row and row[name] != row["loss"]]
        said = "".join([f"({', '.join(terms)})  " if terms else "", accuracy])
        note = (
            f"loss {row['loss']:.4f}  {said}{duration(left)} left  {row['images_per_s']:.1f} images/s  "
            f"grad norm {row['grad_norm']:.3f}  data wait {row['data_wait']:.0%}"
        )
        self.log(f"step {state.step}/{train.steps}  {note}", shown=False)
        if (warning := self._pace.warning(row["images_per_s"])) is not None:
            self.log(warning)
        if row["skipped"]:
            self.log(f"warning: {row['skipped']} of the last updates skipped; {self._offenders()}")
        if (bad := int(state.guard.in_a_row)) >= MAX_SKIPPED_STEPS:
            if state.guard.was_spike:
                what, remedy = "the loss was a spike", f"raise --spike-guard {train.spike_guard:g}, or lower --lr"
            else:
                what = "the gradient was not finite"
                remedy = "lower --lr, or use --grad-clip 1, or --precision bf16 or fp32"
            self.world.refuse(
                f"{what} in the last {bad} updates: {remedy}; the last good checkpoint: {self.saver.last_good()}"
            )
        return note

    def _measure(self, training: float) -> dict[str, float]:
        """The terms of the held-out images, of which every resumed run has the same. Collective.

        The log has them beside the mean ``training`` loss.
        """
        assert self.held_out is not None
        train, size = self.config.train, micro_batches(self.config.train, self.world.size)[0].stop
        found = measure(self.held_out, self.objective, self.model, self.runtime, self.world, train.seed, size)
        self.log(f"step {self.state.step}: {summary(found, len(self.held_out.rows), training)}")
        return found

    def _offenders(self) -> str:
        """Name the last skipped update and its samples with the largest losses. Collective."""
        guard, train = self.state.guard, self.config.train
        if (step := int(guard.step)) < self.state.first_step:
            return f"the last one was update {step + 1}, before this run was resumed"
        losses = np.concatenate(self.world.all_gather_object(guard.losses.cpu().numpy()))
        drawn, _ = batch_indices(len(self.among), train.batch_size, train.seed, step)
        rows = self.among[drawn]
        worst = np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")[:OFFENDERS]
        named = ", ".join(f"{rows[i]} {printable(self.dataset.names[rows[i]])} ({losses[i]:.3g})" for i in worst)
        return f"the last one was update {step + 1}; its samples with the largest losses: {named}"

    def _save(self) -> None:
        """Start saving this step, unless it was saved or loaded."""
        step = self.state.step
        if step in (self._snapshot_step, self.state.first_step):
            return
        self.world.on_all(self.saver.wait)  # before taking another snapshot; has no timeout
        files = self.state.snapshot(self.run_dir, **({"environment": self.environment} if self.environment else {}))
        self._snapshot_step = step
        if self.world.main:
            self.saver.save(step, files, self._copied())

    def _keep_averages(self) -> None:
        """Start writing a snapshot of the power-function averages. Collective."""
        self.world.on_all(self.saver.wait)
        file = self.state.snapshot_of_averages(self.run_dir)
        if file is not None:
            self.saver.keep_averages(file, self.config.train.snapshots_kept, self._copied())

    def _copied(self) -> Callable[[], None] | None:
        """What waits for the copies to the host that were started."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_stream(self.device).record_event().synchronize

    def _preview(self, outputs: Sequence[Sink]) -> None:
        assert isinstance(self.model, UNet)
        folder = self.run_dir / "previews"
        try:
            paths = save_previews(folder, self.state, self.model, self.dataset, self.runtime)
        except (ValueError, OSError) as error:  # raised on every process alike; a preview must not end a run
            self.log(f"warning: no previews of step {self.state.step}: {error}")
            return
        for path in paths:
            for output in outputs:
                output.image(path.stem.split("_", 1)[1], path, self.state.step)

    @contextmanager
    def _no_update_lost(self) -> Iterator[None]:
        """Save when the run ends for any reason, if its last update is complete."""
        try:
            yield
        except BaseException as error:
            # Do not save half an update, a state that other processes would have to help gather, or after a second
            # Ctrl-C, which asks to stop without saving.
            if self.world.size == 1 and self.state.whole and not isinstance(error, KeyboardInterrupt):
                with suppress(ValueError, OSError, RuntimeError):  # report the first error
                    self._save()
            with suppress(ValueError, OSError):
                self.saver.wait()
            raise
        self._save()
        self.world.on_all(self.saver.wait)

    def _explained(self) -> AbstractContextManager[None]:
        """World.explained, which suggests a micro-batch size when memory runs out."""
        size = micro_batches(self.config.train, self.world.size)[0].stop
        smaller = f"--microbatch {size // 2}, or auto" if size > 1 else "--use-checkpoint"
        return self.world.explained(f"use {smaller}", f"out of memory with {size} images in a forward pass")
