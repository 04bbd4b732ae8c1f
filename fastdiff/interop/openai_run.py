"""The files of an improved-diffusion run, to go on from: model, averages and optimizer of one step."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.interop.openai import load_state_dict, read_file

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""

_MODEL = re.compile(r"model(?P<step>\d+)\.(pt|safetensors)")


@dataclass(frozen=True)
class OpenAIRun:
    """State dicts of the weights and, by rate, of their averages; the optimizer's ``{"exp_avg.NAME": ...}``.

    An average without a file is absent; without the optimizer's file ``moments`` is None. ``lr`` is the learning rate
    of its last update, as the file has it.
    """

    step: int
    weights: dict[str, Tensor]
    averages: dict[float, dict[str, Tensor]]
    moments: dict[str, Tensor] | None
    lr: float | None


def step_of(path: Path) -> int:
    """The step in the name modelNNNNNN.pt; ValueError where the file is called otherwise."""
    match = _MODEL.fullmatch(path.name)
    if match is None:
        raise ValueError(
            f"resume_checkpoint {path} is not called modelNNNNNN.pt, so that its step is not known: name that file, or "
            "begin with these weights by --init-from"
        )
    return int(match["step"])


def read_run(path: Path, rates: Iterable[float]) -> OpenAIRun:
    """modelNNNNNN.pt with what lies beside it: ema_RATE_NNNNNN.pt for each of ``rates``, and optNNNNNN.pt.

    ValueError where a file is damaged or does not belong to the model.
    """
    step, weights = step_of(path), load_state_dict(path)
    averages = {}
    for rate in rates:
        beside = path.with_name(f"ema_{rate}_{step:06d}.pt")
        if beside.exists():
            averages[rate] = load_state_dict(beside)
    beside = path.with_name(f"opt{step:06d}.pt")
    if not beside.exists():
        return OpenAIRun(step, weights, averages, None, None)
    file = read_file(beside)
    moments = _moments(file, weights, beside)
    return OpenAIRun(step, weights, averages, moments, _learning_rate(file))


def _moments(file: Any, weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The optimizer's state by the names of the parameters, which it numbers in the order of the state dict.

    A run in fp16 has one parameter instead, all of them flattened and laid end to end.
    """
    try:
        states = [file["state"][i] for i in range(len(file["state"]))]
        found: dict[str, Tensor] = {}
        if len(states) == 1 and len(weights) > 1:
            sizes = [weight.numel() for weight in weights.values()]
            parts = {key: states[0][key].split(sizes) for key in MOMENTS[1:]}
            whole = all(states[0][key].shape == (sum(sizes),) for key in MOMENTS[1:])
            states = [
                {"step": states[0]["step"]} | {key: parts[key][i].view(weight.shape) for key in MOMENTS[1:]}
                for i, weight in enumerate(weights.values())
            ]
        else:
            whole = len(states) == len(weights)
        for (name, weight), state in zip(weights.items(), states, strict=True):
            whole &= all(state[key].shape == weight.shape and state[key].is_floating_point() for key in MOMENTS[1:])
            found |= {f"{key}.{name}": torch.as_tensor(state[key], dtype=torch.float32) for key in MOMENTS}
            whole &= found[f"step.{name}"].ndim == 0
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is not the optimizer's state of the model beside it: restore it, or move it away")
    return found


def _learning_rate(file: Any) -> float | None:
    try:
        return float(file["param_groups"][0]["lr"])
    except (KeyError, TypeError, ValueError, IndexError):
        return None
