"""The kernels' benchmark: checked before it is timed, honest rows, and targets judged by the worst figure."""

import dataclasses
import math
from functools import partial
from importlib import import_module

import pytest
import torch

from fastdiff.benchmarks.cases import Case, attention_case, norm_case
from fastdiff.benchmarks.harness import Timing
from fastdiff.benchmarks.kernels import Measured, measure
from fastdiff.benchmarks.roofline import Roofline
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.targets import training_verdicts, verdicts
from fastdiff.benchmarks.tuning import AS_IT_IS, changed, different, faster, tuned, variants
from fastdiff.kernels import attention, group_norm_silu
from fastdiff.kernels.group_norm_silu import plan

CPU = torch.device("cpu")
ROOFS = Roofline(bytes_per_s=1e9, flops_per_s=1e12)


def small_norm(layout: str = "contiguous") -> Case:
    return norm_case(2, 64, 8, torch.float32, layout, on_gpu=False)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "case", [small_norm(), small_norm("channels_last"), attention_case(2, 16, 2, 16, torch.float32, False)]
)
def test_every_right_candidate_is_timed(case: Case, direction: str) -> None:
    found = list(measure(case, direction, 2, CPU))
    assert {one.candidate for one in found} == set(case.candidates)
    assert found[0].candidate == "reference"
    n_bytes, flops = case.costs[direction]
    for one in found:
        assert one.median > 0
        row = one.row(ROOFS)
        values = row.as_dict()
        assert values["rounds"] == 2
        assert (row.suite, row.candidate, row.failed) == ("kernels", one.candidate, False)
        assert row.workload.startswith(f"{case.op} {direction}, {case.shape}, float32, ")
        assert values["gbyte"] == pytest.approx(n_bytes / 1e9, rel=1e-3)
        assert values["share_of_limit"] == pytest.approx(ROOFS.floor(n_bytes, flops) / one.median, rel=1e-3)
        assert row.peak_gib * 2**30 > n_bytes / 4  # at least what it writes


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_candidate_gets_no_time(direction: str) -> None:
    case = small_norm()
    right = case.candidates["torch"]
    candidates = {
        "off": lambda **tensors: right(**tensors) * 1.001,
        "nan": lambda **tensors: right(**tensors) * math.nan,
        "broken": _raise,
        "right": right,
    }
    rows = {r.candidate: r for r in measure(dataclasses.replace(case, candidates=candidates), direction, 1, CPU)}
    assert rows["right"].timing
    assert math.isnan(rows["right"].row(ROOFS).as_dict()["speedup"])  # type: ignore[arg-type]  # of no reference
    for name in ("off", "nan"):
        assert rows[name].timing is None
        assert rows[name].remark.startswith("ValueError: not timed: error")
    assert rows["broken"].remark == "RuntimeError: no such kernel"
    assert math.isnan(rows["off"].median)
    assert not rows["off"].row(ROOFS).failed  # somebody else's


def test_one_of_ours_that_is_wrong_is_a_failure() -> None:
    case = small_norm()
    candidates = {**case.candidates, "torch": _raise}
    rows = [one.row(ROOFS) for one in measure(dataclasses.replace(case, candidates=candidates), "forward", 1, CPU)]
    assert {row.candidate for row in rows if row.failed} == {"torch"}


def test_a_gradient_that_is_not_a_number_is_wrong_wherever_it_is() -> None:
    case = small_norm()
    right = case.candidates["torch"]

    def last_is_nan(**tensors: torch.Tensor) -> torch.Tensor:
        last = [name for name, t in tensors.items() if t is not None and t.requires_grad][-1]
        tensors[last] = tensors[last].clone()
        tensors[last].register_hook(lambda gradient: gradient * math.nan)
        return right(**tensors)

    candidates = {**case.candidates, "torch": last_is_nan}
    found = {r.candidate: r for r in measure(dataclasses.replace(case, candidates=candidates), "backward", 1, CPU)}
    assert found["torch"].timing is None
    assert found["torch"].remark.startswith("ValueError: not timed: error nan")


def test_what_is_too_large_has_not_failed() -> None:
    case = small_norm()

    def large(**_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("a lot")

    candidates = {**case.candidates, "torch": large}
    rows = [one.row(ROOFS) for one in measure(dataclasses.replace(case, candidates=candidates), "forward", 1, CPU)]
    (row,) = (row for row in rows if row.candidate == "torch")
    assert (row.timing, row.remark, row.failed) == (None, "out of memory", False)


def test_without_what_is_right_nothing_is_timed() -> None:
    case = dataclasses.replace(small_norm(), reference=_raise)
    rows = [one.row(ROOFS) for one in measure(case, "forward", 1, CPU)]
    assert {row.candidate for row in rows} == set(case.candidates)
    assert all(row.timing is None and row.remark == "RuntimeError: no such kernel" for row in rows)
    assert any(row.failed for row in rows)


def _raise(**_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel\nand a long explanation")


def measured(case: Case, candidate: str, seconds: float | None) -> Measured:
    timing = None if seconds is None else Timing(candidate, [seconds], [seconds])
    return Measured(case, "forward", candidate, timing, reason=ValueError("not timed") if seconds is None else None)


def test_marks_are_judged_by_the_worst_figure() -> None:
    large, small = (norm_case(64, c, s, torch.bfloat16, "contiguous", False) for c, s in ((192, 64), (768, 8)))
    floors = {p: ROOFS.floor(*p.costs["forward"]) for p in (large, small)}
    rows = [
        measured(large, "triton", floors[large] / 0.9),
        measured(large, "compile", floors[large] / 0.9 * 1.3),
        measured(small, "triton", 1e-5),
        measured(small, "compile", 1.1e-5),
        measured(small, "torch", None),
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
    large = norm_case(64, 192, 64, torch.bfloat16, "contiguous", False)
    rows = [
        measured(large, "triton", None),
        measured(large, "compile", 1.0),
    ]
    found = {v.what: v for v in verdicts(rows, ROOFS)}
    for what in ("norm forward over 64 MB, share of the floor", "norm forward against Inductor"):
        assert found[what].worst == 0
        assert str(found[what]).startswith("MISSED")


def test_layouts_are_compared_shape_by_shape() -> None:
    planar, last = (norm_case(64, 128, 8, torch.bfloat16, layout, False) for layout in ("contiguous", "channels_last"))
    rows = [measured(planar, "triton", 1.0), measured(last, "triton", 1.25)]
    found = {v.what: v for v in verdicts(rows, ROOFS)}
    assert found["norm forward, channels_last against contiguous"].worst == pytest.approx(0.8)


def step(candidate: str, seconds: float | None) -> dict[str, str]:
    timing = None if seconds is None else Timing(candidate, [seconds], [1.0])
    row = Row("train", "imagenet64_uncond, batch 64", candidate, timing, limit_s=0.3, flops=5e14)
    return {name: str(value) for name, value in row.as_dict().items()}


def test_a_training_step_is_judged_by_the_slower_of_ours() -> None:
    rows = [step("plain", 4.0), step("+ compile", 1.2), step("+ Triton kernels", 0.5), step("trainer", 1.0)]
    quicker, share = training_verdicts(rows)
    assert (quicker.worst, quicker.where) == (pytest.approx(1.2), "trainer")
    assert str(quicker).startswith("met")
    assert share.worst == pytest.approx(0.3)
    assert str(share).startswith("MISSED")
    _, utilisation = training_verdicts(rows, peak_flops=1e15)
    assert (utilisation.what, utilisation.worst) == ("training step, MFU", pytest.approx(0.5))
    whole = [
        step("+ compile", 1.2),
        step("+ Triton kernels", 2.0),
        step("trainer", 0.5),
    ]  # the second is a part of ours
    for beside, worst in ((1.0, 1.2), (0.4, 2.4)):
        quicker, _ = training_verdicts([*whole, step("+ beside the norms", beside)])
        assert quicker.worst == pytest.approx(worst)
    quicker, share = training_verdicts([step("+ compile", 1.2), step("trainer", None)])
    assert (quicker.worst, share.worst) == (0, 0)  # what has no time misses its target
    assert all(math.isnan(v.worst) for v in training_verdicts([step("plain", 4.0), step("+ compile", 1.2)]))


def with_triton(case: Case) -> Case:
    op = {"group_norm_silu": group_norm_silu, "attention": partial(attention, heads=1)}[case.op]
    return dataclasses.replace(case, candidates={"triton": partial(op, backend="triton")})


SMALL = [
    with_triton(norm_case(1, 32, 8, torch.float16, "channels_last", False)),
    with_triton(attention_case(1, 64, 1, 16, torch.float16, False)),
]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)
def test_what_is_tuned_exists_and_differs(case: Case, direction: str) -> None:
    plan = import_module(f"fastdiff.kernels.{case.op}.plan")
    for changes in variants(case, direction).values():
        for name, value in changes.items():
            assert callable(value) == callable(getattr(plan, name)), name
    names = different(case, direction, case.inputs(0, CPU))
    assert next(iter(names)) == AS_IT_IS
    assert len(names) < len(variants(case, direction))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_variants_of_a_norm_have_limited_registers_or_not(direction: str, layout: str) -> None:
    """Every variant has a plan for many large images, whose walks on four warps have a limit unless it lifts that."""
    case = norm_case(2048, 192, 64, torch.bfloat16, layout, False)
    for changes in variants(case, direction).values():
        with changed(case.op, changes):
            found = plan.plan(2048, 192, 64**2, 32, layout == "channels_last", 2, 1 + (direction == "backward"), 132)
        assert (found.registers is None) == ("REGISTERS" in changes or found.warps != 4)


def test_variants_are_timed_and_the_fastest_is_advice() -> None:
    found = tuned(SMALL[1], "backward", 1, CPU)
    assert all(one.timing and not one.reason for one in found)
    slow, quick = (dataclasses.replace(found[i], timing=Timing("", [s], [s])) for i, s in ((0, 2.0), (1, 1.0)))
    assert faster([slow, quick]) == (
        "attention backward, N1 T64 H1 d16, packed: two launches (backward_at_once) is 2.00 times as fast"
    )
    assert faster([slow, dataclasses.replace(quick, timing=slow.timing)]) == ""


def test_a_wrong_variant_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {AS_IT_IS: {}, "broken": {"next_power": lambda _: 1 / 0}}
    monkeypatch.setattr("fastdiff.benchmarks.tuning.variants", lambda *_: wrong)
    monkeypatch.setattr("fastdiff.benchmarks.tuning.different", lambda *_: wrong)
    right, broken = tuned(SMALL[0], "forward", 1, CPU)
    assert right.timing
    assert broken.remark == "ZeroDivisionError: division by zero"
