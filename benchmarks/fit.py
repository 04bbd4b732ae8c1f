"""How a cost grows with its size."""

from collections.abc import Sequence

import numpy as np


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent p of seconds ~ sizes^p by least squares in logarithms; NaN for fewer than two different sizes."""
    if len(set(sizes)) < 2:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
