"""How processes find each other and what they tell each other: one, two by torchrun, and many as threads."""

import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastdiff.runtime import distributed
from fastdiff.runtime.distributed import (
    Agreement,
    SaidElsewhere,
    World,
    _meeting_place,
    launched,
    launcher,
    lost_contact,
    restarted,
)

from ..processes import launch


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def fail(error: Exception) -> Any:
    raise error


def test_alone_everything_is_ones_own() -> None:
    world = World.join(1)
    assert world == World()
    assert not dist.is_initialized()
    assert (world.rank, world.size, world.main, world.describe()) == (0, 1, True, "one process")
    tensor = torch.ones(2, 3)
    assert world.all_reduce(tensor) is tensor
    assert world.all_gather(tensor) is tensor
    assert tensor.tolist() == [[1, 1, 1]] * 2
    value = object()
    assert world.all_gather_object(value) == [value]
    assert world.on_all(lambda: value) is world.from_main(lambda: value) is value
    calls: list[int] = []
    world.one_by_machine_first(lambda: calls.append(1))
    assert calls == [1]
    world.check(torch.device("meta"))  # nothing is sent
    world.leave()


@pytest.mark.parametrize("error", [ValueError("lr"), OSError(28, "full"), KeyError("x"), KeyboardInterrupt()])
def test_alone_an_error_is_ones_own(error: Exception) -> None:
    for method in (World().on_all, World().from_main, World().one_by_machine_first):
        with pytest.raises(type(error)) as caught:
            method(lambda: fail(error))
        assert caught.value is error


def test_alone_an_agreement_is_known_at_once() -> None:
    agreement = Agreement(World())
    assert agreement.exchange(15, 0) == [15, 0]
    assert agreement.exchange(0, 1) == [0, 1]
    assert agreement.settle() is None


PARTS = (
    "who_they_are",
    "what_they_exchange",
    "what_they_run_on_all",
    "what_the_first_does",
    "what_they_agree_on",
    "what_becomes_of_the_one_that_stays",
)


@pytest.mark.parametrize(
    "started",
    [
        "by torchrun that forks",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("as torchrun does it", "by torchrun")),
    ],
)
def test_two_processes(tmp_path: Path, started: str) -> None:
    script, environment = Path(__file__).with_name("two_processes.py"), {"OMP_NUM_THREADS": 1}
    parts = PARTS
    if started == "as torchrun does it":
        result = launch(script, [tmp_path], tmp_path, {**environment, "TORCHELASTIC_RUN_ID": "job 7"}, processes=2)
    elif started == "by torchrun":
        result = launch(script, [tmp_path], tmp_path, environment, processes=2, torchrun=())
    else:
        # torchrun itself, in a process that has imported it; it would wait for the word of the one that dies
        torchrun = tmp_path / "torchrun.py"
        torchrun.write_text("import torch.distributed.run as torchrun; torchrun.main()")
        flags = ["--nproc-per-node=2", "--standalone", "--start-method=fork", "--run-path"]
        result = launch(torchrun, [*flags, script, tmp_path, "alive"], tmp_path, environment)
        parts = PARTS[:-1]
    assert result.status == 0, result.err
    said = result.out.splitlines()
    for rank in (0, 1):
        expected = parts if rank == 0 else PARTS[:-1]  # the second one's last word is none
        assert [line for line in said if line.startswith(f"process {rank}: ")] == [
            f"process {rank}: {part}" for part in expected
        ]


# The environment


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"WORLD_SIZE": "4"}, False),  # some clusters set it for whatever they start
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, True),
    ],
)
def test_launched(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: bool) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() is expected


def test_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not restarted()
    for count, expected in (("0", False), ("1", True), ("12", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert restarted() is expected


def test_the_launcher_is_known_by_machine_process_and_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    ours = launcher()
    assert ours.split()[:2] == [socket.gethostname(), str(os.getppid())]
    assert ours.endswith(" job 7")
    assert launcher() == ours  # what it starts again knows it by that
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert launcher() != ours  # another torchrun with the same, or the default, id
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 8")
    assert launcher().endswith(" job 8")


# Errors


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("[gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 9ms for recv operation"), True),
        (RuntimeError("Connection closed by peer [127.0.0.1]:2345"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("bad"), False),
    ],
)
def test_lost_contact(error: Exception, expected: bool) -> None:
    assert lost_contact(error) is expected


def test_what_another_process_says_is_bad_input_too() -> None:
    assert issubclass(SaidElsewhere, ValueError)


def test_a_job_that_does_not_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConnectionError, match=rf"process 1 of 2 on \S+ .*within 1 s.*127\.0\.0\.1:{port}") as error:
        World.join(1)
    assert "\n" not in str(error.value)
    assert not dist.is_initialized()


# The store that outlives a restart


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launcher's, as the processes of every start find it."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    monkeypatch.setattr(distributed, "rendezvous", lambda url, **kwargs: iter([(store, -1, -1)]))
    return store


def places(size: int, order: Sequence[int]) -> list[Any]:
    """Where the processes of one start meet, begun in this order."""
    with ThreadPoolExecutor(size) as pool:
        found = {rank: pool.submit(_meeting_place, rank, size, timedelta(seconds=20)) for rank in order}
        return [found[rank].result(timeout=30) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("first", ["the first process", "the others"])
def test_they_meet_in_a_place_of_their_own(store: Any, size: int, first: str) -> None:
    ranks = list(range(size)) if first == "the first process" else list(reversed(range(size)))
    earlier = places(size, ranks)
    for rank, place in enumerate(earlier):
        place.set(f"address {rank}", "of one that will be killed")
    assert all(place.get(f"address {rank}") for place in earlier for rank in range(size))
    for _ in range(3):  # restarts
        place, *others = places(size, ranks)
        for other in (place, *others):
            assert not other.check(["address 0"])
            assert not other.check([f"address {size - 1}"])
        for rank, own in enumerate((place, *others)):
            own.set(f"new {rank}", str(rank))
        for own in (place, *others):
            assert [own.get(f"new {rank}") for rank in range(size)] == [str(rank).encode() for rank in range(size)]


def test_what_was_asked_by_a_dead_one_holds_nobody_up(store: Any) -> None:
    """The first of the new processes answers the dead one's question; the living one asks later, and is answered."""
    store.set("asks/1", "the dead")
    store.set("told/the dead", "the dead one's place")
    store.set("the dead one's place/1 knows", "")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(_meeting_place, 0, 2, timedelta(seconds=20))
        deadline = time.monotonic() + 20
        while store.get("told/the dead") == b"the dead one's place":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not first.done()  # it waits for a living one
        second = pool.submit(_meeting_place, 1, 2, timedelta(seconds=20)).result(timeout=30)
        second.set("address 1", "alive")
        assert first.result(timeout=30).get("address 1") == b"alive"


def test_the_first_one_waits_no_longer_than_the_limit(store: Any) -> None:
    with pytest.raises(RuntimeError, match="0 of 2 others came"):
        _meeting_place(0, 3, timedelta(seconds=0.2))


def test_a_dead_one_did_not_come(store: Any) -> None:
    store.set("asks/1", "the dead")
    with pytest.raises(RuntimeError, match="0 of 2 others came"):
        _meeting_place(0, 3, timedelta(seconds=0.2))
