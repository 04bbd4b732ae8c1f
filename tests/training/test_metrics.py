"""What a run reports."""

import csv
import errno
import json
import math
import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdiff.training import metrics
from fastdiff.training.metrics import COLUMNS, LossSums, ProgressFiles

KEPT, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)
CPU = torch.device("cpu")


def test_means_over_all_and_over_quarters() -> None:
    sums = LossSums(CPU)
    sums.add({"loss": torch.tensor([1.0, 2.0]), "mse": torch.tensor([3.0, 4.0])}, torch.tensor([0, 7]), 8)
    sums.add({"loss": torch.tensor([6.0]), "mse": torch.tensor([5.0])}, torch.tensor([6]), 8)
    sums.add_grad_norm(torch.tensor(2.0), KEPT)
    sums.add_grad_norm(torch.tensor(900.0), SKIPPED)
    sums.add_grad_norm(torch.tensor(4.0), KEPT)
    read = sums.read()
    assert read == {
        "loss": 3.0,
        "loss_q0": 1.0,
        "loss_q3": 4.0,
        "mse": 4.0,
        "mse_q0": 3.0,
        "mse_q3": 4.5,
        "grad_norm": 3.0,
        "skipped": 1,
    }
    again = sums.read()  # begun again: the mean of nothing
    assert again.keys() == {"loss", "grad_norm", "skipped"}
    assert math.isnan(again["loss"])
    assert math.isnan(again["grad_norm"])
    assert again["skipped"] == 0


@pytest.mark.parametrize(("steps", "quarters"), [(4, [0, 1, 2, 3]), (10, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]), (1, [0])])
def test_quarters_are_the_originals(steps: int, quarters: list[int]) -> None:
    for t, quarter in enumerate(quarters):
        sums = LossSums(CPU)
        sums.add({"loss": torch.tensor([1.0])}, torch.tensor([t]), steps)
        assert sums.read().keys() - {"loss", "grad_norm", "skipped"} == {f"loss_q{quarter}"}


def test_what_is_not_finite_is_counted_and_not_summed() -> None:
    sums = LossSums(CPU)
    sums.add({"loss": torch.tensor([math.nan, 2.0])}, torch.tensor([0, 1]), 4)
    sums.add_grad_norm(torch.tensor(math.inf), SKIPPED)
    assert bool(sums.state().isfinite().all())  # it goes into checkpoints, which hold no NaN
    read = sums.read()
    assert math.isnan(read.pop("grad_norm"))
    assert read == {"loss": 2.0, "loss_q1": 2.0, "skipped": 1}
    sums.add({"loss": torch.tensor([-math.inf])}, torch.tensor([0]), 4)
    assert math.isnan(sums.read()["loss"])


def batch(seed: int, n: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    terms = {name: torch.rand(n, generator=generator) for name in ("loss", "mse", "vb")}
    return terms, torch.randint(0, 1000, (n,), generator=generator)


def halves(terms: dict[str, Tensor], t: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for part in (slice(0, 32), slice(32, 64)):
        yield {name: values[part] for name, values in terms.items()}, t[part]


def test_processes_add_up_to_one() -> None:
    """Losses are summed over the processes; the norm and the count of what was skipped are the same on each."""
    one, two = LossSums(CPU), [LossSums(CPU), LossSums(CPU)]
    for seed in range(5):
        terms, t = batch(seed)
        one.add(terms, t, 1000)
        for sums, (part, part_t) in zip(two, halves(terms, t), strict=True):
            sums.add(part, part_t, 1000)
        for sums in (one, *two):
            sums.add_grad_norm(torch.tensor(1.5 + seed), SKIPPED if seed == 3 else KEPT)
    exchanged: list[Tensor] = []

    def send(tensor: Tensor) -> Tensor:
        exchanged.append(tensor.clone())
        return tensor.zero_()  # as a collective does that works in place

    two[0].read(send)

    def receive(tensor: Tensor) -> Tensor:
        return tensor + exchanged.pop()

    read = two[1].read(receive)
    assert not exchanged
    assert read == pytest.approx(one.read(), rel=1e-12)
    assert read["grad_norm"] == 3.25
    assert read["skipped"] == 1


def test_a_state_between_two_lines_loses_nothing() -> None:
    straight, broken = LossSums(CPU), LossSums(CPU)
    for seed in range(6):
        for sums in (straight, broken):
            sums.add(*batch(seed), 1000)
            sums.add_grad_norm(torch.tensor(0.1 * seed), KEPT)
        if seed == 3:
            state = broken.state()
            broken.add(*batch(9), 1000)  # lost with the process
            broken = LossSums(CPU)
            broken.load_state(state[None])
    assert straight.read() == broken.read()


def test_a_state_of_two_processes_goes_on_on_one() -> None:
    both = [LossSums(CPU), LossSums(CPU)]
    for sums, (part, t) in zip(both, halves(*batch(0)), strict=True):
        sums.add(part, t, 1000)
        sums.add_grad_norm(torch.tensor(2.0), KEPT)
    one, expected = LossSums(CPU), LossSums(CPU)
    one.load_state(torch.stack([sums.state() for sums in both]))
    expected.add(*batch(0), 1000)
    expected.add_grad_norm(torch.tensor(2.0), KEPT)
    assert one.read() == pytest.approx(expected.read(), rel=1e-12)


def test_adding_asks_for_no_value() -> None:
    """On the device that has none: asking for one, or a shape that depends on one, is an error there."""
    sums = LossSums(torch.device("meta"))
    sums.add({"loss": torch.empty(5, device="meta")}, torch.empty(5, dtype=torch.int64, device="meta"), 10)
    sums.add_grad_norm(torch.empty((), device="meta"), torch.empty((), device="meta"))
    assert sums.state().is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_adding_does_not_wait() -> None:
    sums = LossSums(torch.device("cuda"))
    terms, t = batch(0)
    on_gpu = ({name: value.cuda() for name, value in terms.items()}, t.cuda(), torch.ones((), device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums.add(*on_gpu[:2], 1000)
        sums.add_grad_norm(on_gpu[2], on_gpu[2])
        state = sums.state()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = LossSums(CPU)
    expected.add(terms, t, 1000)
    torch.testing.assert_close(state[:-3].cpu(), expected.state()[:-3], rtol=1e-12, atol=0)


# Files


def written(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir()}


def table(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def lines(run_dir: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (run_dir / "progress.jsonl").read_text().splitlines()]


def test_files_are_cut_back_to_the_step(tmp_path: Path) -> None:
    files = ProgressFiles(tmp_path, 0, pytest.fail)
    for step in (1, 2, 3):
        files.write({"step": step, "loss": step / 2})
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    ProgressFiles(tmp_path, 2, pytest.fail).write({"step": 3, "loss": 7.0})
    assert [row["step"] for row in table(tmp_path)] == ["1", "2", "3"]
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 7.0}]
    assert sorted(written(tmp_path)) == ["progress.csv", "progress.jsonl"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    ProgressFiles(tmp_path, 0, pytest.fail).write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    text = (tmp_path / "progress.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None}
    ProgressFiles(tmp_path, 1, pytest.fail)
    assert lines(tmp_path)[0]["loss"] is None


def test_a_file_that_stays_as_it_is_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ProgressFiles(tmp_path, 0, pytest.fail)
    files.write({"step": 1, "samples": 16, "loss": 1 / 3, "grad_norm": math.inf, "skipped": 2, "lr": 1})
    files.write({"step": 2, "samples": 32, "loss": 1e-300})
    before = written(tmp_path)
    monkeypatch.setattr(metrics, "replacing", pytest.fail)
    ProgressFiles(tmp_path, 2, pytest.fail)
    assert written(tmp_path) == before


def test_files_of_another_version(tmp_path: Path) -> None:
    """With a column less and one more: the history keeps its lines, the table gets today's columns."""
    old = '{"step": 1, "loss": 0.5, "loss_q9": 3.0}\n'
    (tmp_path / "progress.jsonl").write_text(old)
    (tmp_path / "progress.csv").write_text("step,loss,loss_q9\n1,0.5,3.0\n")
    ProgressFiles(tmp_path, 1, pytest.fail).write({"step": 2, "loss": 0.25, "skipped": 0, "memory_gib": 1.5})
    assert (tmp_path / "progress.jsonl").read_text().startswith(old)
    assert [list(row) for row in table(tmp_path)] == [list(COLUMNS)] * 2
    assert [(row["loss"], row["skipped"], row["memory_gib"]) for row in table(tmp_path)] == [
        ("0.5", "", ""),
        ("0.25", "0", "1.5"),
    ]


@pytest.mark.parametrize("line", ["[1]", "7", '"step"', "{}", '{"step": null}', '{"step": 1e999}', "[" * 10**5, "\xff"])
def test_a_line_that_is_none_of_ours_is_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / "progress.jsonl").write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'.encode("latin-1"))
    ProgressFiles(tmp_path, 5, pytest.fail)
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("name", ["progress.jsonl", "progress.csv"])
def test_a_crash_while_cutting_back_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    files = ProgressFiles(tmp_path, 0, pytest.fail)
    for step in (1, 2, 3):
        files.write({"step": step})
    before = written(tmp_path)
    real = metrics.replacing

    @contextmanager
    def crashing(path: Path) -> Iterator[Path]:
        with real(path) as temporary:
            yield temporary
            if path.name == name:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(metrics, "replacing", crashing)
        with pytest.raises(KeyboardInterrupt):
            ProgressFiles(tmp_path, 2, pytest.fail)
    assert written(tmp_path)[name] == before[name]
    ProgressFiles(tmp_path, 2, pytest.fail)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    assert [row["step"] for row in table(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize("name", ["progress.jsonl", "progress.csv"])
def test_lines_that_find_no_room_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    said: list[str] = []
    files = ProgressFiles(tmp_path, 0, said.append)
    files.write({"step": 1})
    real = Path.open

    def full(path: Path, *args: object, **kwargs: object) -> object:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **kwargs)  # type: ignore[call-overload]

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        files.write({"step": 2})
        files.write({"step": 3})
    (line,) = said
    assert re.fullmatch(rf"warning: \S*{name} cannot be written: No space left on device; its lines are kept.*", line)
    files.write({"step": 4})
    rows = [json.loads(line)["step"] for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    table = [line.split(",")[0] for line in (tmp_path / "progress.csv").read_text().splitlines()]
    assert rows == [1, 2, 3, 4]
    assert table == ["step", "1", "2", "3", "4"]


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """A disk that fills up within a line leaves the lines before it, and no part of this one."""
    said: list[str] = []
    files = ProgressFiles(tmp_path, 0, said.append)
    files.write({"step": 1})
    before = (tmp_path / "progress.jsonl").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limit[1]))
    try:
        files.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "progress.jsonl").read_bytes() == before
    assert len(said) == 1
    files.write({"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "progress.jsonl").read_text().splitlines()] == [1, 2, 3]
