"""A plugin of pytest that keeps each test's outcome as soon as it is known, in the file REPORT of the environment."""

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
