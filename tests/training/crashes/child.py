"""Work in a process of its own, forked from one that has imported everything and has one thread."""

import os
import sys
import traceback
from collections.abc import Callable

import torch._dynamo  # noqa: F401  which an optimizer imports, a second in each process


def fork(work: Callable[[], int | None]) -> int:
    """Begin ``work``, whose value is the exit status; returns the process's number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        status = work() or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def wait(child: int) -> int:
    """The exit status of a process, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
