"""Equal calls share the preparation of their launches, and only the addresses differ: seen on a driver's double."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdiff.kernels.launch import launch

ROOT = Path(__file__).parents[2]


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


def test_a_first_call_during_a_capture_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        fn = SimpleNamespace(__name__="norm")

        def __getitem__(self, grid: object) -> object:
            return self

        def __call__(self, **_: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    capturing = [True, False]
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", capturing.pop)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    gpu = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match=r"^operation not permitted"):
        launch(Kernel(), (1,), gpu, num_warps=4, num_stages=1)
    with pytest.raises(RuntimeError, match=r"^norm cannot run first during the capture .* call it once"):
        launch(Kernel(), (1,), gpu, num_warps=4, num_stages=1)
    assert not capturing
