"""To begin with the weights of another training: what its file says of the model, and which classes carry over."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.checkpoint import Weights, find_checkpoint, read_weights
from fastdiff.config import DiffusionConfig, ModelConfig, TrainConfig
from fastdiff.config.base import differences, in_words
from fastdiff.data.classes import completed, listed
from fastdiff.interop.openai import load_state_dict
from fastdiff.interop.openai_run import step_of

_FREE = {"dropout", "use_checkpoint"}  # go with any weights
_LAYERS = {"class_cond", "num_classes", "learn_sigma"}  # of these the differing layer begins afresh
_DERIVED = {"channel_mult", "attention_resolutions", "num_heads_upsample", "image_size"}  # compared by what they mean
_UNSAID = {"num_heads": 4, "diffusion_steps": 1000, "noise_schedule": "linear"}  # by a bare state dict: the defaults

CLASSES, LAST = "label_emb.weight", ("out.2.weight", "out.2.bias")


def find_initial(place: Path, raw: bool = False) -> Path:
    """The file to begin with: ``place`` itself, or the average (or, ``raw``, the weights) of a run folder's step."""
    return find_checkpoint(place, ema_rate=0.0 if raw and not place.is_file() else None)


def read_initial(path: Path, flags: Mapping[str, Any]) -> Weights:
    """The weights to begin with, and their model; what a bare state dict does not say is in the flags, or the default.

    ValueError as read_weights raises.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    names = set(ModelConfig().to_dict()) | set(DiffusionConfig().to_dict())
    given = {name: value for name, value in flags.items() if name in names - _FREE - _LAYERS - {"timestep_respacing"}}
    return read_weights(path, given=_UNSAID | given)


def configuration(weights: Weights, flags: Mapping[str, Any]) -> tuple[ModelConfig, DiffusionConfig, list[str]]:
    """The model and the process of a training that begins with ``weights``, and what is to be said of them.

    Both are the file's, with the flags in their place. ValueError where a flag asks for another architecture, other
    heads, or another prediction: these weights would mean nothing there. Another image size, schedule or number of
    steps is what fine-tuning may be for: it is said.
    """
    before, path = weights.model_config, weights.path
    model = _changed(before, flags)
    if model.image_size != before.image_size and "attention_resolutions" not in flags:
        resolutions = [max(1, r * model.image_size // before.image_size) for r in before.attention_resolutions]
        model = _changed(before, {**flags, "attention_resolutions": tuple(resolutions)})  # the same levels attend
    for name, old, new in differences(before, model):
        if name not in _FREE | _LAYERS | _DERIVED and not (name == "small_size" and None not in (old, new)):
            _refuse(name, old, new, path)
    for name, meaning in (
        ("channel_mult", "multipliers"),
        ("attention_resolutions", "attention_levels"),
        ("num_heads_upsample", "heads_upsample"),
    ):
        if getattr(before, meaning) != getattr(model, meaning):
            _refuse(name, getattr(before, name), getattr(model, name), path)
    process = _changed(weights.diffusion_config, flags)
    if process.predict_xstart != weights.diffusion_config.predict_xstart:
        _refuse("predict_xstart", weights.diffusion_config.predict_xstart, process.predict_xstart, path)
    told = [d for d in differences(before, model) if d[0] in ("image_size", "small_size")]
    told += [d for d in differences(weights.diffusion_config, process) if d[0] not in _LAYERS]
    return model, process, [f"{path} is changed: {in_words(told)}"] if told else []


def flags_to_fine_tune(path: Path, flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The flags of a training that begins with a file's weights, and what is to be said: see configuration."""
    model, process, notes = configuration(read_initial(path, flags), flags)
    return {**flags, **model.to_dict(), **process.to_dict()}, notes


def flags_to_resume(path: Path, flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The flags of a run that goes on from another one's step, and what is to be said of them.

    The model is that of a ``.safetensors`` file. A ``.pt`` file is improved-diffusion's, whose command line says it.
    """
    flags = dict(flags)
    notes: list[str] = []
    if path.suffix == ".safetensors":
        flags, notes = flags_to_fine_tune(path, flags)
    elif (labels := load_state_dict(path).get(CLASSES)) is not None:
        flags = {"num_classes": len(labels)} | flags  # improved-diffusion has 1000 of them whatever the data has
    if "steps" in flags:
        return flags, notes
    notes.append(f"{TrainConfig.steps:,} more steps, as neither --steps nor --lr-anneal-steps says")
    return flags | {"steps": step_of(path) + TrainConfig.steps}, notes


def _changed(config: Any, flags: Mapping[str, Any]) -> Any:
    values = config.to_dict()
    return type(config).from_dict(values | {name: value for name, value in flags.items() if name in values})


def _refuse(name: str, old: object, new: object, path: Path) -> None:
    raise ValueError(f"{name} is {old} in {path} and {new} on the command line: leave the flag out, or the weights")


def carried_over(
    weights: Weights,
    own: Mapping[str, Tensor],
    fresh: Callable[[str], Tensor],
    class_names: Sequence[str],
    named: bool = True,
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict that a model begins with, and what is to be said of it.

    ``own`` are the model's tensors and ``fresh`` gives one of them whole, on the CPU; ``class_names`` are the names of
    its classes, which are only numbers unless they are ``named``. Rows of the class embedding are matched by name, new
    ones are fresh; so is the last layer where only one of the two models predicts the variance.
    """
    state, said = dict(weights.state), []
    if CLASSES in own and CLASSES not in state:
        state[CLASSES] = fresh(CLASSES)
        said.append(f"{weights.path} knows no classes: the embedding of {listed(class_names)} begins afresh")
    elif CLASSES in state and CLASSES not in own:
        del state[CLASSES]
        said.append(f"the classes of {weights.path} are left out: this model is not class-conditional")
    elif CLASSES in own:
        state[CLASSES], lines = _matched(weights, state[CLASSES], fresh(CLASSES), class_names, named)
        said += lines
    if LAST[0] in own and LAST[0] in state and state[LAST[0]].shape[0] != own[LAST[0]].shape[0]:
        state |= {name: fresh(name) for name in LAST}
        said.append("learn_sigma differs: the last layer begins afresh")
    return state, said


def _matched(
    weights: Weights, known: Tensor, fresh: Tensor, class_names: Sequence[str], named: bool
) -> tuple[Tensor, list[str]]:
    """The rows of the class embedding."""
    wanted, theirs = completed(class_names, len(fresh)), completed(weights.class_names, len(known))
    said = []
    if not named or not weights.class_names:
        whose, first = (str(weights.path), wanted[:1]) if named else ("the data", theirs[:1])
        said.append(f"{whose} has no names of its classes: they are taken by number, 0 being {listed(first)}")
        theirs = completed((), len(known))
        if not all(name.isdecimal() for name in wanted):
            if known.shape != fresh.shape:
                return fresh, [f"{whose} has {len(known)} classes without names: the embedding begins afresh"]
            theirs = wanted
    rows = {name: row for row, name in enumerate(theirs)}
    found = fresh.clone()
    for i, name in enumerate(wanted):
        if name in rows:
            found[i] = known[rows[name]]
    if new := [name for name in wanted if name not in rows]:
        said.append(f"{len(new)} of {len(wanted)} classes are new to {weights.path} and begin afresh: {listed(new)}")
    return found, said
