"""Equal calls share the preparation of their launches, and only the addresses differ: seen on a driver's double."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdiff.kernels.launch import launch

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"


def test_a_repeated_call_launches_what_the_first_did() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.repeated_calls"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {name: case["launches"] for name, case in found.items()} == {
        "norm": 1,
        "split norm": 2,
        "strided weight": 1,
        "input bias": 1,
        "norm's gradient": 2,
        "two inputs": 1,
        "gradients of two inputs": 2,
        "limited registers": 2,
        "expanded gradient": 2,
        "copied gradient": 2,
        "attention": 1,
        "attention's gradient": 1,
        "long attention's gradient": 2,
    }
    for name, case in found.items():
        assert case["same"] == [True] * 3, name
        assert case["unknown"] == (name == "strided weight"), name  # .contiguous() allocates by itself
        copied = name in ("strided weight", "copied gradient")  # the copy cannot be repeated
        assert case["prepared"] == (0 if copied else 2), name


class Kernel:
    """Takes the place of a kernel that Triton would compile."""

    fn = SimpleNamespace(__name__="norm")

    def __init__(self, run: Callable[..., object]) -> None:
        self.run = run

    def __getitem__(self, grid: object) -> Callable[..., object]:
        return self.run


@pytest.mark.parametrize(("hip", "passed"), [(None, {"maxnreg": 96}), ("6.4", {})])
def test_registers_are_limited_where_the_compiler_can(
    hip: str | None, passed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton refuses an option that a backend does not know, as AMD's does not know maxnreg."""
    found: list[dict[str, int]] = []

    monkeypatch.setattr("torch.version.hip", hip)
    kernel = Kernel(lambda **options: found.append(options))
    launch(kernel, (1,), torch.device("cpu"), num_warps=4, num_stages=1, maxnreg=96)
    launch(kernel, (1,), torch.device("cpu"), num_warps=4, num_stages=1)
    assert found == [{"num_warps": 4, "num_stages": 1, **passed}, {"num_warps": 4, "num_stages": 1}]


def test_no_function_of_a_kernel_returns_none() -> None:
    """Nor a tuple of a literal None: Triton 3.6 cannot compile them."""
    files = [path for path in KERNELS.rglob("*.py") if "triton.jit" in path.read_text(encoding="utf-8")]
    assert len(files) > 8
    for path in files:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or "triton.jit" not in ast.unparse(function):
                continue
            for value in (node.value for node in ast.walk(function) if isinstance(node, ast.Return)):
                parts = value.elts if isinstance(value, ast.Tuple) else [value]
                assert all(part is not None and ast.unparse(part) != "None" for part in parts), function.name


def test_a_first_call_during_a_capture_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    capturing = [True, False]
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", capturing.pop)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    gpu = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match=r"^operation not permitted"):
        launch(Kernel(run), (1,), gpu, num_warps=4, num_stages=1)
    with pytest.raises(RuntimeError, match=r"^norm cannot run first during the capture .* call it once"):
        launch(Kernel(run), (1,), gpu, num_warps=4, num_stages=1)
    assert not capturing
