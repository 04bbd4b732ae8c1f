"""An update asks the device for nothing that it would have to wait for."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastdiff.data import batches, prefetch_to_device
from fastdiff.data.shapes import write_shapes
from fastdiff.training.update import Updater

from ..watch import Watch
from .support import Lines, trainer


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_update_waits_for_nothing(tmp_path: Path, shapes: Path, precision: str) -> None:
    flags: dict[str, Any] = {"class_cond": True, "label_dropout": 0.1, "learn_sigma": True, "dropout": 0.1}
    flags |= {"schedule_sampler": "loss-second-moment", "spike_guard": 3.0, "microbatch": 2}
    flags |= {"grad_clip": 1.0, "ema_rate": "0.9,0.5", "augment": 0.5, "random_crop": 0.75}
    subject = trainer(tmp_path, shapes, precision, **flags)
    update = Updater(subject.config, subject.state, subject.objective, subject.module, subject.forward, subject.world)
    data = batches(subject.dataset, subject.config.data, 4, 0, 0)
    update(*next(data))  # what is made once may wait
    with Watch() as watch:
        update(*next(data))
        update(*next(data))
    data.close()
    assert subject.state.step == 3
    assert watch.calls > 500
    assert watch.seen == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_on_a_gpu_an_update_under_ddp_waits_for_nothing(tmp_path: Path, precision: str) -> None:
    write_shapes(tmp_path / "images", 8, 16, seed=0)  # gpu_check.sh runs this without the fixtures of all tests
    flags: dict[str, Any] = {"schedule_sampler": "loss-second-moment", "grad_clip": 1.0, "compile": "on"}
    subject = trainer(tmp_path / "run", tmp_path / "images", precision, device="cuda", **flags)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        # as several processes do; parallelise() does not wrap the model of a single one
        module = DistributedDataParallel(subject.model, gradient_as_bucket_view=True)
        forward = subject.runtime.prepare(module, subject.model_calls)
        update = Updater(subject.config, subject.state, subject.objective, module, forward, subject.world)
        data = batches(subject.dataset, subject.config.data, 4, 0, 0, pin=True)
        ahead = prefetch_to_device(data, subject.device)
        for _ in range(5):  # compiles, and fills two buffers of data
            update(*next(ahead))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(10):
            update(*next(ahead))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
    ahead.close()
    assert subject.state.step == 15


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
