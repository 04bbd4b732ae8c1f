"""improved-diffusion's command lines: its scripts' names, flags, defaults and environment, said in ours."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LOG_FORMATS = ("stdout", "log", "csv", "json", "tensorboard")
"""What OPENAI_LOG_FORMAT may name."""

SWITCHES = frozenset(("use-ddim", "use-fp16"))
"""Flags of improved-diffusion that are on or off and that have another name here."""

_REPLACED = {
    "--use-ddim": ("--sampler", "ddim"),
    "--no-use-ddim": ("--sampler", "ddpm"),
    "--use-fp16": ("--precision", "fp16"),
    "--no-use-fp16": ("--precision", "auto"),
    "--large-size": ("--image-size",),
}
_EMPTY_MEANS_NONE = ("--base-samples", "--model-path", "--resume-checkpoint")
_MPI_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Script:
    """A script of improved-diffusion: the command that does the same, with the script's defaults.

    ``bare`` are its defaults for what a state dict does not say of itself; ``out`` is the option and the file for what
    it writes into OPENAI_LOGDIR; ``replaced`` are flags that mean something else here.
    """

    command: tuple[str, ...]
    defaults: tuple[str, ...]
    bare: tuple[str, ...] = ()
    out: tuple[str, str] | None = None
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_TRAIN = Script(
    ("train",),
    ("--batch-size-per-process", "1", "--no-ema-warmup"),
    replaced={"--batch-size": ("--batch-size-per-process",)},
)
_BARE = ("--diffusion-steps", "1000", "--noise-schedule", "linear", "--num-heads", "4")
_SAMPLE = Script(
    ("sample",),
    ("--num-samples", "10000", "--batch-size", "16"),
    bare=_BARE,
    out=("--out", "samples_{shape}.npz"),
)
_UPSAMPLING = ("--image-size", "256", "--small-size", "64")
SCRIPTS: Mapping[str, Script] = {
    "image_train": _TRAIN,
    "super_res_train": Script(_TRAIN.command, (*_TRAIN.defaults, *_UPSAMPLING), replaced=_TRAIN.replaced),
    "image_sample": _SAMPLE,
    "super_res_sample": Script(_SAMPLE.command, _SAMPLE.defaults, (*_BARE, *_UPSAMPLING), _SAMPLE.out),
    "image_nll": Script(
        ("evaluate", "nll"),
        ("--num-samples", "1000", "--batch-size", "1"),
        bare=_BARE,
        out=("--out-dir", ""),
        replaced={"--no-use-fp16": ("--precision", "fp32")},
    ),
}
"""By name; its parameters are written with underscores or hyphens."""


def log_folder() -> Path | None:
    """The run folder that the environment names, if it does: the one for checkpoints goes before that for the log.

    ValueError for an address of a store in a network, which improved-diffusion could write to.
    """
    for name in ("DIFFUSION_BLOB_LOGDIR", "OPENAI_LOGDIR"):
        if folder := os.environ.get(name):
            if "://" in folder:
                raise ValueError(f"{name} {folder}: only folders can be written to; mount it, or name another")
            return Path(folder).expanduser()
    return None


def log_formats() -> frozenset[str]:
    """What OPENAI_LOG_FORMAT asks for; ValueError where it names what is no format."""
    asked = frozenset(filter(None, os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv").split(",")))
    if unknown := sorted(asked - set(LOG_FORMATS)):
        raise ValueError(f"OPENAI_LOG_FORMAT names {', '.join(unknown)}: there are {', '.join(LOG_FORMATS)}")
    return asked


def refuse_mpi(arguments: Sequence[str]) -> None:
    """ValueError, with torchrun's line, where mpiexec has started this process as one of several."""
    if "RANK" in os.environ:  # torchrun's, which may itself have been started so on each machine
        return
    sizes = [os.environ.get(name, "") for name in _MPI_SIZE]
    count = max((int(size) for size in sizes if size.isdecimal()), default=1)
    if count > 1:
        if any(os.environ.get(name, "0") != "0" for name in _MPI_RANK):
            sys.exit(2)  # the first one says it
        line = shlex.join(["torchrun", "--standalone", f"--nproc-per-node={count}", "-m", "fastdiff", *arguments])
        raise ValueError(f"fastdiff is started by torchrun, not by mpiexec: {line}")


def in_our_words(arguments: Sequence[str]) -> list[str]:
    """A command line with improved-diffusion's flags, or of one of its scripts, as one of ours.

    Flags are spelt with hyphens already, and switches have no values (options.with_old_spelling). What stands later
    still counts before what stands first, and a script's defaults stand before all.
    """
    if not arguments:
        return []
    script = script_of(arguments)
    words, model = _translated(arguments[1:], script.replaced if script else {})
    command = script.command if script else (arguments[0],)
    if command[0] == "train" and "--use-fp16" in arguments and not any("--fp16-scale-growth" in word for word in words):
        words += ["--fp16-scale-growth", "1e-3"]  # what goes without saying there
    if script is None:
        return [*command, *words, *model]
    bare = model and Path(model[0]).suffix != ".safetensors" and not Path(model[0]).is_dir()
    undetermined = script.bare if bare and "--preset" not in words else ()
    return [*script.command, *script.defaults, *undetermined, *_output(script), *words, *model]


def script_of(arguments: Sequence[str]) -> Script | None:
    """The script whose name a command line begins with."""
    return SCRIPTS.get(arguments[0].replace("-", "_")) if arguments else None


def _translated(arguments: Sequence[str], replaced: Mapping[str, tuple[str, ...]]) -> tuple[list[str], list[str]]:
    """The words in our spelling, and the path of the model where it is named by a flag, which here is an argument."""
    words: list[str] = []
    model: list[str] = []
    known = _REPLACED | dict(replaced)
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*words, word, *rest], model
        name, equals, value = word.partition("=")
        if name in _EMPTY_MEANS_NONE:
            if not equals:
                value = rest.pop(0) if rest else ""
            if name == "--model-path":
                model = [value] if value else []
            elif value:
                words += [name, value]
        elif name in known:
            *before, last = known[name]
            words += [*before, last + equals + value]
        else:
            words.append(word)
    return words, model


def _output(script: Script) -> list[str]:
    """The option that says where the script's file goes."""
    if script.out is None:
        return []
    option, name = script.out
    folder = os.environ.get("OPENAI_LOGDIR", "")
    if not name:
        return [option, folder] if folder else []
    return [option, str(Path(folder).expanduser() / name)]
