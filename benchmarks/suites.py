"""What is measured: the UNet's forward pass, a training step, sampling on the plain path, ours, a peer's; a step."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.config import (
    Compile,
    DiffusionConfig,
    Kernels,
    MemoryFormat,
    ModelConfig,
    Precision,
    RuntimeConfig,
    SampleConfig,
    Sampler,
)
from fastdiff.diffusion import Philox, build_diffusion
from fastdiff.models import build_model
from fastdiff.runtime.device import Runtime
from fastdiff.sampling import Loop, generate

PLAIN = {
    "kernels": Kernels.REFERENCE,
    "compile": Compile.OFF,
    "precision": Precision.FP32,
    "memory_format": MemoryFormat.CONTIGUOUS,
}
"""improved-diffusion's own operations in their order: what every ratio is quoted against."""

SAMPLING_STEPS = 10
TOLERANCE = {Precision.FP32: 1e-4, Precision.TF32: 1e-2, Precision.BF16: 5e-2, Precision.FP16: 1e-2}
"""Largest relative error of a candidate's output against the plain path's, beyond which no speed is told."""


@dataclass(frozen=True)
class Workload:
    """The model, process and batch that a suite runs."""

    model: ModelConfig
    diffusion: DiffusionConfig
    batch_size: int
    device: torch.device


@dataclass(frozen=True)
class Candidate:
    """A way to run the model: the module whose parameters it uses, the function to call, and the runtime of ours."""

    module: nn.Module
    call: Callable[..., Tensor]
    runtime: Runtime | None = None  # a peer has none

    @property
    def kernels(self) -> Kernels:
        """The process's backend."""
        return self.runtime.kernels if self.runtime else Kernels.AUTO

    def for_sampling(self, workload: Workload) -> Callable[..., Tensor]:
        """The model as the engine calls it, its weights cast once: those of a copy, for training needs them in fp32.

        ValueError where it computes something else than the model as it was.
        """
        self.module.eval()
        if self.runtime is None:
            return self.call
        call = self.runtime.prepare(self.runtime.cast(copy.deepcopy(self.module)), calls=0)
        x, t, kwargs = inputs(workload)
        with torch.no_grad():
            found, expected = (c(x, t.float(), **kwargs) for c in (call, self.runtime.eager(self.module)))
        tolerance = TOLERANCE[self.runtime.precision]
        require_close(found, expected, tolerance, "the model with its weights cast differs from itself")
        return call


def candidates(workload: Workload, ours: RuntimeConfig) -> dict[str, Candidate]:
    """The plain path first, then ours eager and compiled, then diffusers' UNet2DModel where it is installed.

    All with equal weights except the peer's. ValueError where one of ours computes something else than the plain path.
    """
    torch.manual_seed(0)
    initial = randomised(build_model(workload.model).state_dict())
    values = {**ours.to_dict(), "device": str(workload.device)}
    configs = {
        "plain": RuntimeConfig.from_dict({**values, **PLAIN}),
        "fastdiff, eager": RuntimeConfig.from_dict({**values, "compile": Compile.OFF}),
    }
    if ours.compile is not Compile.OFF:
        configs["fastdiff"] = RuntimeConfig.from_dict({**values, "compile": Compile.ON})
    found = {}
    for name, config in configs.items():
        runtime = Runtime.resolve(config)
        module = build_model(workload.model, runtime.kernels, runtime.memory_format)
        module.load_state_dict(initial)
        module.to(workload.device)
        found[name] = Candidate(module, runtime.prepare(module, calls=0), runtime)
        _check(name, found[name], found["plain"], workload, TOLERANCE[runtime.precision])
    if find_spec("diffusers") and not workload.model.class_cond:
        found["diffusers"] = _diffusers_peer(workload)
    return found


def unet_suite(workload: Workload, found: Mapping[str, Candidate]) -> dict[str, Callable[[], object]]:
    """One forward pass without gradients."""
    x, t, kwargs = inputs(workload)

    def forward(candidate: Candidate) -> Tensor:
        with torch.no_grad():
            return candidate.call(x, t.float(), **kwargs)

    return {name: lambda c=c: forward(c) for name, c in found.items()}  # type: ignore[misc]


def train_suite(workload: Workload, found: Mapping[str, Candidate]) -> dict[str, Callable[[], object]]:
    """One update: loss, gradients, AdamW."""
    x, t, kwargs = inputs(workload)

    def stepper(candidate: Candidate) -> Callable[[], None]:
        candidate.module.train()
        diffusion = build_diffusion(workload.diffusion, candidate.kernels)
        ours = candidate.runtime is not None
        optimizer = torch.optim.AdamW(candidate.module.parameters(), lr=1e-4, fused=ours)

        def step() -> None:
            diffusion.training_losses(candidate.call, x, t, kwargs)["loss"].mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {name: stepper(candidate) for name, candidate in found.items()}


def sample_suite(workload: Workload, found: Mapping[str, Candidate]) -> dict[str, Callable[[], object]]:
    """One batch of images in 10 DDIM steps, noise drawn and pixels brought to the host."""
    respaced = {**workload.diffusion.to_dict(), "timestep_respacing": str(SAMPLING_STEPS)}
    process = DiffusionConfig.from_dict(respaced)
    diffusions = {candidate.kernels: build_diffusion(process, candidate.kernels) for candidate in found.values()}
    size = workload.batch_size
    config = SampleConfig(num_samples=size, batch_size=size, sampler=Sampler.DDIM)
    labels = _labels(workload)

    def sampler(name: str, candidate: Candidate) -> Callable[[], object]:
        call = candidate.for_sampling(workload)

        def sample() -> object:
            drawn = generate(
                call,
                diffusions[candidate.kernels],
                config,
                image_size=workload.model.image_size,
                device=workload.device,
                labels=None if labels is None else labels.cpu().numpy(),
                graphs=name.startswith("fastdiff"),
            )
            return list(drawn)

        return sample

    return {name: sampler(name, candidate) for name, candidate in found.items()}


def step_suite(workload: Workload, found: Mapping[str, Candidate]) -> dict[str, Callable[[], object]]:
    """What an ancestral step with its noise costs over the model's call alone, both as the engine runs them."""
    candidate = found.get("fastdiff", found["fastdiff, eager"])
    call = candidate.for_sampling(workload)
    x, t, kwargs = inputs(workload)
    timesteps = t.float()
    diffusion = build_diffusion(workload.diffusion, candidate.kernels)
    loop = Loop(call, diffusion, SampleConfig(sampler=Sampler.DDPM), graphs=True)
    noise = Philox(0, torch.arange(workload.batch_size, device=workload.device))

    def model_call() -> Tensor:
        with torch.no_grad():
            return call(x, timesteps, **kwargs)

    def step() -> None:
        if not loop.left:
            loop.begin(x, noise, kwargs)
        loop.step()

    return {"model call": model_call, "model call and step": step}


SUITES: Mapping[str, Callable[[Workload, Mapping[str, Candidate]], dict[str, Callable[[], object]]]] = {
    "unet": unet_suite,
    "train": train_suite,
    "sample": sample_suite,
    "step": step_suite,
}


def inputs(workload: Workload) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Images, timesteps (N,) int64, and the model's further arguments."""
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch_size, 3, workload.model.image_size, workload.model.image_size)
    x = torch.rand(shape, generator=generator) * 2 - 1
    t = torch.randint(workload.diffusion.diffusion_steps, (workload.batch_size,), generator=generator)
    labels = _labels(workload)
    return x.to(workload.device), t.to(workload.device), {} if labels is None else {"y": labels}


def _labels(workload: Workload) -> Tensor | None:
    if not workload.model.class_cond:
        return None
    return torch.arange(workload.batch_size, device=workload.device) % workload.model.num_classes


def randomised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Small random numbers for what begins as zero, so that a comparison of outputs compares the whole model."""
    return {k: torch.randn_like(v) * 0.02 if not v.any() else v for k, v in state.items()}


def require_close(found: Tensor, expected: Tensor, tolerance: float, verdict: str, what: str = "output") -> None:
    """ValueError where the relative error is larger than ``tolerance``: what is wrong is not timed."""
    error = float((found - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise ValueError(f"{verdict} by {error:.1e} in its {what} (allowed {tolerance:.0e}): not timed")


def _check(name: str, candidate: Candidate, plain: Candidate, workload: Workload, tolerance: float) -> None:
    x, t, kwargs = inputs(workload)
    results = []
    for c in (candidate, plain):
        output = c.call(x, t.float(), **kwargs)
        gradients = torch.autograd.grad(output.square().mean(), list(c.module.parameters()))
        results.append((output.detach().flatten(), torch.cat([g.flatten() for g in gradients])))
    for what, found, expected in zip(("output", "gradient"), *results, strict=True):
        require_close(found, expected, tolerance, f"{name} differs from the plain path", what)


def _diffusers_peer(workload: Workload) -> Candidate:
    """UNet2DModel with the same widths, blocks and attention: eager, fp32, its own AdamW unfused."""
    from diffusers import UNet2DModel

    model = workload.model
    attends = [level in model.attention_levels for level in range(len(model.multipliers))]
    peer: Any = UNet2DModel(
        sample_size=model.image_size,
        in_channels=3,
        out_channels=model.out_channels,
        layers_per_block=model.num_res_blocks,
        block_out_channels=tuple(model.num_channels * m for m in model.multipliers),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=model.num_channels * model.multipliers[-1] // model.num_heads,
        resnet_time_scale_shift="scale_shift" if model.use_scale_shift_norm else "default",
    )
    peer.to(workload.device)

    def call(x: Tensor, timesteps: Tensor) -> Tensor:
        return peer(x, timesteps).sample

    return Candidate(peer, call)
