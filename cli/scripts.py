"""Translates command lines of improved-diffusion and guided-diffusion: scripts, flags, defaults and environment."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

LOG_FORMATS = ("stdout", "log", "csv", "json", "tensorboard")
"""The formats that OPENAI_LOG_FORMAT may name."""

SWITCHES = frozenset(("anneal-lr", "classifier-use-fp16", "noised", "use-ddim", "use-fp16"))
"""Boolean flags of the two projects that have another name here, or belong to one script only."""

_REPLACED = {
    "--use-ddim": ("--sampler", "ddim"),
    "--no-use-ddim": ("--sampler", "ddpm"),
    "--use-fp16": ("--precision", "fp16"),
    "--no-use-fp16": ("--precision", "auto"),
    "--large-size": ("--image-size",),
}
_EMPTY_MEANS_NONE = ("--base-samples", "--classifier-path", "--model-path", "--resume-checkpoint", "--val-data-dir")
_OUR_PATHS = {"--classifier-path": "--classifier"}
_SHARED = ("train", "train-classifier", "sample", "evaluate")  # commands that several processes run together
_MPI_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
_MPI_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")

_ONLY = {
    "improved": ("sigma-small",),
    "guided": ("channel-mult", "num-head-channels", "resblock-updown", "use-new-attention-order"),
}
"""The projects, and the flags that only their scripts have."""


@dataclass(frozen=True)
class Script:
    """A script of the two projects: the equivalent command, with the script's defaults.

    ``assumed`` are its defaults for settings that a preset or a checkpoint would supply, and ``guided`` those that it
    has in guided-diffusion only. ``out`` is the option and the file name for its output in OPENAI_LOGDIR; ``replaced``
    are flags with another meaning here, or none. ``only_guided`` scripts do not exist in improved-diffusion.
    """

    command: tuple[str, ...]
    defaults: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    guided: tuple[str, ...] = ()
    out: tuple[str, str] | None = None
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only_guided: bool = False


_PER_PROCESS = "--batch-size-per-process"
_UNSAID = ("--diffusion-steps", "1000", "--noise-schedule", "linear", "--num-heads", "4")  # not in a state dict
_UNSCALED = ("--no-rescale-timesteps", "--no-rescale-learned-sigmas")
_UNSAID_GUIDED = (*_UNSCALED, "--no-use-new-attention-order")
_OF_DIFFUSION_MODELS = tuple(  # no part of a classifier's training, but flags of its script
    f"--{no}{name}"
    for name in ("learn-sigma", "use-kl", "predict-xstart", "rescale-learned-sigmas")
    for no in ("", "no-")
)
_SMALL_SIZE = ("--small-size", "64")
_LABELS = ("--labels", "prefix")
_TRAIN = Script(
    ("train",),
    ("--recipe", "improved", "--no-ema-warmup", *_LABELS),
    assumed=(_PER_PROCESS, "1"),
    guided=(*_UNSCALED, "--flip"),
    replaced={"--batch-size": (_PER_PROCESS,)},
)
_SAMPLE = Script(
    ("sample",),
    ("--num-samples", "10000", "--batch-size", "16"),
    assumed=_UNSAID,
    guided=_UNSAID_GUIDED,
    out=("--out", "samples_{shape}.npz"),
)
SCRIPTS: Mapping[str, Script] = {
    "image_train": _TRAIN,
    "super_res_train": replace(_TRAIN, assumed=(*_TRAIN.assumed, "--image-size", "256", *_SMALL_SIZE)),
    "image_sample": _SAMPLE,
    "super_res_sample": replace(
        _SAMPLE, assumed=(*_SAMPLE.assumed, *_SMALL_SIZE), guided=(*_UNSAID_GUIDED, "--image-size", "256")
    ),
    "image_nll": Script(
        ("evaluate", "nll"),
        ("--num-samples", "1000", "--batch-size", "1", *_LABELS),
        assumed=_UNSAID,
        guided=_UNSAID_GUIDED,
        out=("--out-dir", ""),
        replaced={"--no-use-fp16": ("--precision", "fp32")},
    ),
    "classifier_train": Script(
        ("train-classifier",),
        # The original measures one batch every 5 updates. fastdiff measures more images, as often as by default.
        ("--holdout", "0", "--no-rescale-timesteps", "--flip", *_LABELS),
        assumed=(_PER_PROCESS, "4", "--steps", "150000", "--lr", "3e-4", "--weight-decay", "0.0"),
        replaced={
            "--batch-size": (_PER_PROCESS,),
            "--iterations": ("--steps",),
            "--classifier-use-fp16": ("--precision", "fp16"),
            "--no-classifier-use-fp16": ("--precision", "auto"),
            **dict.fromkeys(_OF_DIFFUSION_MODELS, ()),
        },
        only_guided=True,
    ),
    "classifier_sample": replace(
        _SAMPLE,
        defaults=(*_SAMPLE.defaults, "--classifier-scale", "1.0"),
        # one precision is for both models: --use-fp16 decides
        replaced={"--classifier-use-fp16": (), "--no-classifier-use-fp16": ()},
        only_guided=True,
    ),
}
"""The scripts by name; hyphens may replace the underscores."""


def log_folder() -> Path | None:
    """The run folder that the environment names, or None: DIFFUSION_BLOB_LOGDIR overrides OPENAI_LOGDIR.

    ValueError for a network address, which the originals could write to.
    """
    return _folder_in("DIFFUSION_BLOB_LOGDIR") or _folder_in("OPENAI_LOGDIR")


def _folder_in(variable: str) -> Path | None:
    folder = os.environ.get(variable)
    if not folder:
        return None
    if "://" in folder:
        raise ValueError(f"{variable} {folder}: only folders can be written to; mount it, or name another")
    return Path(folder).expanduser()


def log_formats() -> frozenset[str]:
    """The formats that OPENAI_LOG_FORMAT names; ValueError if one is unknown."""
    names = os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv").split(",")
    asked = frozenset(filter(None, map(str.strip, names)))
    if unknown := sorted(asked - set(LOG_FORMATS)):
        raise ValueError(f"OPENAI_LOG_FORMAT names {', '.join(unknown)}: there are {', '.join(LOG_FORMATS)}")
    return asked


def refuse_mpi(arguments: Sequence[str]) -> None:
    """ValueError, with the torchrun command, if mpiexec started this process as one of several."""
    if "RANK" in os.environ:  # set by torchrun, which mpiexec itself may have started on each machine
        return
    if not arguments or not (arguments[0] in _SHARED or script_of(arguments)):
        return
    if (count := _number_in(_MPI_SIZE, 1)) < 2:
        return
    if _number_in(_MPI_RANK, 0):
        sys.exit(2)  # the first process reports it
    here = min(max(_number_in(_MPI_LOCAL_SIZE, count), 1), count)
    where, each = ["--standalone"], ""
    if here < count:
        where = [f"--nnodes={-(-count // here)}", "--rdzv-backend=c10d", "--rdzv-endpoint=FIRST_MACHINE:29500"]
        each = f"; on each machine ({count} processes in all)"
    line = shlex.join(["torchrun", *where, f"--nproc-per-node={here}", "-m", "fastdiff", *arguments])
    raise ValueError(f"fastdiff is started by torchrun, not by mpiexec{each}: {line}")


def _number_in(variables: Sequence[str], default: int) -> int:
    """The largest integer in these environment variables, or ``default``."""
    found = [os.environ.get(name, "") for name in variables]
    return max((int(text) for text in found if text.isascii() and text.isdecimal() and len(text) < 7), default=default)


def in_our_words(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Translate a command line with the two projects' flags, or of one of their scripts, into a fastdiff one.

    Flags are already spelt with hyphens, and switches have no values (options.with_old_spelling). Later flags still
    override earlier ones; a script's defaults come first. The second value says which project's defaults they are, if
    it makes a difference and was not chosen with --defaults; else it is empty. ValueError if the flags are of both.
    """
    if not arguments:
        return [], ""
    script = script_of(arguments)
    command = script.command if script else (arguments[0],)
    named = command[0] in ("sample", "evaluate")  # commands that take the model as an argument
    given, chosen = _taken("--defaults", arguments[1:]) if script else (list(arguments[1:]), None)
    words, model = _translated(given, script.replaced if script else {}, named)
    half = [word for word in arguments if word.endswith("use-fp16")][-1:]
    trains = command[0] in ("train", "train-classifier")
    if trains and half in (["--use-fp16"], ["--classifier-use-fp16"]) and not _given("--fp16-scale-growth", words):
        words += ["--fp16-scale-growth", "1e-3"]  # the originals' default
    if script is None:
        return [*command, *words, *model], ""
    if "--classifier-scale" in script.defaults and model and not _given("--classifier", words):
        raise ValueError("classifier_sample guides by a classifier: name it with --classifier_path")
    # a fastdiff checkpoint or run folder stores these settings
    bare = any(Path(path).suffix != ".safetensors" and not _is_run(Path(path)) for path in model)
    unsaid = (not named or bare) and not _given("--preset", words)
    project, said = _project_of(arguments[0], script, given, chosen)
    assumed = (*script.assumed, *(script.guided if project == "guided" else ())) if unsaid else ()
    found = [*script.defaults, *assumed, *_output(script), *words]
    if "--iterations" in script.replaced:
        found = _annealed(found)
    return [*command, *found, *model], said if unsaid else ""


def _project_of(name: str, script: Script, given: Sequence[str], chosen: str | None) -> tuple[str, str]:
    """The project whose defaults a script has, and a line that says so, empty if there is no choice or it is made."""
    if chosen is not None and chosen not in _ONLY:
        raise ValueError(f"defaults must be one of {', '.join(_ONLY)}, not {chosen!r}")
    if script.only_guided:
        if chosen == "improved":
            raise ValueError(f"improved-diffusion has no script {name}: leave out --defaults")
        return "guided", ""
    if chosen is not None:
        return chosen, ""
    signs = {project: flag for flag in reversed(list(_set(given))) for project in _ONLY if _is_only_of(project, flag)}
    if len(signs) > 1:
        raise ValueError(
            f"{signs['improved']} is a flag of improved-diffusion only, {signs['guided']} of guided-diffusion: choose "
            f"the defaults of {name} with --defaults improved or --defaults guided"
        )
    project, other = ("guided", "improved") if "guided" in signs else ("improved", "guided")
    reason = f", as only it has {signs[project]}" if signs else ""
    return project, f"{name}: {project}-diffusion's defaults{reason} (--defaults {other}: {other}-diffusion's)"


def _set(words: Sequence[str]) -> Iterator[str]:
    """The flags in the words, but for those with the value -1, which means that they are not set."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--") and (value if equals else after) != "-1":
            yield name


def _is_only_of(project: str, flag: str) -> bool:
    """Whether only this project has the flag; a switch that is off, as in a run's config.json, says nothing."""
    name = flag.removeprefix("--")
    return name in _ONLY[project] or (project == "guided" and name.startswith("classifier-"))


def _taken(flag: str, arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The other words, and the last value of ``flag``, None if it is not there."""
    rest: list[str] = []
    value = None
    words = iter(arguments)
    for word in words:
        name, equals, text = word.partition("=")
        if word == "--":
            rest += [word, *words]
        elif name == flag:
            value = text if equals else next(words, "")
        else:
            rest.append(word)
    return rest, value


def _annealed(words: Sequence[str]) -> list[str]:
    """The words with --anneal-lr in ours: the learning rate falls to 0 over all of the --steps."""
    switches = ("--anneal-lr", "--no-anneal-lr")
    rest = [word for word in words if word not in switches]
    _, steps = _taken("--steps", rest)
    last = [word for word in words if word in switches][-1:]
    return [*rest, "--lr-anneal-steps", steps] if last == ["--anneal-lr"] and steps else rest


def explained(name: str) -> str:
    """What the name of a script stands for: the equivalent command, with each project's defaults and --defaults."""
    script = SCRIPTS[name.replace("-", "_")]
    shown = {
        p: shlex.join(in_our_words((name, "--defaults", p))[0]) for p in (["guided"] if script.only_guided else _ONLY)
    }
    first, *more = shown
    lines = [f"fastdiff {name} is {first}-diffusion's script: fastdiff {shown[first]} ..."]
    for p in more:
        if shown[p] != shown[first]:
            lines.append(f"With --defaults {p} it is {p}-diffusion's: fastdiff {shown[p]} ...")
        else:
            lines.append(
                f"A bare .pt file is read with {shlex.join(script.assumed)}; with --defaults {p} as {p}-diffusion's, "
                f"also with {shlex.join(script.guided)}."
            )
    return "\n".join(lines)


def _is_run(place: Path) -> bool:
    """Whether it is a run folder, or run@step."""
    name, at, _ = place.name.rpartition("@")
    return place.is_dir() or bool(at and (place.parent / name).is_dir())


def _given(flag: str, words: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == flag for word in words)


def script_of(arguments: Sequence[str]) -> Script | None:
    """The script that the first word of a command line names, or None."""
    return SCRIPTS.get(arguments[0].replace("-", "_")) if arguments else None


def _translated(
    arguments: Sequence[str], replaced: Mapping[str, tuple[str, ...]], named: bool
) -> tuple[list[str], list[str]]:
    """The words in fastdiff's spelling, and the path of --model-path if ``named``: here it is an argument."""
    words: list[str] = []
    paths: dict[str, str] = {}  # the last occurrence counts; an empty path means none
    known = _REPLACED | dict(replaced)
    rest = list(arguments)
    while rest and (word := rest.pop(0)) != "--":
        name, equals, value = word.partition("=")
        if name in _EMPTY_MEANS_NONE and (named or name != "--model-path"):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise ValueError(f"{name} needs a value: name a file, or leave it out")
                value = rest.pop(0)
            paths[name] = value
        elif name in known:
            if known[name]:
                *before, last = known[name]
                words += [*before, last + equals + value]
        else:
            words.append(word)
    model = paths.pop("--model-path", "")
    words += [word for name, path in paths.items() if path for word in (_OUR_PATHS.get(name, name), path)]
    return [*words, *(["--", *rest] if rest else [])], [model] if model else []


def _output(script: Script) -> list[str]:
    """The option that names the script's output."""
    if script.out is None:
        return []
    option, name = script.out
    folder = _folder_in("OPENAI_LOGDIR")
    if not name:
        return [option, str(folder)] if folder else []
    return [option, str((folder or Path()) / name)]
