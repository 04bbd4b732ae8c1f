"""What the tests of the benchmarks share without asking for it."""

from functools import cache

import pytest

from fastdiff.benchmarks.work import Work

count_once = cache(Work.of)


@pytest.fixture(autouse=True)
def _count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a model, a pure function, is counted once: for a small one that takes longer than its steps."""
    monkeypatch.setattr(Work, "of", staticmethod(count_once))
