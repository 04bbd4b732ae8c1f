"""What a candidate does in a round: a forward pass, a training step, a batch of samples, or one sampling step."""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.benchmarks.ladder import NO_GRAPH, Candidate, Models, Rung
from fastdiff.benchmarks.peers import Peer
from fastdiff.benchmarks.workload import TOLERANCE, Workload, inputs, require_close
from fastdiff.config import (
    DataConfig,
    Kernels,
    MemoryFormat,
    Precision,
    RunConfig,
    RuntimeConfig,
    SampleConfig,
    Sampler,
    TrainConfig,
)
from fastdiff.data import Dataset, Preflight, batches, prefetch_to_device, to_uint8
from fastdiff.diffusion import GaussianDiffusion, Philox, build_diffusion
from fastdiff.runtime.device import Runtime
from fastdiff.sampling import Loop
from fastdiff.training import Trainer
from fastdiff.training.ema import EMA
from fastdiff.training.run_folder import Silence
from fastdiff.training.update import Updater, learning_rate

SAMPLING_STEPS = 10
IMAGES = 4
"""Factor on TOLERANCE for images: the first of many steps divides the model's errors by a small number. In bf16 correct
images were off by up to 0.04."""

LOSSES = 0.1
"""Factor on TOLERANCE for losses, of which the output of an untrained model is a small part."""

LEARNING_RATE = 1e-4
EMA_RATE = 0.9999
CHECKED_STEPS = 4
SCALINGS = 20
"""Most updates that fp16 may skip until its loss scale is found."""


@dataclass(frozen=True)
class Job:
    """What a candidate does in a round, and the tensors that it holds between rounds.

    ``check`` is called after the first round: ValueError if its result is wrong. Once warm, a ``steady`` one must not
    wait for the device.
    """

    run: Callable[[], object]
    tensors: Callable[[], Iterable[Tensor]]
    check: Callable[[], None] = lambda: None
    deterministic: bool = False  # selects cuDNN's deterministic convolutions
    steady: bool = False


def job_of(suite: str, models: Models, rung: Rung, stack: ExitStack, workload: Workload | None = None) -> Job:
    """Prepare a rung for a suite, until ``stack`` is closed; ValueError if its model differs from the plain path's.

    A forward pass and the Trainer may run on another batch size than the check, for which memory may be short.
    """
    workload = workload or models.workload
    if suite == "train":
        return _trained(models, rung, stack, workload) if rung.trainer else _updated(models, rung)
    candidate = models.inference(rung.config, beside=rung.beside)
    if suite == "unet":
        return forward(workload, candidate)
    drawing = Drawing(models.workload, candidate.call, candidate.runtime.kernels, rung.graphs)
    return Job(drawing, candidate.module.parameters, lambda: _check_images(models, candidate, drawing))


def peer_job(suite: str, workload: Workload, peer: Peer) -> Job:
    """The job of a peer's module, in place of the plain path's."""
    if suite == "train":
        updates = Updates(workload, peer.module.train(), peer.call, Kernels.REFERENCE, fused=False)
        updates()  # the first update creates the moments
        return Job(updates, updates.tensors)
    peer.module.eval()
    if suite == "unet":
        return forward(workload, peer)
    return Job(Drawing(workload, peer.call, Kernels.REFERENCE, graphs=False), peer.module.parameters)


def forward(workload: Workload, model: Candidate | Peer) -> Job:
    """One forward pass without gradients."""
    x, t, conditions = inputs(workload)
    timesteps = t.float()

    def run() -> Tensor:
        with torch.no_grad():
            return model.call(x, timesteps, **conditions)

    return Job(run, model.module.parameters)


class Updates:
    """Training updates: draw timesteps and noise, q_sample, loss, gradients, AdamW, an EMA of the weights.

    ``fused`` runs AdamW in one kernel and the EMA in one call. Without it AdamW is PyTorch's default, and the EMA runs
    parameter by parameter, as in improved-diffusion.
    """

    def __init__(
        self,
        workload: Workload,
        module: nn.Module,
        call: Callable[..., Tensor],
        kernels: Kernels,
        fused: bool,
        memory_format: MemoryFormat = MemoryFormat.CONTIGUOUS,
    ) -> None:
        x, _, self._conditions = inputs(workload)
        if memory_format is MemoryFormat.CHANNELS_LAST:
            x = x.contiguous(memory_format=torch.channels_last)  # as the Trainer's uint8 images become floats
        self._x, self._call, self._fused = x, call, fused
        self._diffusion = build_diffusion(workload.diffusion, kernels)
        self.parameters = list(module.parameters())
        self._optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=fused or None)
        self.average = EMA(self.parameters, EMA_RATE, warmup=False)

    def __call__(self, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Run one update and return the losses (N,). ``t`` (N,) and ``noise`` (N, 3, H, W) are drawn if not given."""
        x = self._x
        if t is None:
            t = torch.randint(self._diffusion.num_timesteps, (len(x),), device=x.device)
        if noise is not None:
            noise = torch.empty_like(x).copy_(noise)  # in the layout of drawn noise
        losses = self._diffusion.training_losses(self._call, x, t, self._conditions, noise)["loss"]
        losses.mean().backward()
        self._optimizer.step()
        if self._fused:
            self.average.update()
        else:
            self._average_one_by_one()
        self._optimizer.zero_grad(set_to_none=True)
        return losses.detach()

    def tensors(self) -> list[Tensor]:
        """Weights, their EMA and the optimizer's moments."""
        return [*self.parameters, *self.average.tensors(), *_moments(self._optimizer)]

    @torch.no_grad()
    def _average_one_by_one(self) -> None:
        for own, parameter in zip(self.average.tensors(), self.parameters, strict=True):
            own.mul_(EMA_RATE).add_(parameter, alpha=1 - EMA_RATE)


def _updated(models: Models, rung: Rung) -> Job:
    """Updates, the first of which is checked, without dropout, which is random."""
    workload, candidate = models.workload, models.training(rung.config, rung.beside)
    runtime, module = candidate.runtime, candidate.module
    updates = Updates(workload, module, candidate.call, runtime.kernels, rung.fused, runtime.memory_format)
    x, t, conditions = inputs(workload)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)

    @torch.no_grad()
    def losses_of(plain: Candidate) -> Tensor:
        diffusion = build_diffusion(workload.diffusion, plain.runtime.kernels)
        return diffusion.training_losses(plain.call, x, t, conditions, noise)["loss"]

    expected = models.plain("losses", losses_of)
    module.train(not workload.model.dropout)
    losses: list[Tensor] = []
    _check_update(lambda: losses.append(updates(t, noise)), updates.parameters, [updates.average], LEARNING_RATE)
    module.train()
    require_close(losses[0], expected, LOSSES * TOLERANCE[runtime.precision], "differs from the plain path", "loss")
    if workload.model.dropout:
        updates()  # compiles again, before the memory is counted
    return Job(updates, updates.tensors)


@torch.no_grad()
def _zero(averages: Iterable[EMA]) -> None:
    for own in (tensor for average in averages for tensor in average.tensors()):
        own.zero_()


def _check_update(
    update: Callable[[], object], parameters: Sequence[Tensor], averages: Sequence[EMA], lr: float
) -> None:
    """Run the first update; ValueError if it is wrong.

    AdamW's first update moves nearly every weight by ``lr``, and an EMA that was zero becomes (1 - rate) * weight.
    """
    before = [p.detach().clone() for p in parameters]
    _zero(averages)
    update()
    with torch.no_grad():
        moved = torch.stack([(p - b).norm() for p, b in zip(parameters, before, strict=True)]).norm()
        share = float(moved) / math.sqrt(sum(p.numel() for p in parameters)) / lr
        if not 0.5 <= share <= 1.01:
            raise ValueError(f"an update moves the weights by {share:.2g} times the learning rate: not timed")
        for average in averages:
            rate = min(average.rate, average.updates / (9 + average.updates)) if average.warmup else average.rate
            for own, p in zip(average.tensors(), parameters, strict=True):
                require_close(own, (1 - rate) * p, 1e-5, "differs from the moving average", "weights")
                own.copy_(p)


def _trained(models: Models, rung: Rung, stack: ExitStack, workload: Workload) -> Job:
    """The Trainer's update, with batches loaded as in a run, and with its guards, sums and loss scale."""
    trainer = _trainer(workload, rung.config, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    models.checked(Candidate(trainer.model, trainer.forward, trainer.runtime))
    config, state = trainer.config, trainer.state
    update = Updater(config, state, trainer.objective, trainer.module, trainer.forward, trainer.world)
    pin = trainer.device.type == "cuda"
    data = batches(trainer.dataset, config.data, config.train.batch_size, config.train.seed, 0, pin=pin)
    stream = stack.enter_context(closing(prefetch_to_device(data, trainer.device)))

    def run() -> None:
        update(*next(stream))

    def first() -> None:
        for _ in range(SCALINGS if trainer.runtime.precision is Precision.FP16 else 1):
            _zero(state.emas)
            run()
            sums = state.sums.read()
            if not sums["skipped"]:
                break
        if sums["skipped"] or not math.isfinite(sums["loss"]):
            raise ValueError(f"the Trainer skips its first update, of loss {sums['loss']:.3g}: not timed")

    _check_update(first, state.parameters, state.emas, learning_rate(config.train, state.step))
    averages = [tensor for ema in state.emas for tensor in ema.tensors()]

    def tensors() -> list[Tensor]:
        return [*state.parameters, *averages, *_moments(state.optimizer)]

    return Job(run, tensors, deterministic=True, steady=True)


def _trainer(workload: Workload, on: RuntimeConfig, folder: Path) -> Trainer:
    """The Trainer of a run on random images, which writes nothing to ``folder``."""
    model, size, images = workload.model, workload.model.image_size, max(256, workload.batch_size)
    classes = model.num_classes if model.class_cond else 0
    pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
    labels = np.arange(images) % classes if classes else None
    preflight = Preflight({"png": images}, (), (size, size), (size, size), ())
    dataset = Dataset(pixels, labels, tuple(map(str, range(classes))), preflight, tuple(map(str, range(images))), "")
    config = RunConfig(model, workload.diffusion, DataConfig(), TrainConfig(batch_size=workload.batch_size), on)
    return Trainer(config, dataset, Runtime.resolve(on), folder, Silence())


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]


class Drawing:
    """Samples a batch in SAMPLING_STEPS DDIM steps: noise, steps, pixels, and the wait until the host has them.

    With ``graphs`` the first batch captures CUDA graphs of the steps.
    """

    def __init__(self, workload: Workload, call: Callable[..., Tensor], kernels: Kernels, graphs: bool) -> None:
        size, batch_size = workload.model.image_size, workload.batch_size
        self._shape = (batch_size, 3, size, size)
        self._noise = Philox(0, torch.arange(batch_size, device=workload.device))
        _, _, self._conditions = inputs(workload)
        process = replace(workload.diffusion, timestep_respacing=str(sampling_steps(workload)))
        self._diffusion = build_diffusion(process, kernels)
        self._loop = Loop(call, self._diffusion, SampleConfig(sampler=Sampler.DDIM), graphs=graphs)

    def __call__(self) -> Tensor:
        """One batch, uint8 (N, H, W, 3), from the same noise every time."""
        loop = self._loop
        loop.begin(self._noise.of_start(self._shape, self._diffusion.kernels), self._noise, self._conditions)
        while loop.left:
            loop.step()
        return to_uint8(loop.x).cpu()

    @property
    def images(self) -> Tensor:
        """The last batch (N, 3, H, W), before its conversion to pixels."""
        return self._loop.x


def _check_images(models: Models, candidate: Candidate, drawing: Drawing) -> None:
    """Raise a ValueError if the images differ from those that the plain path draws from the same noise."""

    def drawn(plain: Candidate) -> Tensor:
        theirs = Drawing(models.workload, plain.call, plain.runtime.kernels, graphs=False)
        theirs()
        return theirs.images

    tolerance = IMAGES * TOLERANCE[candidate.runtime.precision]
    require_close(drawing.images, models.plain("images", drawn), tolerance, "differs from the plain path", "images")


def sampling_steps(workload: Workload) -> int:
    """The number of steps of ``Drawing``."""
    return min(SAMPLING_STEPS, workload.diffusion.diffusion_steps)


def stepping(models: Models, rung: Rung) -> Job:
    """The model's call with the ancestral step and its noise: as the engine runs them, or p_sample's operations.

    A rung with a ``mode`` of torch.compile takes the latter, with noise of the device's generator, which is cheaper.
    """
    workload, candidate = models.workload, models.inference(rung.config, rung.mode, rung.beside)
    x, _, conditions = inputs(workload)
    if rung.mode:
        diffusion = build_diffusion(workload.diffusion, candidate.runtime.kernels)
        timesteps = torch.arange(diffusion.num_timesteps, device=x.device).flip(0)[:, None].expand(-1, len(x))
        return Job(_single_operations(candidate, diffusion, x, timesteps, conditions), candidate.module.parameters)
    noise = Philox(0, torch.arange(workload.batch_size, device=workload.device))

    def loop_of(one: Candidate, graphs: bool) -> Loop:
        diffusion = build_diffusion(workload.diffusion, one.runtime.kernels)
        return Loop(one.call, diffusion, SampleConfig(sampler=Sampler.DDPM), graphs=graphs)

    def few_steps(loop: Loop) -> Tensor:
        loop.begin(x, noise, conditions)
        for _ in range(min(loop.left, CHECKED_STEPS)):
            loop.step()
        return loop.x - x  # a small change: a few steps of thousands

    loop = loop_of(candidate, graphs=rung.name != NO_GRAPH)

    def run() -> None:
        if not loop.left:
            loop.begin(x, noise, conditions)
        loop.step()

    def check() -> None:
        expected = models.plain("step", lambda plain: few_steps(loop_of(plain, graphs=False)))
        tolerance = TOLERANCE[candidate.runtime.precision]
        found = few_steps(loop)
        require_close(found, expected, tolerance, "differs from the plain path", "step")
        alone = few_steps(loop_of(candidate, graphs=False))
        require_close(found, alone, TOLERANCE[Precision.FP32], "differs from the steps without a graph", "step")

    return Job(run, candidate.module.parameters, check, steady=True)


def _single_operations(
    candidate: Candidate, diffusion: GaussianDiffusion, x: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
) -> Callable[[], None]:
    rounds = itertools.cycle(timesteps.unbind())

    @torch.no_grad()
    def run() -> None:
        nonlocal x
        x = diffusion.p_sample(candidate.call, x, next(rounds), model_kwargs=conditions, pred_xstart=False)["sample"]

    return run
