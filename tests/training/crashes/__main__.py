"""``python -m tests.training.crashes [--short]``: the crash matrix, in a process with the shim before libc."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "shim.so"
        source = Path(__file__).with_name("shim.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.training.crashes.matrix", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)
