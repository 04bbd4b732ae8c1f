"""Comparing two computations of the same numbers by what rounding does to both; the truth comes from float64."""

from typing import Any

import torch

ORDER_OF_SUMS = 4
"""Roundings of n terms in one chain add up to about √n, in the 16 lanes of a vector register to √(n/16)."""


def assert_equal_but_for_rounding(found: Any, reference: Any, truth: Any, what: str = "") -> None:
    """‖found − truth‖ ≤ 4·‖reference − truth‖ + one rounding of the truth to fp32.

    ``found`` and ``reference`` were computed in fp32, ``truth`` in float64 from the same inputs. Which instructions a
    processor has and how many threads sum moves both sides alike; the norm over all elements keeps the luck of a single
    rounding out.
    """
    found, reference, truth = (torch.as_tensor(value).detach().cpu() for value in (found, reference, truth))
    assert truth.dtype == torch.float64
    assert found.shape == reference.shape == truth.shape, what
    error, rounding = (float((value.double() - truth).norm()) for value in (found, reference))
    limit = ORDER_OF_SUMS * rounding + torch.finfo(torch.float32).eps / 2 * float(truth.norm())
    assert error <= limit, f"{what}: error {error:.3g} over the budget {limit:.3g}"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
