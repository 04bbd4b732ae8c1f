"""Trains a classifier of noisy images, whose gradient guides sampling (Dhariwal & Nichol 2021, section 4)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoint import model_metadata
from fastdiff.config import ClassifierConfig, ClassifierTrainConfig, RunConfig
from fastdiff.models import build_classifier
from fastdiff.models.unet import Encoder
from fastdiff.runtime.device import Runtime
from fastdiff.training.metrics import columns
from fastdiff.training.objective import Objective

TERMS = ("loss", "acc1", "acc5")
MEASURED = tuple(f"val_{term}" for term in TERMS)
"""The same terms on held-out images."""


class Classification(Objective):
    """Trains a classifier: the cross-entropy in nats of the images' classes at x_t, or with --no-noised at x_0, t = 0.

    acc1 and acc5 are 1 where the class is the likeliest one, or among the five likeliest, else 0.
    """

    kind = "classifier"
    terms = TERMS
    columns = columns(*TERMS, *MEASURED)

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        assert isinstance(config.model, ClassifierConfig)
        assert isinstance(config.train, ClassifierTrainConfig)
        self.model = config.model
        self.noised = config.train.noised
        if not self.noised:
            self.num_timesteps = 1

    def build(self, runtime: Runtime) -> Encoder:
        return build_classifier(self.model, runtime.kernels, runtime.memory_format)

    def conditions(self, x_start: Tensor, labels: Tensor | None, numbers: Tensor | None) -> dict[str, Tensor]:
        assert labels is not None
        return {"y": labels}

    def losses(
        self,
        forward: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        noise: Tensor,
    ) -> dict[str, Tensor]:
        y = conditions["y"]
        x_t = self.diffusion.q_sample(x_start, t, noise) if self.noised else x_start
        logits = forward(x_t, self.diffusion.model_timesteps(t))  # (N, K)
        with torch.no_grad():
            likeliest = logits.topk(min(5, logits.shape[1])).indices == y[:, None]  # (N, 5)
        return {
            "loss": F.cross_entropy(logits, y, reduction="none"),
            "acc1": likeliest[:, 0].to(logits.dtype),
            "acc5": likeliest.any(dim=1).to(logits.dtype),
        }

    def metadata(self, config: RunConfig, step: int) -> dict[str, Any]:
        return model_metadata(
            self.model,
            config.diffusion,
            step,
            config.class_names,
            class_counts=list(config.class_counts),
            noised=self.noised,
            run_config=config.to_dict(),
        )
