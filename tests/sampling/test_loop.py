"""The captured loop: each sampler's own, on buffers alone, waiting for nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import DiffusionConfig, GaussianDiffusion, SampleConfig, build_diffusion
from fastdiff.config import Sampler
from fastdiff.diffusion import Philox
from fastdiff.models import UNet
from fastdiff.sampling import Loop
from fastdiff.sampling.guidance import guided

from ..watch import Watch
from .support import MODEL, model_of, runtime

STEPS = 4
SHAPE = (3, 3, 8, 8)
SAMPLERS = [(sampler, 0.0) for sampler in Sampler] + [(Sampler.DDIM, 0.7)]


def config(sampler: Sampler, eta: float = 0.0) -> SampleConfig:
    return SampleConfig(sampler=sampler, eta=eta)


def diffusion(learned: bool = False, xstart: bool = False) -> GaussianDiffusion:
    return build_diffusion(
        DiffusionConfig(
            diffusion_steps=20,
            noise_schedule="cosine",
            learn_sigma=learned,
            predict_xstart=xstart,
            timestep_respacing=str(STEPS),
        )
    )


def mixing(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Depends on all that it is given, image by image."""
    return (0.5 * x.flip(-1) + 0.3 * x.roll(1, 1)).tanh() + (t / 1000 + y / 10).view(-1, 1, 1, 1)


def learned(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([mixing(x, t, y), 0.5 * mixing(x, t, y).sin()], dim=1)


Batch = tuple[Tensor, Philox | Tensor, dict[str, Tensor]]


def batch(first: int, given: bool = False) -> Batch:
    """x_T, noise and conditions of the images from ``first`` on."""
    philox = Philox(7, torch.arange(first, first + SHAPE[0]))
    x = philox.of_start(SHAPE, "torch")  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(first)
    noise = torch.randn(STEPS, *SHAPE, generator=generator) if given else philox
    return x, noise, {"y": torch.arange(first, first + SHAPE[0]) % 4}


def run(loop: Loop, *taken: Any) -> Tensor:
    loop.begin(*taken)
    while loop.left:
        loop.step()
    return loop._held.x.clone()


def fields_loop(
    process: GaussianDiffusion, model: Callable[..., Tensor], how: SampleConfig, taken: Batch, **more: Any
) -> Tensor:
    """The process's own loop of that sampler."""
    x, noise, conditions = taken
    options: dict[str, Any] = {"noise": x, "step_noise": noise, "model_kwargs": conditions, **more}
    match how.sampler:
        case Sampler.DDPM:
            return process.p_sample_loop(model, SHAPE, **options)
        case Sampler.DDIM:
            return process.ddim_sample_loop(model, SHAPE, eta=how.eta, **options)
        case Sampler.HEUN:
            return process.heun_sample_loop(model, SHAPE, **options)
        case Sampler.DPM | Sampler.DPM_SDE:
            return process.dpm_solver_sample_loop(model, SHAPE, sde=how.sampler is Sampler.DPM_SDE, **options)
        case solver:
            return process.multistep_sample_loop(model, SHAPE, solver, **options)


@pytest.mark.parametrize("given", [False, True], ids=["philox", "given"])
@pytest.mark.parametrize("model", [mixing, learned], ids=["fixed", "learned"])
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_the_loop_is_the_processs_own(sampler: Sampler, eta: float, model: Callable[..., Tensor], given: bool) -> None:
    process, how = diffusion(model is learned), config(sampler, eta)
    taken = batch(0, given)
    images = run(Loop(model, process, how), *taken)
    assert torch.equal(images, fields_loop(process, model, how, taken))
    other = run(Loop(model, process, how), taken[0], batch(9, given)[1], taken[2])
    # noise of one's own goes into the images exactly where the sampler has some
    assert torch.equal(images, other) == (not sampler.stochastic and not eta)


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_is_the_configurations(clip: bool) -> None:
    process, taken = diffusion(), batch(0)
    images = run(Loop(mixing, process, SampleConfig(clip_denoised=clip)), *taken)
    expected = process.p_sample_loop(
        mixing, SHAPE, noise=taken[0], step_noise=taken[1], model_kwargs=taken[2], clip_denoised=clip
    )
    assert torch.equal(images, expected)
    assert (float(images.abs().max()) <= 1) == clip


@pytest.mark.parametrize("given", [False, True], ids=["philox", "given"])
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_one_batch_leaves_nothing_to_the_next(sampler: Sampler, eta: float, given: bool) -> None:
    process, how = diffusion(), config(sampler, eta)
    loop = Loop(mixing, process, how)
    both = [run(loop, *batch(first, given)) for first in (0, 3)]
    apart = [run(Loop(mixing, process, how), *batch(first, given)) for first in (0, 3)]
    assert torch.equal(torch.stack(both), torch.stack(apart))
    assert not torch.equal(*both)
    # nor one that was left in the middle
    loop.begin(*batch(6, given))
    loop.step()
    loop.step()
    assert torch.equal(run(loop, *batch(0, given)), apart[0])


def test_what_a_batch_brings_is_copied() -> None:
    process = diffusion()
    x, noise, conditions = batch(0)
    assert isinstance(noise, Philox)
    before = [tensor.clone() for tensor in (x, noise.samples, conditions["y"])]
    loop = Loop(mixing, process, SampleConfig())
    loop.begin(x, noise, conditions)
    places = [tensor.data_ptr() for tensor in (loop.x, loop._held.t, loop._held.conditions["y"])]
    for tensor in (x, noise.samples, conditions["y"]):
        tensor.fill_(-1)  # its owner does with it what he wants
    while loop.left:
        loop.step()
    assert torch.equal(loop.x, run(Loop(mixing, process, SampleConfig()), *batch(0)))
    x, noise, conditions = batch(3)
    run(loop, x, noise, conditions)
    assert places == [tensor.data_ptr() for tensor in (loop.x, loop._held.t, loop._held.conditions["y"])]
    assert torch.equal(x, batch(3)[0])  # and the loop does nothing with it
    assert torch.equal(conditions["y"], batch(3)[2]["y"])
    assert before[0].data_ptr() not in places


def unet() -> UNet:
    return model_of(replace(MODEL, class_cond=True, num_classes=4, learn_sigma=True))


def with_models(*ways: Any) -> list[Any]:
    """Each sampler in each of these ways: the first one with a net, since none knows its model, the others without."""
    first = SAMPLERS[0]
    return [(*sampler, *way, sampler == first) for sampler in SAMPLERS for way in ways]


WAYS = with_models((1.0, True), (3.0, False))
"""Without guidance and with noise that is given; with guidance and Philox."""


@pytest.mark.parametrize(("sampler", "eta", "scale", "given", "net"), WAYS)
def test_no_step_waits_for_the_device(sampler: Sampler, eta: float, scale: float, given: bool, net: bool) -> None:
    place = runtime("bf16")
    model = place.prepare(place.cast(unet()), 0) if net else learned
    loop = Loop(guided(model, scale) if scale != 1 else model, diffusion(True), config(sampler, eta))
    run(loop, *batch(0, given))  # what is made once may wait
    taken = batch(3, given)
    with Watch() as watch:
        loop.begin(*taken)
        while loop.left:
            loop.step()
    assert watch.calls > (100 if net else 10) * STEPS
    assert watch.seen == []


class Elsewhere(TorchDispatchMode):
    """Notes every operation that has to do with numbers in the host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if any(part.device.type == "cpu" and part.ndim for part in tensors([*args, result])):
            self.seen.append(str(func))
        return result


@pytest.mark.parametrize(("sampler", "eta", "scale", "net"), [(*SAMPLERS[0], 1.0, True), *with_models((3.0,))])
def test_no_step_copies_from_the_host(sampler: Sampler, eta: float, scale: float, net: bool) -> None:
    """On a device that is only thought of, and on which nothing can be computed."""
    model: Callable[..., Tensor] = unet().to("meta") if net else learned
    process = build_diffusion(
        DiffusionConfig(diffusion_steps=20, noise_schedule="cosine", learn_sigma=True, timestep_respacing=str(STEPS)),
        kernels="torch",
    )
    loop = Loop(guided(model, scale) if scale != 1 else model, process, config(sampler, eta))
    numbers = torch.zeros(SHAPE[0], dtype=torch.int64, device="meta")
    taken = torch.empty(SHAPE, device="meta"), Philox(7, numbers), {"y": numbers}
    run(loop, *taken)  # the tables are copied once
    with Elsewhere() as watch:
        loop.begin(*taken)
        while loop.left:
            loop.step()
    assert watch.calls > (100 if net else 10) * STEPS
    assert watch.seen == []


class Recording(TorchDispatchMode):
    """Stands for a CUDA graph: notes operations with the very tensors, and does them again on these."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, dict[str, Any], list[Tensor]]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [a for a, said in zip(args, func._schema.arguments, strict=False) if said.is_write]
        self._before += [(tensor, tensor.clone()) for tensor in written]
        result = func(*args, **kwargs)
        self._operations.append((func, args, kwargs, tensors(result)))
        return result

    def pool(self) -> object:
        return self

    @property
    def names(self) -> set[str]:
        return {func._schema.name for func, *_ in self._operations}

    @torch.no_grad()
    def forget(self) -> None:
        """A capture computes nothing: what was written to is as it was."""
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self._operations:
            for result, again in zip(results, tensors(func(*args, **kwargs)), strict=True):
                if result.untyped_storage().data_ptr() != again.untyped_storage().data_ptr():
                    result.copy_(again)


def tensors(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, (list, tuple)) else [result]
    return [part for part in parts if isinstance(part, Tensor)]


class Posing(Loop):
    """Says that its tensors are on a GPU."""

    @property
    def x(self) -> Any:
        return SimpleNamespace(device=SimpleNamespace(type="cuda"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """CUDA graphs on the CPU; returns those that were captured."""
    captured: list[Recording] = []

    @contextmanager
    def graph(recording: Recording, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert pool is (captured[0].pool() if captured else None)  # one memory for all
        assert (stream, capture_error_mode) == ("its own", "thread_local")
        with recording:
            yield
        recording.forget()
        captured.append(recording)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "its own")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return captured


@pytest.mark.parametrize(("sampler", "eta", "scale", "given", "net"), WAYS)
def test_a_step_is_one_graph_of_the_buffers(
    graphs: list[Recording], sampler: Sampler, eta: float, scale: float, given: bool, net: bool
) -> None:
    """One step as it is, one captured, then replays: further batches run no line of Python of the model's."""
    calls = 0
    module = unet() if net else learned

    def model(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return module(*args, **kwargs)

    process, how = diffusion(True), config(sampler, eta)
    steps = guided(model, scale) if scale != 1 else model
    stepped = [run(Loop(steps, process, how), *batch(first, given)) for first in (0, 3, 6)]
    calls = 0
    loop = Posing(steps, process, how)
    heun = sampler is Sampler.HEUN
    # Heun's method calls twice, but for its last step, which is a graph of its own
    for first, after in ((0, 5 if heun else 2), (3, 6 if heun else 2), (6, 6 if heun else 2)):
        assert torch.equal(run(loop, *batch(first, given)), stepped[first // 3]), first
        assert calls == after
    assert len(graphs) == 1 + heun
    for graph in graphs:
        # no number comes from the host or from a generator that a replay would not move on
        assert not {name for name in graph.names if "lift_fresh" in name or "rand" in name or "normal_" in name}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_on_a_gpu_a_graph_is_the_steps(sampler: Sampler, eta: float) -> None:
    device = torch.device("cuda")
    module, process, how = unet().to(device), diffusion(True), config(sampler, eta)

    def there(first: int) -> Batch:
        x, noise, conditions = batch(first)
        assert isinstance(noise, Philox)
        return x.to(device), Philox(7, noise.samples.to(device)), {"y": conditions["y"].to(device)}

    loop = Loop(guided(module, 3.0), process, how)
    for first in (0, 3, 6):
        expected = fields_loop(process, guided(module, 3.0), how, there(first))
        torch.testing.assert_close(run(loop, *there(first)), expected, rtol=0, atol=1e-4)
    assert all(isinstance(graph, torch.cuda.CUDAGraph) for graph in loop._graphs.values())
    taken = there(9)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(loop, *taken)
    finally:
        torch.cuda.set_sync_debug_mode("default")
