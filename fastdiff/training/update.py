"""One update of the weights: forward and backward in micro-batches, and the optimizer step, without a host sync."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.config import RunConfig, TrainConfig
from fastdiff.diffusion.timestep_sampler import draw
from fastdiff.kernels import philox_normal, philox_uint32
from fastdiff.runtime.distributed import World
from fastdiff.training.metrics import SHARES
from fastdiff.training.objective import NOISE_STREAM, TIMESTEP_STREAM, Objective
from fastdiff.training.parallel import accumulating, own_part, total_norm
from fastdiff.training.state import TrainState


@dataclass(frozen=True, eq=False)
class Updater:
    """Updates a TrainState from batches.

    ``module`` is the model, or its DDP wrapper, and ``forward`` the same module as a function: under autocast, possibly
    compiled.
    """

    config: RunConfig
    state: TrainState
    objective: Objective
    module: nn.Module
    forward: Callable[..., Tensor]
    world: World

    def __call__(self, images: Tensor, labels: Tensor | None) -> None:
        """Run one update on this process's part of a batch: uint8 images (B, H, W, 3), int64 labels (B,)."""
        state, train, world = self.state, self.config.train, self.world

        # Everything random is a function of seed, step and sample: a resumed run matches an uninterrupted one.
        dropout = np.random.SeedSequence([train.seed, state.step, world.rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(dropout >> 1))
        first = state.step * train.batch_size + world.rank * len(images)
        numbers = torch.arange(first, first + len(images), device=images.device)
        t, weights = draw(state.sampler, philox_uint32(train.seed, numbers, TIMESTEP_STREAM, 2))
        x_start, conditions = self.objective.inputs(images, labels, numbers)

        found = []
        parts = micro_batches(train, world.size)
        for part in parts:
            kwargs = {name: value[part] for name, value in conditions.items()}
            noise = philox_normal(train.seed, numbers[part], NOISE_STREAM, x_start.shape[1:])
            with accumulating(self.module) if part is not parts[-1] else nullcontext():
                terms = self.objective.losses(self.forward, x_start[part], t[part], kwargs, noise)
                # Divide by the full share, so that micro-batches and processes average to the gradient of one batch.
                loss = (terms["loss"] * weights[part]).sum() / len(images)
                # Make a non-finite loss spoil the gradient, so that every process detects it.
                state.scaler.scale(loss * (1 + (loss - loss).detach())).backward()
            found.append({name: term.detach() for name, term in terms.items()})
        terms = {name: torch.cat([part[name] for part in found]) for name in found[0]}  # (B,) each
        weighted = {name: term if name in SHARES else term * weights for name, term in terms.items()}

        # From here to the end the state is half updated.
        state.whole = False
        state.sums.add(weighted, t, self.objective.num_timesteps)
        if state.sampler.learns:
            seen = world.all_gather(torch.stack([t.double(), terms["loss"].double()], dim=1))  # (B of all, 2)
            state.sampler.update(seen[:, 0].long(), seen[:, 1])

        for parameter, held in zip(state.parameters, state.held, strict=True):
            if parameter is not held and held.grad is not None:
                parameter.grad = own_part(held.grad)
        state.scaler.unscale_(state.optimizer)
        norm = total_norm([p.grad for p in state.parameters if p.grad is not None], state.held)
        skip = state.guard.judge(
            state.step, norm, weighted["loss"], lambda losses: world.all_reduce(losses.mean()) / world.size
        )
        state.sums.add_grad_norm(norm, skip)
        if train.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(state.parameters, train.grad_clip, norm)

        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(train, state.step)
        # A fused optimizer skips the update on the device if found_inf is 1. GradScaler sets it from this process's
        # gradients alone; all processes must skip alike, and a spike must not change the scale.
        if state.scaler.is_enabled():
            (found_inf,) = state.scaler._found_inf_per_device(state.optimizer).values()
            found_inf.copy_(skip)
            state.scaler.step(state.optimizer)
            found_inf.copy_(~norm.isfinite())
            state.scaler.update()
        else:
            state.optimizer.found_inf = skip  # type: ignore[attr-defined]
            state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        self.module.zero_grad(set_to_none=True)  # under FSDP the module's parameters are not the optimizer's

        for average in state.averages:
            average.update()
        state.step += 1
        state.whole = True


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate after ``step`` updates: warm-up, then constant, or linear to 0 over lr_anneal_steps."""
    warm = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    left = max(0.0, 1 - step / config.lr_anneal_steps) if config.lr_anneal_steps else 1.0
    return config.lr * warm * left


def micro_batches(config: TrainConfig, processes: int) -> list[slice]:
    """The micro-batches of a process's share of a batch, as slices."""
    share = config.batch_size // processes
    assert isinstance(config.microbatch, int), "auto is decided before the first update"
    size = share if config.microbatch == -1 else min(config.microbatch, share)
    return [slice(start, min(start + size, share)) for start in range(0, share, size)]
