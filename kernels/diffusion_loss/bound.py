"""The variational bound's term at t, element by element, with its derivatives."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.arithmetic import exp, log, reciprocal
from fastdiff.kernels.gaussian.kernel import (
    FIXED_LARGE_LOG_VARIANCE,
    FIXED_LARGE_VARIANCE,
    LOG_BETAS,
    POSTERIOR_LOG_VARIANCE,
    POSTERIOR_MEAN_COEF1,
    POSTERIOR_MEAN_COEF2,
    POSTERIOR_VARIANCE,
    predict_xstart,
    xstart_coefficients,
)


@triton.jit
def logistic(u):
    """sigmoid(w), sigmoid(-w) and dw / du for w = 2 sqrt(2 / pi) (u + 0.044715 u^3)

    The model family approximates the normal distribution function by (1 + tanh(w / 2)) / 2 = sigmoid(w). The sigmoid
    keeps its digits in both tails.
    """
    w = 1.5957691216057308 * u * (1.0 + 0.044715 * u * u)
    e = exp(-tl.abs(w))
    large = reciprocal(1.0 + e)
    small = e * large
    slope = 1.5957691216057308 * (1.0 + 0.134145 * u * u)
    return tl.where(w < 0, small, large), tl.where(w < 0, large, small), slope


@triton.jit
def negative_log_likelihood(x, mean, log_variance):
    """-log of the probability p of 8-bit pixels x in [-1, 1] under N(mean, exp log_variance) (DDPM equation 13), and
    its derivatives by mean and log variance. p is at least 1e-12; where it is clamped, the derivatives are 0.

    With a and b the w of the pixel's upper and lower end (``logistic``), p = sigmoid(a) - sigmoid(b) =
    sigmoid(a) sigmoid(-b) m for m = 1 - e^(b - a). Black pixels have no lower end, white ones no upper end. The formula
    never subtracts nearly equal numbers.
    """
    inverse = exp(-0.5 * log_variance)
    middle, half = inverse * (x - mean), inverse * (1 / 255)
    # both tails vanish beyond 30
    upper = tl.clamp(middle + half, -30.0, 30.0, propagate_nan=tl.PropagateNan.ALL)
    lower = tl.clamp(middle - half, -30.0, 30.0, propagate_nan=tl.PropagateNan.ALL)
    below_upper, above_upper, slope_upper = logistic(upper)
    below_lower, above_lower, slope_lower = logistic(lower)
    black, white = x < -0.999, x > 0.999

    scale = 3.1915382432114616 * half  # 2 half dw / du at 0
    cubic = 0.044715 * (3.0 * middle * middle + half * half)
    gap = scale * (1.0 + cubic)  # a - b
    rest = exp(-gap)
    series = gap * (1 - gap / 2 * (1 - gap / 3 * (1 - gap / 4 * (1 - gap / 5 * (1 - gap / 6)))))
    m = tl.where(gap < 0.25, series, 1.0 - rest)
    p = tl.where(black, below_upper, tl.where(white, above_lower, below_upper * above_lower * m))

    # derivatives of log p by a and by b, without the term that m adds to both: 1 / (e^(a - b) - 1)
    by_upper = tl.where(white, 0.0, slope_upper * above_upper)
    by_lower = tl.where(black, 0.0, slope_lower * below_lower)
    of_m = tl.where(black | white | (gap > 80.0), 0.0, rest / m)
    by_mean = inverse * ((by_upper - by_lower) + of_m * (scale * 0.26829 * middle))
    by_log_scale = (upper * by_upper - lower * by_lower) + of_m * (scale * (1.0 + 3.0 * cubic))
    lost = p < 1e-12
    p = tl.maximum(p, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    return -log(p), tl.where(lost, 0.0, by_mean), tl.where(lost, 0.0, 0.5 * by_log_scale)


@triton.jit
def bound(x_start, x_t, output, values, row, step, MEAN_TYPE: tl.constexpr, VAR_TYPE: tl.constexpr):
    """The variational bound's term in nats, element by element, and its derivatives by output and values.

    KL = (u - 1 + e^(-u) + d^2 / variance) / 2, u = log(variance / posterior variance), d the difference of the means.
    """
    coef1, coef2 = tl.load(row + POSTERIOR_MEAN_COEF1), tl.load(row + POSTERIOR_MEAN_COEF2)
    true_variance, true_log_variance = tl.load(row + POSTERIOR_VARIANCE), tl.load(row + POSTERIOR_LOG_VARIANCE)
    a, b = xstart_coefficients(row, MEAN_TYPE)
    if MEAN_TYPE == "previous_x":
        mean = output
        d = (coef1 * x_start + coef2 * x_t) - output
        mean_by_output = 1.0
    else:
        pred_xstart = predict_xstart(x_t, output, a, b, MEAN_TYPE)
        mean = pred_xstart  # used only at t = 0, where coef1 is 1 and coef2 is 0
        if MEAN_TYPE == "start_x":
            d = coef1 * (x_start - pred_xstart)
            mean_by_output = coef1
        else:
            # subtract the nearly equal numbers first: that is exact, but pred_xstart has a rounding error of its size
            d = coef1 * ((x_start - a * x_t) + b * output)
            mean_by_output = -coef1 * b
    if VAR_TYPE == "learned":
        u = values - true_log_variance
        by_values = 1.0
    elif VAR_TYPE == "learned_range":
        by_values = 0.5 * (tl.load(row + LOG_BETAS) - true_log_variance)
        u = (values + 1.0) * by_values
    elif VAR_TYPE == "fixed_large":
        fixed_variance = tl.load(row + FIXED_LARGE_VARIANCE)
        u = tl.load(row + FIXED_LARGE_LOG_VARIANCE) - true_log_variance
        by_values = 0.0
    else:
        u = 0.0
        by_values = 0.0
    if step == 0:
        log_variance = values if VAR_TYPE == "learned" else u + true_log_variance
        term, by_mean, by_log_variance = negative_log_likelihood(x_start, mean, log_variance)
    else:
        # u and the ratio e^(-u) must match: for small u the error of one cancels in u + e^(-u)
        if VAR_TYPE == "learned":
            ratio = exp(-u)
            precision = exp(-values)
        elif VAR_TYPE == "learned_range":
            ratio = exp(-u)
            precision = ratio * reciprocal(true_variance)
        elif VAR_TYPE == "fixed_large":
            ratio = tl.math.div_rn(true_variance, fixed_variance)
            precision = reciprocal(fixed_variance)
            u = -log(ratio)
        else:
            ratio = 1.0
            precision = reciprocal(true_variance)
        squared = d * d * precision
        term = 0.5 * (((u - 1.0) + ratio) + squared)
        by_mean = -d * precision
        by_log_variance = 0.5 * ((1.0 - ratio) - squared)
    return term, by_mean * mean_by_output, by_log_variance * by_values
