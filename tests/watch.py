"""Which operations would have the host wait for a device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"),
    *("aten::masked_select", "aten::bincount", "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave.Tensor"),
}
"""What makes the host wait for a GPU: reading a number, and results whose shape depends on numbers."""


class Watch(TorchDispatchMode):
    """Notes every operation that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        full = f"{name}.{func._overloadname}"
        self.calls += 1
        by_mask = name.startswith("aten::index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in WAITS or full in WAITS or by_mask:
            self.seen.append(full)
        return func(*args, **(kwargs or {}))
