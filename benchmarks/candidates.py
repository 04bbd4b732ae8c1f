"""What a candidate does in a round: a forward pass, a training step, a batch of samples, or one sampling step."""

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.benchmarks.ladder import Candidate, Models, Rung
from fastdiff.benchmarks.updates import build_trainer, stream
from fastdiff.benchmarks.workload import TOLERANCE, Workload, inputs, require_close
from fastdiff.config import Kernels, MemoryFormat, Precision, SampleConfig, Sampler, TrainConfig
from fastdiff.data import to_uint8
from fastdiff.diffusion import GaussianDiffusion, Philox, build_diffusion
from fastdiff.sampling import Loop
from fastdiff.training.ema import EMA
from fastdiff.training.update import Updater, learning_rate

SAMPLING_STEPS = 10
IMAGES = 4
"""Factor on TOLERANCE for images: the first of many steps divides the model's errors by a small number. In bf16 correct
images were off by up to 0.04."""

LOSSES = 0.1
"""Factor on TOLERANCE for losses, of which the output of an untrained model is a small part."""

LEARNING_RATE = 1e-4
EMA_RATE = 0.9999
SCALINGS = 20
"""Most updates that fp16 may skip until its loss scale is found."""


@dataclass(frozen=True)
class Job:
    """What a candidate does in a round, and the tensors that it holds between rounds.

    ``check`` is called after the first round: ValueError if its result is wrong.
    """

    run: Callable[[], object]
    tensors: Callable[[], Iterable[Tensor]]
    check: Callable[[], None] = lambda: None


def job_of(suite: str, models: Models, rung: Rung, stack: ExitStack) -> Job:
    """Prepare a rung for a suite, until ``stack`` is closed; ValueError if its model differs from the plain path's."""
    workload = models.workload
    match suite:
        case "train" if rung.trainer:
            return _trained(models, rung, stack)
        case "train":
            return _updated(models, models.training(rung.config), rung.fused)
        case "sample":
            candidate = models.inference(rung.config)
            drawing = Drawing(workload, candidate.call, candidate.runtime.kernels, rung.graphs)
            return Job(drawing, candidate.module.parameters, lambda: _check_images(models, candidate, drawing))
        case _:
            candidate = models.inference(rung.config)
            return forward(workload, candidate.module, candidate.call)


def peer_job(suite: str, workload: Workload, module: nn.Module, call: Callable[..., Tensor]) -> Job:
    """The job of a peer's module, in place of the plain path's."""
    match suite:
        case "train":
            updates = Updates(workload, module.train(), call, Kernels.REFERENCE, fused=False)
            updates()  # the first update creates the moments
            return Job(updates, updates.tensors)
        case "sample":
            module.eval()
            return Job(Drawing(workload, call, Kernels.REFERENCE, graphs=False), module.parameters)
        case _:
            return forward(workload, module.eval(), call)


def forward(workload: Workload, module: nn.Module, call: Callable[..., Tensor]) -> Job:
    """One forward pass without gradients."""
    x, t, conditions = inputs(workload)
    timesteps = t.float()

    def run() -> Tensor:
        with torch.no_grad():
            return call(x, timesteps, **conditions)

    return Job(run, module.parameters)


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


def _updated(models: Models, candidate: Candidate, fused: bool) -> Job:
    """Updates, the first of which is checked, without dropout, which is random."""
    workload, runtime, module = models.workload, candidate.runtime, candidate.module
    updates = Updates(workload, module, candidate.call, runtime.kernels, fused, runtime.memory_format)
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


def _trained(models: Models, rung: Rung, stack: ExitStack) -> Job:
    """The Trainer's update, with batches loaded as in a run, and with its guards, sums and loss scale."""
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

    def first() -> None:
        for _ in range(SCALINGS if trainer.runtime.precision is Precision.FP16 else 1):
            _zero(state.emas)
            run()
            sums = state.sums.read()
            if not sums["skipped"]:
                break
        if sums["skipped"] or not math.isfinite(sums["loss"]):
            raise ValueError(f"the Trainer skips its first update, of loss {sums['loss']:.3g}: not timed")

    _check_update(first, state.parameters, state.emas, learning_rate(trainer.config.train, state.step))
    averages = [tensor for ema in state.emas for tensor in ema.tensors()]
    return Job(run, lambda: [*state.parameters, *averages, *_moments(state.optimizer)])


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
        self._diffusion = _respaced(workload, kernels)
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


def _respaced(workload: Workload, kernels: Kernels) -> GaussianDiffusion:
    process = replace(workload.diffusion, timestep_respacing=str(sampling_steps(workload)))
    return build_diffusion(process, kernels)


def stepping(models: Models, candidate: Candidate) -> Job:
    """The model's call with the ancestral step and its noise, as the engine runs them."""
    workload = models.workload
    x, _, conditions = inputs(workload)
    noise = Philox(0, torch.arange(workload.batch_size, device=workload.device))

    def loop_of(one: Candidate, graphs: bool) -> Loop:
        diffusion = build_diffusion(workload.diffusion, one.runtime.kernels)
        return Loop(one.call, diffusion, SampleConfig(sampler=Sampler.DDPM), graphs=graphs)

    def advance(loop: Loop) -> None:
        if not loop.left:
            loop.begin(x, noise, conditions)
        loop.step()

    def stepped(plain: Candidate) -> Tensor:
        theirs = loop_of(plain, graphs=False)
        advance(theirs)
        return theirs.x

    loop = loop_of(candidate, graphs=True)

    def check() -> None:
        tolerance, moved = TOLERANCE[candidate.runtime.precision], loop.x - x  # a small change: one step of thousands
        require_close(moved, models.plain("step", stepped) - x, tolerance, "differs from the plain path", "step")

    return Job(lambda: advance(loop), candidate.module.parameters, check)
