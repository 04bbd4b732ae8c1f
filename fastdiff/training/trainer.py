"""The training loop on one process."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fastdiff import checkpoint
from fastdiff.config import TrainConfig
from fastdiff.data import Dataset, batches
from fastdiff.diffusion import build_diffusion
from fastdiff.diffusion.timestep_sampler import draw
from fastdiff.kernels import philox_normal
from fastdiff.models import build_model
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.words import duration
from fastdiff.training.metrics import LossSums, ProgressFiles
from fastdiff.training.preview import IMAGES, save_preview
from fastdiff.training.run_folder import Log, RunConfig
from fastdiff.training.signals import StopRequest
from fastdiff.training.state import TrainState

NOISE_STREAM = 0xFFFFFFFF
"""The Philox step that training draws from; sampling counts its own from 0."""

TIMESTEP_STREAM = 2
"""What keeps the timesteps' random numbers apart from those of the order of the images."""

MAX_NONFINITE_STEPS = 25
"""So many updates in a row with a gradient that is not finite end the run. fp16's first search for a scale, which
halves it from 2^16, takes fewer."""

OnUpdate = Callable[[int, int, str], None]


@dataclass
class Clock:
    """The time of the updates since the last line of the log, without what else was done between them."""

    images: int = 0
    waited: float = 0.0
    paused: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def read(self) -> dict[str, float]:
        """Images per second, and the share of the time in which the step waited for data."""
        seconds = max(time.perf_counter() - self.began - self.paused, 1e-9)
        return {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}


class Trainer:
    """Trains the run of ``run_dir``, from its last checkpoint on, until its last update or a signal."""

    def __init__(self, config: RunConfig, dataset: Dataset, runtime: Runtime, run_dir: Path, log: Log) -> None:
        # Initial weights are drawn on the CPU, the same for every device.
        torch.manual_seed(config.train.seed)
        self.config = config
        self.dataset = dataset
        self.runtime = runtime
        self.run_dir = run_dir
        self.log = log
        self.device = runtime.device
        self.diffusion = build_diffusion(config.diffusion, runtime.kernels)
        self.model = build_model(config.model, runtime.kernels, runtime.memory_format).to(self.device)
        self.state = TrainState(config, self.model, self.diffusion, runtime.precision)
        self.saved_step = 0
        self.sums = LossSums(self.device)
        self.nonfinite_steps = torch.zeros((), device=self.device)  # in a row

    def init_from(self, path: Path) -> None:
        """Begin with the weights of a checkpoint; ValueError where they do not fit."""
        weights = checkpoint.read_weights(path)
        own = self.model.state_dict()
        known, wanted = weights.get("label_emb.weight"), own.get("label_emb.weight")
        if known is not None and wanted is not None and known.shape != wanted.shape:
            weights["label_emb.weight"] = wanted
            self.log(f"{path} knows {len(known)} classes, the data has {len(wanted)}: their embedding begins afresh")
        checkpoint.load_weights(self.model, weights, path)
        self.state = TrainState(self.config, self.model, self.diffusion, self.runtime.precision)
        self.log(f"weights from {path}")

    def resume(self) -> None:
        """Go on from the run's newest checkpoint that is whole; ValueError where none is."""
        steps = checkpoint.saved_steps(self.run_dir)
        for step in reversed(steps):
            try:
                self.state.load(self.run_dir, step)
            except ValueError as error:
                self.log(f"warning: cannot resume at step {step}: {error}")
            else:
                self.saved_step = step
                self.log(f"resumed at step {step}")
                return
        if steps:
            raise ValueError(f"none of the {len(steps)} checkpoints in {self.run_dir} can be resumed")
        self.log(f"{self.run_dir} holds no checkpoint yet: beginning afresh")

    def run(self, on_update: OnUpdate | None = None) -> int:
        """Train; returns the process's exit status.

        ``on_update(step, steps, note)`` is called after each update, with a note every log_interval.

        0 at the run's end, 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, all with the last update saved.
        """
        train = self.config.train
        forward = self.runtime.prepare(self.model.train(), self.model_calls)
        data = batches(self.dataset, self.config.data, train.batch_size, train.seed, self.state.step)
        files = ProgressFiles(self.run_dir, self.state.step, train.tensorboard)
        clock = Clock()
        with StopRequest() as stop, files, closing(data), self._no_update_lost():  # type: ignore[type-var]  # a generator has close()
            while self.state.step < train.steps and not stop.received:
                asked = time.perf_counter()
                images, labels = next(data)
                clock.waited += time.perf_counter() - asked
                self._update(forward, images, labels)
                clock.images += len(images)
                step = self.state.step
                last = step == train.steps or stop.received is not None
                note = ""
                if step % train.log_interval == 0 or last:
                    note = self._report(files, clock)
                    clock = Clock()
                if on_update is not None:
                    on_update(step, train.steps, note)
                paused = time.perf_counter()
                if step % train.save_interval == 0 or step == train.steps:
                    self._save()
                if train.preview_interval and (step % train.preview_interval == 0 or step == train.steps):
                    self._preview()
                clock.paused += time.perf_counter() - paused
        if stop.received is not None and self.state.step < train.steps:
            self.log(f"stopped by {stop.received.name} at step {self.state.step}, which is saved")
            return stop.exit_status
        return 0

    @contextmanager
    def _no_update_lost(self) -> Iterator[None]:
        """Save at the end, whatever the end was: the last step, a signal, a disk that is full or a bug."""
        try:
            yield
        finally:
            if self.saved_step < self.state.step:
                self._save()

    @property
    def model_calls(self) -> int:
        """Forward passes of the whole run: a resumed one decides to compile as the run that it goes on with."""
        train = self.config.train
        return train.steps * -(-train.batch_size // self.microbatch)

    @property
    def microbatch(self) -> int:
        """Images per forward pass."""
        train = self.config.train
        return train.batch_size if train.microbatch == -1 else min(train.microbatch, train.batch_size)

    def _update(self, forward: Callable[..., Tensor], images: Tensor, labels: Tensor | None) -> None:
        """One update of the weights from uint8 images (B, H, W, 3).

        It waits for the device only where the timestep sampler learns from the losses.
        """
        state, train, step = self.state, self.config.train, self.state.step
        # Everything random is a function of seed and step alone, so that a resumed run goes on as if never stopped.
        torch.manual_seed((train.seed << 32) + step)  # dropout's
        t_drawn, weights_drawn = draw(
            state.sampler, len(images), np.random.default_rng([train.seed, step, TIMESTEP_STREAM])
        )
        t = torch.from_numpy(t_drawn).to(self.device)
        weights = torch.from_numpy(weights_drawn).to(self.device)
        x_start = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1
        numbers = torch.arange(step * len(images), (step + 1) * len(images), device=self.device)
        conditions = self._conditions(x_start, labels)

        losses = []
        for part in _slices(len(images), self.microbatch):
            kwargs = {name: value[part] for name, value in conditions.items()}
            noise = philox_normal(train.seed, numbers[part], NOISE_STREAM, x_start.shape[1:])
            terms = self.diffusion.training_losses(forward, x_start[part], t[part], kwargs, noise)
            # divided by the whole batch: micro-batches average to what one batch would give
            state.scaler.scale((terms["loss"] * weights[part]).sum() / len(images)).backward()
            self.sums.add({k: v * weights[part] for k, v in terms.items()}, t[part], self.diffusion.num_timesteps)
            losses.append(terms["loss"].detach())
        if state.sampler.learns:
            state.sampler.update(t_drawn, torch.cat(losses).double().cpu().numpy())
        self._step_optimizer(learning_rate(train, step))
        for ema in state.emas:
            ema.update()
        state.step += 1

    def _conditions(self, x_start: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        conditions = {}
        if labels is not None:
            conditions["y"] = labels.to(self.device, non_blocking=True)
        if self.config.model.small_size is not None:
            conditions["low_res"] = F.interpolate(x_start, self.config.model.small_size, mode="area")
        return conditions

    def _step_optimizer(self, lr: float) -> None:
        state, train = self.state, self.config.train
        state.scaler.unscale_(state.optimizer)
        gradients = [p.grad for p in state.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if train.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(state.parameters, train.grad_clip, norm)
        nonfinite = (~norm.isfinite()).float()
        self.nonfinite_steps = (self.nonfinite_steps + 1) * nonfinite
        if not state.scaler.is_enabled():
            # What GradScaler hands a fused optimizer: the update is skipped on the device where this is 1.
            state.optimizer.found_inf = nonfinite  # type: ignore[attr-defined]
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        self.sums.add_grad_norm(norm)

    def _report(self, files: ProgressFiles, clock: Clock) -> str:
        """Write a line of the log and return what it says; ValueError where the run has come to nothing."""
        state, train = self.state, self.config.train
        row: dict[str, float] = {"step": state.step, "samples": state.step * train.batch_size, **self.sums.read()}
        row |= {"lr": learning_rate(train, state.step - 1), **clock.read()}
        if state.scaler.is_enabled():
            row["lg_loss_scale"] = float(np.log2(state.scaler.get_scale()))
        files.write(row)
        left = (train.steps - state.step) * train.batch_size / row["images_per_s"]
        note = (
            f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}  {row['images_per_s']:.1f} images/s  "
            f"data wait {row['data_wait']:.0%}  {duration(left)} left"
        )
        self.log(f"step {state.step}/{train.steps}  {note}", shown=False)
        if (bad := int(self.nonfinite_steps)) >= MAX_NONFINITE_STEPS:
            steps = checkpoint.saved_steps(self.run_dir)
            good = checkpoint.model_path(self.run_dir, steps[-1]) if steps else "none was saved yet"
            raise ValueError(
                f"the gradient was not finite in the last {bad} updates: lower --lr, or use --grad-clip 1, or "
                f"--precision bf16 or fp32; the last good checkpoint: {good}"
            )
        return note

    def _save(self) -> None:
        self.state.save(self.run_dir)
        self.saved_step = self.state.step
        self.log(f"saved step {self.state.step} in {self.run_dir.resolve()}")
        keep = self.config.train.keep_last
        # Later steps are damaged ones that the run fell back from: they count for nothing.
        older = [step for step in checkpoint.saved_steps(self.run_dir) if step <= self.state.step]
        for step in older[:-keep] if keep else ():
            checkpoint.delete_step(self.run_dir, step)

    def _preview(self) -> None:
        """Grids of raw and averaged weights, drawn by the uncompiled model: their shapes are not training's."""
        weights: dict[str, dict[str, Tensor]] = {"raw": {}}
        weights |= {f"ema_{ema.rate}": self.state.ema_state(ema) for ema in self.state.emas}
        low_res = None
        if self.config.model.small_size is not None:
            rows = np.arange(IMAGES) % len(self.dataset.images)
            images = torch.from_numpy(np.asarray(self.dataset.images[rows])).permute(0, 3, 1, 2) / 127.5 - 1
            low_res = F.interpolate(images, self.config.model.small_size, mode="area")
        self.model.eval()
        for name, state in weights.items():

            def model(*args: Any, state: dict[str, Tensor] = state, **kwargs: Any) -> Tensor:
                with self.runtime.autocast():
                    return functional_call(self.model, state, args, kwargs)

            path = self.run_dir / "previews" / f"{self.state.step:06d}_{name}.png"
            save_preview(
                path, model, self.config.model, self.config.diffusion, self.device, low_res, self.runtime.kernels
            )
        self.model.train()


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of the update after ``step`` updates: warm-up, then constant, or linear to 0 over lr_anneal_steps."""
    warm = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    left = max(0.0, 1 - step / config.lr_anneal_steps) if config.lr_anneal_steps else 1.0
    return config.lr * warm * left


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
