"""What a forked process becomes: see ``processes.py``, which runs this file with a REQUEST."""

import atexit
import os
import runpy
import signal
import sys
from typing import Any

import torch

REQUEST: dict[str, Any] = globals()["REQUEST"]

for number, descriptor, name in ((1, REQUEST["out"], "stdout"), (2, REQUEST["err"], "stderr")):
    file = os.open(descriptor, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, number)
    os.close(file)
    setattr(sys, name, open(number, "w", encoding="utf-8", buffering=1, closefd=False))  # noqa: SIM115
nothing = os.open(os.devnull, os.O_RDONLY)
os.dup2(nothing, 0)
os.environ.clear()
os.environ.update(REQUEST["environment"])
os.chdir(REQUEST["cwd"])
sys.path[:0] = [path for path in REQUEST["environment"]["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
try:
    if REQUEST["script"] is None:
        sys.argv = ["fastdiff", *REQUEST["args"]]
        from fastdiff.cli.app import main

        main()
    else:
        sys.argv = [REQUEST["script"], *REQUEST["args"]]
        sys.path.insert(0, os.path.dirname(REQUEST["script"]))
        runpy.run_path(REQUEST["script"], run_name="__main__")
finally:
    atexit._run_exitfuncs()
