"""Other divisions of the work than the kernels' plans choose, timed side by side: a faster one belongs in the plans."""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

from fastdiff.benchmarks.cases import Case, Inputs
from fastdiff.benchmarks.harness import graphed, interleaved
from fastdiff.benchmarks.kernels import Measured, checked, expected, input_sets, run_once
from fastdiff.kernels.attention.plan import Tiles, next_power
from fastdiff.kernels.group_norm_silu import plan as norm_plan
from fastdiff.kernels.launch import Launch, forget, recording

AS_IT_IS = "as it is"

Changes = Mapping[str, Any]
"""Attributes of an operation's plan module and their replacements."""

_UNLIMITED: Changes = {"REGISTERS": dict.fromkeys(norm_plan.REGISTERS), "ON_CHIP_REGISTERS": None}

NORMS: Mapping[str, Changes] = {
    AS_IT_IS: {},
    "registers without a limit": _UNLIMITED,
    "cache hints": {"KEPT": True},
    "twice the values per warp": {"PER_WARP": 1024, **_UNLIMITED},
    "half the values per warp": {"PER_WARP": 256},
    "chunks of 2048, 6 stages": {"CHUNKS": ((2048, 6), (2048, 6))},
    "chunks of 4096, 3 stages": {"CHUNKS": ((4096, 3), (4096, 3))},
    "chunks of 4096, 4 stages": {"CHUNKS": ((4096, 4), (4096, 4))},
    "chunks of 1024, 6 stages": {"CHUNKS": ((1024, 6), (1024, 6))},
    "chunks of 4096, 4 stages, 4 warps": {"CHUNKS": ((4096, 4), (4096, 4)), "MOST_WARPS": 4, **_UNLIMITED},
    "16 warps for large tiles": {"FEW_WARPS": 16, **_UNLIMITED},
    "small tiles": {"ON_CHIP": {1: 8192, 2: 4096}},
    "smaller tiles": {"ON_CHIP": {1: 4096, 2: 2048}},
    "short runs": {"FULL_RUN": 32},
}


FORWARD = [
    *((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4)),
    *((128, 128, 4, 2), (64, 128, 4, 2)),
]
AT_ONCE = [(64, 64, 8, 2), (128, 128, 8, 2), (128, 128, 4, 2)]
QUERIES = [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)]
KEYS = [(64, 64, 4, 2), (64, 128, 8, 2), (64, 128, 8, 3), (128, 128, 8, 2)]
APART: Changes = {"backward_at_once": lambda *_: None}


def _attentions(direction: str, tokens: int) -> dict[str, Changes]:
    """Tiles that are no longer than the sequence."""

    def tiles(name: str, choices: Iterable[tuple[int, int, int, int]], **others: Any) -> Iterator[tuple[str, Changes]]:
        for queries, keys, warps, stages in choices:
            if max(queries, keys) <= tokens:
                said = f"{name.replace('_', ' ')} {queries} x {keys}, {warps} warps, {stages} stages"
                found = Tiles(queries, keys, warps, stages)
                yield said, {name: lambda *_, found=found: found, **others}

    if direction == "forward":
        return dict(tiles("forward", FORWARD))
    whole = [one for one in AT_ONCE if one[1] == next_power(tokens)]  # one tile holds the sequence
    split = [*tiles("backward_queries", QUERIES, **APART), *tiles("backward_keys", KEYS, **APART)]
    return {"two launches": APART, **dict(tiles("backward_at_once", whole)), **dict(split)}


RARE = re.compile(r"T(2048|4096)|d(32|144|192)$")
"""Attentions that the released models have not."""


def worth_tuning(case: Case) -> bool:
    """Whether a case has variants, and released models have its shape or one like it."""
    return case.op in ("group_norm_silu", "attention") and not RARE.search(case.shape)


def variants(case: Case, direction: str) -> Mapping[str, Changes]:
    """Changes of the plan's attributes for a case, by name; some of them change nothing for it."""
    if case.op == "group_norm_silu":
        return NORMS
    tokens = int(case.shape.split()[1].removeprefix("T"))
    return {AS_IT_IS: {}, **_attentions(direction, tokens)}


@contextmanager
def changed(op: str, changes: Changes) -> Iterator[None]:
    """Calls of the operation are divided as changed."""
    plan = import_module(f"fastdiff.kernels.{op}.plan")
    context: AbstractContextManager[object] = patch.multiple(plan, **changes) if changes else nullcontext()
    with context:
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    norm_plan.plan.cache_clear()
    forget()


def different(case: Case, direction: str, inputs: Inputs) -> dict[str, Changes]:
    """The variants of a case whose launches differ, by name."""
    found: dict[str, Changes] = {}
    seen: list[object] = []
    for name, changes in variants(case, direction).items():
        with changed(case.op, changes), recording() as launches:
            run_once(case.candidates["triton"], inputs, direction)
        wanted = [one for one in launches if ("backward" in one.kernel.fn.__name__) == (direction == "backward")]
        if (division := [_division(one) for one in wanted]) not in seen:
            seen.append(division)
            found[name] = changes
    return found


def _division(launch: Launch) -> object:
    plain = {name: value for name, value in launch.arguments.items() if not isinstance(value, (torch.Tensor, tuple))}
    return launch.kernel.fn.__name__, launch.grid, plain, launch.num_warps, launch.num_stages, launch.maxnreg


def tuned(case: Case, direction: str, rounds: int, device: torch.device, deadline: float = math.inf) -> list[Measured]:
    """The time of each variant of our kernels on a case, checked as the plan's own division is.

    After ``deadline``, of time.monotonic(), no further one is prepared.
    """
    ours = replace(case, candidates={"triton": case.candidates["triton"]})
    inputs = input_sets(ours, direction, device)
    right = expected(ours, inputs[0], direction)
    ready: dict[str, Callable[[], object]] = {}
    reasons: dict[str, Exception] = {}
    names = different(ours, direction, inputs[0])
    for name, changes in names.items():
        if time.monotonic() > deadline:
            break
        with changed(case.op, changes):
            try:
                ready[name] = graphed(checked(ours, direction, "triton", inputs, right), device)
            except Exception as reason:  # any failure or wrong result becomes its remark
                reasons[name] = reason.with_traceback(None)
    timings = {t.name: t.divided(len(inputs)) for t in interleaved(ready, rounds, 2, device, AS_IT_IS, reasons)}
    return [Measured(case, direction, name, timings.get(name), reason=reasons.get(name)) for name in (*ready, *reasons)]


def faster(found: Sequence[Measured], by: float = 1.03) -> str:
    """The fastest variant, if it is faster than the plan's own division by more than noise."""
    timed = {one.candidate: one.timing for one in found if one.timing is not None}
    if AS_IT_IS not in timed:
        return ""
    best = min(timed, key=lambda name: timed[name].median)
    gain = timed[AS_IT_IS].median / timed[best].median
    one = found[0]
    where = f"{one.case.op} {one.direction}, {one.case.shape}, {one.case.layout}"
    if gain <= by:
        return ""
    changed = ", ".join(
        name if callable(value) else f"{name} = {value}"
        for name, value in variants(one.case, one.direction)[best].items()
    )
    return f"{where}: {best} ({changed}) is {gain:.2f} times as fast"
