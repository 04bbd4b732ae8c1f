"""Private names of other projects that this one uses: one list, with a test of the behaviour that each is used for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("fastdiff", "kernels", "cli", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]

USES = {
    "_found_inf_per_device": "says on the device whether fp16 gradients overflowed; GradScaler.step syncs",
    "_foreach_copy_": "copies all parameters in one launch; there is no public multi-tensor copy",
    "_foreach_lerp_": "updates an EMA of all parameters in one launch",
    "_overloadpacket": "the operation of an overload, by which a model's operations are counted",
    "_apply": "the hook through which nn.Module.to and its like convert a module",
    "_inductor": "config.unsafe_marked_cacheable_functions lets the cache keep graphs that call our functions",
    "_dynamo": "config.fail_on_recompile_limit_hit: a benchmark fails instead of running eagerly",
    "_functorch": "config.donated_buffer: a benchmark runs a compiled backward pass twice",
    "_python_dispatch": "TorchDispatchMode counts the operations of a model; PyTorch documents it, from this module",
    "_imaging": "Pillow's library, which has libtiff in it: its handler of errors writes to stderr",
    "_sleep": "keeps a GPU busy while the host queues the kernels that are timed",
}
"""By name: why we use it. What is not in the list is refused by the first test."""


def private_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name):
                yield name
            case ast.Import(names=names):
                for alias in names:
                    yield from alias.name.split(".")
            case ast.ImportFrom(module=str(module), names=names):
                yield from module.split(".")
                yield from (alias.name for alias in names)


def own_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                yield name


def test_every_use_is_in_the_list() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    of_named_tuples = {"_asdict", "_fields", "_replace"}  # which are public
    own = {name for tree in trees for name in own_names(tree)} | of_named_tuples
    used = {name for tree in trees for name in private_names(tree) if name.startswith("_") and not name.endswith("__")}
    assert used - (own - set(USES)) == set(USES)


def test_a_fused_optimizer_skips_the_update_that_found_inf_marks() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones(3)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize("gradient", [1.0, torch.inf, torch.nan])
def test_a_grad_scaler_knows_which_gradients_overflowed(gradient: float) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    assert parameter.grad is not None
    parameter.grad[1] = gradient
    scaler.unscale_(optimizer)
    (found,) = scaler._found_inf_per_device(optimizer).values()
    assert bool(found) == (gradient != 1.0)


def test_parameters_are_copied_and_averaged() -> None:
    ours, theirs = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), 2.0)]
    torch._foreach_copy_(ours, theirs)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    torch._foreach_lerp_(ours, [torch.zeros(2), torch.zeros(3)], 0.25)
    assert torch.equal(ours[1], torch.full((3,), 1.5))


def test_moving_a_module_applies_a_function_to_its_tensors() -> None:
    class Seen(nn.Linear):
        calls = 0

        def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
            Seen.calls += 1
            return super()._apply(fn, recurse)

    assert Seen(2, 2).to(torch.float64).weight.dtype is torch.float64
    assert Seen.calls == 1


def test_settings_of_the_compiler_exist() -> None:
    assert isinstance(torch._inductor.config.unsafe_marked_cacheable_functions, dict)
    assert isinstance(torch._functorch.config.donated_buffer, bool)
    assert isinstance(torch._dynamo.config.fail_on_recompile_limit_hit, bool)


def test_a_dispatch_mode_sees_operations_and_a_gpu_can_be_kept_busy() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    with Seen():
        torch.ones(2) + 1
    assert torch.ops.aten.add.Tensor in seen
    assert torch.ops.aten.add.Tensor._overloadpacket is torch.ops.aten.add
    assert callable(torch.cuda._sleep)
