"""What a candidate does in a round: a forward pass, a training step, a batch of a sampling job, one step of it."""

import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.benchmarks.ladder import Candidate, Models, Rung
from fastdiff.benchmarks.updates import build_trainer, stream
from fastdiff.benchmarks.workload import Workload, inputs
from fastdiff.config import Kernels, MemoryFormat, SampleConfig, Sampler, TrainConfig
from fastdiff.diffusion import GaussianDiffusion, Philox, build_diffusion
from fastdiff.sampling import Loop, generate
from fastdiff.training.ema import EMA
from fastdiff.training.update import Updater

SAMPLING_STEPS = 10
EMA_RATE = 0.9999
BATCHES = 10_000
"""Of a sampling job that no benchmark brings to its end."""


@dataclass(frozen=True)
class Job:
    """What a candidate does in a round, and the tensors that it holds between rounds."""

    run: Callable[[], object]
    tensors: Callable[[], Iterable[Tensor]]


def job_of(suite: str, models: Models, rung: Rung, stack: ExitStack) -> Job:
    """A rung made ready for a suite, until ``stack`` is closed; ValueError where it is not the plain path's model."""
    workload = models.workload
    match suite:
        case "train" if rung.trainer:
            return _trained(models, rung, stack)
        case "train":
            candidate = models.training(rung.config)
            runtime = candidate.runtime
            return updating(
                workload, candidate.module, candidate.call, runtime.kernels, rung.fused, runtime.memory_format
            )
        case "sample":
            candidate = models.inference(rung.config)
            return drawing(workload, candidate.module, candidate.call, candidate.runtime.kernels, rung.graphs)
        case _:
            candidate = models.inference(rung.config)
            return forward(workload, candidate.module, candidate.call)


def peer_job(suite: str, workload: Workload, module: nn.Module, call: Callable[..., Tensor]) -> Job:
    """A peer's module in the place of the plain path's."""
    match suite:
        case "train":
            return updating(workload, module.train(), call, Kernels.REFERENCE, fused=False)
        case "sample":
            return drawing(workload, module.eval(), call, Kernels.REFERENCE, graphs=False)
        case _:
            return forward(workload, module.eval(), call)


def forward(workload: Workload, module: nn.Module, call: Callable[..., Tensor]) -> Job:
    """One pass without gradients."""
    x, t, conditions = inputs(workload)
    timesteps = t.float()

    def run() -> Tensor:
        with torch.no_grad():
            return call(x, timesteps, **conditions)

    return Job(run, module.parameters)


def updating(
    workload: Workload,
    module: nn.Module,
    call: Callable[..., Tensor],
    kernels: Kernels,
    fused: bool,
    memory_format: MemoryFormat = MemoryFormat.CONTIGUOUS,
) -> Job:
    """One update: timesteps and noise drawn, q_sample, loss, gradients, AdamW, an average of the weights.

    ``fused`` is AdamW in one kernel and the averages in one call; without it they are PyTorch's default and, as in
    improved-diffusion, parameter by parameter.
    """
    x, _, conditions = inputs(workload)
    if memory_format is MemoryFormat.CHANNELS_LAST:
        x = x.contiguous(memory_format=torch.channels_last)  # as the Trainer's uint8 images become floats
    diffusion = build_diffusion(workload.diffusion, kernels)
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=fused or None)
    average = EMA(parameters, EMA_RATE)

    @torch.no_grad()
    def averaged_one_by_one() -> None:
        for own, parameter in zip(average.tensors(), parameters, strict=True):
            own.mul_(EMA_RATE).add_(parameter, alpha=1 - EMA_RATE)

    def update() -> None:
        t = torch.randint(diffusion.num_timesteps, (len(x),), device=x.device)
        diffusion.training_losses(call, x, t, conditions)["loss"].mean().backward()
        optimizer.step()
        if fused:
            average.update()
        else:
            averaged_one_by_one()
        optimizer.zero_grad(set_to_none=True)

    update()  # the moments come to be in the first one
    return Job(update, lambda: [*parameters, *average.tensors(), *_moments(optimizer)])


def _trained(models: Models, rung: Rung, stack: ExitStack) -> Job:
    """The Trainer's own update of batches on their way as in a run: with its guards, sums and loss scale."""
    workload = models.workload
    training = TrainConfig(batch_size=workload.batch_size)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    trainer = build_trainer(workload.model, workload.diffusion, training, rung.config, folder)
    models.checked(Candidate(trainer.model, trainer.forward, trainer.runtime))
    update = Updater(trainer.config, trainer.state, trainer.diffusion, trainer.module, trainer.forward, trainer.world)
    batches = stack.enter_context(closing(stream(trainer)))
    state = trainer.state

    def run() -> None:
        update(*next(batches))

    run()
    averages = [tensor for ema in state.emas for tensor in ema.tensors()]
    return Job(run, lambda: [*state.parameters, *averages, *_moments(state.optimizer)])


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]


def drawing(workload: Workload, module: nn.Module, call: Callable[..., Tensor], kernels: Kernels, graphs: bool) -> Job:
    """A batch of a job under way, in SAMPLING_STEPS steps of DDIM: noise drawn, pixels brought to the host.

    ``graphs`` are CUDA graphs of the steps, which the first batch captures.
    """
    model, size = workload.model, workload.batch_size
    _, _, conditions = inputs(workload)
    drawn = generate(
        call,
        _respaced(workload, kernels),
        SampleConfig(num_samples=size * BATCHES, batch_size=size, sampler=Sampler.DDIM),
        image_size=model.image_size,
        device=workload.device,
        labels=np.arange(size * BATCHES) % model.num_classes if model.class_cond else None,
        low_res=(lambda _: conditions["low_res"]) if model.small_size else None,
        graphs=graphs,
    )
    return Job(lambda: next(drawn), module.parameters)


def sampling_steps(workload: Workload) -> int:
    """The steps in which ``drawing`` draws."""
    return min(SAMPLING_STEPS, workload.diffusion.diffusion_steps)


def _respaced(workload: Workload, kernels: Kernels) -> GaussianDiffusion:
    process = replace(workload.diffusion, timestep_respacing=str(sampling_steps(workload)))
    return build_diffusion(process, kernels)


def stepping(workload: Workload, candidate: Candidate) -> Job:
    """The model's call with the ancestral step and its noise, as the engine runs them."""
    x, _, conditions = inputs(workload)
    diffusion = build_diffusion(workload.diffusion, candidate.runtime.kernels)
    loop = Loop(candidate.call, diffusion, SampleConfig(sampler=Sampler.DDPM), graphs=True)
    noise = Philox(0, torch.arange(workload.batch_size, device=workload.device))

    def run() -> None:
        if not loop.left:
            loop.begin(x, noise, conditions)
        loop.step()

    return Job(run, candidate.module.parameters)
