"""The marks that the kernels must reach on a GPU, and the worst figure of a run for each."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastdiff.benchmarks.kernels import Measured
from fastdiff.benchmarks.roofline import Roofline
from fastdiff.benchmarks.rows import Row

LARGE = 64 * 2**20
"""Bytes of a tensor above which a norm must run at memory speed."""


@dataclass(frozen=True)
class Verdict:
    """A mark, and the worst figure of a run for it."""

    what: str
    mark: float
    worst: float
    where: str

    def __str__(self) -> str:
        met = "      " if math.isnan(self.worst) else "met   " if self.worst >= self.mark else "MISSED"
        return f"{met} {self.what}: {self.worst:.2f}, expected at least {self.mark:.2f} ({self.where})"


def verdicts(rows: Sequence[Measured], roofline: Roofline) -> list[Verdict]:
    """Verdicts on every mark, from the rows: shares of the floor, and ratios of a rival's time to ours."""
    table = _Table(rows, roofline)
    found: list[Verdict] = []

    def judge(what: str, mark: float, figures: list[tuple[float, str]]) -> None:
        found.append(Verdict(what, mark, *_worst(figures)))

    for direction, floor, inductor in (("forward", 0.8, 1.2), ("backward", 0.7, 1.3)):
        norms = table.ours("group_norm_silu", direction)
        large = [r for r in norms if r.case.costs["forward"][0] > 2 * LARGE]
        small = [r for r in norms if r.case.shape.endswith((" 8x8", " 16x16"))]
        judge(f"norm {direction} over 64 MB, share of the floor", floor, table.shares(large))
        judge(f"norm {direction} against Inductor", inductor, table.ratios(norms, "compile"))
        judge(f"norm {direction}, channels_last against contiguous", 0.95, table.layouts(norms))
        rivals = ("reference", "torch", "eager", "compile")
        judge(f"norm {direction}, 8 and 16 pixels, against eager and compile", 1.0, table.ratios(small, *rivals))
    for direction, share in (("forward", 0.6), ("backward", 0.5)):
        attentions = {r: _tokens(r) for r in table.ours("attention", direction)}
        short = [r for r, tokens in attentions.items() if tokens in (64, 256)]
        judge(f"attention {direction}, 64 and 256 tokens, share of the roof", share, table.shares(short))
        up_to_512 = [r for r, tokens in attentions.items() if tokens <= 512]
        judge(f"attention {direction}, up to 512 tokens, against SDPA", 1.0, table.ratios(up_to_512, "SDPA"))
        up_to_1024 = [r for r, tokens in attentions.items() if tokens == 1024]
        mark = 0.97 if direction == "forward" else 1.0
        judge(f"attention {direction}, 1024 tokens, against SDPA", mark, table.ratios(up_to_1024, "SDPA"))
    judge("diffusion_step, share of the floor", 0.8, table.shares(table.ours("diffusion_step", "forward")))
    for direction in ("forward", "backward"):
        losses = table.ours("diffusion_loss", direction)
        judge(f"diffusion_loss {direction}, share of the floor", 0.7, table.shares(losses))
    return found


def training_verdicts(rows: Sequence[Row], peak_flops: float | None = None) -> list[Verdict]:
    """Verdicts on the marks of a training step, from the rows of the suite train on a GPU.

    The model FLOPs utilisation refers to the device's ``peak_flops`` per second. If they are unknown, the share of the
    measured limit takes its place.
    """
    timed = {row.candidate: row for row in rows}
    ours = [timed[name] for name in ("+ Triton kernels", "trainer") if name in timed]
    rival = timed["+ compile"].timing if "+ compile" in timed else None
    faster, shares = [], []
    for row in ours:
        timing = row.timing
        if rival is not None:
            faster.append((timing.speedup_over(rival) if timing else 0.0, row.candidate))
        least = row.flops / peak_flops if peak_flops else row.limit_s
        shares.append((least / timing.median if timing else 0.0, row.candidate))
    return [
        Verdict("training step against torch's kernels, compiled", 1.15, *_worst(faster)),
        Verdict(f"training step, {'MFU' if peak_flops else 'share of the limit'}", 0.4, *_worst(shares)),
    ]


def _worst(figures: Sequence[tuple[float, str]]) -> tuple[float, str]:
    return min(figures, default=(math.nan, "not measured"))


class _Table:
    """The rows of a run, with lookups of what was timed on the same case."""

    def __init__(self, rows: Sequence[Measured], roofline: Roofline) -> None:
        self._rows = list(rows)
        self._roofline = roofline

    def ours(self, op: str, direction: str) -> list[Measured]:
        return [r for r in self._rows if (r.candidate, r.case.op, r.direction) == ("triton", op, direction)]

    def shares(self, rows: Iterable[Measured]) -> list[tuple[float, str]]:
        return [(_or_zero(self._roofline.floor(*r.case.costs[r.direction]) / r.median), _where(r)) for r in rows]

    def ratios(self, rows: Iterable[Measured], *rivals: str) -> list[tuple[float, str]]:
        """The time of the fastest rival whose name starts with one of ``rivals``, divided by ours."""
        found = []
        for row in rows:
            theirs = [
                r.median
                for r in self._rows
                if r.case is row.case and r.direction == row.direction and r.candidate.startswith(rivals)
                if r.timing
            ]
            if theirs:
                found.append((_or_zero(min(theirs) / row.median), _where(row)))
        return found

    def layouts(self, rows: Sequence[Measured]) -> list[tuple[float, str]]:
        planar = {r.case.shape: r.median for r in rows if r.case.layout == "contiguous"}
        last = [r for r in rows if r.case.layout == "channels_last" and r.case.shape in planar]
        return [(_or_zero(planar[r.case.shape] / r.median), _where(r)) for r in last]


def _or_zero(figure: float) -> float:
    """0, the worst figure, for NaN: a candidate that was wrong or did not run has no time."""
    return 0.0 if math.isnan(figure) else figure


def _tokens(row: Measured) -> int:
    return int(row.case.shape.split()[1].removeprefix("T"))


def _where(row: Measured) -> str:
    return f"{row.case.shape} {row.case.layout}"
