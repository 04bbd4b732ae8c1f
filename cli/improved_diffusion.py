"""Translates improved-diffusion's command lines: the names, flags, defaults and environment of its scripts."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

LOG_FORMATS = ("stdout", "log", "csv", "json", "tensorboard")
"""The formats that OPENAI_LOG_FORMAT may name."""

SWITCHES = frozenset(("use-ddim", "use-fp16"))
"""Boolean flags of improved-diffusion that have another name here."""

_REPLACED = {
    "--use-ddim": ("--sampler", "ddim"),
    "--no-use-ddim": ("--sampler", "ddpm"),
    "--use-fp16": ("--precision", "fp16"),
    "--no-use-fp16": ("--precision", "auto"),
    "--large-size": ("--image-size",),
}
_EMPTY_MEANS_NONE = ("--base-samples", "--model-path", "--resume-checkpoint")
_SHARED = ("train", "sample", "evaluate")  # commands that several processes run together
_MPI_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
_MPI_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Script:
    """A script of improved-diffusion: the equivalent command, with the script's defaults.

    ``assumed`` are its defaults for settings that a preset or a checkpoint would supply; ``out`` is the option and the
    file name for its output in OPENAI_LOGDIR; ``replaced`` are flags with another meaning here.
    """

    command: tuple[str, ...]
    defaults: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    out: tuple[str, str] | None = None
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_PER_PROCESS = "--batch-size-per-process"
_TRAIN = Script(
    ("train",), ("--no-ema-warmup",), assumed=(_PER_PROCESS, "1"), replaced={"--batch-size": (_PER_PROCESS,)}
)
_UNSAID = ("--diffusion-steps", "1000", "--noise-schedule", "linear", "--num-heads", "4")  # not in a state dict
_SMALL_SIZE = ("--small-size", "64")
_SAMPLE = Script(
    ("sample",),
    ("--num-samples", "10000", "--batch-size", "16"),
    assumed=_UNSAID,
    out=("--out", "samples_{shape}.npz"),
)
SCRIPTS: Mapping[str, Script] = {
    "image_train": _TRAIN,
    "super_res_train": replace(_TRAIN, assumed=(*_TRAIN.assumed, "--image-size", "256", *_SMALL_SIZE)),
    "image_sample": _SAMPLE,
    "super_res_sample": replace(_SAMPLE, assumed=(*_SAMPLE.assumed, *_SMALL_SIZE)),
    "image_nll": Script(
        ("evaluate", "nll"),
        ("--num-samples", "1000", "--batch-size", "1"),
        assumed=_UNSAID,
        out=("--out-dir", ""),
        replaced={"--no-use-fp16": ("--precision", "fp32")},
    ),
}
"""The scripts by name; hyphens may replace the underscores."""


def log_folder() -> Path | None:
    """The run folder that the environment names, or None: DIFFUSION_BLOB_LOGDIR overrides OPENAI_LOGDIR.

    ValueError for a network address, which improved-diffusion could write to.
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


def in_our_words(arguments: Sequence[str]) -> list[str]:
    """Translate a command line with improved-diffusion's flags, or of one of its scripts, into a fastdiff one.

    Flags are already spelt with hyphens, and switches have no values (options.with_old_spelling). Later flags still
    override earlier ones; a script's defaults come first.
    """
    if not arguments:
        return []
    script = script_of(arguments)
    command = script.command if script else (arguments[0],)
    named = command[0] in ("sample", "evaluate")  # commands that take the model as an argument
    words, model = _translated(arguments[1:], script.replaced if script else {}, named)
    half = [word for word in arguments if word in ("--use-fp16", "--no-use-fp16")][-1:]
    if command[0] == "train" and half == ["--use-fp16"] and not _given("--fp16-scale-growth", words):
        words += ["--fp16-scale-growth", "1e-3"]  # improved-diffusion's default
    if script is None:
        return [*command, *words, *model]
    # a fastdiff checkpoint or run folder stores these settings
    bare = any(Path(path).suffix != ".safetensors" and not _is_run(Path(path)) for path in model)
    unsaid = (command[0] == "train" or bare) and not _given("--preset", words)
    assumed = script.assumed if unsaid else ()
    return [*command, *script.defaults, *assumed, *_output(script), *words, *model]


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
            *before, last = known[name]
            words += [*before, last + equals + value]
        else:
            words.append(word)
    model = paths.pop("--model-path", "")
    words += [word for name, path in paths.items() if path for word in (name, path)]
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
