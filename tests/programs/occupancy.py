"""How many programs of a kernel a multiprocessor (compute unit) runs at the same time, from what one of them needs.

The limits of sm_80, sm_90 and sm_100 are those of the CUDA programming guide's table "Technical Specifications per
Compute Capability"; registers are allocated to a warp 256 at a time, in its quarter of the multiprocessor, and every
program has 1 KiB of shared memory reserved (CUDA's tuning guides, and the occupancy calculator of Nsight Compute). The
limits of gfx942 are those of AMD's "CDNA3 Instruction Set Architecture" and of its hardware tables for HIP: of 512
vector registers per lane on each of four SIMD units a wave gets 8 at a time.
"""

from typing import NamedTuple


class Limits(NamedTuple):
    """What the programs of one multiprocessor share."""

    registers: int  # of 32 bits, on each of four units
    lanes: int  # of a warp
    warps: int  # on each of four units
    programs: int
    shared: int  # bytes
    reserved: int = 0  # of them, for each program


UNITS = 4
REGISTERS_AT_A_TIME = 8  # per lane

LIMITS = {
    "sm_80": Limits(16384, 32, 16, 32, 164 * 1024, 1024),
    "sm_90": Limits(16384, 32, 16, 32, 228 * 1024, 1024),
    "sm_100": Limits(16384, 32, 16, 32, 228 * 1024, 1024),
    "gfx942": Limits(512 * 64, 64, 8, 16, 64 * 1024),
}


def resident(target: str, registers: int, shared: int, warps: int) -> int:
    """Programs per multiprocessor by registers per thread, bytes of shared memory and warps."""
    limits = LIMITS[target]
    allocated = -(-max(registers, 1) // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME * limits.lanes
    at_once = UNITS * min(limits.registers // allocated, limits.warps) // warps
    by_memory = limits.shared // max(shared + limits.reserved, 1)
    return min(at_once, by_memory, limits.programs)
