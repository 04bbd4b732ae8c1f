"""One model on several processes: DistributedDataParallel, or FSDP2 where it does not fit on one device."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastdiff.config import Parallel
from fastdiff.models import UNet
from fastdiff.runtime.distributed import World

_RENAMED = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # in torch 2.13
_KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}
"""The only buffer is a table that never changes: no need to send it around in every forward pass."""


def parallelise(model: UNet, device: torch.device, world: World, parallel: Parallel) -> nn.Module:
    """Move a model to ``device``; the module to call in its place, whose gradients are the means over the processes.

    Under FSDP the model itself is changed: each of its parameters becomes a DTensor, split over the processes. It comes
    to the device block by block, and is never whole there.
    """
    if world.size == 1:
        return model.to(device)
    if parallel is Parallel.DDP:
        model.to(device)
    if parallel is Parallel.DDP:
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            **_KEEP_BUFFERS,
            gradient_as_bucket_view=True,  # else every gradient is there twice
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other layout; the feature maps keep theirs
    mesh = init_device_mesh(device.type, (world.size,))
    for block in (*model.input_blocks, model.middle_block, *model.output_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is left: the embeddings and the last layer
    return model


def accumulating(module: nn.Module) -> AbstractContextManager[None]:
    """The context of a backward pass whose gradients wait for those of the next one before they are exchanged."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return _without_sync(module) if isinstance(module, FSDPModule) else nullcontext()


@contextmanager
def _without_sync(module: FSDPModule) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def own_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, but under FSDP. It shares the parameter's memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this process would hold of ``whole``, if that were the parameter."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device)
    # every process has read the same file: nothing needs to be sent
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def whole_of(part: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of part_of: the tensor of which the processes hold these parts. Collective under FSDP."""
    if not isinstance(parameter, DTensor) or part.ndim == 0:
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    shape: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(part, mesh, placements, run_check=False, **shape).full_tensor()


def total_norm(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """The norm of the whole gradient, of which this process holds a part, or all."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(parameters[0], DTensor):
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    return norm
