"""The choices of a diffusion process, what the model output means and how it is trained, and its tables."""

from enum import StrEnum


class ModelMeanType(StrEnum):
    """What the first channels of the model output predict."""

    PREVIOUS_X = "previous_x"  # the mean of x_{t-1}
    START_X = "start_x"  # x_0
    EPSILON = "epsilon"  # the noise (Ho et al. 2020, equation 14)
    V = "v"  # sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, section 4)
    FLOW = "flow"  # epsilon - x_0, the velocity of a rectified flow (Liu et al. 2023, Lipman et al. 2023)


class ModelVarType(StrEnum):
    """Where the variance of p(x_{t-1} | x_t) comes from."""

    LEARNED = "learned"  # the model predicts log sigma^2
    FIXED_SMALL = "fixed_small"  # the posterior's variance, a lower bound
    FIXED_LARGE = "fixed_large"  # beta_t, an upper bound
    LEARNED_RANGE = "learned_range"  # the model interpolates the two logs (Nichol & Dhariwal 2021, equation 15)

    @property
    def learned(self) -> bool:
        """Whether half of the model's output channels predict the variance."""
        return self in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class LossType(StrEnum):
    """The training objective (Nichol & Dhariwal 2021, section 3)."""

    MSE = "mse"  # weighted L_simple, plus L_vlb for a learned variance
    RESCALED_MSE = "rescaled_mse"  # the same with L_vlb weighted by T / 1000: the hybrid objective
    KL = "kl"  # L_vlb
    RESCALED_KL = "rescaled_kl"  # T * L_vlb, an estimate of the complete bound

    @property
    def is_vb(self) -> bool:
        """Whether the loss is the variational bound itself."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class Sampler(StrEnum):
    """How x_{t-1} is drawn."""

    DDPM = "ddpm"  # from p(x_{t-1} | x_t) (Ho et al. 2020, algorithm 2)
    DDIM = "ddim"  # Song et al. 2021, equation 12


TABLES = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "one_minus_alphas_cumprod_prev",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "fixed_large_variance",
    "fixed_large_log_variance",
    "log_betas",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "loss_weight",
)
"""The columns of ``tables`` (T, 15), a row for each timestep, with which diffusion_step and diffusion_loss compute.

With betas b_t, a_t = 1 - b_t and A_t = a_1 ... a_t, A_0 = 1 (Ho et al. 2020, equations 4 to 7), they are, in order:
A_t; A_{t-1}; 1 - A_{t-1}; sqrt(1 / A_t); sqrt(1 / A_t - 1); the posterior mean's coefficients of x_0, sqrt(A_{t-1}) b_t
/ (1 - A_t), and of x_t, sqrt(a_t) (1 - A_{t-1}) / (1 - A_t); its variance b_t (1 - A_{t-1}) / (1 - A_t); the variance's
logarithm, at the first timestep that of the second; b_t, at the first timestep the second's variance, and its
logarithm; log b_t; sqrt(A_t); sqrt(1 - A_t); the weight of the mean squared error in the loss. Where A_T is 0, the
columns with 1 / A_T take 1e-20 for it. GaussianDiffusion.step_tables(device, dtype) makes them from attributes of these
names, computed in float64.
"""
