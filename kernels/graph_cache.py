"""Let torch.compile cache graphs that call our functions. Imported only when something is compiled."""

import torch
import torch._inductor.config


def let_cache(function: str, version: str) -> None:
    """Let torch.compile cache traced graphs that call ``function``, "module.name", until its ``version`` changes.

    A function that PyTorch does not know to be safe keeps the graph of the complete model out of the cache, so that
    every start would trace it again. The setting applies to the calling thread.
    """
    config, name = torch._inductor.config, "unsafe_marked_cacheable_functions"
    if hasattr(config, name):
        # assigned, because a change in place would not reach the cache key
        setattr(config, name, {**getattr(config, name), function: version})


if torch.__version__ >= "2.13":  # earlier cache keys do not distinguish bf16 from fp16
    for _name in ("_enter_autocast", "_exit_autocast"):  # backend.without_autocast in a graph
        let_cache(f"torch.amp.autocast_mode.{_name}", version=torch.__version__)
