"""The targets that the kernels must reach on a GPU, and the worst figure of a run for each."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from fastdiff.benchmarks.harness import ALONE
from fastdiff.benchmarks.kernels import Measured
from fastdiff.benchmarks.roofline import Roofline

LARGE = 64 * 2**20
"""Bytes of a tensor from which on a norm must run at memory speed."""


Figures = Iterable[tuple[float, str]]
"""Values for a target, each with where it was measured."""


@dataclass(frozen=True)
class Verdict:
    """A target, and the worst figure of a run for it."""

    what: str
    target: float
    worst: float
    where: str

    @classmethod
    def on(cls, what: str, target: float, figures: Figures) -> Self:
        """The verdict on the figures; neither met nor missed if there are none."""
        return cls(what, target, *min(figures, default=(math.nan, "not measured")))

    def __str__(self) -> str:
        met = "      " if math.isnan(self.worst) else "met   " if self.worst >= self.target else "MISSED"
        return f"{met} {self.what}: {self.worst:.2f}, expected at least {self.target:.2f} ({self.where})"


def verdicts(rows: Sequence[Measured], roofline: Roofline) -> list[Verdict]:
    """Verdicts on every target, from the rows: shares of the floor, and ratios of a rival's time to ours."""

    def ours(op: str, direction: str) -> list[Measured]:
        return [r for r in rows if (r.candidate, r.case.op, r.direction) == ("triton", op, direction)]

    def shares(rows: Iterable[Measured]) -> Figures:
        return [_figure(roofline.floor(*r.case.costs[r.direction]), r) for r in rows]

    found: list[Verdict] = []
    for direction, floor, inductor in (("forward", 0.8, 1.2), ("backward", 0.7, 1.3)):
        norms = ours("group_norm_silu", direction)
        large = [r for r in norms if r.case.costs["forward"][0] >= 2 * LARGE]
        small = [r for r in norms if r.case.shape.endswith((" 8x8", " 16x16"))]
        rivals = ("reference", "torch", "eager", "compile")
        found += [
            Verdict.on(f"norm {direction} over 64 MB, share of the floor", floor, shares(large)),
            Verdict.on(f"norm {direction} against Inductor", inductor, _ratios(norms, rows, "compile")),
            Verdict.on(f"norm {direction}, channels_last against contiguous", 0.95, _layouts(norms)),
            Verdict.on(
                f"norm {direction}, 8 and 16 pixels, against eager and compile", 1.0, _ratios(small, rows, *rivals)
            ),
        ]
    for direction, share, target in (("forward", 0.6, 0.97), ("backward", 0.5, 1.0)):
        attentions = [(r, int(r.case.shape.split()[1].removeprefix("T"))) for r in ours("attention", direction)]
        short = [r for r, tokens in attentions if tokens in (64, 256)]
        up_to_512 = [r for r, tokens in attentions if tokens <= 512]
        with_1024 = [r for r, tokens in attentions if tokens == 1024]
        found += [
            Verdict.on(f"attention {direction}, 64 and 256 tokens, share of the roof", share, shares(short)),
            Verdict.on(f"attention {direction}, up to 512 tokens, against SDPA", 1.0, _ratios(up_to_512, rows, "SDPA")),
            Verdict.on(f"attention {direction}, 1024 tokens, against SDPA", target, _ratios(with_1024, rows, "SDPA")),
        ]
    found.append(Verdict.on("diffusion_step, share of the floor", 0.8, shares(ours("diffusion_step", "forward"))))
    for direction in ("forward", "backward"):
        losses = shares(ours("diffusion_loss", direction))
        found.append(Verdict.on(f"diffusion_loss {direction}, share of the floor", 0.7, losses))
    return found


def _figure(seconds: float, row: Measured) -> tuple[float, str]:
    """``seconds`` divided by the row's time; 0, the worst figure, if one is missing: it was wrong or did not run."""
    figure = seconds / row.median
    return 0.0 if math.isnan(figure) else figure, f"{row.case.shape} {row.case.layout}"


def _ratios(ours: Iterable[Measured], rows: Sequence[Measured], *rivals: str) -> Figures:
    """The time of the fastest rival whose name starts with one of ``rivals``, divided by ours on the same case."""
    for own in ours:
        beside = [r for r in rows if r.case is own.case and r.direction == own.direction and r.timing]
        theirs = [r.median for r in beside if r.candidate.startswith(rivals)]
        if any(r.candidate.startswith(rivals) and r.candidate != "reference" for r in beside):
            yield _figure(min(theirs), own)


def _layouts(norms: Sequence[Measured]) -> Figures:
    """The time of a contiguous norm divided by that of the same norm in channels_last."""
    planar = {r.case.shape: r.median for r in norms if r.case.layout == "contiguous"}
    last = [r for r in norms if r.case.layout == "channels_last" and r.case.shape in planar]
    return [_figure(planar[r.case.shape], r) for r in last]


def training_verdicts(rows: Sequence[Mapping[str, str]], peak_flops: float | None = None) -> list[Verdict]:
    """Verdicts on the targets of a training step, from a CSV file's rows of the suite train on a GPU.

    The model FLOPs utilisation refers to the device's ``peak_flops`` per second. If they are unknown, the share of the
    measured limit takes its place.
    """
    timed = {row["candidate"]: row for row in rows}
    whole = "+ beside the norms" if "+ beside the norms" in timed else "+ Triton kernels"  # of earlier versions
    ours = [timed[name] for name in (whole, "trainer") if name in timed]
    rival = float(timed["+ compile"]["median_s"]) if "+ compile" in timed else math.nan
    faster, shares = [], []
    for row in ours:
        seconds = float(row["median_s"])
        share = float(row["gflop"]) * 1e9 / seconds / peak_flops if peak_flops else float(row["share_of_limit"])
        figures = (rival / seconds, share) if seconds > 0 else (0.0, 0.0)
        faster += [(figures[0], row["candidate"])] if not math.isnan(rival) else []
        shares.append((figures[1], row["candidate"]))
    return [
        Verdict.on("training step against torch's kernels, compiled", 1.15, faster),
        Verdict.on(f"training step, {'MFU' if peak_flops else 'share of the limit'}", 0.4, shares),
    ]


SAMPLING = {1: 1.6, 16: 1.6, 256: 1.0}
"""For each batch size, the required speedup of a sampling step over the faster of torch.compile's rivals."""


def sampling_verdicts(rows: Sequence[Mapping[str, str]]) -> list[Verdict]:
    """Verdicts on a sampling step's targets, from a CSV file's rows of the suite step: speed, one launch, no wait."""
    ours = {row["workload"]: row for row in rows if row["candidate"] == "model call and step"}
    faster: dict[int, list[tuple[float, str]]] = {size: [] for size in SAMPLING}
    for row in rows:
        workload, seconds = row["workload"], float(row["median_s"])
        figures = faster.setdefault(int(workload.rpartition(" ")[2]), [])
        if row is ours.get(workload) and math.isnan(seconds):
            figures.append((0.0, f"{workload}: {row['remark']}"))
        elif row["candidate"].startswith("max-autotune") and workload in ours and seconds > 0:
            ratio = seconds / float(ours[workload]["median_s"])
            figures += [] if math.isnan(ratio) else [(ratio, f"{workload}, {row['candidate']}")]
    found = [
        Verdict.on(f"sampling step, batch {size}, against max-autotune", target, faster[size])
        for size, target in SAMPLING.items()
    ]
    watched = {workload: row["remark"] for workload, row in ours.items() if row["remark"].startswith("graph launches")}
    for what, said in (
        ("is one graph's launch and nothing else", ALONE),
        ("never waits for the device", "no wait for the device"),
    ):
        figures = [(float(said in remark), workload) for workload, remark in watched.items()]
        found.append(Verdict.on(f"sampling step {what}", 1.0, figures))
    return found
