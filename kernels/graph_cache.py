"""What torch.compile may keep of graphs that call our functions; imported only where something is compiled."""

import torch
import torch._inductor.config


def let_cache(function: str, version: str) -> None:
    """Let torch.compile keep traced graphs that call ``function``, "module.name", until its ``version`` is another.

    One that PyTorch does not know to be safe keeps the graph of the whole model out of its cache, and every start would
    trace it anew. It counts in the calling thread.
    """
    config, name = torch._inductor.config, "unsafe_marked_cacheable_functions"
    if hasattr(config, name):
        # assigned and not changed in place, which would not reach the cache's key
        setattr(config, name, {**getattr(config, name), function: version})


if torch.__version__ >= "2.13":  # before, the cache's key did not tell bf16 from fp16
    for _name in ("_enter_autocast", "_exit_autocast"):  # backend.without_autocast in a graph
        let_cache(f"torch.amp.autocast_mode.{_name}", version=torch.__version__)
