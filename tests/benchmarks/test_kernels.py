"""The kernels' benchmark: checked before it is timed, honest rows, and marks judged by the worst figure."""

import dataclasses
import math
from importlib import import_module

import pytest
import torch

from fastdiff.benchmarks.bars import verdicts
from fastdiff.benchmarks.gpu_check import ATTENTION_VARIANTS, NORM_VARIANTS, Variants
from fastdiff.benchmarks.kernels import Row, measure
from fastdiff.benchmarks.problems import Problem, attention_problem, norm_problem
from fastdiff.benchmarks.roofs import Roofs

CPU = torch.device("cpu")
ROOFS = Roofs(bytes_per_s=1e9, flops_per_s=1e12)


def small_norm(layout: str = "contiguous") -> Problem:
    return norm_problem(2, 64, 8, torch.float32, layout, on_gpu=False)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "problem", [small_norm(), small_norm("channels_last"), attention_problem(2, 16, 2, 16, torch.float32, False)]
)
def test_every_right_candidate_is_timed(problem: Problem, direction: str) -> None:
    rows = list(measure(problem, direction, 2, CPU))
    assert [row.candidate for row in rows] == list(problem.candidates)
    for row in rows:
        assert len(row.seconds) == 2
        assert row.median > 0
        values = row.as_dict(ROOFS)
        n_bytes, _ = problem.cost(direction)
        assert values["gb_per_s"] == pytest.approx(n_bytes / row.median / 1e9, rel=1e-3)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_candidate_gets_no_time(direction: str) -> None:
    problem = small_norm()
    right = problem.candidates["torch"]
    candidates = {
        "off": lambda **tensors: right(**tensors) * 1.001,
        "nan": lambda **tensors: right(**tensors) * math.nan,
        "broken": _raise,
        "right": right,
    }
    rows = {r.candidate: r for r in measure(dataclasses.replace(problem, candidates=candidates), direction, 1, CPU)}
    assert rows["right"].seconds
    for name in ("off", "nan"):
        assert not rows[name].seconds
        assert rows[name].remark.startswith("ValueError: not timed: error")
    assert rows["broken"].remark == "RuntimeError: no such kernel"
    assert math.isnan(rows["off"].median)


def _raise(**_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel\nand a long explanation")


def test_marks_are_judged_by_the_worst_figure() -> None:
    large, small = (norm_problem(64, c, s, torch.bfloat16, "contiguous", False) for c, s in ((192, 64), (768, 8)))
    floors = {p: ROOFS.floor(*p.cost("forward")) for p in (large, small)}
    rows = [
        Row(large, "forward", "triton", [floors[large] / 0.9]),
        Row(large, "forward", "compile", [floors[large] / 0.9 * 1.3]),
        Row(small, "forward", "triton", [1e-5]),
        Row(small, "forward", "compile", [1.1e-5]),
        Row(small, "forward", "torch", []),
    ]
    found = {v.what: v for v in verdicts(rows, ROOFS)}
    assert found["norm forward over 64 MB, share of the floor"].worst == pytest.approx(0.9)  # the large one alone
    inductor = found["norm forward against Inductor"]
    assert (inductor.worst, inductor.where) == (pytest.approx(1.1), "N64 C768 8x8 contiguous")
    assert str(inductor).startswith("MISSED")
    unmeasured = [v for what, v in found.items() if "backward" in what or "attention" in what]
    assert unmeasured
    assert all(v.where == "not measured" and math.isnan(v.worst) for v in unmeasured)


def test_a_kernel_without_a_time_misses_its_mark() -> None:
    large = norm_problem(64, 192, 64, torch.bfloat16, "contiguous", False)
    rows = [
        Row(large, "forward", "triton", [], "ValueError: not timed: error 1"),
        Row(large, "forward", "compile", [1.0]),
    ]
    found = {v.what: v for v in verdicts(rows, ROOFS)}
    for what in ("norm forward over 64 MB, share of the floor", "norm forward against Inductor"):
        assert found[what].worst == 0
        assert str(found[what]).startswith("MISSED")


def test_layouts_are_compared_shape_by_shape() -> None:
    planar, last = (
        norm_problem(64, 128, 8, torch.bfloat16, layout, False) for layout in ("contiguous", "channels_last")
    )
    rows = [Row(planar, "forward", "triton", [1.0]), Row(last, "forward", "triton", [1.25])]
    found = {v.what: v for v in verdicts(rows, ROOFS)}
    assert found["norm forward, channels_last against contiguous"].worst == pytest.approx(0.8)


@pytest.mark.parametrize(("op", "variants"), [("group_norm_silu", NORM_VARIANTS), ("attention", ATTENTION_VARIANTS)])
def test_what_is_tuned_exists(op: str, variants: Variants) -> None:
    plan = import_module(f"fastdiff.kernels.{op}.plan")
    for changes in variants.values():
        for name, value in changes.items():
            assert callable(value) == callable(getattr(plan, name)), name
