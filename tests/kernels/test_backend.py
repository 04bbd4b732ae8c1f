"""How an implementation is chosen: by name, and never another in its place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdiff.kernels import Backend, attention, group_norm_silu

OPS: dict[str, Callable[[str], Tensor]] = {
    "group_norm_silu": lambda backend: group_norm_silu(
        torch.zeros(1, 32, 4), torch.ones(32), torch.zeros(32), backend=backend
    ),
    "attention": lambda backend: attention(torch.zeros(1, 4, 48), 2, backend=backend),
}


@pytest.mark.parametrize("op", OPS)
def test_triton_is_refused_where_there_is_none(op: str) -> None:
    with pytest.raises(ValueError, match=f"{op} has no triton implementation .* auto or one of torch, reference"):
        OPS[op]("triton")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cuda", "", "Torch", None])
def test_an_unknown_backend_is_refused(backend: str, op: str) -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, reference, not"):
        OPS[op](backend)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.TORCH, Backend.REFERENCE, "auto", "torch", "reference"])
def test_members_and_their_names_are_the_same(backend: str, op: str) -> None:
    assert torch.isfinite(OPS[op](backend)).all()


@pytest.mark.parametrize(("module", "op"), [("group_norm_silu", "group_norm_silu"), ("attention", "attention")])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_named_implementation_runs(module: str, op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    implementations = import_module(f"fastdiff.kernels.{module}.op").IMPLEMENTATIONS
    called = []
    for name, implementation in list(implementations.items()):
        monkeypatch.setitem(
            implementations,
            name,
            lambda *a, name=name, implementation=implementation: called.append(name) or implementation(*a),
        )
    OPS[op](backend)
    assert called == [backend]
