"""The checks that diffusion_step and diffusion_loss share."""

import torch
from torch import Tensor

from fastdiff.kernels.backend import require
from fastdiff.kernels.gaussian.parameterization import TABLES, ModelVarType


def require_process(
    op: str, x: Tensor, model_output: Tensor, t: Tensor, tables: Tensor, var_type: ModelVarType
) -> None:
    """Raise a ValueError unless the shapes and dtypes of one batch at timesteps t match."""
    require(x.ndim >= 3, op, "x must be (N, C, *spatial), not {}", tuple(x.shape))
    require(x.is_floating_point(), op, "x must have a floating-point dtype, not {}", x.dtype)
    require(t.shape == x.shape[:1], op, "t must be ({},), not {}", len(x), tuple(t.shape))
    require(t.dtype is torch.int64, op, "t must be int64, not {}", t.dtype)
    fits = tables.ndim == 2 and tables.shape[1] == len(TABLES)
    require(fits, op, "tables must be (T, {}), not {}", len(TABLES), tuple(tables.shape))
    dtype = torch.promote_types(x.dtype, torch.float32)
    require(tables.dtype is dtype, op, "tables must be {} for x in {}, not {}", dtype, x.dtype, tables.dtype)
    expected = (x.shape[0], x.shape[1] * (2 if var_type.learned else 1), *x.shape[2:])
    require(
        model_output.shape == expected,
        op,
        "model_output must be {} for a {} variance, not {}",
        expected,
        "learned" if var_type.learned else "fixed",
        tuple(model_output.shape),
    )


def refusal(*tensors: Tensor | None) -> str:
    """The reason why the kernels do not support one of the further inputs, or an empty string."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return "computes in fp32, fp16 and bf16, not in torch.float64"
    return ""
