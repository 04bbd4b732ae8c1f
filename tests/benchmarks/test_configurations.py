"""Every launch that the released models make, compiled for GPUs that are not at hand."""

import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "fastdiff.benchmarks.configurations"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without the interpreter, which the other tests use where there is no GPU: it would leave nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False)


def assert_all_compiled(result: subprocess.CompletedProcess[str], at_least: int) -> None:
    *rows, summary = result.stdout.splitlines()[1:]
    faults = [row for row in rows if row.rstrip().endswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))]
    assert result.returncode == 0, f"{result.stderr}\n" + "\n".join(faults) + summary
    assert len(rows) >= at_least
    for kernel in KERNELS:
        assert any(row.startswith(kernel + " ") for row in rows), kernel
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert sum(f" {target} " in row for row in rows) > at_least / 8


KERNELS = [
    "group_norm_silu_forward",
    "group_norm_silu_statistics",
    "group_norm_silu_apply",
    "group_norm_silu_backward",
    "group_norm_silu_backward_sums",
    "group_norm_silu_backward_apply",
    "group_norm_silu_backward_parameters",
    "attention_forward",
    "attention_backward_at_once",
    "attention_backward_all_keys",
    "attention_backward_queries",
    "attention_backward_keys",
    "diffusion_step",
    "diffusion_loss_forward",
    "diffusion_loss_backward",
]


@pytest.mark.timeout(1500)
def test_the_default_ones_compile_for_every_target() -> None:
    assert_all_compiled(run(), 1000)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_dtype_and_layout_compiles() -> None:
    assert_all_compiled(run("--thorough"), 5000)


def test_an_unknown_target() -> None:
    result = run("sm_12")
    assert result.returncode == 2
    assert "no target sm_12: sm_80, sm_90, sm_100, gfx942" in result.stderr
