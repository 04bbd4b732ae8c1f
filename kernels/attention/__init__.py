"""Self-attention on packed queries, keys and values."""

from fastdiff.kernels.attention.op import attention

__all__ = ["attention"]
