"""``python worker.py sample ...``: the command line, with the harm that the environment asks for.

KILL_AFTER_STEPS=17 or, with SIGNAL=SIGTERM, SIGNAL_AFTER_STEPS=17 come to the process KILL_RANK (default 0), and never
to one that torchrun has started again; with SIGNAL_TORCHRUN the signal goes to torchrun, which hands it on. COUNT_FILE
and the rank are the name of a file that gets the steps taken.
"""

import os
import signal
import time
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from fastdiff.cli.app import main
from fastdiff.sampling import Loop

torch.set_num_threads(1)
rank = os.environ.get("RANK", "0")
harmed = rank == os.environ.get("KILL_RANK", "0") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
real, steps = Loop.step, 0


def step(self: Loop) -> None:
    global steps
    real(self)
    steps += 1
    if harmed and steps == int(os.environ.get("SIGNAL_AFTER_STEPS", "0")):
        to_torchrun = "SIGNAL_TORCHRUN" in os.environ
        os.kill(os.getppid() if to_torchrun else os.getpid(), signal.Signals[os.environ["SIGNAL"]])
        time.sleep(3 * to_torchrun)  # it takes a moment
    if harmed and steps == int(os.environ.get("KILL_AFTER_STEPS", "0")):
        os.kill(os.getpid(), signal.SIGKILL)


Loop.step = step  # type: ignore[method-assign]
try:
    main()
finally:
    if "COUNT_FILE" in os.environ:
        Path(os.environ["COUNT_FILE"] + rank).write_text(str(steps))
