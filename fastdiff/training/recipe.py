"""The recipe of a new run: the settings that were not given, chosen for its images and for the time that it has.

The dataclasses' own defaults are improved-diffusion's, for weeks on several GPUs: in minutes they draw noise.
"""

import math
import shlex
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from fastdiff.config import GROUPS, ModelConfig, NoiseSchedule, Prediction, RunConfig, Weighting
from fastdiff.runtime.words import duration
from fastdiff.training import preview

MINUTES_ON_A_CPU = 30.0
"""Length of a run on a CPU for which neither updates nor minutes are given."""

_LR = 2e-3
"""At 32 channels, where 300 updates of small digits came nearer to the data than with half of it."""

_PATCHES_BIAS = -2.0
"""Bias of the sigmoid weighting of a model of patches. Samples of an unweighted one lack variety; with a larger bias,
which takes weight from high noise levels, more of them have the wrong class."""

_MARGIN = 0.02
"""Share of the updates by which their number must be wrong to be changed, and of the time that is left free."""


_OVERHEAD = 1.1
"""Time of an update in relation to that of its passes."""


def with_prediction(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags, with a prediction that is valid until the recipe chooses one, where the default would be refused."""
    wanted = flags.get("zero_terminal_snr") and not {"prediction", "predict_xstart"} & flags.keys()
    return {"prediction": Prediction.V} | dict(flags) if wanted else dict(flags)


def decided(
    config: RunConfig, given: Collection[str], images: int, device: torch.device, processes: int, timed: bool
) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration with the recipe's settings, and these as flags, without those that are ``given``.

    A ``timed`` run has no number of updates yet: TimeLimit chooses what depends on it.
    """
    chosen = model_and_process(config, given, images, device, processes)
    config = RunConfig.from_flags(chosen, base=config)
    if not timed:
        chosen |= (of_length := schedule(config, given))
        config = RunConfig.from_flags(of_length, base=config)
    return config, chosen


def model_and_process(
    config: RunConfig, given: Collection[str], images: int, device: torch.device, processes: int
) -> dict[str, Any]:
    """The settings that do not depend on the length of the run, as flags, without those that are ``given``.

    ``images`` is the number of images to train on. A small set, and a CPU, get a narrow model.
    """
    model, process = config.model, config.diffusion
    assert isinstance(model, ModelConfig)
    chosen: dict[str, Any] = {}
    patch_size, may_predict_xstart = model.patch_size, _may_predict_xstart(config, given)
    if device.type == "cpu":
        if may_predict_xstart and "patch_size" not in given and _levels_fit(model, given):
            chosen["patch_size"] = patch_size = patch_size_for(model.image_size)
        chosen |= {"num_channels": 32, "num_res_blocks": 1, "attention_resolutions": (8,)}
        chosen["channel_mult"] = narrow_levels(model.image_size // patch_size)
    elif images < 20_000:
        chosen["num_channels"] = 64 if images < 2_000 else 96
    if "num_channels" in chosen:
        chosen["num_channels"] = _fitting_width(model, chosen["num_channels"])
    if not process.use_kl and process.prediction is not Prediction.FLOW:
        chosen |= {"prediction": Prediction.V, "noise_schedule": NoiseSchedule.COSINE}
        if patch_size > 1 and may_predict_xstart:
            chosen["prediction"] = Prediction.X_START
            # the sigmoid is a slope over at least three timesteps
            weighting = process.weighting if "weighting" in given else Weighting.SIGMOID
            if weighting is Weighting.SIGMOID and process.diffusion_steps >= 3:
                chosen |= {"weighting": weighting, "sigmoid_bias": _PATCHES_BIAS}
    if model.image_size > 64 and model.small_size is None:
        chosen["noise_shift"] = model.image_size / 64
    chosen["batch_size"] = max(min(32, images) // processes, 1) * processes
    return _without(chosen | {"grad_clip": 1.0, "ema_lengths": (0.05, 0.1)}, given)


def _may_predict_xstart(config: RunConfig, given: Collection[str]) -> bool:
    """Whether the model predicts x_0 by a given flag, or no flag keeps it from that."""
    process = config.diffusion
    if {"prediction", "predict_xstart"} & {*given}:
        return process.predict_xstart
    return not process.use_kl


def _levels_fit(model: ModelConfig, given: Collection[str]) -> bool:
    """Whether the levels that were given, if any, can be those of a model of patches, down to at least 4."""
    if "channel_mult" not in given:
        return True
    if model.channel_mult is None:  # the originals' levels, which are those of pixels
        return False
    factor = patch_size_for(model.image_size) * 2 ** (len(model.channel_mult) - 1)
    return model.image_size % factor == 0 and model.image_size // factor >= 4


def _fitting_width(model: ModelConfig, num_channels: int) -> int:
    """The least width from ``num_channels`` on of which every level has 32 channels and whole attention heads."""
    if model.channel_mult is not None:  # a level of half the channels needs 32, too
        num_channels = max(num_channels, math.ceil(GROUPS / min(model.channel_mult)))
    heads = (model.num_heads, model.heads_upsample) if model.num_head_channels == -1 else (model.num_head_channels,)
    multiple = math.lcm(GROUPS, *heads)
    return -(-num_channels // multiple) * multiple


def patch_size_for(image_size: int) -> int:
    """The patches of a model for a CPU (Luhman & Luhman 2022): 2 pixels from 32 on, 4 from 64 on.

    The cost follows the number of patches, not of pixels: at 32 pixels 0.08 GFLOP instead of 0.32. Such a model
    predicts x_0: a narrow network does that better than epsilon or v, which hold all the noise of a patch (Li & He
    2025).
    """
    return next((side for side in (4, 2) if image_size >= 16 * side and image_size % (2 * side) == 0), 1)


def narrow_levels(grid_size: int) -> tuple[int, ...]:
    """Multipliers of a model whose channels double at every other halving of its ``grid_size``, down to at least 4.

    A level costs at most half as much as the one above, so that a CPU makes more updates in the same time.
    """
    levels = 1
    while grid_size % 2**levels == 0 and grid_size >> levels >= 4:
        levels += 1
    return tuple(2 ** (level // 2) for level in range(levels))


def schedule(config: RunConfig, given: Collection[str]) -> dict[str, Any]:
    """The settings that depend on the number of updates, as flags, without those that are ``given``."""
    assert isinstance(config.model, ModelConfig)
    steps = config.train.steps
    chosen = {
        "lr": float(f"{_LR * min(1.0, 32 / config.model.num_channels) ** 1.5:.1g}"),
        "lr_warmup_steps": math.ceil(0.05 * min(steps, 20_000)),
        "lr_anneal_steps": steps,
        "ema_rate": (ema_rate(steps),),
    }
    return _without(chosen, given)


def ema_rate(steps: int) -> float:
    """The rate of an average over about the last tenth of the updates, at most improved-diffusion's 0.9999."""
    rates = (0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
    return min(rates, key=lambda rate: abs(math.log((1 - rate) * steps / 10)))


def _without(chosen: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """What is chosen for flags that are not given; --predict-xstart is --prediction, too."""
    taken = {*given, "prediction"} if "predict_xstart" in given else given
    return {name: value for name, value in chosen.items() if name not in taken}


def said(chosen: Mapping[str, Any]) -> str:
    """The line of the log: the chosen settings as the flags that override them."""
    words = []
    for name, value in chosen.items():
        values = value if isinstance(value, tuple) else (value,)
        text = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        words += [f"--{name.replace('_', '-')}", text]
    return f"recipe auto: {shlex.join(words)}; each can be given, and --recipe improved has improved-diffusion's"


class TimeLimit:
    """Chooses the number of updates of a run that ends at ``deadline``, in seconds of time.perf_counter().

    The learning rate's decay ends with the updates, unless --lr-anneal-steps is among the ``given`` flags. With
    ``auto`` the recipe's other settings that depend on them are chosen, too. The run starts after ``start`` updates.
    """

    def __init__(self, deadline: float, given: Collection[str], auto: bool, start: int = 0) -> None:
        self.deadline, self._given, self._auto, self.start = deadline, given, auto, start
        self._began, self._first = 0.0, 0

    def planned(self, config: RunConfig, seconds: float) -> tuple[RunConfig, str]:
        """The configuration of a run whose updates' passes take ``seconds``, and a line for the log."""
        config = self._with_steps(config, self._steps(config, self.start, seconds * _OVERHEAD))
        chosen = schedule(config, self._given) if self._auto else {}
        left = duration(self.deadline - time.perf_counter())
        line = f"time: about {config.train.steps - self.start} updates in {left}, to be corrected by their speed"
        return RunConfig.from_flags(chosen, base=config), f"{line}; {said(chosen)}" if chosen else line

    def again(self, config: RunConfig, step: int) -> RunConfig:
        """The configuration after ``step`` updates, whose number follows the speed so far."""
        if step == config.train.steps:
            return config
        if not self._first:  # the first line of the log: the first updates are slower than the others
            self._began, self._first = time.perf_counter(), step
            return config
        seconds = (time.perf_counter() - self._began) / max(step - self._first, 1)
        steps = self._steps(config, step, seconds)
        return config if abs(steps - config.train.steps) < _MARGIN * steps else self._with_steps(config, steps)

    def _steps(self, config: RunConfig, step: int, seconds: float) -> int:
        """The updates of the whole run at this speed: previews and the last checkpoint need time, too."""
        train = config.train
        passes = preview.IMAGES * preview.STEPS * (1 + len(train.ema_rate)) if train.preview_interval else 0
        last = seconds * passes / (3 * train.batch_size)  # an update is three forward passes
        left = self.deadline - time.perf_counter() - last
        return step + max(1, int((1 - _MARGIN) * left / seconds))

    def _with_steps(self, config: RunConfig, steps: int) -> RunConfig:
        train = config.train
        ends_together = train.lr_anneal_steps == train.steps and "lr_anneal_steps" not in self._given
        anneal = steps if ends_together else train.lr_anneal_steps
        return replace(config, train=replace(train, steps=steps, lr_anneal_steps=anneal))
