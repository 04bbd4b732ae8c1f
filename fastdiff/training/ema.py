"""Exponential moving averages of the weights."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.runtime.distributed import World


class EMA:
    """The average a <- rate * a + (1 - rate) * w of the parameters, in fp32 for any parameter dtype.

    With ``warmup`` the rate of update s is at most (1 + s) / (10 + s), so that the initial weights fade early: at rate
    0.9999 without warm-up they still make up 37% of the average after 10,000 updates.

    In a ``world`` of processes with equal parameters, each process keeps the averages of a part of them.
    """

    def __init__(
        self, parameters: Iterable[Tensor], rate: float, warmup: bool = True, world: World | None = None
    ) -> None:
        self.rate = rate
        self.warmup = warmup
        self.updates = 0
        self._parameters = list(parameters)
        self._world = world or World()
        self._owners = _owners([p.numel() for p in self._parameters], self._world.size)
        self._kept = [p for p, owner in zip(self._parameters, self._owners, strict=True) if owner == self._world.rank]
        self._averages = [p.detach().to(torch.float32, copy=True) for p in self._kept]

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the current parameters."""
        rate = min(self.rate, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.rate
        if self._kept:
            torch._foreach_lerp_(self._averages, [p.detach().float() for p in self._kept], 1 - rate)
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
    def load(self, tensors: Iterable[Tensor], updates: int) -> None:
        """Resume from saved averages, given in the parameters' order."""
        saved = [t for t, owner in zip(tensors, self._owners, strict=True) if owner == self._world.rank]
        for own, value in zip(self._averages, saved, strict=True):
            own.copy_(value)
        self.updates = updates


def _owners(sizes: Sequence[int], processes: int) -> list[int]:
    """The rank that keeps each tensor: contiguous ranges with about equal numbers of elements."""
    total, before, owners = max(sum(sizes), 1), 0, []
    for size in sizes:
        owners.append(min((before + size // 2) * processes // total, processes - 1))
        before += size
    return owners
