"""Joins the processes of a job that torchrun started. A single process opens no socket."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in its __all__
from torch.distributed.rendezvous import rendezvous

from fastdiff.runtime.memory import out_of_memory

T = TypeVar("T")

_PATIENCE = timedelta(days=2)
"""Timeout while one process decodes a large folder. If that process dies, the others fail at once."""


class SaidElsewhere(ValueError):
    """An error that another process reports to the user."""


@dataclass(frozen=True)
class World:
    """Ranks and world sizes of this process, global and local, and its collectives.

    Every process must call the collective methods. ``channel`` and ``patient`` are CPU process groups, which never wait
    for a device. A world of one process communicates with nobody.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    channel: Any = field(default=None, repr=False)
    patient: Any = field(default=None, repr=False)
    owned: bool = field(default=False, repr=False)
    timeout: float = 600.0

    @classmethod
    def join(cls, timeout: float) -> Self:
        """Join the processes that torchrun (or Ray, or anything that sets its variables) started, else a world of one.

        ``timeout`` (s) is how long one process waits for another. ConnectionError if they do not find each other.
        """
        if not launched():
            return cls()
        owned = not dist.is_initialized()
        limit = timedelta(seconds=timeout)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            if owned:
                # NCCL initialises in the first collective on a GPU, so never in CPU training.
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                store = _meeting_place(rank, size, limit)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            channel, patient = (dist.new_group(backend="gloo", timeout=t) for t in (limit, _PATIENCE))
            dist.all_reduce(torch.ones(1), group=channel)
        except (RuntimeError, ValueError) as error:
            raise ConnectionError(
                f"process {rank} of {size} on {socket.gethostname()} did not find the others within {timeout:.0f} s "
                f"({_short(error)}): start all of them, make {os.environ.get('MASTER_ADDR')}:"
                f"{os.environ.get('MASTER_PORT')} reachable, and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the "
                "network between the machines"
            ) from error
        local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return cls(rank, size, *local, channel, patient, owned, timeout)

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def describe(self) -> str:
        """One-line summary for the log."""
        return f"{self.size} processes" if self.size > 1 else "one process"

    def check(self, device: torch.device) -> None:
        """Run a first collective on the device, so that a broken network fails now and not in an hour."""
        if self.size == 1:
            return
        said: list[str] = []

        def first() -> None:
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                arrived = torch.ones(1, device=device)
                dist.all_reduce(arrived)
                said.append("" if int(arrived) == self.size else "they add up wrongly")
            except RuntimeError as error:
                said.append(_short(error))

        # NCCL connects in the first collective, which never returns if a connection cannot be made.
        thread = threading.Thread(target=first, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if said != [""]:
            raise ConnectionError(
                f"the {self.size} processes do not reach each other from {device} "
                f"({said[0] if said else f'nothing came within {self.timeout:.0f} s'}): NCCL_DEBUG=INFO tells more, "
                "NCCL_SOCKET_IFNAME selects the network, NCCL_P2P_DISABLE=1 disables direct copies"
            )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """All-reduce: the sum over all processes, in place, on the tensor's device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """All-gather: the processes' tensors (N, ...), of equal shape, concatenated in rank order: (size * N, ...)."""
        if self.size == 1:
            return tensor
        whole = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        dist.all_gather(list(whole.split(len(tensor))), tensor.contiguous())
        return whole

    def all_gather_object(self, value: T) -> list[T]:
        """All-gather of objects: one from each process, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def on_all(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every process; if one raises ValueError or OSError, all raise and one reports it."""
        error: Exception | None = None
        try:
            result = action()
        except (ValueError, OSError) as caught:
            error = caught
        for rank, text in enumerate(self.all_gather_object(error and str(error))):
            if text is not None:
                raise error if error is not None and rank == self.rank else SaidElsewhere(f"process {rank}: {text}")
        return result

    def from_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 and return its result on every process."""
        result = self.on_all(lambda: action() if self.main else None)
        return self.all_gather_object(result)[0]  # type: ignore[return-value]  # rank 0 has it

    def refuse(self, message: str) -> NoReturn:
        """Raise ValueError for an error that every process has detected; rank 0 reports it."""
        raise ValueError(message) if self.main else SaidElsewhere(message)

    @contextmanager
    def explained(self, remedy: str, lack: str = "out of memory") -> Iterator[None]:
        """Turn external failures into errors for the user: a lost process, or too little memory (``lack: remedy``)."""
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                raise ValueError(f"{lack}: {remedy}") from error
            if self.size > 1 and lost_contact(error):
                raise ConnectionError(
                    f"process {self.rank} lost the others: see the error of the one that failed first ({_short(error)})"
                ) from error
            raise

    def one_by_machine_first(self, action: Callable[[], T]) -> T:
        """Run ``action`` on local rank 0 of each machine, then on the others, which use what it prepared."""
        first = self.on_all(lambda: action() if self.local_rank == 0 else None)
        return self.on_all(lambda: action() if self.local_rank else first)  # type: ignore[return-value]

    def leave(self) -> None:
        """Destroy the process group if join created it."""
        if self.owned and dist.is_initialized():
            dist.destroy_process_group()


class Agreement:
    """Asynchronous maximum of small integers over all processes, returned one call later so that nobody waits."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Tensor, Any] | None = None

    def exchange(self, *values: int) -> list[int]:
        """Submit this process's numbers; returns the maxima of the previous call (of this one in a world of one)."""
        if self._world.size == 1:
            return list(values)
        agreed = self.settle() or [0] * len(values)
        ours = torch.tensor(values)
        self._pending = ours, dist.all_reduce(ours, dist.ReduceOp.MAX, group=self._world.channel, async_op=True)
        return agreed

    def settle(self) -> list[int] | None:
        """Wait for the maxima of the last call; None if nothing is pending."""
        if self._pending is None:
            return None
        (numbers, work), self._pending = self._pending, None
        work.wait()
        return [int(number) for number in numbers]


def _meeting_place(rank: int, size: int, limit: timedelta) -> PrefixStore:
    """A fresh prefix of the launcher's store for these processes' addresses, without those of killed processes.

    torchrun's store survives a restart with everything that dead processes wrote into it (pytorch/pytorch#135712), and
    its restart count differs between machines. So rank 0 chooses a random prefix and sends it to each rank that asks.
    """
    store, _, _ = next(rendezvous("env://", timeout=limit))
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", name)
        place = store.get(f"told/{name}").decode()
        store.set(f"{place}/{rank} knows", "")
        return PrefixStore(place, store)
    others, deadline = range(1, size), time.monotonic() + limit.total_seconds()
    told: dict[int, bytes] = {}
    while not store.check([f"{name}/{other} knows" for other in others]):
        for other in others:
            if store.check([f"asks/{other}"]) and (asking := store.get(f"asks/{other}")) != told.get(other):
                store.set(f"told/{asking.decode()}", name)  # never read if a dead process asked
                told[other] = asking
        if time.monotonic() > deadline:
            came = sum(store.check([f"{name}/{other} knows"]) for other in others)
            raise RuntimeError(f"{came} of {len(others)} others came")
        time.sleep(0.02)
    return PrefixStore(name, store)


def launched() -> bool:
    """Whether this is one of several processes of a job: torchrun's variables are set."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def restarted() -> bool:
    """Whether torchrun restarted this process after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launcher() -> str:
    """An identifier of the torchrun that started this process, unchanged by restarts; empty without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    try:  # its start time: process ids repeat from container to container
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        began = ""
    return f"{socket.gethostname()} {parent} {began} {os.environ['TORCHELASTIC_RUN_ID']}"


def lost_contact(error: Exception) -> bool:
    """Whether a collective failed because a peer died or timed out."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
