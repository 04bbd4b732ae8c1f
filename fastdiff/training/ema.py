"""Averages of the weights: exponential moving averages, and power-function averages."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.checkpoint import exponent_of
from fastdiff.runtime.distributed import World

SNAPSHOT_SPACING = 1.25
"""Factor between the steps of one snapshot of the averages and the next."""

_SNAPSHOTS = 16


class Average(ABC):
    """An average a <- rate * a + (1 - rate) * w of the parameters, in fp32 for any parameter dtype.

    ``updates`` of the training are in it; those up to ``since`` as if they had all ended at the weights of that one.
    In a ``world`` of processes with equal parameters, each process keeps the averages of a part of them.
    """

    def __init__(self, parameters: Iterable[Tensor], world: World | None = None) -> None:
        self.updates = self.since = 0
        self._parameters = list(parameters)
        self._world = world or World()
        self._owners = _owners([p.numel() for p in self._parameters], self._world.size)
        self._kept = [p for p, owner in zip(self._parameters, self._owners, strict=True) if owner == self._world.rank]
        self._averages = [p.detach().to(torch.float32, copy=True) for p in self._kept]

    @abstractmethod
    def next_rate(self) -> float:
        """The rate of the next update."""

    @property
    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What a file says of the average, as values for JSON."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The average in words."""

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the current parameters."""
        if self._kept:
            torch._foreach_lerp_(self._averages, [p.detach().float() for p in self._kept], 1 - self.next_rate())
        self.updates += 1

    @torch.no_grad()
    def tensors(self) -> list[Tensor]:
        """All averages, fp32, in the parameters' order, on every process. Collective."""
        if self._world.size == 1:
            return self._averages
        own = iter(self._averages)
        found: list[Tensor] = []
        for parameter, owner in zip(self._parameters, self._owners, strict=True):
            found.append(next(own) if owner == self._world.rank else torch.empty_like(parameter, dtype=torch.float32))
        for rank in range(self._world.size):
            part = [tensor for tensor, owner in zip(found, self._owners, strict=True) if owner == rank]
            if part:  # one broadcast per rank
                flat = torch.cat([tensor.reshape(-1) for tensor in part])
                dist.broadcast(flat, rank)
                for tensor, values in zip(part, flat.split([t.numel() for t in part]), strict=True):
                    tensor.copy_(values.view(tensor.shape))
        return found

    @torch.no_grad()
    def load(self, tensors: Iterable[Tensor], updates: int, since: int = 0) -> None:
        """Resume from saved averages, given in the parameters' order."""
        saved = [t for t, owner in zip(tensors, self._owners, strict=True) if owner == self._world.rank]
        for own, value in zip(self._averages, saved, strict=True):
            own.copy_(value)
        self.updates, self.since = updates, since


class EMA(Average):
    """The exponential moving average of a rate.

    With ``warmup`` the rate of update s is at most (1 + s) / (10 + s), so that the initial weights fade early: at rate
    0.9999 without warm-up they still make up 37% of the average after 10,000 updates.
    """

    def __init__(
        self, parameters: Iterable[Tensor], rate: float, warmup: bool = True, world: World | None = None
    ) -> None:
        super().__init__(parameters, world)
        self.rate = rate
        self.warmup = warmup

    def next_rate(self) -> float:
        return min(self.rate, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.rate

    @property
    def about(self) -> dict[str, Any]:
        return {"ema_rate": self.rate, "ema_warmup": self.warmup, "ema_updates": self.updates}

    @property
    def name(self) -> str:
        return f"EMA of rate {self.rate:g}"


class PowerAverage(Average):
    """The power-function average of a relative length (Karras et al. 2024, EDM2, section 3.1).

    The rate of update t is (1 - 1/t)^(gamma + 1): the average forgets the initial weights at once, and its length grows
    with the training. From it averages of other lengths follow, see checkpoint/averages.py.
    """

    def __init__(self, parameters: Iterable[Tensor], length: float, world: World | None = None) -> None:
        super().__init__(parameters, world)
        self.length = length
        self.exponent = exponent_of(length)

    def next_rate(self) -> float:
        return float((1 - 1 / (self.updates + 1)) ** (self.exponent + 1))

    @property
    def about(self) -> dict[str, Any]:
        return {"ema_length": self.length, "ema_updates": self.updates, "ema_since": self.since}

    @property
    def name(self) -> str:
        return f"average of length {self.length:g}"


def snapshot_steps(steps: int) -> frozenset[int]:
    """The updates of a run of ``steps`` after which a snapshot of its power-function averages is taken.

    The newest ones that are kept are then best placed at the end of the run: half a spacing before it, and so on.
    """
    found = (round(steps * SNAPSHOT_SPACING ** -(i + 0.5)) for i in range(_SNAPSHOTS))
    return frozenset(step for step in found if 0 < step < steps)


def _owners(sizes: Sequence[int], processes: int) -> list[int]:
    """The rank that keeps each tensor: contiguous ranges with about equal numbers of elements."""
    total, before, owners = max(sum(sizes), 1), 0, []
    for size in sizes:
        owners.append(min((before + size // 2) * processes // total, processes - 1))
        before += size
    return owners
