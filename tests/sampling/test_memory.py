"""How much memory a job takes does not depend on how many images it draws."""

import re
from pathlib import Path

import numpy as np
import pytest

from ..processes import launch
from .support import saved

SIDE = 64
SCRIPT = """
import os, re, sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
from fastdiff.cli.app import main
from fastdiff.models import UNet

if sys.argv.pop(1) == "two layers":
    UNet.forward = lambda self, x, timesteps: self.out(self.input_blocks[0](x, timesteps))
try:
    main()
finally:
    # not getrusage's, which is that of the process that started this one if it was larger; of a forked one it begins
    # with what it shares
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0], file=sys.stderr)
"""


def peak(folder: Path, model: Path, net: str, images: int) -> float:
    """MiB of memory that ``fastdiff sample`` held at most."""
    out = folder / f"{images}.npz"
    flags = ["--num-samples", images, "--batch-size", 10, "--steps", 1, "--compile", "off", "--device", "cpu"]
    (folder / "job.py").write_text(SCRIPT)
    words = [net, "sample", model, *flags, "--precision", "fp32", "--overwrite", "--out", out]
    result = launch(folder / "job.py", words, folder, {"OMP_NUM_THREADS": 1})
    assert result.status == 0, result
    with np.load(out, mmap_mode="r") as file:
        drawn = file["arr_0"]
        assert drawn.shape == (images, SIDE, SIDE, 3)
        assert len({image.tobytes() for image in drawn}) == images
    assert not out.with_name(out.name + ".parts").exists()
    found = re.search(r"VmHWM:\s+(\d+) kB", result.err)
    assert found, result
    return int(found[1]) / 1024


# A net's own memory differs from run to run: that of its outer layers by up to four MiB, that of a whole net, on some
# processors, by ten.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count")
@pytest.mark.parametrize(
    ("net", "further", "runs"),
    [("two layers", 900, 1), pytest.param("all layers", 2200, 2, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_many_images_take_the_memory_of_200(tmp_path: Path, net: str, further: int, runs: int) -> None:
    model = saved(tmp_path / "model.safetensors", image_size=SIDE, channel_mult=(1, 1, 1, 1))
    few, many = (min(peak(tmp_path, model, net, images) for _ in range(runs)) for images in (200, 200 + further))
    held = further * 3 * SIDE**2 / 2**20  # 10.5 and 25.8 MiB
    assert many - few < 0.6 * held, (few, many)
