"""From improved-diffusion's operations to what a user gets, one change at a time, each checked before it is timed."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.benchmarks.workload import TOLERANCE, Workload, inputs, randomised, require_close
from fastdiff.config import Compile, Kernels, MemoryFormat, Precision, RuntimeConfig
from fastdiff.kernels.backend import HAS_TRITON
from fastdiff.models import UNet, build_model
from fastdiff.models.blocks import set_fuses
from fastdiff.runtime.device import Runtime, has_native_bf16

PLAIN = RuntimeConfig(
    kernels=Kernels.REFERENCE,
    compile=Compile.OFF,
    precision=Precision.FP32,
    memory_format=MemoryFormat.CONTIGUOUS,
)
"""improved-diffusion's operations in their order: the baseline of every speedup."""

ONE_PARAMETER = 4
"""Factor on TOLERANCE for the gradient of one parameter, in which fewer errors average out. In bf16 correct gradients
were off by up to 0.08; that of a layer without a gradient is off by 0.7 or more."""

ROUNDING = 1e-3
"""Fraction of the total gradient norm. A smaller gradient, such as that of a bias before a norm, may be off by more."""

TF32 = "+ tf32"
"""The rung with PyTorch's default arithmetic on a GPU, which is also the peers'."""

LONG = 10**6
"""Model calls of a job that is long enough to compile the model."""


@dataclass(frozen=True)
class Rung:
    """One way to run the workload, named by what it adds to the rung below."""

    name: str
    config: RuntimeConfig
    fused: bool = False  # the optimizer in one kernel, the EMAs in one call
    graphs: bool = False  # CUDA graphs of the sampling steps
    trainer: bool = False  # the Trainer's update, with its guards
    beside: bool = False  # the norms' kernels take over work beside them
    mode: str = ""  # of torch.compile, in place of the runtime's


RIVALS = ("max-autotune", "max-autotune-no-cudagraphs")
"""Modes of torch.compile that take minutes: the fastest without this library's kernels."""


def ladder(suite: str, device: torch.device) -> list[Rung]:
    """The rungs of a suite on this device, the plain path first; unsupported rungs are left out."""
    on_gpu, training = device.type == "cuda", suite == "train"
    compiles = Runtime.resolve(RuntimeConfig(device=str(device))).compiles(LONG)
    changes: list[tuple[bool, str, dict[str, Any], dict[str, Any]]] = [
        (has_tf32(device), TF32, {"precision": Precision.TF32}, {}),
        (True, "+ channels_last", {"memory_format": MemoryFormat.CHANNELS_LAST}, {}),
        (True, "+ torch kernels", {"kernels": Kernels.TORCH}, {}),
        (has_native_bf16(device), "+ bf16", {"precision": Precision.BF16}, {}),
        (training, "+ fused optimizer", {}, {"fused": True}),
        (compiles, "+ compile", {"compile": Compile.ON}, {}),
        (on_gpu and HAS_TRITON, "+ Triton kernels", {"kernels": Kernels.AUTO}, {}),
        (on_gpu and HAS_TRITON, "+ beside the norms", {}, {"beside": True}),
        (on_gpu and suite == "sample", "+ CUDA graph", {}, {"graphs": True}),
        (training, "trainer", {}, {"trainer": True}),
    ]
    rungs = [Rung("plain", replace(PLAIN, device=str(device)))]
    for possible, name, settings, options in changes:
        if possible:
            rungs.append(replace(rungs[-1], name=name, config=replace(rungs[-1].config, **settings), **options))
    return rungs


NO_GRAPH = "without a CUDA graph"


def rivals(device: torch.device) -> list[Rung]:
    """What a sampling step is compared with: PyTorch's kernels in the engine and, on a GPU, RIVALS and NO_GRAPH."""
    arithmetic = Runtime.resolve(RuntimeConfig(device=str(device), kernels=Kernels.TORCH))
    compile = Compile.ON if device.type == "cuda" else Compile.OFF
    config = RuntimeConfig(str(device), arithmetic.precision, compile, Kernels.TORCH, arithmetic.memory_format)
    modes = RIVALS if device.type == "cuda" else ()
    ours = [replace(ladder("step", device)[-1], name=NO_GRAPH)] if device.type == "cuda" else []
    return [*ours, Rung("torch kernels", config), *(Rung(mode, config, mode=mode) for mode in modes)]


def has_tf32(device: torch.device) -> bool:
    """Whether the device can round fp32 to TF32, as PyTorch's convolutions do by default."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def as_asked(suite: str, config: RuntimeConfig, device: torch.device) -> list[Rung]:
    """The plain path, also in TF32 if the peers use it, and the requested arithmetic as a user gets it."""
    runtime = Runtime.resolve(replace(config, device=str(device)))
    compiled = runtime.compiles(LONG)
    how = "compiled" if compiled else "eager"
    said = f"{runtime.precision}, {how}, {runtime.memory_format}, kernels {runtime.kernels}"
    compile = Compile.ON if compiled else Compile.OFF
    asked = replace(config, device=str(device), precision=runtime.precision, compile=compile)
    rung = Rung(f"asked: {said}", asked, fused=True, graphs=True, beside=True, trainer=suite == "train")
    plain = [one for one in ladder(suite, device)[:2] if one.name in ("plain", TF32)]
    return [*plain, rung]


@dataclass(frozen=True)
class Candidate:
    """A model ready to be called: the module with its parameters, and the function that its runtime prepared."""

    module: nn.Module
    call: Callable[..., Tensor]
    runtime: Runtime


class Models:
    """A workload's model in every requested arithmetic, all with the same weights, each checked."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        torch.manual_seed(0)
        self._initial = randomised(build_model(workload.model).state_dict())
        self.num_parameters = sum(p.numel() for p in self._initial.values())
        self._inference: dict[tuple[RuntimeConfig, str, bool], Candidate] = {}
        self._results: dict[str, Tensor] = {}

    def plain(self, what: str, compute: Callable[[Candidate], Tensor]) -> Tensor:
        """The plain path's result in a job, computed once and cached as ``what``."""
        if what not in self._results:
            self._results[what] = compute(self.inference(replace(PLAIN, device=str(self.workload.device))))
        return self._results[what]

    def compute_plain(self, training: bool) -> None:
        """Compute at once what the candidates' outputs, or if ``training`` their gradients, are compared with."""
        _ = self._expected_gradients if training else self._expected_output

    def inference(self, config: RuntimeConfig, mode: str = "", beside: bool = False) -> Candidate:
        """The model as the engine calls it, its weights cast once; ValueError if its output is not the plain path's.

        With a ``mode`` torch.compile prepares it in that mode; ``beside`` as in a rung. It is cached, so that the
        suites share compiled models.
        """
        key = config, mode, beside
        if key not in self._inference:
            runtime = Runtime.resolve(config)
            module = runtime.cast(self._module(runtime, beside).for_inference())
            compiled = runtime.eager(torch.compile(module, dynamic=False, mode=mode)) if mode else None
            candidate = Candidate(module, compiled or runtime.prepare(module, LONG), runtime)
            tolerance = TOLERANCE[runtime.precision]
            require_close(self._output(candidate), self._expected_output, tolerance, "differs from the plain path")
            self._inference[key] = candidate
        return self._inference[key]

    def training(self, config: RuntimeConfig, beside: bool = False) -> Candidate:
        """The model as it is trained; ValueError if its output or gradients are not the plain path's."""
        runtime = Runtime.resolve(config)
        module = self._module(runtime, beside).train()
        return self.checked(Candidate(module, runtime.prepare(module, LONG), runtime))

    def checked(self, candidate: Candidate) -> Candidate:
        """The candidate with the common weights; ValueError if its output or gradients are not the plain path's."""
        candidate.module.load_state_dict(self._initial)
        tolerance, verdict = TOLERANCE[candidate.runtime.precision], "differs from the plain path"
        found, expected = self._gradients(candidate), self._expected_gradients
        require_close(found[0], expected[0], tolerance, verdict)
        whole, wanted = (torch.cat([g.flatten() for g in gradients]) for gradients in (found[1], expected[1]))
        require_close(whole, wanted, tolerance, verdict, "gradient")
        floor = ROUNDING * wanted.norm()
        names = [name for name, _ in candidate.module.named_parameters()]
        for name, own, wanted in zip(names, found[1], expected[1], strict=True):
            require_close(own, wanted, ONE_PARAMETER * tolerance, verdict, f"gradient of {name}", floor)
        return candidate

    @functools.cached_property
    def _plain(self) -> Runtime:
        return Runtime.resolve(replace(PLAIN, device=str(self.workload.device)))

    @functools.cached_property
    def _expected_output(self) -> Tensor:
        module = self._module(self._plain).eval()
        return self._output(Candidate(module, self._plain.eager(module), self._plain))

    @functools.cached_property
    def _expected_gradients(self) -> tuple[Tensor, Sequence[Tensor]]:
        module = self._module(self._plain).train()
        return self._gradients(Candidate(module, self._plain.eager(module), self._plain))

    def _module(self, runtime: Runtime, beside: bool = False) -> UNet:
        module = build_model(self.workload.model, runtime.kernels, runtime.memory_format)
        set_fuses(module, beside)
        module.load_state_dict(self._initial)
        return module.to(self.workload.device)

    def _output(self, candidate: Candidate) -> Tensor:
        x, t, conditions = inputs(self.workload)
        with torch.no_grad():
            return candidate.call(x, t.float(), **conditions).float()

    def _gradients(self, candidate: Candidate) -> tuple[Tensor, Sequence[Tensor]]:
        """The output and the gradients of its sum of squares, without dropout, which is random."""
        x, t, conditions = inputs(self.workload)
        x = x.contiguous(memory_format=torch.channels_last)  # the layout of batches: another one is compiled again
        candidate.module.train(not self.workload.model.dropout)
        output = candidate.call(x, t.float(), **conditions)
        loss = output.float().square().sum() / len(x)
        gradients = torch.autograd.grad(loss, list(candidate.module.parameters()))
        candidate.module.train()
        return output.detach().float(), gradients
