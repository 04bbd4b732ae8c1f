"""``python worker.py evaluate nll ...``: the command line, with the harm that the environment asks for.

SIGNAL_AFTER_STEPS=17 with SIGNAL=SIGTERM comes to the process SIGNAL_RANK (default 0) after so many steps of a batch,
FAIL_AFTER_STEPS=17 loses FAIL_RANK the decoded images.
"""

import os
import signal
import time
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from fastdiff.cli.app import main
from fastdiff.diffusion import GaussianDiffusion

torch.set_num_threads(1)
rank = os.environ.get("RANK", "0")
real, steps = GaussianDiffusion.vb_terms_bpd, 0


def now(harm: str) -> bool:
    return os.environ.get(f"{harm}_RANK", "0") == rank and steps == int(os.environ.get(f"{harm}_AFTER_STEPS", "0"))


def vb_terms_bpd(self: GaussianDiffusion, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    global steps
    out = real(self, *args, **kwargs)
    steps += 1
    if now("SIGNAL"):
        os.kill(os.getpid(), signal.Signals[os.environ["SIGNAL"]])
        time.sleep(0.1)
    if now("FAIL"):
        raise OSError("decoded.npy, the decoded images, has lost 7 bytes")
    return out


GaussianDiffusion.vb_terms_bpd = vb_terms_bpd  # type: ignore[method-assign]
main()
