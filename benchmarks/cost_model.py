"""``python -m fastdiff.benchmarks.cost_model``: the modelled time of the fused norm, step and loss on two GPUs.

The model reads how an operation is divided among programs, and what one of them needs, from compiled programs
(``results/compiled.csv``: ``python -m tests.programs.instructions``). It assumes that

- three things take time side by side: moving bytes, issuing instructions, and waiting; the longest dominates, and the
  others add to it as in a norm of the order ``Constants.order``;
- an H100 and an H200 differ only in bandwidth: both have 132 multiprocessors with four schedulers;
- a program that keeps its tile in registers waits once for memory; one that walks over its pixels waits in every chunk,
  less if chunks are loaded ahead;
- a second read hits the cache to the extent that the images of all resident programs fit;
- runs of few adjacent bytes waste bandwidth, and all lanes of a tile cost instructions, padded ones too;
- the busiest multiprocessor decides: it runs a whole number of programs, in a whole number of rounds;
- a step or a loss whose model output is channels_last reads it value by value.

The constants were fitted to an H200's times of norms at the shapes of FITTED_SHAPES and are held to all others.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from fastdiff.benchmarks.compiled import GROUPS, PRESENT, RESULTS, Compiled, read
from fastdiff.benchmarks.rows import read_rows
from fastdiff.benchmarks.targets import LARGE
from fastdiff.kernels.group_norm_silu.plan import next_power

DEVICES = {"H200": 4.27e12, "H100": 3.0e12}
"""Bytes per second of a large copy: measured, and assumed."""
PROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.8e9
SHARED = 227 * 1024
"""Bytes of shared memory for the programs of a multiprocessor, each of which has one KiB reserved."""
FITTED_SHAPES = ("C192 64x64", "C384 32x32", "C576 16x16", "C1152 16x16", "C512 8x8")


class Constants(NamedTuple):
    """What the model does not read from programs. Cycles are of CLOCK."""

    load: float  # cycles until a value is there
    copy: float  # cycles until a chunk that was loaded ahead is there
    start: float  # cycles to start a program, to sum over its groups and to end it
    chunk: float  # cycles that a chunk takes beside its instructions
    waits: float  # cycles of a warp per instruction, if it loads into registers
    ahead: float  # the same if chunks are loaded ahead
    issue: float  # share of the cycles in which a scheduler with enough warps issues
    cached: float  # bytes per second of reads from the cache
    cache: float  # bytes that stay in it
    run: float  # adjacent bytes that move at half speed
    order: float  # of the norm that joins moving, issuing and waiting
    launch: float  # seconds
    lines: float  # cycles of a load whose values are not adjacent: one for each of 128 bytes, so not fitted


FITTED = Constants(666, 1950, 2170, 63.6, 5.04, 1.6, 0.836, 15.9e12, 34.1e6, 30.6, 3.14, 2.04e-6, 6)


class Change(NamedTuple):
    """A change of a kernel."""

    held: int = 0  # up to so many programs keep whole groups in shared memory: x, and dy, are read once
    instructions: float = 1.0  # of today's
    padding: float = math.inf  # lanes per value at most
    without: str = ""  # one of COSTS


AS_IT_IS = Change()
COSTS = ("waiting", "issuing", "second read", "short runs", "padding", "rounding up", "launches", "scattered loads")
"""What a kernel may be rid of, at best."""


def seconds(one: Compiled, bytes_per_s: float, c: Constants = FITTED, change: Change = AS_IT_IS) -> float:
    """The modelled time of a pass, in the fastest division that the change allows."""
    now = _time(one, bytes_per_s, c, change._replace(held=0))
    if not change.held or not one.second:
        return now
    return min([now, *(_time(each, bytes_per_s, c, change) for each in _held(one, change.held))])


def _held(one: Compiled, together: int) -> Iterator[Compiled]:
    """Divisions in which up to ``together`` programs hold their groups: each some pixels, summed over all of them."""
    n, channels, size = one.shape
    for groups, warps in product(range(1, GROUPS + 1), (4, 8, 16)):
        width, lanes = next_power(groups * channels // GROUPS), 512 * warps
        fit = SCHEDULERS * min(16384 // (-(-one.registers // 8) * 8 * 32), 16) // warps
        for parts in (1 << i for i in range(together.bit_length())):
            pixels = -(-(size**2) // parts)
            resident = min(fit, SHARED // (groups * channels // GROUPS * pixels * 2 * one.tensors + 1024))
            if resident and width <= lanes:
                tile = min(lanes // width, pixels)
                programs, trips = n * -(-GROUPS // groups) * parts, -(-pixels // tile)
                each = one._replace(programs=programs, warps=warps, resident=resident)
                yield each._replace(groups=groups, channels=width, pixels=tile, trips=trips)


def _time(one: Compiled, bytes_per_s: float, c: Constants, change: Change) -> float:
    without, held = change.without, change.held > 0
    whole = (lambda value: value) if without == "rounding up" else math.ceil
    lanes = min(1.0, (1.0 if without == "padding" else change.padding) / one.padding)
    share = one.programs / PROCESSORS  # programs of a multiprocessor
    mine = max(1.0, whole(share))
    rounds = max(1.0, whole(share / min(one.resident, math.ceil(share))))
    loops = one.loop, one.second

    trips, straight = one.trips * lanes, one.straight * (1.0 if one.trips else lanes * change.instructions)
    loop, second = (length * change.instructions for length in loops)
    issuing = mine * one.warps * (straight + trips * (loop + second)) / SCHEDULERS / c.issue

    def chunk(length: float, at_hand: bool) -> float:
        if at_hand:
            return length * c.ahead + c.chunk
        if one.stages > 1:
            return max(c.copy / (one.stages - 1), length * c.ahead) + c.chunk
        return c.load + length * c.waits + c.chunk

    walk = (one.second > 0) * (chunk(second, held)) + (one.loop > 0) * chunk(loop, held)
    once = c.load * ((1 if held else 2) if one.stages > 1 or held else 0) if one.second else c.load * (not one.trips)
    # held groups cost another start: for the exchange of their sums, or until all of them are there
    waiting = rounds * (c.start * (1 + held) + straight * c.waits + trips * walk + once)

    hit = 1.0
    again = 0 if held or not one.second else one.elements * 2 * one.tensors
    if again and without != "second read":
        groups = one.groups * one.shape[1] // GROUPS * one.shape[2] ** 2 * 2 * one.tensors
        split = one.launches - one.tensors  # in two launches, between which all images are read
        at_once = again if split else min(one.programs, PROCESSORS * one.resident) * groups
        hit = min(1.0, c.cache / at_once)
    else:
        again = 0
    speed = bytes_per_s * (1.0 if without == "short runs" else one.run / (one.run + c.run))
    moving = (one.floor + again * (1 - hit)) / speed + again * hit / c.cached

    scattered = 0.0
    if not one.groups and one.last and without != "scattered loads":
        scattered = 2 * one.elements / 32 * one.tensors * c.lines / PROCESSORS / CLOCK
    parts = {"waiting": waiting / CLOCK, "issuing": issuing / CLOCK, "moving": moving, "scattered": scattered}
    joined = sum(part**c.order for name, part in parts.items() if name != without) ** (1 / c.order)
    return joined + (0.0 if without == "launches" else c.launch * one.launches)


def on_paper(one: Compiled, bytes_per_s: float) -> float:
    """The time of a norm as it was estimated before any GPU was at hand. Its figures stay as they were.

    It assumes the programs of a multiprocessor, and the instructions of a warp for 16 values in each walk.
    """
    resident = 2 if not one.trips else 2 if (one.last, one.tensors) == (True, 2) else 3
    work = {1: ((112, 193), (125, 216)), 2: ((292, 321), (316, 354))}[one.tensors][one.last]
    image, warps = one.elements * 2, one.warps
    share, waves = one.programs / PROCESSORS, one.programs / (PROCESSORS * resident)
    uneven = math.ceil(waves) / waves if waves > 1 else max(1.0, math.ceil(share) / share)
    if not one.trips:
        values = one.channels * one.pixels / (warps * 32)
        issue = (18.6, 36.7)[one.tensors - 1] * values * warps / 4 / 0.8
        cycles = max(issue, (1100 + issue * 1.2 + 400) / resident)
        return max(share * cycles / CLOCK * min(uneven, 1.15), one.floor / (bytes_per_s * 0.93))
    group = one.groups * one.shape[1] // GROUPS * one.shape[2] ** 2 * 2 * one.tensors
    hit = min(1.0, 30e6 / (min(one.programs, PROCESSORS * resident) * group))
    busy = min(resident * warps, math.ceil(share) * warps)
    iterations = one.programs * one.trips / PROCESSORS

    def walk(instructions: int, latency: float, n_bytes: float) -> float:
        issue = instructions * busy / 4 / 0.8
        each = max(issue, latency + instructions * busy / 4 * 0.5 + 150) / (busy / warps)
        return max(iterations * each / CLOCK * min(uneven, 1.2), n_bytes / (bytes_per_s * 0.93))

    read_again = image * one.tensors * (1 - hit)
    return walk(work[0], 1000, image * one.tensors) + walk(work[1], 1000 - 500 * hit, read_again + image)


def measured() -> dict[tuple[str, str, str], float]:
    """Seconds on an H200 by commit, workload and candidate."""
    rows = [row for name in ("h200.csv", "h200_tune.csv") for row in read_rows(RESULTS / name)]
    found = {(row["commit"], row["workload"], row["candidate"]): float(row["median_s"]) for row in rows}
    return {key: value for key, value in found.items() if not math.isnan(value)}


def share(one: Compiled, device: str, c: Constants = FITTED, change: Change = AS_IT_IS) -> float:
    """The modelled share of the floor."""
    speed = DEVICES[device]
    return one.floor / speed / seconds(one, speed, c, change)


def interval(one: Compiled, device: str, by: float = 0.2) -> tuple[float, float]:
    """The share of the floor if every constant is off by ``by``, all to the worse and all to the better."""
    worse: dict[str, float] = {}
    better: dict[str, float] = {}
    for name, value in FITTED._asdict().items():
        ends = sorted(
            (share(one, device, FITTED._replace(**{name: to})), to) for to in (value * (1 - by), value * (1 + by))
        )
        worse[name], better[name] = ends[0][1], ends[1][1]
    return share(one, device, Constants(**worse)), share(one, device, Constants(**better))


def gains(one: Compiled, device: str) -> dict[str, float]:
    """How many times as fast a pass would be without each of COSTS."""
    now = seconds(one, DEVICES[device])
    return {cost: now / seconds(one, DEVICES[device], change=Change(without=cost)) for cost in COSTS}


def bar(one: Compiled) -> float:
    """The least share of the floor that is asked for; NaN for norms of small images."""
    if one.groups and one.elements * 2 < LARGE:
        return math.nan
    return 0.8 if one.tensors == 1 and one.op != "diffusion_loss" else 0.7


CHANGES = {
    "as it is": AS_IT_IS,
    "one read": Change(held=1),
    "one read, clusters": Change(held=8),
    "3/4 of the instructions": Change(instructions=0.75),
    "padding of 1.1": Change(padding=1.1),
    "all of these": Change(8, 0.75, 1.1),
    "half the instructions, too": Change(8, 0.5, 1.1),
}

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headings and lines."""


def benchmarked() -> list[Compiled]:
    """The benchmark's passes, as the kernels are."""
    return [one for one in read() if one.commit == PRESENT and not one.calls]


def errors() -> Table:
    """How far the model is off every measured time."""
    times, rows = measured(), read()

    def line(
        what: str, model: Callable[[Compiled, float], float], chosen: Callable[[Compiled], object]
    ) -> Sequence[str]:
        known = [(one, times.get((one.commit, one.workload, one.candidate))) for one in rows if chosen(one)]
        off = [model(one, DEVICES["H200"]) / time - 1 for one, time in known if time]
        size = [abs(each) for each in off]
        figures = statistics.median(size), max(size), statistics.mean(off)
        return what, str(len(off)), *(f"{figure:.0%}" for figure in figures)

    def fitted(one: Compiled) -> bool:
        return one.groups > 0 and any(f" {shape}," in one.workload for shape in FITTED_SHAPES)

    return ("", "rows", "median error", "largest", "mean"), [
        line("norms, on paper", on_paper, lambda one: one.groups),
        line("norms of the fitted shapes", seconds, fitted),
        line("norms of the other shapes", seconds, lambda one: one.groups and not fitted(one)),
        line("step, not fitted", seconds, lambda one: one.op == "diffusion_step"),
        line("loss, not fitted", seconds, lambda one: one.op == "diffusion_loss"),
    ]


def shares() -> Table:
    """Every benchmarked pass beside its bar, and its largest costs."""
    times = {workload: time for (_, workload, candidate), time in measured().items() if candidate == "triton"}
    lines = []
    for one in benchmarked():
        low, high = interval(one, "H200")
        seen = one.floor / DEVICES["H200"] / times[one.workload] if one.workload in times else math.nan
        costs = sorted(((gain, cost) for cost, gain in gains(one, "H200").items() if gain > 1.03), reverse=True)[:2]
        lines.append(
            (
                short(one),
                _percent(bar(one)),
                f"{share(one, 'H200'):.0%} ({low:.0%} to {high:.0%})",
                _percent(seen),
                f"{share(one, 'H100'):.0%}",
                ", ".join(f"{cost} {gain:.2f}" for gain, cost in costs),
            )
        )
    return ("modelled share of the floor", "bar", "H200 (constants ±20%)", "measured", "H100", "× without"), lines


def layouts() -> Table:
    """The time in channels_last divided by that of contiguous tensors; at most 1.05 is asked for."""
    rows = {one.workload: one for one in benchmarked() if one.groups}
    times = {workload: time for (_, workload, candidate), time in measured().items() if candidate == "triton"}
    lines = []
    for workload, one in rows.items():
        if not one.last:
            twin = workload.replace("contiguous", "channels_last")
            ratios = []
            for change in (AS_IT_IS, Change(held=8), CHANGES["all of these"]):
                ours, theirs = (seconds(rows[name], DEVICES["H200"], change=change) for name in (twin, workload))
                ratios.append(f"{ours / theirs:.2f}")
            seen = times.get(twin, math.nan) / times.get(workload, math.nan)
            lines.append((short(one).replace(", contiguous", ""), *ratios, "" if math.isnan(seen) else f"{seen:.2f}"))
    return ("channels_last / contiguous", "as it is", "one read, clusters", "all of these", "measured"), lines


def what_ifs(device: str) -> Table:
    """The share of the floor of each norm with a bar, after each change; bold where it is reached."""
    lines = [
        (
            short(one),
            _percent(bar(one)),
            *(_percent(share(one, device, change=to), bar(one)) for to in CHANGES.values()),
        )
        for one in benchmarked()
        if one.groups and not math.isnan(bar(one))
    ]
    return (f"{device}, modelled", "bar", *CHANGES), lines


def reached() -> Table:
    """How many of the norms with a bar reach it after each change."""
    norms = [one for one in benchmarked() if one.groups and not math.isnan(bar(one))]
    lines = []
    for layout, tensors, device in product(("contiguous", "channels_last"), (1, 2), DEVICES):
        mine = [one for one in norms if one.tensors == tensors and one.workload.endswith(layout)]
        counts = [sum(share(one, device, change=change) >= bar(one) for one in mine) for change in CHANGES.values()]
        what = f"{'backward' if tensors == 2 else 'forward'}, {layout}, {device}"
        lines.append((what, *(f"{count} of {len(mine)}" for count in counts)))
    return ("norms from 64 MB on that reach their bar, modelled", *CHANGES), lines


def training_step() -> Table:
    """Milliseconds of the norms of a training step: each change alone, modelled."""
    rows = [one for one in read() if one.calls]
    lines = []
    for what, tensors in (("forward", (1,)), ("backward", (2,)), ("both", (1, 2))):
        mine = [one for one in rows if one.tensors in tensors]
        floor = sum(one.calls * one.floor for one in mine) / DEVICES["H200"]
        times = [
            sum(one.calls * seconds(one, DEVICES["H200"], change=change) for one in mine) for change in CHANGES.values()
        ]
        lines.append((what, f"{floor * 1e3:.2f}", *(f"{time * 1e3:.2f}" for time in times)))
    return ("norms of ImageNet-64's step, 64 images, H200, ms", "floor", *CHANGES), lines


def short(one: Compiled) -> str:
    """The workload without what its operation implies."""
    return (
        one.workload.replace("group_norm_silu", "norm")
        .replace("diffusion_", "")
        .replace(", bfloat16", "")
        .replace(", float32", "")
    )


def _percent(value: float, at_least: float = math.inf) -> str:
    if math.isnan(value):
        return ""
    return f"**{value:.0%}**" if value >= at_least else f"{value:.0%}"


def markdown(table: Table) -> str:
    """A table as the documents show it."""
    head, lines = table
    cells = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> None:
    """Print every table."""
    for table in (errors(), reached(), training_step(), layouts(), shares(), what_ifs("H200"), what_ifs("H100")):
        print(markdown(table), end="\n\n")


if __name__ == "__main__":
    main()
