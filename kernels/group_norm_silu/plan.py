"""How group_norm_silu is divided among programs: a pure function of shape, layout, element size and processors."""

from dataclasses import dataclass
from functools import cache

import torch

ON_CHIP = {1: 16384, 2: 8192}
"""Largest tile in values, including padding, that a program keeps in registers: of x alone (1), or of x and dy (2)."""
CHUNKS = (2048, 4), (4096, 3)
"""Values per chunk if a program walks over its pixels twice, and chunks that are being loaded or computed at a time.

The second choice is for chunks of less than SHORT_ROW pixels in a row."""
SHORT_ROW = 128
PER_WARP = 512
"""Values of a tile per warp, as long as there are no more than MOST_WARPS."""
MOST_WARPS = 8
FEW_WARPS = 4
"""Warps of a tile of more than SINGLE values, so that another program's registers fit beside it. In fp32 they spill."""
WIDE = 128
"""Most channels of such a tile that FEW_WARPS hold without spilling."""
SINGLE = 8192
"""Values of a tile in registers above which too few programs fit on a multiprocessor to hide each other's waits."""
REGISTERS = {(1, False): 80, (1, True): 96, (2, False): 96, (2, True): 128}
"""Most registers of a thread of a walk on WALKERS warps in 16 bits, by tensors that it reads and whether channels are
adjacent. Left to itself the compiler takes up to 164, and fewer programs fit on a multiprocessor."""
WALKERS = 4
WITHOUT_A_LIMIT = {1: 4, 2: 3}
"""Fewest programs of such a walk that fit on a multiprocessor without the limit."""
ON_CHIP_REGISTERS = 128
"""Most registers of a thread of a largest tile of x and dy in 16 bits, so that two programs fit."""
CACHE = 40 * 2**20
"""Bytes that are still cached when they are read a second time."""
MOST_SPLITS = 64
PARTIALS = 2048
"""Most partial results, splits times channels, that one program can combine."""
NEVER_SPLIT = 1024
"""Most pixels for which a second launch would cost more than idle processors."""
KEPT = False
"""Whether a walk's first reads are hinted to stay in the cache, and its second ones to leave it."""
PIPELINES_WITHOUT_A_GPU = True
"""Whether walks are pipelined if there is no GPU, where launches are only interpreted or recorded."""

# Costs, relative to reading and writing a value once at full speed.
START = 512  # starting a program, in values
CACHED = 1.35  # a second read from the cache
AGAIN = 1.6  # a second read from memory
UNALIGNED = 2.0  # accesses of less than 16 bytes
ALONE = 1.1  # a tile of more than SINGLE values
FULL_RUN = 64  # shortest contiguous run at full speed, in bytes


@dataclass(frozen=True)
class Plan:
    """The work of one program: ``groups`` complete groups of a sample, or one of ``splits`` ranges of their pixels."""

    groups: int
    block_channels: int
    block_pixels: int
    splits: int
    pixels_per_split: int
    warps: int
    stages: int = 1
    registers: int | None = None  # of a thread, at most

    @property
    def on_chip(self) -> bool:
        """Whether a program reads only one tile."""
        return self.splits == 1 and self.pixels_per_split <= self.block_pixels

    def blocks(self, groups: int) -> int:
        """Programs per sample and split."""
        return -(-groups // self.groups)


def next_power(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()


def pipelines(device: torch.device) -> bool:
    """Whether a walk loads chunks ahead. On AMD's GPUs these wait in registers, 2.5 times as many in some programs."""
    return torch.version.hip is None if device.type == "cuda" else PIPELINES_WITHOUT_A_GPU


@cache
def plan(
    samples: int,
    channels: int,
    pixels: int,
    groups: int,
    channels_fastest: bool,
    element_size: int,
    tensors: int,
    processors: int,
) -> Plan:
    """The cheapest division of x (samples, channels, pixels), read alone or, with ``tensors`` = 2, together with dy.

    ``channels_fastest``: channels, not pixels, are adjacent in memory. The candidates differ in the groups per program:
    more groups need less padding to a power of two and give longer contiguous runs if channels are fastest; fewer give
    smaller tiles and more programs.
    """
    depth = channels // groups
    whole = next_power(pixels)

    def tile(k: int) -> tuple[int, int]:
        """Channels and pixels of a tile of k groups."""
        width = next_power(k * depth)
        return width, whole if width * whole <= ON_CHIP[tensors] else max(min(whole, chunk(width)[0] // width), 1)

    def chunk(width: int) -> tuple[int, int]:
        short = not channels_fastest and CHUNKS[0][0] // width < SHORT_ROW
        return CHUNKS[1] if short else CHUNKS[0]

    def cost(k: int) -> float:
        width, height = tile(k)
        blocks, chunks = -(-groups // k), -(-pixels // height)
        run = k * depth if channels_fastest else pixels
        slowness = max(FULL_RUN / (run * element_size), 1.0) ** 0.5
        if channels_fastest and blocks > 1 and run * element_size % 16:
            slowness *= UNALIGNED
        idle = max(2 * processors / (samples * blocks), 1.0)
        if chunks == 1 and width * height > SINGLE:
            slowness *= ALONE
        if chunks > 1:
            at_once = min(samples * blocks, 2 * processors) * k * depth * pixels * element_size * tensors
            slowness *= CACHED if at_once <= CACHE else AGAIN
            if pixels > NEVER_SPLIT:
                idle = min(idle, AGAIN * max(idle / min(chunks, MOST_SPLITS), 1.0))
        return blocks * (width * height * chunks + START) * slowness * idle

    k = min(range(1, groups + 1), key=cost)
    width, height = tile(k)
    chunks, programs = -(-pixels // height), samples * -(-groups // k)
    splits, span = 1, pixels
    if pixels > max(NEVER_SPLIT, height) and programs < processors:
        splits = min(-(-4 * processors // programs), chunks, MOST_SPLITS, max(PARTIALS // width, 1))
        span = -(-chunks // splits) * height
        splits = -(-pixels // span)
    tile_size = width * height
    narrow = channels_fastest and k < groups and k * depth * element_size % 8 > 0  # loads, whose addresses spill
    few = tile_size > SINGLE and width <= WIDE and element_size < 4 and not narrow
    warps = min(max(tile_size // PER_WARP, 1), FEW_WARPS if few else MOST_WARPS)
    stages = chunk(width)[1] if span > height else 1
    registers = None
    share = programs / processors
    if element_size == 2 and splits == 1:
        if chunks > 1 and warps == WALKERS and share > WITHOUT_A_LIMIT[tensors]:
            registers = REGISTERS[tensors, channels_fastest]
        elif chunks == 1 and tensors == 2 and tile_size == ON_CHIP[2] and share > 1:
            registers = ON_CHIP_REGISTERS
    return Plan(k, width, height, splits, span, warps, stages, registers)
