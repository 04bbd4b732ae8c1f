"""The complete training state, and its conversion to and from checkpoint files."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import checkpoint
from fastdiff.config import Precision, RunConfig, ScheduleSampler
from fastdiff.diffusion import LossSecondMomentSampler, UniformSampler
from fastdiff.interop.openai_run import MOMENTS, OpenAIRun
from fastdiff.models.unet import Encoder
from fastdiff.runtime.distributed import World
from fastdiff.training.ema import EMA, Average, PowerAverage
from fastdiff.training.guard import Guard
from fastdiff.training.metrics import LossSums
from fastdiff.training.objective import Objective
from fastdiff.training.optimizer import FusedAdamW
from fastdiff.training.parallel import own_part, part_of, whole_of
from fastdiff.training.saver import CheckpointFile

INITIAL_LOG_LOSS_SCALE = {"model": 20, "classifier": 16}
"""log2 of the initial loss scale with fp16_scale_growth, by kind, as in improved- and guided-diffusion."""


class TrainState:
    """Weights, averages, optimizer state, loss scale, timestep loss history and log sums after ``step`` updates.

    ``first_step`` is the step that was loaded, or 0. ``whole`` is false while an update is changing the parts one by
    one. ``weights`` are the model's parameters by name and ``held`` the same in a list; ``parameters`` are the tensors
    that this process updates: its shards under FSDP, else the model's.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Encoder,
        objective: Objective,
        precision: Precision,
        world: World,
    ) -> None:
        train = config.train
        self.config = config
        self.objective = objective
        self.world = world
        self.step = self.first_step = 0
        self.whole = True
        self.weights: dict[str, Tensor] = dict(model.named_parameters())
        self.held = list(self.weights.values())
        self.parameters = [p if (part := own_part(p)) is p else nn.Parameter(part) for p in self.held]
        # Under FSDP the EMAs are sharded like the parameters.
        everyone = world if self.parameters[0] is self.held[0] else World()
        self.emas = [EMA(self.parameters, rate, train.ema_warmup, everyone) for rate in train.ema_rate]
        self.powers = [PowerAverage(self.parameters, length, everyone) for length in train.ema_lengths]
        self.averages: list[Average] = [*self.emas, *self.powers]
        device = self.parameters[0].device
        # The fused optimizer skips a step with non-finite gradients on the device, without a host sync.
        self.optimizer = FusedAdamW(self.parameters, train.lr, train.weight_decay)
        self.scaler = _scaler(device, precision, train.fp16_scale_growth, INITIAL_LOG_LOSS_SCALE[objective.kind])
        self.guard = Guard(train.spike_guard, device)
        self.sums = LossSums(device, objective.terms)
        self.sampler: UniformSampler | LossSecondMomentSampler
        if train.schedule_sampler is ScheduleSampler.LOSS_SECOND_MOMENT:
            self.sampler = LossSecondMomentSampler(objective.num_timesteps, device=device)
        else:
            self.sampler = UniformSampler(objective.num_timesteps, device)

    @property
    def num_parameters(self) -> int:
        """Number of learned values."""
        return sum(p.numel() for p in self.held)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Load the weights of a file's state dict; ValueError if it has another architecture."""
        checkpoint.refuse_other_architecture(self.weights, weights, path)
        for parameter, part in zip(self.parameters, self._parts(weights), strict=True):
            parameter.copy_(part)

    def _parts(self, whole: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """This process's shards of a state dict, in the parameters' order."""
        return (part_of(whole[name], held) for name, held in self.weights.items())

    def snapshot(self, run_dir: Path, **about: Any) -> list[CheckpointFile]:
        """Copy the files of this step to the host, so that later updates do not change them. Collective.

        ``about`` joins the metadata of every file.

        On CUDA the copies are asynchronous and may still be running on return. Only rank 0 gets the files; the other
        processes get an empty list.
        """
        described = self.objective.metadata(self.config, self.step) | about
        weights = self._on_host(self.parameters)
        files = [CheckpointFile(checkpoint.model_path(run_dir, self.step), weights, described)]
        for average in self.averages:
            path = average_path(average, run_dir, self.step)
            files.append(CheckpointFile(path, self._on_host(average.tensors()), described | average.about))
        path = checkpoint.optimizer_path(run_dir, self.step)
        said = {"kind": "optimizer", "step": self.step, "scaler": self.scaler.state_dict()} | about
        files.append(CheckpointFile(path, self._optimizer_tensors(), said | {"run_config": self.config.to_dict()}))
        return files if self.world.main else []

    def snapshot_of_averages(self, run_dir: Path) -> CheckpointFile | None:
        """Copy the power-function averages to the host in 16 bits; as snapshot, for the file on rank 0. Collective."""
        tensors = {}
        for power in self.powers:
            parts = dict(zip(self.weights, power.tensors(), strict=True))
            pinned, at = self.parameters[0].device.type == "cuda", 0
            flat = torch.empty(self.num_parameters if self.world.main else 0, dtype=torch.float16, pin_memory=pinned)
            for name, held in sorted(self.weights.items()):
                whole = whole_of(parts[name], held)
                if self.world.main:
                    flat[at : at + whole.numel()].copy_(whole.detach().half().reshape(-1), non_blocking=pinned)
                    at += whole.numel()
            tensors[str(power.length)] = flat
        about = {"kind": "averages", "step": self.step, "ema_lengths": [power.length for power in self.powers]}
        about["ema_since"] = [power.since for power in self.powers]
        path = checkpoint.snapshot_path(run_dir, self.step)
        return CheckpointFile(path, tensors, about) if self.world.main else None

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key in MOMENTS:
            found |= self._on_host((self.optimizer.state[p][key] for p in self.parameters), f"{key}.")
        if isinstance(self.sampler, LossSecondMomentSampler):
            found |= {f"sampler.{key}": on_host(value) for key, value in self.sampler.state_dict().items()}
        sums = self.world.all_gather(self.sums.state()[None])  # (processes, n)
        return found | {"guard": on_host(self.guard.state()), "log_sums": on_host(sums)}

    def _on_host(self, parts: Iterable[Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Host copies of the full tensors of which this process has ``parts``, by name; empty except on rank 0."""
        found = {}
        for (name, held), part in zip(self.weights.items(), parts, strict=True):
            whole = whole_of(part, held)
            if self.world.main:
                found[prefix + name] = on_host(whole)
        return found

    def load(self, run_dir: Path, step: int) -> list[Average]:
        """Resume from the files of ``step``, which rank 0 has verified.

        Returns the averages that the run did not have: they start from the weights. ValueError if a file is
        damaged or does not match the model.
        """
        read = partial(checkpoint.read_tensors, verified=self.world.main)
        kind = self.objective.kind
        path = checkpoint.model_path(run_dir, step)
        weights, _ = read(path, kind=kind)
        tensors, metadata = read(checkpoint.optimizer_path(run_dir, step), kind="optimizer")
        saved, added = [], []
        for average in self.averages:
            # the manifest has it if the run did; a reconstructed one is not what training kept
            there = average_path(average, run_dir, step)
            tensors_of, about = read(there, kind=kind) if there.exists() else (weights, {})
            if "ema_updates" not in about:
                began = step if isinstance(average, PowerAverage) else 0
                tensors_of, about = weights, {"ema_updates": began, "ema_since": began}
                added.append(average)
            saved.append((tensors_of, about))
        self.set_weights(weights, path)
        for average, (tensors_of, about) in zip(self.averages, saved, strict=True):
            average.load(self._parts(tensors_of), about["ema_updates"], about.get("ema_since", 0))
        self._set_moments(tensors)
        if self.scaler.is_enabled() and metadata["scaler"]:
            self.scaler.load_state_dict(metadata["scaler"])
        if isinstance(self.sampler, LossSecondMomentSampler):
            history = tensors.get("sampler.history")
            # A run resumed with another diffusion process or timestep sampler starts with an empty history.
            if history is not None and history.shape == self.sampler.history.shape:
                self.sampler.load_state_dict({"history": history, "counts": tensors["sampler.counts"]})
        self.guard.load_state(tensors["guard"])
        self.sums.load_state(tensors["log_sums"], self.world.rank, self.world.size)
        self.step = self.first_step = step
        return added

    def load_openai(self, run: OpenAIRun) -> None:
        """Resume from an improved-diffusion run; ValueError, before any change, if it belongs to another model.

        An EMA that it did not save starts from the weights, as in improved-diffusion.
        """
        checkpoint.refuse_other_architecture(self.weights, run.weights, run.path)
        for rate, average in run.averages.items():
            checkpoint.refuse_other_architecture(self.weights, average, run.average_path(rate))
        ordered = {name: run.weights[name] for name in self.weights}
        moments = None if run.optimizer is None else run.moments(ordered)
        self.set_weights(ordered, run.path)
        for ema in self.emas:
            ema.load(self._parts(run.averages.get(ema.rate, run.weights)), run.step)
        for power in self.powers:
            power.load(self._parts(run.weights), run.step, since=run.step)
        if moments is not None:
            self._set_moments(moments)
        self.step = self.first_step = run.step

    def _set_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the optimizer state, ``{"exp_avg.NAME": ...}``."""
        for (name, held), parameter in zip(self.weights.items(), self.parameters, strict=True):
            self.optimizer.state[parameter] = {"step": tensors[f"step.{name}"].to(parameter.device, copy=True)} | {
                # in the parameter's memory layout, which the file does not store
                key: torch.empty_like(parameter).copy_(part_of(tensors[f"{key}.{name}"], held))
                for key in MOMENTS[1:]
            }


def _scaler(device: torch.device, precision: Precision, growth: float, initial: int) -> torch.amp.GradScaler:
    """The loss scaler: PyTorch's rule, or improved-diffusion's, which grows the scale a little in every update.

    ``growth`` is the increase of its log2 in every update, 0 for PyTorch's rule, and ``initial`` where it starts.
    Both rules halve the scale and skip the update if the gradient is not finite.
    """
    rule: dict[str, float] = {}
    if growth:
        rule = {"init_scale": 2.0**initial, "growth_factor": 2.0**growth, "growth_interval": 1}
    return torch.amp.GradScaler(device.type, enabled=precision is Precision.FP16, **rule)  # type: ignore[arg-type]


def average_path(average: Average, run_dir: Path, step: int) -> Path:
    """The path of an average in a run folder."""
    if isinstance(average, EMA):
        return checkpoint.ema_path(run_dir, average.rate, step)
    assert isinstance(average, PowerAverage)
    return checkpoint.average_path(run_dir, average.length, step)


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; a copy from a GPU is asynchronous and may still be running on return."""
    pinned = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return copy.copy_(tensor.detach(), non_blocking=pinned)
