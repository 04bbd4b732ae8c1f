"""FusedAdamW: PyTorch's numbers, and every tensor left as it was."""

import pytest
import torch
from torch import Tensor

from fastdiff.training.optimizer import FusedAdamW

SHAPES = [(8, 6, 3, 3), (8, 6, 1, 1), (5, 7, 3, 3), (6, 4), (9,), (12, 4, 1)]


def weights(memory_format: torch.memory_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*shape, generator=generator) for shape in SHAPES]
    return [(w.contiguous(memory_format=memory_format) if w.ndim == 4 else w).clone().requires_grad_() for w in drawn]


def gradients(step: int, like: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.empty_like(w).copy_(torch.randn(w.shape, generator=generator)) for w in like]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pytorchs_numbers(memory_format: torch.memory_format) -> None:
    ours, plain = weights(memory_format), weights(torch.contiguous_format)
    own, theirs = FusedAdamW(ours, 1e-2, 0.1), torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(4):
        for parameters, optimizer in ((ours, own), (plain, theirs)):
            for weight, gradient in zip(parameters, gradients(step, parameters), strict=True):
                weight.grad = gradient
            optimizer.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the last bit depends on where a vector ends
        for name, value in theirs.state[b].items():
            torch.testing.assert_close(own.state[a][name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_everything_is_left_as_it_was() -> None:
    """Shapes, strides and memory of the weights, the gradients themselves, moments in the weights' layout."""
    parameters = weights(torch.channels_last)
    optimizer = FusedAdamW(parameters, 1e-2, 0.0)
    for step in range(2):
        held = gradients(step, parameters)
        before = [(w.shape, w.stride(), w.data_ptr()) for w in parameters]
        for weight, gradient in zip(parameters, held, strict=True):
            weight.grad = gradient
        optimizer.step()
        assert [(w.shape, w.stride(), w.data_ptr()) for w in parameters] == before
        for weight, gradient in zip(parameters, held, strict=True):
            assert weight.grad is gradient
            for name in ("exp_avg", "exp_avg_sq"):
                assert optimizer.state[weight][name].shape == weight.shape
                assert optimizer.state[weight][name].stride() == weight.stride()


def test_a_failed_update_leaves_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = weights(torch.channels_last)
    optimizer = FusedAdamW(parameters, 1e-2, 0.0)
    for weight, gradient in zip(parameters, gradients(0, parameters), strict=True):
        weight.grad = gradient

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    assert [tuple(w.shape) for w in parameters] == SHAPES
    assert all(w.grad is not None and w.grad.shape == w.shape for w in parameters)


def test_found_inf_skips() -> None:
    parameters = weights(torch.channels_last)
    before = [w.detach().clone() for w in parameters]
    optimizer = FusedAdamW(parameters, 1e-2, 0.0)
    for weight, gradient in zip(parameters, gradients(0, parameters), strict=True):
        weight.grad = gradient
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    for weight, old in zip(parameters, before, strict=True):
        assert torch.equal(weight, old)
