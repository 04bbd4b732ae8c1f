"""Philox 4x32-10, the only counter-based random generator here (Salmon et al. 2011, "Parallel random numbers").

Every number is a pure function of (seed, sample, step, element), so that a draw depends on neither batch size, layout
nor device. Key: the 64-bit seed. Counter: (element / 4, step, low and high word of the sample); the four words of one
counter belong to four consecutive elements.
"""

from fastdiff.kernels.philox.op import philox_normal, philox_uint32

__all__ = ["philox_normal", "philox_uint32"]
