"""The model card, README.md, of a diffusers folder, in Hugging Face's format: what is known of the model, and no more.

It is meant to be published: of paths it has the last component only, and neither the host nor the command line.
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastdiff.checkpoint.files import sha256
from fastdiff.checkpoint.model import Checkpoint
from fastdiff.config import DiffusionConfig, ModelConfig, Prediction, RunConfig
from fastdiff.interop.diffusers import Scheduler
from fastdiff.runtime.words import printable

NAME = "README.md"

_SEAL = re.compile(r"<!-- fastdiff convert wrote this card: (?P<digest>[0-9a-f]{64}) -->\n\Z")
_LICENSE = re.compile(r"[a-z][a-z0-9.+-]*")
_YAML_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))
_MOST_ROWS = 20
_MOST_NAMES = 1000
_LONGEST = 200  # characters of a text from outside
_STEPS = 50  # of DDIM, in the example

Rows = Iterator[tuple[str, str]]


def check_license(license: str) -> None:
    """ValueError if this is no identifier of a licence as Hugging Face writes them."""
    if not _LICENSE.fullmatch(license) or license in _YAML_WORDS:
        raise ValueError(
            f"license must be an identifier in small letters, such as mit, apache-2.0 or cc-by-4.0, not {license!r}"
        )


def is_untouched(path: Path) -> bool:
    """Whether this file is a card that nobody has edited since it was written."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    seal = _SEAL.search(text)
    return seal is not None and seal["digest"] == _digest(text[: seal.start()])


def model_card(
    name: str, source: Path, loaded: Checkpoint, scheduler: Scheduler, read_back: Mapping[str, Any], license: str = ""
) -> str:
    """The text of the card of the folder ``name``, which was written from the file ``source``.

    ``read_back`` are the fields of the diffusion process that the folder's scheduler determines. Without a ``license``
    the card says that it is unknown.
    """
    run, process = _run_of(loaded.metadata), loaded.diffusion_config
    conditional = "class-conditional" if loaded.model_config.class_cond else "unconditional"
    side = loaded.model_config.image_size
    of_run = f" of the run {_code(source.parent.name)}" if run is not None and source.parent.name else ""
    unknown = "unknown. Whoever publishes the model must know the rights to its training data, and name one"
    lines = [
        *("---", f"license: {license or 'other'}", "library_name: diffusers"),
        *([] if loaded.model_config.class_cond else ["pipeline_tag: unconditional-image-generation"]),
        *("tags:", "- fastdiff", "- diffusion", f"- {conditional}"),
        *("---", "", f"# {_text(name)}", ""),
        f"A diffusion model that draws images of {side} × {side} pixels, {conditional}, as a folder for diffusers.",
        f"fastdiff convert wrote it from {_code(source.name)}{of_run}.",
        *("", f"Licence: {license or unknown}.", ""),
        *("## Model", "", *_table(_model(loaded, scheduler)), ""),
        *_classes(loaded, run),
        *("## Training data", "", *_training_data(run), ""),
        *("## Training", "", *_training(loaded, run), ""),
        *("## Evaluation", "", *_evaluation(source), ""),
        *_environment(loaded.metadata.get("environment")),
        *("## Use", "", "With diffusers:", "", "```python"),
        *_diffusers_code(name, loaded.model_config, scheduler, _integer_steps(process)),
        *("```", "", "With fastdiff:", "", "```sh"),
        *_fastdiff_code(name, process, read_back),
        *("```", "", "## Limits", "", *(f"- {limit}" for limit in _limits(loaded, scheduler)), ""),
    ]
    text = "\n".join(lines) + "\n"
    return f"{text}<!-- fastdiff convert wrote this card: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _run_of(metadata: Mapping[str, Any]) -> RunConfig | None:
    """The settings of the run that made the file, if it has them and this version knows them."""
    try:
        return RunConfig.from_dict(metadata["run_config"])
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _text(value: object) -> str:
    """A text from outside as Markdown that shows it as it is, in one line."""
    line = printable(" ".join(str(value).split()))
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!@:^]|(?<=www)\.)", r"\\\1", line, flags=re.IGNORECASE)


def _code(value: object) -> str:
    """A name or number from outside as code, or as text if it has characters that end or confuse code."""
    line = str(value)
    plain = re.fullmatch(r"[\w.,:+()=-]([\w.,:+()= -]*[\w.,:+()=-])?", line) is not None and len(line) <= _LONGEST
    return f"`{line}`" if plain else _text(line)


def _last_part(path: str) -> str:
    """The last component of a path of any system."""
    return next((part for part in reversed(re.split(r"[\\/]+", path)) if part), "")


def _table(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ("", "")) -> Iterator[str]:
    yield from (f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _model(loaded: Checkpoint, scheduler: Scheduler) -> Rows:
    model, process = loaded.model_config, loaded.diffusion_config
    family = "guided-diffusion" if model.resblock_updown or model.num_head_channels != -1 else "improved-diffusion"
    yield "Architecture", f"UNet of {family}"
    yield "Parameters", f"{sum(p.numel() for p in loaded.model.parameters()):,}"
    yield "Images", f"{model.image_size} × {model.image_size} pixels, RGB"
    yield "Classes", f"{model.num_classes:,}" if model.class_cond else "none"
    yield "Channels by level", ", ".join(map(str, model.widths))
    yield "Residual blocks per level", f"{model.num_res_blocks}"
    sides = ", ".join(f"{model.image_size >> level}" for level in sorted(model.attention_levels, reverse=True))
    yield "Attention", f"at {sides} pixels, and in the middle" if sides else "in the middle"
    yield "Diffusion process", f"{process.diffusion_steps:,} steps, {process.noise_schedule} noise schedule"
    yield (
        "Prediction",
        _PREDICTIONS[process.prediction]
        + (", and the variance" if model.learn_sigma and scheduler is Scheduler.DDPM else ""),
    )
    yield "Scheduler", f"{scheduler.upper()}Scheduler with {_integer_steps(process):,} steps"


_PREDICTIONS = {
    Prediction.EPSILON: "the noise",
    Prediction.X_START: "x_0",
    Prediction.V: "v",
    Prediction.FLOW: "the velocity of a rectified flow",
}


def _integer_steps(process: DiffusionConfig) -> int:
    """The steps of the folder's scheduler."""
    return min(process.diffusion_steps, 1000) if process.rescale_timesteps else process.diffusion_steps


def _classes(loaded: Checkpoint, run: RunConfig | None) -> Iterator[str]:
    names = loaded.class_names
    if not names or not loaded.model_config.class_cond:
        return
    yield from ("### Classes", "")
    if len(names) > _MOST_NAMES:
        yield f"0 {_text(names[0])} to {len(names) - 1} {_text(names[-1])}, in the order of their names"
    elif len(names) > _MOST_ROWS:
        yield ", ".join(f"{i} {_text(name)}" for i, name in enumerate(names))
    elif run is not None and run.class_names == names and len(run.class_counts) == len(names):
        rows = ((f"{i}", _text(name), f"{run.class_counts[i]:,}") for i, name in enumerate(names))
        yield from _table(rows, ("label", "class", "training images"))
    else:
        yield from _table(((f"{i}", _text(name)) for i, name in enumerate(names)), ("label", "class"))
    yield ""


def _training_data(run: RunConfig | None) -> Iterator[str]:
    if run is None or not run.data.data_dir:
        yield "Unknown: the file does not say on which images the model was trained."
        return
    yield f"The images in {_code(_last_part(run.data.data_dir))}."
    if counts := run.class_counts:
        each = f"{min(counts):,} to {max(counts):,} of each"
        yield f"They are {sum(counts):,} images of {len(counts):,} classes, {each}."
    if run.train.holdout:
        yield f"{run.train.holdout:.3g} of them, chosen by a hash of their names, were held out to measure on."


def _training(loaded: Checkpoint, run: RunConfig | None) -> Iterator[str]:
    rows = list(_recipe(loaded, run))
    yield from _table(rows) if rows else ["Unknown: the file does not say how the model was trained."]


def _recipe(loaded: Checkpoint, run: RunConfig | None) -> Rows:
    metadata, usual = loaded.metadata, loaded.diffusion_config
    if loaded.step:
        yield "Updates", f"{loaded.step:,}" + (f" of {run.train.steps:,}" if run else "")
    if type(rate := metadata.get("ema_rate")) is float:
        yield "Weights", f"exponential moving average, rate {rate:g}"
    elif type(length := metadata.get("ema_length")) is float:
        yield "Weights", f"power-function average, length (sigma_rel) {length:g}"
    elif run is not None:
        yield "Weights", "as trained, without an average"
    if run is None:
        return
    train = run.train
    yield "Images per update", f"{train.batch_size:,}"
    schedule = f", warmed up over {train.lr_warmup_steps:,} updates" if train.lr_warmup_steps else ""
    schedule += f", annealed to 0 over {train.lr_anneal_steps:,}" if train.lr_anneal_steps else ""
    yield "Learning rate", f"{train.lr:g}{schedule}"
    yield "Optimiser", f"AdamW, weight decay {train.weight_decay:g}"
    if train.grad_clip:
        yield "Gradient norm", f"clipped to {train.grad_clip:g}"
    loss = "variational bound" if usual.use_kl else "mean squared error"
    yield "Loss", loss + (", and the bound for the variance" if usual.learn_sigma and not usual.use_kl else "")
    yield "Timesteps drawn", f"{train.schedule_sampler}"
    environment = metadata.get("environment")
    decided = environment.get("precision") if isinstance(environment, dict) else None
    yield "Precision", _code(decided or run.runtime.precision)
    for what, value in (("Dropout", loaded.model_config.dropout), ("Labels dropped", train.label_dropout)):
        if value:
            yield what, f"{value:g}"
    if run.data.flip:
        yield "Augmentation", "images mirrored left to right with probability 1/2"
    yield "Seed", f"{train.seed}"


def _evaluation(source: Path) -> Iterator[str]:
    """What the run's evaluations say of exactly this file."""
    rows: dict[str, str] = {}
    for entry in _evaluations(source):
        rows |= dict(_figures(entry))
    if rows:
        yield from _table(rows.items(), ("metric", "value"))
        yield from ("", "Lower is better for distances (FD, FID, KD, KID), higher for the others.")
    else:
        yield "No metrics of this checkpoint are recorded."
    best = _json(_read(source.parent / "best.json"))
    if best.get("checkpoint") == source.name and isinstance(best.get("name"), str):
        yield from ("", f"It is the best checkpoint of its run by {_text(best['name'])}.")


def _evaluations(source: Path) -> Iterator[dict[str, Any]]:
    for line in _read(source.parent / "evaluation" / "metrics.jsonl").splitlines():
        entry = _json(line)
        if entry.get("checkpoint") == source.name and source.is_file() and entry.get("sha256") == sha256(source):
            yield entry


def _figures(entry: Mapping[str, Any]) -> Rows:
    """The figures of an evaluation, each under a name that says how the images were drawn and what they are beside."""
    parts = {part: found if isinstance(found := entry.get(part), dict) else {} for part in _PARTS}
    samples, reference = parts["samples"], parts["reference"]
    how = f"{_text(samples['sampler'])}, {_text(samples['steps'])} steps" if {"sampler", "steps"} <= {*samples} else ""
    if isinstance(data := reference.get("data"), str):
        how += f"{', ' if how else ''}against {_text(_last_part(data))}"
    for key, name in parts["names"].items():
        value, deviation = parts["figures"].get(key), parts["figures"].get(f"{key}_deviation")
        if isinstance(value, (int, float)) and math.isfinite(value):
            spread = f" ± {deviation:.2g}" if isinstance(deviation, (int, float)) else ""
            yield _text(name) + (f", {how}" if how else ""), f"{value:.4g}{spread}"


_PARTS = ("samples", "reference", "figures", "names")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")  # a killed process may leave half a line
    except OSError:
        return ""


def _json(text: str) -> dict[str, Any]:
    """The JSON object that the text is; an empty one if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


_SHOWN = {
    "fastdiff": "fastdiff",
    "commit": "commit",
    "torch": "PyTorch",
    "triton": "Triton",
    "python": "Python",
    "device": "device",
    "processes": "processes",
    "kernels": "kernels",
    "compile": "compiled",
    "started": "started",
}
"""The entries of an environment that a card shows."""


def _environment(found: object) -> Iterator[str]:
    if isinstance(found, dict):
        rows = [(said, found.get(name)) for name, said in _SHOWN.items()]
        yield from ("## Environment", "")
        words = {True: "yes", False: "no"}
        shown = ((said, value) for said, value in rows if isinstance(value, (str, int, float)))
        yield from _table((said, words[v] if isinstance(v, bool) else _code(v)) for said, v in shown)
        yield ""


def _diffusers_code(name: str, model: ModelConfig, scheduler: Scheduler, steps: int) -> Iterator[str]:
    ddim = scheduler is Scheduler.DDIM
    kind, few = scheduler.upper(), min(_STEPS, steps) if ddim else steps
    clipped = ", use_clipped_model_output=True" if ddim else ""
    if not model.class_cond:
        yield f"from diffusers import {kind}Pipeline"
        yield ""
        yield f"pipeline = {kind}Pipeline.from_pretrained({_literal(name)})"
        yield f"images = pipeline(batch_size=4, num_inference_steps={few}{clipped}).images  # of PIL"
        return
    side, labels = model.image_size, [min(i, model.num_classes - 1) for i in range(4)]
    yield "import torch"
    yield f"from diffusers import {kind}Scheduler, UNet2DModel"
    yield ""
    yield f'unet = UNet2DModel.from_pretrained({_literal(name)}, subfolder="unet")'
    yield f'scheduler = {kind}Scheduler.from_pretrained({_literal(name)}, subfolder="scheduler")'
    yield f"labels = torch.tensor({labels})"
    yield f"x = torch.randn(len(labels), 3, {side}, {side})"
    yield f"scheduler.set_timesteps({few})"
    yield "with torch.no_grad():"
    yield "    for t in scheduler.timesteps:"
    yield "        output = unet(x, t, class_labels=labels).sample"
    yield f"        x = scheduler.step(output, t, x{clipped}).prev_sample"
    yield f"images = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)  # (N, 3, {side}, {side})"


def _literal(name: str) -> str:
    """The name as Python's literal, in double quotes where possible."""
    return f'"{name}"' if repr(name) == f"'{name}'" and '"' not in name else repr(name)


def _fastdiff_code(name: str, process: DiffusionConfig, read_back: Mapping[str, Any]) -> Iterator[str]:
    folder = shlex.quote(printable(f"./{name}" if name.startswith("-") else name))
    unsaid = [field for field in ("diffusion_steps", "noise_schedule") if field not in read_back]
    flags = "".join(f" --{field.replace('_', '-')} {getattr(process, field)}" for field in unsaid)
    if process.sigma_small and "sigma_small" not in read_back:
        flags += " --sigma-small"
    if not process.rescale_timesteps and "rescale_timesteps" not in read_back:
        flags += " --no-rescale-timesteps"
    yield f"fastdiff convert {folder} model.safetensors{flags}"
    yield "fastdiff sample model.safetensors --sampler ddim --steps " + str(min(_STEPS, process.diffusion_steps))


def _limits(loaded: Checkpoint, scheduler: Scheduler) -> Iterator[str]:
    model, metadata = loaded.model_config, loaded.metadata
    yield f"Images of other sizes than {model.image_size} × {model.image_size} pixels were not trained."
    yield "What the training images lack or show too often, so do the samples; samples may repeat training images."
    if model.learn_sigma and scheduler is Scheduler.DDIM:
        yield "The learned variance is not in this folder: DDIM does not use it."
    if metadata.get("ema_warmup") is False and loaded.step and metadata["ema_rate"] ** loaded.step > 0.01:
        yield "The average of the weights is young: it still holds part of the initial ones."
    if model.class_cond:
        yield f"{scheduler.upper()}Pipeline gives no class labels: call the UNet2DModel as above."
    if metadata.get("label_dropout"):
        yield "The model also knows images without a class (classifier-free guidance), which only fastdiff can ask for."
    if loaded.diffusion_config.rescale_timesteps and loaded.diffusion_config.diffusion_steps > 1000:
        yield "Of the steps of training only 1,000 are in the scheduler: diffusers gives a model whole timesteps only."
