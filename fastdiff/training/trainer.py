"""The training loop, on one process or many."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff import checkpoint
from fastdiff.config import Compile, RunConfig
from fastdiff.data import Dataset, batch_indices, batches, prefetch_to_device
from fastdiff.data.classes import composed, listed
from fastdiff.diffusion import build_diffusion
from fastdiff.interop.openai_run import read_run, step_of
from fastdiff.models import build_model, forward_flops
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.distributed import Agreement, SaidElsewhere, World
from fastdiff.runtime.memory import out_of_memory
from fastdiff.runtime.signals import StopRequest
from fastdiff.runtime.throughput import peak_flops, peak_memory_gib
from fastdiff.runtime.words import duration, printable
from fastdiff.training.fine_tuning import carried_over, configuration, read_initial
from fastdiff.training.fitting import largest_that_fits
from fastdiff.training.metrics import ProgressFiles
from fastdiff.training.parallel import own_part, parallelise, whole_of
from fastdiff.training.preview import save_previews
from fastdiff.training.run_folder import Log, Silence, write_config
from fastdiff.training.saver import Saver, free_space_check
from fastdiff.training.state import TrainState
from fastdiff.training.trackers import Sink, open_sinks
from fastdiff.training.update import Updater, learning_rate, micro_batches, trial, warm_up

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
    began: float = field(default_factory=time.perf_counter)

    def read(self) -> dict[str, float]:
        """Images per second, and the fraction of the time spent waiting for data."""
        seconds = max(time.perf_counter() - self.began - self.paused, 1e-9)
        return {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}


class Trainer:
    """Trains the run in ``run_dir`` until its last update or a signal.

    Every process of ``world`` creates one and calls the same methods; rank 0 writes the run folder.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        runtime: Runtime,
        run_dir: Path,
        log: Log | Silence,
        world: World | None = None,
    ) -> None:
        # Draw initial weights on the CPU, so that they are equal for every device and process.
        torch.manual_seed(config.train.seed)
        self.world = world or World()
        self.dataset = dataset
        self.runtime = runtime
        self.run_dir = run_dir
        self.log = log
        self.device = runtime.device
        self.diffusion = build_diffusion(config.diffusion, runtime.kernels)
        self.model = build_model(config.model, runtime.kernels, runtime.memory_format).train()
        self.config = config
        if self.device.type == "cuda":
            # A resumed run must match an uninterrupted one bit for bit, but cuDNN may sum in any order.
            torch.backends.cudnn.deterministic = True
        with self._explained():
            if config.train.microbatch == "auto":
                self._choose_microbatch()
            self.module = parallelise(self.model, self.device, self.world, config.train.parallel)
            self.forward = runtime.prepare(self.module, self.model_calls)
            if self.world.size > 1 or runtime.compiles(self.model_calls):
                warm_up(self.config, self.diffusion, self.module, self.forward, self.world)
        self.state = self._new_state()
        self.saver = Saver(run_dir, self.config.train, log)
        self._snapshot_step = 0
        self._first_step = 0
        self._peak_flops = peak_flops(self.device, runtime.precision)
        self._flops_per_image = 3 * forward_flops(config.model) if self._peak_flops else 0.0  # backward is two forwards

    def _new_state(self) -> TrainState:
        return TrainState(self.config, self.model, self.diffusion, self.runtime.precision, self.world)

    def _choose_microbatch(self) -> None:
        """Resolve ``microbatch auto``, while reserving memory for Adam moments, EMAs and gradient buffers."""
        train = self.config.train
        numbers = sum(p.numel() for p in self.model.to(self.device).parameters())

        def attempt(images: int) -> None:
            moments_averages_messages = torch.empty(numbers * (3 + len(train.ema_rate)), device=self.device)
            forward = replace(self.runtime, compile=Compile.OFF).prepare(self.model, calls=0)
            trial(self.config, self.diffusion, forward, images, self.device)
            del moments_averages_messages

        found = largest_that_fits(train.batch_size // self.world.size, attempt, self.world)
        self.model.zero_grad(set_to_none=True)
        self.config = replace(self.config, train=replace(train, microbatch=found))
        self.log(f"microbatch auto: {found} images in a forward pass")

    def init_from(self, path: Path) -> None:
        """Start from the weights of a checkpoint; ValueError if they do not fit the model."""
        said = self.config.model.to_dict() | self.config.diffusion.to_dict()
        weights = self.world.on_all(lambda: read_initial(path, said))
        self.world.on_all(lambda: configuration(weights, said))  # rejects weights that do not fit this configuration
        own = dict(zip(self.state.names, self.state.held, strict=True))

        def fresh(name: str) -> Tensor:
            return whole_of(own_part(own[name]), own[name]).detach().cpu()

        state, lines = carried_over(weights, own, fresh, self.config.class_names, self.dataset.named)
        self.world.on_all(lambda: self.state.set_weights(state, path))
        self.state = self._new_state()
        for line in (*lines, f"weights from {path}"):
            self.log(line)

    def resume_from(self, path: Path) -> None:
        """Resume in this run folder from another run's modelNNNNNN file, improved-diffusion's (.pt) or fastdiff's.

        EMAs and optimizer state beside it are loaded too. ValueError if something does not fit.
        """
        step = step_of(path)
        if step >= (steps := self.config.train.steps):
            self.world.refuse(f"{path} is at step {step}, but steps is {steps}: give a larger --steps")
        if path.suffix == ".pt":
            self.world.on_all(lambda: self._resume_from_openai(path))
        else:
            self.world.from_main(lambda: checkpoint.verify_step(path.parent, step, offer=True))
            metadata = self.world.on_all(lambda: checkpoint.read_metadata(path, kind="model"))
            names, ours = tuple(map(composed, metadata["class_names"])), self.config.class_names
            if names and names != ours:
                self.world.refuse(
                    f"{path} has the classes {listed(names)}, and the data {listed(ours) or 'none'}: "
                    "--init-from matches them by name"
                )
            self.world.on_all(lambda: self.state.load(path.parent, step))
        self._snapshot_step = self._first_step = step
        self.log(f"resumed at step {step} from {path}")

    def _resume_from_openai(self, path: Path) -> None:
        train = self.config.train
        run = read_run(path, train.ema_rate)
        self.state.load_openai(run)
        for rate in train.ema_rate:
            if rate not in run.averages:
                self.log(f"no {run.average_path(rate).name} beside it: this EMA starts from the weights")
        if run.optimizer is None:
            self.log(f"no {run.optimizer_path.name} beside it: the optimizer state starts empty")
        for name, ours in (("lr", train.lr), ("weight_decay", train.weight_decay)):
            theirs = run.setting(name)
            if theirs not in (None, ours) and not (name == "lr" and train.lr_anneal_steps):
                flag = name.replace("_", "-")
                self.log(f"its optimizer had {name} {theirs:g}, but the run continues with --{flag} {ours:g}")

    def resume(self) -> None:
        """Resume from the run's newest intact checkpoint; ValueError if all are damaged, or it does not fit."""
        step = self.world.from_main(self._newest_whole)
        if step is None:
            self.log(f"{self.run_dir} holds no checkpoint yet: starting from scratch")
            return
        if step > (steps := self.config.train.steps):
            self.world.refuse(f"{self.run_dir} is at step {step}, but steps is {steps}: give a larger --steps")
        self.world.on_all(lambda: self.state.load(self.run_dir, step))
        self._snapshot_step = self.saver.saved_step = self._first_step = step
        self.log(f"resumed at step {step}")

    def _newest_whole(self) -> int | None:
        steps = checkpoint.saved_steps(self.run_dir)
        for step in reversed(steps):
            try:
                checkpoint.verify_step(self.run_dir, step)
            except checkpoint.NewerFormat:
                raise  # it is not damaged, and resuming from an earlier step would overwrite it
            except ValueError as error:
                self.log(f"warning: cannot resume at step {step}: {error}")
            else:
                return step
        if steps:
            raise ValueError(f"none of the {len(steps)} checkpoints in {self.run_dir} can be resumed")
        return None

    def run(self, on_update: OnUpdate | None = None) -> int:
        """Train; returns the process's exit status.

        Calls ``on_update(step, steps, note)`` after each update, with a note every log_interval.

        The status is 0 at the run's end, 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, all with the last
        update saved.
        """
        train, state, world = self.config.train, self.state, self.world
        outputs = world.on_all(lambda: self._open_outputs() if world.main else [])
        share = train.batch_size // world.size
        rows = slice(world.rank * share, (world.rank + 1) * share)
        data = batches(
            self.dataset,
            self.config.data,
            train.batch_size,
            train.seed,
            state.step,
            rows=rows,
            pin=self.device.type == "cuda",
        )
        update = Updater(self.config, state, self.diffusion, self.module, self.forward, world)
        agreement, clock, stopped_by = Agreement(world), Clock(), 0
        with (
            StopRequest() as stop,
            ExitStack() as outputs_closed,
            closing(data),  # its thread too
            closing(prefetch_to_device(data, self.device)) as prefetched,
            self._no_update_lost(),
            self._explained(),
        ):
            for output in outputs:
                outputs_closed.callback(output.close)
            while state.step < train.steps and not stopped_by:
                asked = time.perf_counter()
                images, labels = next(prefetched)
                clock.waited += time.perf_counter() - asked
                update(images, labels)
                clock.images += train.batch_size
                note = ""
                if state.step % train.log_interval == 0 or state.step == train.steps:
                    note = self._report(outputs, clock)
                    clock = Clock()
                if on_update is not None:
                    on_update(state.step, train.steps, note)
                paused = time.perf_counter()
                if state.step % train.save_interval == 0 or state.step == train.steps:
                    self._save()
                if train.preview_interval and (state.step % train.preview_interval == 0 or state.step == train.steps):
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

    def _open_outputs(self) -> list[Sink]:
        for name in checkpoint.remove_leftovers(self.run_dir):
            self.log(f"removed {name}, which a killed process left behind")
        free_space_check(self.run_dir, self.state.saved_bytes)
        sinks = open_sinks(self.config.train, self.run_dir, self.config.to_dict(), self.log)
        write_config(self.config, self.run_dir)
        return [ProgressFiles(self.run_dir, self.state.step, self.log), *sinks]

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

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Like World.explained, and suggests a micro-batch size when memory runs out."""
        with self.world.explained():
            try:
                yield
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                size = micro_batches(self.config.train, self.world.size)[0].stop
                smaller = f"--microbatch {size // 2}, or auto" if size > 1 else "--use-checkpoint"
                raise ValueError(f"out of memory with {size} images in a forward pass: use {smaller}") from error

    @property
    def model_calls(self) -> int:
        """Forward passes of the whole run, so that a resumed run makes the same decision to compile."""
        return self.config.train.steps * len(micro_batches(self.config.train, self.world.size))

    def _report(self, outputs: Sequence[Sink], clock: Clock) -> str:
        """Log the metrics and return the progress note; ValueError after too many skipped updates in a row."""
        state, train = self.state, self.config.train
        row: dict[str, float] = {"step": state.step, "samples": state.step * train.batch_size}
        row |= state.sums.read(self.world.all_reduce)
        row |= {"lr": learning_rate(train, state.step - 1), **clock.read()}
        row["memory_gib"] = peak_memory_gib(self.device)
        if self._peak_flops is not None:
            row["mfu"] = row["images_per_s"] * self._flops_per_image / (self._peak_flops * self.world.size)
        if state.scaler.is_enabled():
            row["lg_loss_scale"] = float(np.log2(state.scaler.get_scale()))
        for output in outputs:
            output.write(row)
        left = (train.steps - state.step) * train.batch_size / row["images_per_s"]
        note = (
            f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}  {row['images_per_s']:.1f} images/s  "
            f"data wait {row['data_wait']:.0%}  {duration(left)} left"
        )
        self.log(f"step {state.step}/{train.steps}  {note}", shown=False)
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

    def _offenders(self) -> str:
        """Name the last skipped update and its samples with the largest losses. Collective."""
        guard, train = self.state.guard, self.config.train
        if (step := int(guard.step)) < self._first_step:
            return f"the last one was update {step + 1}, before this run was resumed"
        losses = np.concatenate(self.world.all_gather_object(guard.losses.cpu().numpy()))
        rows, _ = batch_indices(len(self.dataset.images), train.batch_size, train.seed, step)
        worst = np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")[:OFFENDERS]
        named = ", ".join(f"{rows[i]} {printable(self.dataset.names[rows[i]])} ({losses[i]:.3g})" for i in worst)
        return f"the last one was update {step + 1}; its samples with the largest losses: {named}"

    def _save(self) -> None:
        """Start saving this step, unless it has been saved."""
        if self._snapshot_step == self.state.step:
            return
        self.world.on_all(self.saver.wait)  # before taking another snapshot; has no timeout
        files = self.state.snapshot(self.run_dir)
        self._snapshot_step = self.state.step
        if self.world.main:
            copied = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
            self.saver.save(self.state.step, files, copied.synchronize if copied else None)

    def _preview(self, outputs: Sequence[Sink]) -> None:
        folder = self.run_dir / "previews"
        try:
            paths = save_previews(folder, self.state, self.model, self.dataset, self.runtime)
        except (ValueError, OSError) as error:  # raised on every process alike; a preview must not end a run
            self.log(f"warning: no previews of step {self.state.step}: {error}")
            return
        for path in paths:
            for output in outputs:
                output.image(path.stem.split("_", 1)[1], path, self.state.step)
