"""``python -m tests.training.soak [STEPS]``: a small model's training with everything that comes round, and its memory.

Prints the resident memory every STEPS / 20 updates: saves, previews, log lines and epochs pass many times in between.
"""

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


def main(steps: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shapes"
        write_shapes(data, 60, 8, seed=0)
        flags = {"schedule_sampler": "loss-second-moment", "ema_rate": "0.9999,0.5", "class_cond": True, "flip": True}
        intervals = {"log_interval": 10, "save_interval": steps // 80, "preview_interval": steps // 40, "keep_last": 2}
        subject = trainer(Path(folder) / "run", data, steps=steps, grad_clip=1.0, **flags, **intervals)
        print("step,resident_mib")

        def after(step: int, total: int, note: str) -> None:
            if step % (steps // 20) == 0:
                print(f"{step},{resident_mib():.1f}", flush=True)

        subject.run(after)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
