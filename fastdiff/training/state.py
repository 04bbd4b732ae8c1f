"""Everything that an update changes, and its way to and from the files of a checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import checkpoint
from fastdiff.config import Precision, ScheduleSampler
from fastdiff.diffusion import GaussianDiffusion, LossSecondMomentSampler, UniformSampler
from fastdiff.models import UNet
from fastdiff.training.ema import EMA
from fastdiff.training.run_folder import RunConfig


class TrainState:
    """Weights, averages, optimizer, loss scale and timestep history after ``step`` updates."""

    def __init__(self, config: RunConfig, model: UNet, diffusion: GaussianDiffusion, precision: Precision) -> None:
        train = config.train
        self.config = config
        self.model = model
        self.step = 0
        self.names, self.parameters = map(list, zip(*model.named_parameters(), strict=True))
        self.emas = [EMA(self.parameters, rate, train.ema_warmup) for rate in train.ema_rate]
        device = self.parameters[0].device
        # The fused update skips a step with an infinite gradient by itself, without a word from the host.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=train.lr, weight_decay=train.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision is Precision.FP16)
        self.sampler: UniformSampler | LossSecondMomentSampler
        if train.schedule_sampler is ScheduleSampler.LOSS_SECOND_MOMENT:
            self.sampler = LossSecondMomentSampler(diffusion.num_timesteps)
        else:
            self.sampler = UniformSampler(diffusion.num_timesteps)

    @property
    def num_parameters(self) -> int:
        """Numbers that are learned."""
        return sum(p.numel() for p in self.parameters)

    def ema_state(self, ema: EMA) -> dict[str, Tensor]:
        """An average as a state dict."""
        return dict(zip(self.names, ema.tensors(), strict=True))

    def save(self, run_dir: Path) -> None:
        """Write the files of this step, the optimizer's last: only with it does the step count as saved.

        ValueError, and nothing written, where a weight is not finite.
        """
        norms = torch.stack(torch._foreach_norm(self.parameters))
        if not bool(norms.isfinite().all()):
            steps = checkpoint.saved_steps(run_dir)
            good = checkpoint.model_path(run_dir, steps[-1]) if steps else "none was saved yet"
            raise ValueError(
                f"the weights of step {self.step} are not finite and were not saved: lower --lr; "
                f"the last good checkpoint: {good}"
            )
        described: dict[str, Any] = {
            "model_config": self.config.model,
            "diffusion_config": self.config.diffusion,
            "step": self.step,
            "class_names": self.config.class_names,
            "run_config": self.config.to_dict(),
        }
        checkpoint.save_checkpoint(checkpoint.model_path(run_dir, self.step), self.model, **described)
        for ema in self.emas:
            path = checkpoint.ema_path(run_dir, ema.rate, self.step)
            described |= {"ema_rate": ema.rate, "ema_warmup": ema.warmup, "ema_updates": ema.updates}
            checkpoint.save_checkpoint(path, self.ema_state(ema), **described)
        tensors = {f"{key}.{name}": value for name, key, value in self._moments()}
        if isinstance(self.sampler, LossSecondMomentSampler):
            state = self.sampler.state_dict()
            tensors |= {f"sampler.{key}": torch.from_numpy(np.array(value)) for key, value in state.items()}
        metadata = {
            "kind": "optimizer",
            "step": self.step,
            "scaler": self.scaler.state_dict(),
            "run_config": self.config.to_dict(),
        }
        checkpoint.write_tensors(checkpoint.optimizer_path(run_dir, self.step), tensors, metadata)

    def load(self, run_dir: Path, step: int) -> None:
        """Go on from the files of ``step``; ValueError where one is damaged or does not fit."""
        path = checkpoint.model_path(run_dir, step)
        weights, _ = checkpoint.read_tensors(path, kind="model")
        opt_path = checkpoint.optimizer_path(run_dir, step)
        tensors, metadata = checkpoint.read_tensors(opt_path, kind="optimizer")
        checkpoint.load_weights(self.model, weights, path)
        for ema in self.emas:
            ema_path = checkpoint.ema_path(run_dir, ema.rate, step)
            if not ema_path.exists():
                raise ValueError(f"{ema_path} is missing: go on with the ema_rate that the run was begun with")
            averages, about = checkpoint.read_tensors(ema_path, kind="model")
            ema.load((averages[name] for name in self.names), about["ema_updates"])
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self.optimizer.state[parameter] = {
                "step": tensors[f"step.{name}"].to(parameter.device),
                # in the parameter's own layout, which the file does not keep
                "exp_avg": torch.empty_like(parameter).copy_(tensors[f"exp_avg.{name}"]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"exp_avg_sq.{name}"]),
            }
        if self.scaler.is_enabled() and metadata["scaler"]:
            self.scaler.load_state_dict(metadata["scaler"])
        if isinstance(self.sampler, LossSecondMomentSampler) and "sampler.history" in tensors:
            self.sampler.load_state_dict({k: tensors[f"sampler.{k}"].numpy() for k in ("history", "counts")})
        self.step = step

    def _moments(self) -> list[tuple[str, str, Tensor]]:
        moments = []
        for name, parameter in zip(self.names, self.parameters, strict=True):
            moments += [(name, key, value) for key, value in self.optimizer.state[parameter].items()]
        return moments
