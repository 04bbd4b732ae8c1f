"""``python worker.py train ...``: the command line, with the harm that the environment asks for.

KILL_AFTER_STEP=11, SIGNAL_AFTER_STEP=5 with SIGNAL=SIGTERM, or NAN_AT_UPDATES=7 or 7-99, each only in the process
KILL_RANK (default 0) and never in one that torchrun has started again; COMPILE_BACKEND compiles by another backend.
STATUS_FILE gets the exit status and the last step.
"""

import functools
import os
import signal
import sys
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from fastdiff.cli.app import main
from fastdiff.training import Trainer
from fastdiff.training.update import Updater

torch.set_num_threads(1)
harmed = os.environ.get("RANK", "0") == os.environ.get("KILL_RANK", "0")
harmed &= os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
real_update, real_run = Updater.__call__, Trainer.run


def wanted(name: str) -> range:
    """The updates, counted from 1, that a variable names."""
    first, _, last = os.environ.get(name, "0").partition("-")
    return range(int(first), int(last or first) + 1) if harmed else range(0)


def spoilt(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.reshape(-1).index_fill(0, torch.tensor([0]), torch.nan).view(gradient.shape)


def update(self: Updater, *batch: Any) -> None:
    number = self.state.step + 1
    hook = None
    if number in wanted("NAN_AT_UPDATES"):
        # in one number of one layer's gradient, before the processes exchange it
        hook = self.state.held[3].register_hook(spoilt)
    real_update(self, *batch)
    if hook is not None:
        hook.remove()


def run(self: Trainer, on_update: Any) -> int:
    def after(step: int, steps: int, note: str) -> None:
        on_update(step, steps, note)
        if step in wanted("SIGNAL_AFTER_STEP"):
            os.kill(os.getpid(), signal.Signals[os.environ["SIGNAL"]])
        if step in wanted("KILL_AFTER_STEP"):
            self.saver.wait()  # what was saved before is not what is tested
            os.kill(os.getpid(), signal.SIGKILL)

    status = real_run(self, after)
    if "STATUS_FILE" in os.environ:
        with open(os.environ["STATUS_FILE"] + str(self.world.rank), "w") as file:
            file.write(f"{status} {self.state.step}")
    return status


Updater.__call__ = update  # type: ignore[method-assign]
Trainer.run = run  # type: ignore[method-assign, assignment]
if "COMPILE_BACKEND" in os.environ:
    torch.compile = functools.partial(torch.compile, backend=os.environ["COMPILE_BACKEND"])  # type: ignore[assignment]
sys.exit(main())
