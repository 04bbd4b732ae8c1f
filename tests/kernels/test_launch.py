"""Equal calls share the preparation of their launches, and only the addresses differ: seen on a driver's double."""

import json
import os
import subprocess
import sys


def test_a_repeated_call_launches_what_the_first_did() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.repeated_calls"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert {name: case["launches"] for name, case in found.items()} == {
        "norm": 1,
        "split norm": 2,
        "strided weight": 1,
        "norm's gradient": 2,
        "attention": 1,
        "attention's gradient": 1,
        "long attention's gradient": 2,
    }
    for name, case in found.items():
        assert case["same"] == [True] * 3, name
        assert case["prepared"] == (0 if name == "strided weight" else 2), name  # its copy cannot be repeated
