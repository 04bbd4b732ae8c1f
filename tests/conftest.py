"""What the tests of training, sampling and the command line share."""

import functools
import gc
import os
import signal
from pathlib import Path

import pytest
import torch
import typer.main

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel: without a GPU they are interpreted

from fastdiff.data.shapes import write_shapes

if os.environ.get("TRITON_INTERPRET") == "1":
    from .interpreter import round_like_a_gpu, speed_up

    speed_up()
    round_like_a_gpu()

# Tests send signals, which a shell may have them ignore (a job in the background, nohup), and their children with them.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


# Typer puts the tree of commands together at every call of one: 60 ms, and the tests call a thousand.
typer.main.get_command = functools.cache(typer.main.get_command)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than processors: now and then a test waits for the disk, or for a process that starts."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look through it again and again, nor so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models of a few pixels run ten times faster on one thread than on two that wait for each other."""
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 8 pixels in the four classes circle, cross, square, triangle. Not to be written to."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, 12, 8, seed=0)
    return folder
