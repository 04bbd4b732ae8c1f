"""How an implementation is chosen: by name, and never another in its place."""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.kernels import Backend, attention, diffusion_loss, diffusion_step, group_norm_silu
from fastdiff.kernels import backend as backend_module
from fastdiff.kernels.gaussian import TABLES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLES_OF_10 = torch.rand(10, len(TABLES))


def image(channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, channels, 2, 2, device=DEVICE, dtype=dtype)


def t() -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=DEVICE)


OPS: dict[str, Callable[..., Any]] = {
    "group_norm_silu": lambda backend, dtype=torch.float32: group_norm_silu(
        image(32, dtype), torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE), backend=backend
    ),
    "attention": lambda backend, dtype=torch.float32: attention(
        torch.zeros(1, 4, 96, device=DEVICE, dtype=dtype), 2, backend=backend
    ),
    "diffusion_step": lambda backend, dtype=torch.float32: (
        diffusion_step(
            image(3, dtype),
            image(6, dtype),
            t(),
            TABLES_OF_10.to(DEVICE, torch.promote_types(dtype, torch.float32)),
            noise=image(3, dtype),
            backend=backend,
        ).sample
    ),
    "diffusion_loss": lambda backend, dtype=torch.float32: (
        diffusion_loss(
            image(6, dtype),
            *(image(3, dtype),) * 3,
            t(),
            TABLES_OF_10.to(DEVICE, torch.promote_types(dtype, torch.float32)),
            backend=backend,
        ).loss
    ),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["triton", Backend.TRITON])
def test_triton_runs(backend: str, op: str) -> None:
    assert torch.isfinite(OPS[op](backend)).all()


ARGUMENTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "group_norm_silu": (
        group_norm_silu,
        {"x": image(32), "weight": torch.ones(32), "bias": torch.ones(32)}
        | {"scale": torch.ones(1, 32), "shift": torch.ones(1, 32)},
    ),
    "diffusion_step": (
        diffusion_step,
        {"x": image(3), "model_output": image(6), "t": t(), "tables": TABLES_OF_10, "seed": 1} | {"samples": t()},
    ),
    "diffusion_loss": (
        diffusion_loss,
        {"x_t": image(3), "model_output": image(6), "x_start": image(3), "noise": image(3), "t": t()}
        | {"tables": TABLES_OF_10},
    ),
}


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_tensor_on_another_device_is_named(op: str, backend: str) -> None:
    run, arguments = ARGUMENTS[op]
    first, *others = arguments = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    run(**arguments, backend=backend)
    for name in (name for name in others if isinstance(arguments[name], Tensor)):
        message = f"^{op}: {name} is on meta, but the input on {arguments[first].device}: move it there$"
        with pytest.raises(ValueError, match=message):
            run(**arguments | {name: arguments[name].to("meta")}, backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_triton_refuses_float64_and_auto_does_not(op: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{op}: backend triton computes in fp32, fp16 and bf16, not in torch.float64"
    ):
        OPS[op]("triton", torch.float64)
    assert torch.isfinite(OPS[op]("auto", torch.float64)).all()


@pytest.mark.parametrize("op", OPS)
def test_triton_without_a_gpu_says_what_to_do(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "INTERPRETED", False)
    if DEVICE.type == "cuda":
        assert torch.isfinite(OPS[op]("triton")).all()
        return
    with pytest.raises(ValueError, match=f"^{op}: backend triton needs a GPU, but the tensor is on cpu .* use auto"):
        OPS[op]("triton")


@pytest.mark.parametrize("op", OPS)
def test_triton_that_is_not_installed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "HAS_TRITON", False)
    with pytest.raises(ValueError, match=f"^{op}: backend triton needs the package triton, which is not installed"):
        OPS[op]("triton")
    assert torch.isfinite(OPS[op]("auto")).all()


def test_the_kernels_can_do_without_triton() -> None:
    """A platform without Triton still has every operation: importing them must not import it."""
    program = (
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from fastdiff.kernels import attention\n"
        "print(attention(torch.zeros(1, 4, 48), 1).shape)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "torch.Size([1, 4, 16])\n"), run.stderr


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cuda", "", "Torch", None])
def test_an_unknown_backend_is_refused(backend: str, op: str) -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, reference, not"):
        OPS[op](backend)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.TORCH, Backend.REFERENCE, "auto", "torch", "reference"])
def test_members_and_their_names_are_the_same(backend: str, op: str) -> None:
    assert torch.isfinite(OPS[op](backend)).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_the_named_implementation_runs(op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    implementations = import_module(f"fastdiff.kernels.{op}.op").IMPLEMENTATIONS
    called = []
    for name, implementation in list(implementations.items()):
        monkeypatch.setitem(
            implementations,
            name,
            lambda *a, name=name, implementation=implementation: called.append(name) or implementation(*a),
        )
    OPS[op](backend)
    assert called == [backend]
