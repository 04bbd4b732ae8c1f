"""How group_norm_silu is divided among programs: a pure function of shape, layout, element size and processors."""

from dataclasses import dataclass
from functools import cache

ON_CHIP = {1: 16384, 2: 8192}
"""Largest tile in values, including padding, that a program keeps in registers: of x alone (1), or of x and dy (2)."""
CHUNK = 4096
"""Values per chunk if a program walks over its pixels twice."""
STAGES = 1
"""Chunks of a walk that are being loaded or computed at the same time."""
PER_WARP = 512
"""Values of a tile per warp, as long as there are no more than MOST_WARPS."""
MOST_WARPS = 8
CACHE = 40 * 2**20
"""Bytes that are still cached when they are read a second time."""
MOST_SPLITS = 64
PARTIALS = 2048
"""Most partial results, splits times channels, that one program can combine."""
NEVER_SPLIT = 1024
"""Most pixels for which a second launch would cost more than idle processors."""
ENOUGH = 1
"""Programs per multiprocessor that make splitting needless."""

# Costs, relative to reading and writing a value once at full speed.
START = 1024  # starting a program, in values
CACHED = 1.2  # a second read from the cache
AGAIN = 1.5  # a second read from memory
UNALIGNED = 2.0  # accesses of less than 16 bytes
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
        return width, whole if width * whole <= ON_CHIP[tensors] else max(min(whole, CHUNK // width), 1)

    def cost(k: int) -> float:
        width, height = tile(k)
        blocks, chunks = -(-groups // k), -(-pixels // height)
        run = k * depth if channels_fastest else pixels
        slowness = max(FULL_RUN / (run * element_size), 1.0) ** 0.5
        if channels_fastest and blocks > 1 and run * element_size % 16:
            slowness *= UNALIGNED
        idle = max(2 * processors / (samples * blocks), 1.0)
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
    if pixels > max(NEVER_SPLIT, height) and programs < ENOUGH * processors:
        splits = min(-(-4 * processors // programs), chunks, MOST_SPLITS, max(PARTIALS // width, 1))
        span = -(-chunks // splits) * height
        splits = -(-pixels // span)
    warps = min(max(width * height // PER_WARP, 1), MOST_WARPS)
    return Plan(k, width, height, splits, span, warps, stages=STAGES if span > height else 1)
