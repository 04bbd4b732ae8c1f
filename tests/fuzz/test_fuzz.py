"""A short form of ``python -m tests.fuzz``: other damage every day."""

import datetime
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdiff.data import cifar10

from .__main__ import Bench, watch
from .kinds import KINDS, run

COUNT = 4


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(cifar10, "_ROWS", cifar10._ROWS)  # which the kind changes
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGPROF)}
    watch()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_read_as_it_was_or_refused(name: str, tmp_path: Path) -> None:
    bench, day = Bench(name, tmp_path / "bench"), datetime.date.today().toordinal()
    faults = {number: bench.fault(day, number) for number in range(COUNT)}
    wrong = {number: fault for number, fault in faults.items() if fault[0]}
    assert not wrong, f"{wrong}: python -m tests.fuzz {name} --seed {day} --count {COUNT} --show"


def test_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are faults."""
    from . import __main__ as module

    bench = Bench("safetensors", tmp_path / "bench")
    answers = {
        "shows a traceback": (2, "", "Traceback (most recent call last)\nerror: x\n"),
        "is not one line": (2, "", "error: x\nerror: y\n"),
        "ends with status 1": (1, "", ""),
    }
    for said, answer in answers.items():
        monkeypatch.setattr(module, "run", lambda words, answer=answer: answer)
        assert bench.fault(0, 0)[0].startswith(said)

    def other(words: object) -> tuple[int, str, str]:
        result = run(
            ["sample", str(tmp_path / "bench/inputs/model.safetensors"), *map(str, tuple(words)[2:]), "--seed", "1"]
        )  # type: ignore[call-overload]
        return result

    monkeypatch.setattr(module, "run", other)
    assert bench.fault(0, 0)[0] == "other images were drawn without a word"

    def raises(words: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(module, "run", raises)
    assert "boom" in bench.fault(0, 0)[0]
