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
    """modelNNNNNN.pt at ``path``: state dicts of the weights and, by rate, of their averages, and the optimizer's.

    An average or an optimizer without a file is absent or None.
    """

    path: Path
    weights: dict[str, Tensor]
    averages: dict[float, dict[str, Tensor]]
    optimizer: Any = None

    @property
    def step(self) -> int:
        """The number in the names."""
        return step_of(self.path)

    def average_path(self, rate: float) -> Path:
        """Where the average of ``rate`` is, or would be."""
        return self.path.with_name(f"ema_{rate}_{self.step:06d}.pt")

    @property
    def optimizer_path(self) -> Path:
        """Where the optimizer's state is, or would be."""
        return self.path.with_name(f"opt{self.step:06d}.pt")

    def setting(self, name: str) -> float | None:
        """The optimizer's lr or weight_decay in its last update, where the file has it."""
        try:
            return float(self.optimizer["param_groups"][0][name])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError):
            return None

    def moments(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's state as ``{"exp_avg.NAME": ...}``; ``weights`` are in the order of the model's parameters.

        The file numbers them in that order. A run in fp16 has one parameter instead, all of them flattened and laid end
        to end. ValueError where the file is another model's.
        """
        try:
            numbered: dict[int, Any] = dict(self.optimizer["state"].items())
            states = [numbered[i] for i in range(len(numbered))]
            found: dict[str, Tensor] = {}
            whole = True
            if len(states) == 1 and len(weights) > 1:
                sizes = [weight.numel() for weight in weights.values()]
                parts = {key: states[0][key].split(sizes) for key in MOMENTS[1:]}
                whole = all(states[0][key].shape == (sum(sizes),) for key in MOMENTS[1:])
                states = [
                    {"step": states[0]["step"]} | {key: parts[key][i].view(weight.shape) for key in MOMENTS[1:]}
                    for i, weight in enumerate(weights.values())
                ]
            for (name, weight), state in zip(weights.items(), states, strict=True):
                whole &= all(state[key].shape == weight.shape and state[key].is_floating_point() for key in MOMENTS[1:])
                found |= {f"{key}.{name}": torch.as_tensor(state[key], dtype=torch.float32) for key in MOMENTS}
                step, mean, square = (found[f"{key}.{name}"] for key in MOMENTS)
                # of what is not in memory, as meta and sparse tensors are not, this cannot be asked
                whole &= (
                    step.ndim == 0 and bool(step >= 0) and bool(mean.isfinite().all()) and bool((square >= 0).all())
                )
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, OverflowError):
            whole = False
        if not whole:
            raise ValueError(
                f"{self.optimizer_path} is not the optimizer's state of the model beside it: restore it, or move it "
                "away"
            )
        return found


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

    ValueError where a file is damaged or of another kind.
    """
    run = OpenAIRun(path, load_state_dict(path), {})
    there = {rate: load_state_dict(beside) for rate in rates if (beside := run.average_path(rate)).exists()}
    optimizer = read_file(run.optimizer_path) if run.optimizer_path.exists() else None
    return OpenAIRun(path, run.weights, there, optimizer)
