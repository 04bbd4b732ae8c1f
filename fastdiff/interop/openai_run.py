"""The files to resume a run of improved-diffusion or guided-diffusion from: model, EMAs and optimizer of one step."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.interop.openai import load_state_dict, read_file

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state for each parameter."""

_MODEL = re.compile(r"model(?P<step>\d+)\.(pt|safetensors)")


@dataclass(frozen=True)
class OpenAIRun:
    """modelNNNNNN.pt at ``path``: state dicts of the weights, of their EMAs by rate, and of the optimizer.

    An EMA without a file is absent; an optimizer without a file is None.
    """

    path: Path
    weights: dict[str, Tensor]
    averages: dict[float, dict[str, Tensor]]
    optimizer: Any = None

    @property
    def step(self) -> int:
        """The step in the file names."""
        return step_of(self.path)

    def average_path(self, rate: float) -> Path:
        """The path of the EMA of ``rate``, whether it exists or not."""
        return self.path.with_name(f"ema_{rate}_{self.step:06d}.pt")

    @property
    def optimizer_path(self) -> Path:
        """The path of the optimizer state, whether it exists or not."""
        return self.path.with_name(f"opt{self.step:06d}.pt")

    def setting(self, name: str) -> float | None:
        """The optimizer's lr or weight_decay in its last update; None if the file does not contain it."""
        try:
            return float(self.optimizer["param_groups"][0][name])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError):
            return None

    def moments(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer state as ``{"exp_avg.NAME": ...}``; ``weights`` must be in the order of the model's parameters.

        The file numbers the parameters in that order, except in fp16 runs (see _apart). ValueError if the file belongs
        to another model.
        """
        try:
            numbered: dict[int, Any] = dict(self.optimizer["state"].items())
            states = _apart([numbered[i] for i in range(len(numbered))], weights)
            found: dict[str, Tensor] = {}
            whole = True
            for (name, weight), state in zip(weights.items(), states, strict=True):
                whole &= all(state[key].shape == weight.shape and state[key].is_floating_point() for key in MOMENTS[1:])
                found |= {f"{key}.{name}": torch.as_tensor(state[key], dtype=torch.float32) for key in MOMENTS}
                step, mean, square = (found[f"{key}.{name}"] for key in MOMENTS)
                # raises for tensors without dense data, such as meta and sparse ones
                whole &= (
                    step.ndim == 0 and bool(step >= 0) and bool(mean.isfinite().all()) and bool((square >= 0).all())
                )
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, OverflowError):
            whole = False
        if not whole:
            raise ValueError(
                f"{self.optimizer_path} is not the optimizer state of the model beside it: restore it, or move it away"
            )
        return found


def _apart(states: list[Any], weights: Mapping[str, Tensor]) -> list[Any]:
    """The optimizer's state of each weight.

    In an fp16 run the optimizer has all parameters flattened and concatenated, as a single one in improved-diffusion.
    In guided-diffusion there are two: the biases and norms, and all others. RuntimeError if the sizes differ.
    """
    groups = [list(weights)]
    if len(states) == 2:
        groups = [[n for n, w in weights.items() if (w.ndim > 1) == matrices] for matrices in (False, True)]
    if len(states) != len(groups) or len(states) == len(weights):
        return states
    found = {}
    for state, names in zip(states, groups, strict=True):
        sizes = [weights[name].numel() for name in names]
        parts = {key: state[key].flatten().split(sizes) for key in MOMENTS[1:]}
        for i, name in enumerate(names):
            moments = {key: parts[key][i].view(weights[name].shape) for key in MOMENTS[1:]}
            found[name] = {"step": state["step"]} | moments
    return [found[name] for name in weights]


def step_of(path: Path) -> int:
    """The step in the name modelNNNNNN.pt or .safetensors; ValueError if the file is named differently."""
    match = _MODEL.fullmatch(path.name)
    if match is None:
        raise ValueError(
            f"resume_checkpoint {path} is not called modelNNNNNN.pt, so its step is unknown: name that file, or "
            "start from these weights with --init-from"
        )
    return int(match["step"])


def read_run(path: Path, rates: Iterable[float]) -> OpenAIRun:
    """Read modelNNNNNN.pt and the files beside it: ema_RATE_NNNNNN.pt for each of ``rates``, and optNNNNNN.pt.

    ValueError if a file is damaged or of another kind.
    """
    run = OpenAIRun(path, load_state_dict(path), {})
    there = {rate: load_state_dict(beside) for rate in rates if (beside := run.average_path(rate)).exists()}
    optimizer = read_file(run.optimizer_path) if run.optimizer_path.exists() else None
    return OpenAIRun(path, run.weights, there, optimizer)
