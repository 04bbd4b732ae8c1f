"""What the kernel tests share: the error budget, which comes from float64."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRITON_DTYPES = DTYPES if DEVICE.type == "cuda" else [torch.float32, torch.float16]
"""What the kernels are tested in: Triton's interpreter is no measure of bf16."""


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A small choice of the product of the axes in which every pair of values of every two axes occurs."""
    names = list(axes)
    open_pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    chosen = []
    while open_pairs:
        a, i, b, j = min(open_pairs, key=lambda pair: (names.index(pair[0]), pair[1], names.index(pair[2]), pair[3]))
        picked = {a: i, b: j}
        for name in names:
            if name not in picked:
                gains = [
                    sum(
                        ((m, picked[m], name, k) if names.index(m) < names.index(name) else (name, k, m, picked[m]))
                        in open_pairs
                        for m in picked
                    )
                    for k in range(len(axes[name]))
                ]
                picked[name] = gains.index(max(gains))
        open_pairs -= {(m, picked[m], n, picked[n]) for m, n in itertools.combinations(names, 2)}
        chosen.append({name: axes[name][picked[name]] for name in names})
    return chosen


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that are exact in ``dtype``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: Tensor, truth: Tensor) -> float:
    """The largest distance from the float64 truth."""
    assert found.shape == truth.shape
    assert truth.dtype == torch.float64
    return float((found.double() - truth).abs().max()) if truth.numel() else 0.0


def rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """What one rounding to ``dtype`` may cost the largest element."""
    return float(truth.abs().max()) * torch.finfo(dtype).eps / 2 if truth.numel() else 0.0


def assert_within_budget(found: Tensor, reference: Tensor, truth: Tensor, what: str) -> None:
    """By norm, err(found, fp64) <= 2 * err(reference in that dtype, fp64) + one rounding; of no element over 4 times.

    The largest error of a few hundred sums is a matter of luck, on one make of processor three times that on another
    where the norms agree to a tenth.
    """
    assert torch.isfinite(found).all(), what
    limit = 4 * error(reference, truth) + rounding(truth, found.dtype)
    assert error(found, truth) <= limit, f"{what}: error {error(found, truth):.3g} over the budget {limit:.3g}"
    norm, of_reference = (float((value.double() - truth).norm()) for value in (found, reference))
    limit = 2 * of_reference + torch.finfo(found.dtype).eps / 2 * float(truth.norm())
    assert norm <= limit, f"{what}: norm of the error {norm:.3g} over the budget {limit:.3g}"


Results = Mapping[str, Tensor]
"""Outputs and gradients by name."""


def joined(batches: Sequence[Sequence[Results]]) -> list[dict[str, Tensor]]:
    """What each implementation made of one batch after the other, as the results of a single batch."""
    return [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*batches, strict=True)
    ]


def assert_all_within_budget(found: Results, reference: Results, truth: Results, what: str = "") -> None:
    """Every result has the reference's dtype and is within its budget."""
    assert found.keys() == reference.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name].dtype == reference[name].dtype
        assert_within_budget(found[name], reference[name], value, f"{name} {what}")


def assert_a_few_roundings(found: Results, truth: Results, dtype: torch.dtype) -> None:
    """Every result is at most 16 roundings to ``dtype`` away."""
    for name, value in truth.items():
        assert error(found[name], value) <= 16 * rounding(value, dtype), name
