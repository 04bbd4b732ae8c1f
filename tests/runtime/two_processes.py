"""``torchrun --nproc-per-node=2 two_processes.py folder [alive]``: two processes try everything that a World does.

The second one ends without a word at the end, unless both are to stay alive; the first then finds that it is alone.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from fastdiff.runtime import distributed
from fastdiff.runtime.distributed import Agreement, SaidElsewhere, World, launched, lost_contact, restarted

torch.set_num_threads(1)
folder = Path(sys.argv[1])


def raised(call: Callable[[], object], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def fail(error: Exception) -> NoReturn:
    raise error


def who_they_are(world: World) -> None:
    assert launched()
    assert not restarted()
    assert dist.is_initialized()
    assert (world.rank, world.size) == (int(os.environ["RANK"]), 2)
    assert (world.local_rank, world.local_size) == (world.rank, 2)
    assert world.main is (world.rank == 0)
    assert world.describe() == "2 processes"
    assert world.owned
    world.check(torch.device("cpu"))


def what_they_exchange(world: World) -> None:
    ours = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    assert world.all_reduce(ours) is ours
    assert ours.tolist() == [3, 30]
    rows = torch.arange(6).view(2, 3).T + 100 * world.rank  # (3, 2), not contiguous
    whole = world.all_gather(rows)
    assert whole.dtype is torch.int64
    assert whole.tolist() == [[0, 3], [1, 4], [2, 5], [100, 103], [101, 104], [102, 105]]
    assert world.all_gather_object({"rank": world.rank, "more": "x" * 50 * world.rank}) == [
        {"rank": 0, "more": ""},
        {"rank": 1, "more": "x" * 50},
    ]
    assert world.all_gather_object(None) == [None, None]


def what_they_run_on_all(world: World) -> None:
    assert world.on_all(lambda: world.rank + 7) == world.rank + 7
    for failing in (0, 1):
        for error in (ValueError("lr must be positive"), OSError(28, "No space left"), ValueError("")):
            bad = error  # for the lambda
            call = lambda: world.on_all(lambda: fail(bad) if world.rank == failing else 3)  # noqa: B023, E731
            if world.rank == failing:
                assert raised(call, type(error)) == str(error)
            else:
                assert raised(call, SaidElsewhere) == f"process {failing}: {error}"
    # where both fail each tells its own at home, but only the first is the one to tell
    text = raised(
        lambda: world.on_all(lambda: fail(ValueError(f"from {world.rank}"))),
        SaidElsewhere if world.rank else ValueError,
    )
    assert text == ("process 0: from 0" if world.rank else "from 0")
    assert world.all_gather_object(world.rank) == [0, 1]  # and they still talk


def what_the_first_does(world: World) -> None:
    def alone() -> str:
        assert world.main
        return "decided"

    assert world.from_main(alone) == "decided"
    kind = ValueError if world.main else SaidElsewhere
    assert raised(lambda: world.from_main(lambda: fail(ValueError("no run"))), kind) == (
        "no run" if world.main else "process 0: no run"
    )

    made = folder / "made"

    def prepare() -> str:
        if world.local_rank == 0:
            time.sleep(0.3)  # the other one waits for it
            made.touch()
            return "made"
        assert made.exists()
        return "found"

    assert world.one_by_machine_first(prepare) == ("found" if world.rank else "made")
    made.unlink(missing_ok=True)
    # where the first one fails the others do not even try
    tried: list[int] = []

    def attempt() -> None:
        tried.append(world.rank)
        raise ValueError("no images")

    raised(lambda: world.one_by_machine_first(attempt), kind)
    assert tried == ([0] if world.main else [])


def what_they_agree_on(world: World) -> None:
    agreement = Agreement(world)
    assert agreement.settle() is None
    put = {0: [(0, 0), (15, 0), (0, 0), (2, 1)], 1: [(0, 0), (0, 1), (0, 0), (9, 0)]}[world.rank]
    assert [agreement.exchange(*values) for values in put] == [[0, 0], [0, 0], [15, 1], [0, 0]]
    assert agreement.settle() == [9, 1]
    assert agreement.settle() is None
    # Nobody waits for it: the first goes on although the second has not put anything in.
    if world.main:
        agreement.exchange(3)
        (folder / "went on").touch()
    else:
        deadline = time.monotonic() + 30
        while not (folder / "went on").exists():
            assert time.monotonic() < deadline, "the first one waits"
            time.sleep(0.01)
        agreement.exchange(4)
    assert agreement.settle() == [4]


def what_becomes_of_the_one_that_stays(world: World) -> None:
    assert not lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    world.all_gather_object("before the end")
    if not world.main:
        os._exit(0)
    for collective in (
        lambda: world.all_reduce(torch.ones(3)),
        lambda: world.all_gather_object(1),
        lambda: dist.all_reduce(torch.ones(1), group=world.channel),
    ):
        with pytest.raises(RuntimeError) as caught:
            collective()
        assert lost_contact(caught.value), caught.value


assert distributed.launcher().endswith(f" {os.environ['TORCHELASTIC_RUN_ID']}")
world = World.join(60)
for part in (
    who_they_are,
    what_they_exchange,
    what_they_run_on_all,
    what_the_first_does,
    what_they_agree_on,
    *([] if "alive" in sys.argv else [what_becomes_of_the_one_that_stays]),
):
    part(world)
    print(f"process {world.rank}: {part.__name__}\n", end="", flush=True)  # in one piece
world.leave()
assert not dist.is_initialized()
