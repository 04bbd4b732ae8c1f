"""An update asks the device for nothing that it would have to wait for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.data import batches
from fastdiff.training.update import Updater

from ..watch import Watch
from .support import Lines, trainer


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_update_waits_for_nothing(tmp_path: Path, shapes: Path, precision: str) -> None:
    flags: dict[str, Any] = {"class_cond": True, "label_dropout": 0.1, "learn_sigma": True, "dropout": 0.1}
    flags |= {"schedule_sampler": "loss-second-moment", "spike_guard": 3.0, "microbatch": 2}
    flags |= {"grad_clip": 1.0, "ema_rate": "0.9,0.5"}
    subject = trainer(tmp_path, shapes, precision, **flags)
    update = Updater(subject.config, subject.state, subject.diffusion, subject.module, subject.forward, subject.world)
    data = batches(subject.dataset, subject.config.data, 4, 0, 0)
    update(*next(data))  # what is made once may wait
    with Watch() as watch:
        update(*next(data))
        update(*next(data))
    data.close()
    assert subject.state.step == 3
    assert watch.calls > 500
    assert watch.seen == []


def test_the_watch_sees_what_waits() -> None:
    numbers = torch.arange(3)
    for wait in (
        lambda: int(numbers[0]),
        lambda: bool((numbers > 0).any()),
        lambda: numbers[numbers > 0],
        lambda: numbers.bincount(),
        lambda: torch.where(numbers > 0),
    ):
        with Watch() as watch:
            wait()
        assert watch.seen, wait


def test_lines_of_the_log_alone_read_numbers(tmp_path: Path, shapes: Path) -> None:
    """The whole loop: with a line every 5 updates, those between them wait for nothing."""
    subject = trainer(tmp_path, shapes, steps=10, log_interval=5, save_interval=100)
    assert isinstance(subject.log, Lines)
    with Watch() as watch:
        counts = []
        subject.run(lambda step, steps, note: counts.append(len(watch.seen)))
    assert counts[1] == counts[0]
    assert counts[3] == counts[0]
    assert counts[4] > counts[3]
    assert counts[8] == counts[4]
