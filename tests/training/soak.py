"""``python -m tests.training.soak [STEPS]``: a small model's training with everything that comes round, and its memory.

Prints every STEPS / 20 updates, when no save is under way, what is resident and what of it is in use: the difference is
what the allocator keeps. Saves, previews, log lines and epochs pass many times in between. For Linux with glibc.
"""

import ctypes
import gc
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from fastdiff.data.shapes import write_shapes

from .support import trainer


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Mallinfo2(ctypes.Structure):
    """<malloc.h>"""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def in_use_mib() -> float:
    """What the C heap has given out and not got back, mapped blocks included."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    info = libc.mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


def main(steps: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shapes"
        write_shapes(data, 60, 8, seed=0)
        flags = {"schedule_sampler": "loss-second-moment", "ema_rate": "0.9999,0.5", "class_cond": True, "flip": True}
        intervals = {"log_interval": 10, "save_interval": steps // 80, "preview_interval": steps // 40, "keep_last": 2}
        subject = trainer(Path(folder) / "run", data, steps=steps, grad_clip=1.0, **flags, **intervals)
        print("step,resident_mib,in_use_mib")

        def after(step: int, total: int, note: str) -> None:
            if step % (steps // 20) == 0:
                subject.saver.wait()
                subject.log.clear()  # the test's own list of lines
                gc.collect()
                print(f"{step},{resident_mib():.1f},{in_use_mib():.2f}", flush=True)

        subject.run(after)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
