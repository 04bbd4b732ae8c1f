"""The checkpoints of improved-diffusion and guided-diffusion: bare state dicts in .pt files."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.runtime.files import refuse_other_kind
from fastdiff.runtime.words import first_line, printable

_FIRST = "time_embed.0.weight"
_NAME = re.compile(r"(model|ema_(?P<rate>0?\.\d+)_)(?P<step>\d{6,})\.pt")


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` file of improved-diffusion or guided-diffusion, on the CPU.

    Only tensors are read, never code. ValueError if the file is damaged, contains anything else, or is optimizer state.
    """
    state = read_file(path)
    if isinstance(state, dict) and {"state", "param_groups"} <= set(state):
        raise ValueError(f"{path} is optimizer state, not a model: name the model*.pt or ema_*.pt file beside it")
    if isinstance(state, dict) and (inside := [key for key, value in state.items() if _is_model(value)]):
        raise ValueError(
            f"{path} is not a bare state dict, but contains one: save it alone, "
            f"torch.save(torch.load({path.name!r})[{inside[0]!r}], 'model.pt')"
        )
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a bare state dict of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or value.layout is not torch.strided or value.is_meta:
            raise ValueError(f"{path} is not a bare state dict: {key!r:.80} is not a dense tensor with a string key")
    return _unwrapped(state)


def _is_model(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(key, str) and key.endswith(_FIRST) for key in value)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the key prefix of a wrapper, such as DistributedDataParallel's "module."."""
    prefix = next((key.removesuffix(_FIRST) for key in state if key.endswith(_FIRST)), "")
    if not all(key.startswith(prefix) for key in state):
        return state
    return {key.removeprefix(prefix): value for key, value in state.items()}


def said_by_name(path: Path) -> dict[str, Any]:
    """The metadata in a name like model200000.pt or ema_0.9999_200000.pt, with the keys of a fastdiff file."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return {}
    step = int(match["step"])
    if match["rate"] is None:
        return {"step": step}
    return {"step": step, "ema_rate": float(match["rate"]), "ema_updates": step, "ema_warmup": False}


def _verify(path: Path) -> None:
    """ValueError if a record of a zip, which PyTorch's files are, fails its CRC-32: torch.load does not compare it."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # the reader can raise almost anything on damaged bytes
        raise ValueError(f"{path} is damaged or not a PyTorch checkpoint ({first_line(error, limit=300)})") from None
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {printable(damaged)} in it does not have its checksum; copy it again")


def read_file(path: Path) -> object:
    """The contents of a ``.pt`` file, on the CPU: tensors, numbers, text and containers of them, never code."""
    refuse_other_kind(path)
    _verify(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an unusual pickle protocol
            # memory-mapped if possible, so that several processes share one copy
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors (pickled code, perhaps) and is not loaded: it must be a bare state dict"
        ) from None
    except Exception as error:  # the unpickler can raise almost anything on damaged bytes
        raise ValueError(f"{path} is damaged or not a PyTorch checkpoint ({first_line(error, limit=300)})") from None
