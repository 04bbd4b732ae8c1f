"""The demo, whole: it is what a newcomer sees first."""

from pathlib import Path

import numpy as np
import pytest

from fastdiff.cli import demo

from .conftest import Cli
from .support import succeeded

GROUND = np.array([24, 28, 44])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_draws_shapes(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many updates as a slow machine makes in the demo's time."""
    rest = {name: value for name, value in demo._TRAIN.items() if name != "minutes"}
    monkeypatch.setattr(demo, "_TRAIN", {**rest, "steps": 650})
    result = succeeded(cli("demo"))
    run = tmp_path / "runs" / "demo"
    assert str(run / "samples.png") in result.out
    assert len(list((run / "shapes").glob("*.png"))) == 2000
    with np.load(run / "samples.npz") as file:
        images, labels = file["arr_0"].astype(int), file["arr_1"]
    assert sorted(set(labels)) == [0, 1, 2, 3]
    # shapes on the ground: the corners are ground, and of the other pixels some but not most are
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # (N, 4, 3)
    assert np.median(np.abs(corners - GROUND).max(axis=-1)) < 15
    drawn = (np.abs(images - GROUND).max(axis=-1) > 60).mean(axis=(1, 2))  # (N,)
    assert ((drawn > 0.05) & (drawn < 0.6)).mean() > 0.9
