"""How much memory a comparison takes does not depend on how many images it compares."""

import re
from pathlib import Path

import numpy as np
import pytest

from ..processes import launch
from .colours import pictures, program

SIDE = 64
SCRIPT = """
import ctypes, re, sys, threading
from pathlib import Path

# Freed blocks must go back to the system at once: what the allocator keeps differs from run to run.
for option, value in ((-3, 2**16), (-1, 0)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    ctypes.CDLL(None).mallopt(option, value)

from fastdiff.cli.app import main

most, done = 0, threading.Event()


def watch():
    # not VmHWM: it counts the pages of mapped files that the system may drop
    global most
    while not done.wait(0.002):
        most = max(most, int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))


thread = threading.Thread(target=watch)
thread.start()
try:
    main()
finally:
    done.set()
    thread.join()
    print(f"at most {most} kB", file=sys.stderr)
"""


def peak(folder: Path, extractor: Path, images: int) -> float:
    """MiB that ``fastdiff evaluate fid`` held at most."""
    files = [folder / f"{images}-{seed}.npz" for seed in (0, 1)]
    for seed, path in enumerate(files):
        few = pictures(100, SIDE, seed)
        np.savez(path, arr_0=np.tile(few, (images // 100, 1, 1, 1)))
    (folder / "job.py").write_text(SCRIPT)
    how = ["--extractor", extractor, "--trust", "--extractor-size", 8, "--device", "cpu"]
    result = launch(folder / "job.py", ["evaluate", "fid", *files, *how], folder, {"OMP_NUM_THREADS": 1})
    assert result.status == 0, result
    assert f"(n={images:,}, colours at 8 pixels)" in result.out
    found = re.search(r"at most (\d+) kB", result.err)
    assert found, result
    return int(found[1]) / 1024


# What the libraries keep for themselves differs by up to 60 MiB from run to run.
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count")
@pytest.mark.parametrize(("further", "copies"), [(10_000, 1), (6_000, 107)], ids=["12", "1284"])
def test_more_images_take_no_more_memory(tmp_path: Path, further: int, copies: int) -> None:
    extractor = program(tmp_path / "colours.pt", copies)
    few, many = (peak(tmp_path, extractor, images) for images in (5_000, 5_000 + further))
    held = 2 * further * (3 * SIDE**2 + 4 * 12 * copies) / 2**20  # 235 and 199 MiB
    assert many - few < 0.4 * held, (few, many)
