"""The processes that share a job: torchrun starts them, this joins them. A process on its own opens no socket."""

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
"""How long the others wait for one that decodes a large folder. If it dies, they know at once."""


class SaidElsewhere(ValueError):
    """An error that another process tells the user about."""


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is, in all and on its machine, and how they talk to each other.

    Collective methods must be called by every process. ``channel`` and ``patient`` are process groups on the CPU: what
    goes over them never waits for a device. A world of one does everything by itself.
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
        """Join the processes that torchrun (or Ray, or anything that sets its variables) started, else be on one's own.

        ``timeout`` (s) is how long one process waits for another. ConnectionError where they do not find each other.
        """
        if not launched():
            return cls()
        owned = not dist.is_initialized()
        limit = timedelta(seconds=timeout)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            if owned:
                # NCCL wakes up at the first collective on a GPU, never in a training on CPUs.
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                store = _meeting_place(rank, size, limit)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            channel, patient = (dist.new_group(backend="gloo", timeout=t) for t in (limit, _PATIENCE))
            dist.all_reduce(torch.ones(1), group=channel)
        except (RuntimeError, ValueError) as error:
            raise ConnectionError(
                f"process {rank} of {size} on {socket.gethostname()} did not find the others within {timeout:.0f} s "
                f"({_short(error)}): all must be started, {os.environ.get('MASTER_ADDR')}:"
                f"{os.environ.get('MASTER_PORT')} reachable, and GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the "
                "network between the machines"
            ) from error
        local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return cls(rank, size, *local, channel, patient, owned, timeout)

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def describe(self) -> str:
        """In words, for a log."""
        return f"{self.size} processes" if self.size > 1 else "one process"

    def check(self, device: torch.device) -> None:
        """A first collective on the device, so that a network that does not work shows now and not in an hour."""
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

        # NCCL makes its connections in the first call, and one that never comes about never returns.
        thread = threading.Thread(target=first, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if said != [""]:
            raise ConnectionError(
                f"the {self.size} processes do not reach each other from {device} "
                f"({said[0] if said else f'nothing came within {self.timeout:.0f} s'}): NCCL_DEBUG=INFO tells more, "
                "NCCL_SOCKET_IFNAME chooses the network, NCCL_P2P_DISABLE=1 does without direct copies"
            )

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place, on the tensor's device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def concatenated(self, tensor: Tensor) -> Tensor:
        """The processes' tensors (N, ...), alike in shape, one after the other: (size * N, ...)."""
        if self.size == 1:
            return tensor
        whole = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        dist.all_gather(list(whole.split(len(tensor))), tensor.contiguous())
        return whole

    def gathered(self, value: T) -> list[T]:
        """The processes' objects in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Do something on every process; where it fails on one with ValueError or OSError, all fail, and one tells."""
        result, error = _attempt(action)
        said = [(rank, text) for rank, text in enumerate(self.gathered(error and str(error))) if text is not None]
        if said:
            first, text = said[0]
            if first == self.rank and error is not None:
                raise error
            raise SaidElsewhere(f"process {first}: {text}")
        return result  # type: ignore[return-value]  # without an error there is one

    def from_main(self, action: Callable[[], T]) -> T:
        """Do something on the first process and hand every other what came of it."""
        result = self.together(lambda: action() if self.main else None)
        return self.gathered(result)[0]  # type: ignore[return-value]  # the main process has it

    def refuse(self, message: str) -> NoReturn:
        """End with ValueError what all processes know to be wrong: the first one tells it."""
        raise ValueError(message) if self.main else SaidElsewhere(message)

    @contextmanager
    def explained(self, remedy: str = "use a smaller model, or --parallel fsdp on several GPUs") -> Iterator[None]:
        """Say in a user's words what ends a job from outside: another process's end, or too little memory."""
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                raise ValueError(f"out of memory: {remedy}") from error
            if self.size > 1 and lost_contact(error):
                raise ConnectionError(
                    f"process {self.rank} lost the others: see what the one that ended first says ({_short(error)})"
                ) from error
            raise

    def one_by_machine_first(self, action: Callable[[], T]) -> T:
        """Do something on the first process of each machine, then on its others, who find what that one prepared."""
        first = self.together(lambda: action() if self.local_rank == 0 else None)
        return self.together(lambda: action() if self.local_rank else first)  # type: ignore[return-value]

    def leave(self) -> None:
        """End what join began."""
        if self.owned and dist.is_initialized():
            dist.destroy_process_group()


class Agreement:
    """Small numbers of which every process learns the largest, one call later, so that nobody ever waits for it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Tensor, Any] | None = None

    def exchange(self, *values: int) -> list[int]:
        """Put in this process's numbers; returns the largest of all processes' in the call before (now, if alone)."""
        if self._world.size == 1:
            return list(values)
        agreed = self.settle() or [0] * len(values)
        ours = torch.tensor(values)
        self._pending = ours, dist.all_reduce(ours, dist.ReduceOp.MAX, group=self._world.channel, async_op=True)
        return agreed

    def settle(self) -> list[int] | None:
        """What the last call put in, waited for; None where nothing is open."""
        if self._pending is None:
            return None
        (numbers, work), self._pending = self._pending, None
        work.wait()
        return [int(number) for number in numbers]


def _meeting_place(rank: int, size: int, limit: timedelta) -> PrefixStore:
    """The part of the launcher's store where these processes leave their addresses, and none that were killed before.

    torchrun's store outlives a restart with all that the dead wrote into it (pytorch/pytorch#135712), and its count of
    restarts is not the same on every machine. So the first process names a place of its own to everyone who asks it.
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
                store.set(f"told/{asking.decode()}", name)  # nobody reads it if it was a dead one who asked
                told[other] = asking
        if time.monotonic() > deadline:
            came = sum(store.check([f"{name}/{other} knows"]) for other in others)
            raise RuntimeError(f"{came} of {len(others)} others came")
        time.sleep(0.02)
    return PrefixStore(name, store)


def launched() -> bool:
    """Whether this is one of the processes of a job: torchrun's variables are set."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def restarted() -> bool:
    """Whether torchrun started this process in the place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launcher() -> str:
    """A name of the torchrun that started this process, the same for what it starts again; empty without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    try:  # when it was started: in a container the numbers of processes are always the same
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        began = ""
    return f"{socket.gethostname()} {parent} {began} {os.environ['TORCHELASTIC_RUN_ID']}"


def lost_contact(error: Exception) -> bool:
    """Whether a RuntimeError is a collective's that another process's end, or its silence, has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except (ValueError, OSError) as error:
        return None, error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
