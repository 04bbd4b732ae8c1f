"""A plugin of pytest for gpu_check: what matters most comes first, outcomes are kept in the file $REPORT at once."""

import json
import os
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """One line for each test that ran, failed in its set-up or was skipped."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    words = {"test": report.nodeid, "outcome": report.outcome}
    if report.failed:
        words["why"] = str(report.longrepr)[-2000:]
    with open(os.environ["REPORT"], "a", encoding="utf-8") as file:
        file.write(json.dumps(words) + "\n")


FIRST = ("every_kernel", "attention_triton", "group_norm_silu_full", "diffusion_loss", "diffusion_step", "arithmetic")
"""The kernels' files that come before the others: the time may be up before all have run."""


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Put FIRST first."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(FIRST)))
