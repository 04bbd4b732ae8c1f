"""One model on several processes: DistributedDataParallel, or FSDP2 if the model does not fit on one device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from fastdiff.models.unet import Encoder
from fastdiff.runtime.distributed import World

_RENAMED = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # in torch 2.13
_KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}
"""The only buffer is a constant table, which need not be broadcast in every forward pass."""


def parallelise(model: Encoder, device: torch.device, world: World, parallel: Parallel) -> nn.Module:
    """Move a model to ``device`` and return the module to call instead, which averages gradients over the processes.

    FSDP changes the model in place: each parameter becomes a DTensor, sharded over the processes. It moves to the
    device block by block, so that the device never holds the unsharded model.
    """
    if world.size == 1:
        return model.to(device)
    if parallel is Parallel.DDP:
        return DistributedDataParallel(
            model.to(device),
            device_ids=[device.index] if device.type == "cuda" else None,
            **_KEEP_BUFFERS,
            gradient_as_bucket_view=True,  # else each gradient is stored twice
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 requires it; feature maps keep their layout
    mesh = init_device_mesh(device.type, (world.size,))
    output_blocks = model.output_blocks if isinstance(model, UNet) else ()
    for block in (*model.input_blocks, model.middle_block, *output_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the rest: the embeddings and the last layer
    return model


@contextmanager
def accumulating(module: nn.Module) -> Iterator[None]:
    """Context for a backward pass that accumulates gradients without synchronising them."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield


def own_part(parameter: Tensor) -> Tensor:
    """This process's shard of a parameter under FSDP, else the parameter itself. It shares the parameter's memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of ``whole``, sharded like ``parameter``."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device)
    # every process has read the same file: no communication is needed
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def whole_of(part: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of part_of: the full tensor from the processes' shards. Collective under FSDP."""
    if not isinstance(parameter, DTensor) or part.ndim == 0:
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    shape: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(part, mesh, placements, run_check=False, **shape).full_tensor()


def total_norm(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """The norm of the full gradient, of which this process holds a shard, or all. Collective under FSDP."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(parameters[0], DTensor):
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    return norm
