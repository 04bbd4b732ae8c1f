"""Fine-tuning: start from another run's weights, with the configuration in their file and matching classes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.checkpoint import (
    ClassifierWeights,
    Weights,
    find_checkpoint,
    read_classifier,
    read_metadata,
    read_weights,
)
from fastdiff.config import ClassifierConfig, DiffusionConfig, Labels, ModelConfig, TrainConfig
from fastdiff.config.base import differences, in_words
from fastdiff.config.classifier import used_by_classifiers
from fastdiff.data.classes import completed, listed
from fastdiff.interop.classifier import LAST_LAYER
from fastdiff.interop.openai import load_state_dict, said_by_name
from fastdiff.interop.openai_run import step_of
from fastdiff.interop.recognition import describe, recognise, refuse_classifier
from fastdiff.presets import CLASSIFIER_PRESETS, described_by

_FREE = {"dropout", "use_checkpoint"}  # compatible with any weights
_LAYERS = {"class_cond", "num_classes", "learn_sigma", "augment_dim"}  # if one differs, its layer is newly initialised
_HEADS = ("num_heads", "num_heads_upsample", "num_head_channels")
_DERIVED = {"channel_mult", "attention_resolutions", "image_size", *_HEADS}  # compared by their effect
_UNSAID = {"num_heads": 4, "diffusion_steps": 1000, "noise_schedule": "linear"}  # defaults for improved-diffusion's
_PROCESS = ("diffusion_steps", "noise_schedule")  # what a bare classifier does not say

Initial = Weights | ClassifierWeights
"""The weights to start from."""

CLASSES, LAST = "label_emb.weight", ("out.2.weight", "out.2.bias")
AUGMENT = "augment_emb.weight"


def find_initial(place: Path, raw: bool = False) -> Path:
    """The file to start from: ``place`` itself, or the EMA (with ``raw``, the raw weights) of a run folder's step."""
    return find_checkpoint(place, ema_rate=0.0 if raw and not place.is_file() else None)


def read_initial(path: Path, flags: Mapping[str, Any]) -> Weights:
    """Read the weights to start from; settings that a bare state dict lacks come from the flags and their preset.

    Those of neither have the defaults, if it is improved-diffusion's. Raises ValueError as read_weights does.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    names = set(ModelConfig().to_dict()) | set(DiffusionConfig().to_dict())
    said = described_by(flags.get("preset")) | dict(flags)
    given = {name: value for name, value in said.items() if name in names - _FREE - _LAYERS - {"timestep_respacing"}}
    state = load_state_dict(path)
    if not recognise(state, path).resblock_updown:
        given = _UNSAID | given
    return Weights(path, state, *describe(state, path, given), (), said_by_name(path))


def configuration(weights: Weights, flags: Mapping[str, Any]) -> tuple[ModelConfig, DiffusionConfig, list[str]]:
    """The model and diffusion configurations of a run that starts from ``weights``, and lines for the log.

    The flags override the file's configurations. ValueError if a flag changes the architecture, the number of heads or
    the prediction type: the weights would be meaningless. Fine-tuning may change the image size, the noise schedule or
    the number of steps: the log reports it.
    """
    before, path = weights.model_config, weights.path
    if "num_heads" in flags:
        flags = {"num_head_channels": -1} | dict(flags)  # the file's would go before num_heads
    model = before.from_flags(flags, base=before)
    if model.image_size != before.image_size and "attention_resolutions" not in flags:
        resolutions = [max(1, r * model.image_size // before.image_size) for r in before.attention_resolutions]
        same_levels = {**flags, "attention_resolutions": tuple(resolutions)}
        model = before.from_flags(same_levels, base=before)
    for name, old, new in differences(before, model):
        if name not in _FREE | _LAYERS | _DERIVED and not (name == "small_size" and None not in (old, new)):
            _refuse(name, old, new, path)
    for name, meaning in (("channel_mult", "widths"), ("attention_resolutions", "attention_levels")):
        if getattr(before, meaning) != getattr(model, meaning):
            _refuse(name, getattr(before, name), getattr(model, name), path)
    for name, old_heads, new_heads in zip(_HEADS[:2], before.attention_heads, model.attention_heads, strict=True):
        if old_heads != new_heads:
            _refuse(name, _heads(before, name), _heads(model, name), path)
    process = weights.diffusion_config.from_flags(flags, base=weights.diffusion_config)
    if process.prediction != weights.diffusion_config.prediction:
        name = "prediction" if "prediction" in flags else "predict_xstart"
        _refuse(name, getattr(weights.diffusion_config, name), getattr(process, name), path)
    told = [d for d in differences(before, model) if d[0] in ("image_size", "small_size")]
    told += [d for d in differences(weights.diffusion_config, process) if d[0] not in _LAYERS]
    return model, process, [f"{path} is changed: {in_words(told)}"] if told else []


def read_initial_classifier(path: Path, flags: Mapping[str, Any]) -> ClassifierWeights:
    """Read the weights to start a classifier from; ValueError as read_classifier, or if a flag contradicts the file.

    Only the number of classes may change, and use_checkpoint.
    """
    names = set(ClassifierConfig().to_dict()) - _FREE - {"num_classes"}
    return read_classifier(path, given={name: value for name, value in flags.items() if name in names})


def flags_to_fine_tune(weights: Initial, flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The flags of a run that starts from a file's weights, and lines for the log: see configuration.

    A classifier is trained on its file's process, or as the flags change it. ValueError if neither a bare state dict
    nor the flags say the process.
    """
    if isinstance(weights, Weights):
        model, process, notes = configuration(weights, flags)
        return {**flags, **model.to_dict(), **process.to_dict()}, notes
    path, before = weights.path, weights.diffusion_config
    if before is None:
        if missing := [name for name in _PROCESS if name not in flags]:
            asked = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(
                f"{path} does not say which diffusion process the classifier was trained on: give {asked}, or its "
                f"--preset ({', '.join(CLASSIFIER_PRESETS)})"
            )
        before = DiffusionConfig.from_flags(used_by_classifiers(flags))
    process = before.from_flags(used_by_classifiers(flags), base=before)
    told = in_words(differences(before, process))
    return {**weights.config.to_dict(), **flags, **process.to_dict()}, [f"{path} is changed: {told}"] if told else []


def flags_to_resume(
    path: Path, flags: Mapping[str, Any], classifier: bool = False, timed: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """The flags of a run that resumes from another run's step, and lines for the log. Time limits a ``timed`` run.

    A ``.safetensors`` file and a ``classifier`` determine the model. For a ``.pt`` file of improved-diffusion the flags
    do, and for any ``.pt`` file they determine the diffusion process.
    """
    flags = dict(flags)
    notes: list[str] = []
    if classifier or path.suffix == ".safetensors":
        weights = read_initial_classifier(path, flags) if classifier else read_initial(path, flags)
        assumed = {}
        if classifier and weights.diffusion_config is None:
            assumed = {name: getattr(DiffusionConfig, name) for name in _PROCESS if name not in flags}
        flags, notes = flags_to_fine_tune(weights, assumed | flags)
        if assumed:
            said = ", ".join(f"{name} {value}" for name, value in assumed.items())
            notes.append(f"{path} does not say its diffusion process: {said} assumed")
        run = read_metadata(path).get("run_config", {}) if path.suffix == ".safetensors" else {}
        if run.get("data", {}).get("labels") == Labels.AUTO and not flags.get("label_file"):
            flags = {"labels": Labels.AUTO} | flags
    else:
        refuse_classifier(state := load_state_dict(path), path)
        if CLASSES in state:
            flags = {"num_classes": len(state[CLASSES])} | flags  # improved-diffusion always has 1000, for any data
    if "steps" in flags or timed:
        return flags, notes
    notes.append(f"{TrainConfig.steps:,} more steps, as neither --steps nor --lr-anneal-steps is given")
    return flags | {"steps": step_of(path) + TrainConfig.steps}, notes


def _heads(config: ModelConfig, name: str) -> object:
    """The setting ``name``, num_heads or num_heads_upsample, in words."""
    return f"one per {config.num_head_channels} channels" if config.num_head_channels != -1 else getattr(config, name)


def _refuse(name: str, old: object, new: object, path: Path) -> None:
    raise ValueError(f"{name} is {old} in {path} and {new} on the command line: leave the flag out, or the weights")


def carried_over(
    weights: Weights,
    own: Mapping[str, Tensor],
    fresh: Callable[[str], Tensor],
    class_names: Sequence[str],
    named: bool = True,
) -> tuple[dict[str, Tensor], list[str]]:
    """The initial state dict of a model, and lines for the log.

    ``own`` are the model's tensors, and ``fresh`` returns one of them unsharded, on the CPU. ``class_names`` are its
    class names, which are only numbers unless ``named``. Rows of the class embedding are matched by name, and new
    classes keep the model's initialisation; so does the last layer if only one of the two models predicts the variance.
    """
    state, said = dict(weights.state), []
    if CLASSES in own and CLASSES not in state:
        state[CLASSES] = fresh(CLASSES)
        said.append(f"{weights.path} has no classes: the embedding of {listed(class_names)} is newly initialised")
    elif CLASSES in state and CLASSES not in own:
        del state[CLASSES]
        said.append(f"the classes of {weights.path} are dropped: this model is not class-conditional")
    elif CLASSES in own:
        rows, lines = _matched(weights, len(state[CLASSES]), len(own[CLASSES]), class_names, named, "the embedding")
        state[CLASSES] = _taken(state[CLASSES], fresh(CLASSES), rows)
        said += lines
    if AUGMENT in own and AUGMENT not in state:
        state[AUGMENT] = fresh(AUGMENT)
        said.append(f"{weights.path} was trained without --augment: the layer that is told of it is newly initialised")
    elif AUGMENT not in own:
        state.pop(AUGMENT, None)
    if LAST[0] in own and LAST[0] in state and state[LAST[0]].shape[0] != own[LAST[0]].shape[0]:
        state |= {name: fresh(name) for name in LAST}
        said.append("learn_sigma differs: the last layer is newly initialised")
    return state, said


def classifier_carried_over(
    weights: ClassifierWeights,
    fresh: Callable[[str], Tensor],
    class_names: Sequence[str],
    num_classes: int,
    named: bool = True,
) -> tuple[dict[str, Tensor], list[str]]:
    """The initial state dict of a classifier of ``num_classes``, and lines for the log; arguments as carried_over's.

    The last layer's rows are matched by the names of the classes, and new classes keep their initialisation.
    """
    last = LAST_LAYER[weights.config.classifier_pool]
    rows, said = _matched(weights, weights.config.num_classes, num_classes, class_names, named, "the last layer")
    heads = {name: _taken(weights.state[name], fresh(name), rows) for name in (last, last.replace("weight", "bias"))}
    return weights.state | heads, said


def _taken(known: Tensor, fresh: Tensor, rows: Sequence[int | None]) -> Tensor:
    """The ``rows`` of ``known``; where one is None, the row of ``fresh``."""
    found = fresh.clone()
    for i, row in enumerate(rows):
        if row is not None:
            found[i] = known[row]
    return found


def _matched(
    weights: Initial,
    their_count: int,
    our_count: int,
    class_names: Sequence[str],
    named: bool,
    layer: str,
) -> tuple[list[int | None], list[str]]:
    """The number in the file of each of the model's classes, matched by name, and lines for the log.

    None is a new class, whose row of ``layer`` keeps its initialisation.
    """
    wanted, theirs = completed(class_names, our_count), completed(weights.class_names, their_count)
    said = []
    if not named or not weights.class_names:
        whose, first = (str(weights.path), wanted[:1]) if named else ("the data", theirs[:1])
        said.append(f"{whose} has no class names: classes are matched by number, 0 being {listed(first)}")
        theirs = completed((), their_count)
        if not all(name.isdecimal() for name in wanted):
            if their_count != our_count:
                return [None] * our_count, [
                    f"{whose} has {their_count} classes without names: {layer} is newly initialised"
                ]
            theirs = wanted
    number = {name: row for row, name in enumerate(theirs)}
    if new := [name for name in wanted if name not in number]:
        said.append(f"{len(new)} of {len(wanted)} classes are not in {weights.path}, newly initialised: {listed(new)}")
    return [number.get(name) for name in wanted], said
