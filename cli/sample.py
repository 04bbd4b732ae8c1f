"""``fastdiff sample``: a checkpoint in, images out."""

import difflib
import os
import re
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.options import DebugFlag, Flags, PresetFlag, all_flags, build, refuse_contradiction, with_flags
from fastdiff.config import DiffusionConfig, ModelConfig, RuntimeConfig, SampleConfig, Sampler
from fastdiff.runtime.words import duration

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastdiff.checkpoint import Checkpoint
    from fastdiff.cli.display import Display
    from fastdiff.runtime.device import Runtime

GRID_IMAGES = 100
"""The grid beside the npz shows the first of them."""

MOST_COLUMNS = 16


@with_flags(SampleConfig, RuntimeConfig, ModelConfig, DiffusionConfig)
def sample(
    flags: Flags,
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint or run folder; by default the newest run under runs/.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The npz file to write; a grid appears beside it as .png.")] = Path(
        "samples.npz"
    ),
    class_: Annotated[
        str | None, typer.Option("--class", help="Class to draw, by name or index; by default all in turn.")
    ] = None,
    png_dir: Annotated[Path | None, typer.Option(help="Write every image as a PNG file into this folder too.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output file that exists.")] = False,
    preset: PresetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Draw images from a trained model.

    A checkpoint knows its model; the model's and the process's flags are for bare state dicts (.pt) only.
    """
    run_sampling(
        all_flags(flags, preset, ModelConfig, DiffusionConfig),
        checkpoint,
        out,
        class_=class_,
        png_dir=png_dir,
        overwrite=overwrite,
    )


def run_sampling(
    flags: Flags,
    checkpoint: Path | None,
    out: Path,
    *,
    class_: str | None = None,
    png_dir: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Sample as ``flags`` say."""
    config = build(SampleConfig, flags)
    _check_output(out, overwrite)
    if png_dir is not None:
        if png_dir.is_dir() and any(png_dir.glob("*.png")) and not overwrite:
            raise ValueError(f"png_dir {png_dir} holds PNG files: name another folder, or use --overwrite")
        _check_folder("png_dir", png_dir)
    import numpy as np

    from fastdiff.checkpoint import find_checkpoint
    from fastdiff.cli.display import Display
    from fastdiff.runtime.device import Runtime
    from fastdiff.sampling import generate, save_grid, save_npz, save_pngs

    runtime = Runtime.resolve(build(RuntimeConfig, flags))
    path = find_checkpoint(checkpoint)
    loaded = _load(path, flags, config, runtime)
    labels = _labels(loaded, class_, config.num_samples)
    batches = -(-config.num_samples // config.batch_size)
    steps = loaded.diffusion.num_timesteps
    calls = batches * (2 * steps - 1 if config.sampler is Sampler.HEUN else steps)
    model = runtime.prepare(loaded.model, calls)
    with Display() as display:
        display.line(f"model: {path}, step {loaded.step}{_young_average(loaded)}")
        display.line(
            f"drawing: {config.num_samples} images of {loaded.model_config.image_size} pixels, "
            f"{steps} {config.sampler} steps, seed {config.seed}; {runtime.describe(calls)}"
        )
        if steps > 250 and runtime.device.type == "cpu":
            display.line("hint: fewer steps are faster, try --sampler dpm++ --steps 20")
        meter = _Meter(display, config.num_samples * steps)
        drawn = generate(
            model,
            loaded.diffusion,
            config,
            image_size=loaded.model_config.image_size,
            device=runtime.device,
            labels=labels,
            on_step=meter.step,
        )
        images = np.concatenate(list(drawn))
        grid = out.with_suffix(".png")
        save_npz(out, images, labels)
        save_grid(grid, images[:GRID_IMAGES], _columns(loaded.model_config))
        display.line(f"wrote {out} and {grid}, {config.num_samples / meter.seconds:.2f} images/s")
        if png_dir is not None:
            save_pngs(png_dir, images, _names(loaded.class_names, labels, len(images)))
            display.line(f"wrote {len(images)} PNG files in {png_dir}")


def _columns(model: ModelConfig) -> int | None:
    """One column a class where they are few: the classes are drawn in turn."""
    return model.num_classes if model.class_cond and 1 < model.num_classes <= MOST_COLUMNS else None


class _Meter:
    """Tells the display how far the loop is, a few times a second."""

    def __init__(self, display: "Display", total: int) -> None:
        self._display = display
        self._total = total
        self._done = 0
        self._began = self._shown = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._began

    def step(self, images: int) -> None:
        """One more step of so many images is done."""
        self._done += images
        now = time.perf_counter()
        if now - self._shown >= (0.2 if self._display.live else 30) or self._done == self._total:
            self._shown = now
            left = self.seconds / self._done * (self._total - self._done)
            self._display.advance("image steps", self._done, self._total, f"{duration(left)} left")


def _load(path: Path, flags: Flags, config: SampleConfig, runtime: "Runtime") -> "Checkpoint":
    """The checkpoint with the timesteps that were asked for; flags may only describe a bare state dict."""
    from fastdiff.checkpoint import load_checkpoint
    from fastdiff.diffusion import build_diffusion

    model_flags = {f.name for f in fields(ModelConfig)} | {f.name for f in fields(DiffusionConfig)}
    given = {k: v for k, v in flags.items() if k in model_flags - {"timestep_respacing"}}
    bare = given and path.suffix != ".safetensors"
    loaded = load_checkpoint(
        path,
        model_config=build(ModelConfig, given) if bare else None,
        diffusion_config=build(DiffusionConfig, given) if bare else None,
        device=runtime.device,
        kernels=runtime.kernels,
        memory_format=runtime.memory_format,
    )
    refuse_contradiction(given, str(path), loaded.model_config, loaded.diffusion_config)
    if loaded.model_config.small_size is not None:
        raise ValueError(f"{path} is a super-resolution model: drawing from those is not part of this version")
    if config.respacing is None:
        return loaded
    respaced = replace(loaded.diffusion_config, timestep_respacing=config.respacing)
    return replace(loaded, diffusion=build_diffusion(respaced, runtime.kernels), diffusion_config=respaced)


def _labels(loaded: "Checkpoint", wanted: str | None, count: int) -> "NDArray[np.int64] | None":
    """The class of every image: the one that is wanted, or all in turn; None for a model without classes."""
    import numpy as np

    number = loaded.model_config.num_classes
    if not loaded.model_config.class_cond:
        if wanted is not None:
            raise ValueError(f"class {wanted}: this model was trained without classes (class_cond)")
        return None
    if wanted is None:
        return np.arange(count) % number
    names = loaded.class_names
    if wanted in names:
        index = names.index(wanted)
    elif wanted.isdecimal() and int(wanted) < number:
        index = int(wanted)
    else:
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names[:10]
        known = f"; there are {', '.join(near)}{' and more' if len(names) > len(near) else ''}" if names else ""
        raise ValueError(f"class {wanted!r} is none of the model's {number} classes{known}")
    return np.full(count, index)


def _names(class_names: tuple[str, ...], labels: "NDArray[np.int64] | None", count: int) -> list[str]:
    """File names that begin with the class, so that the folder can be trained on as it is."""
    if labels is None or not class_names:
        return [f"{i:06d}" for i in range(count)]
    # A name comes from a file that may be anybody's: it must not lead out of the folder.
    names = {i: re.sub(r"[/\\\0]|^\.+", "_", name) for i, name in enumerate(class_names)}
    return [f"{names.get(int(label), label)}_{i:06d}" for i, label in enumerate(labels)]


def _young_average(loaded: "Checkpoint") -> str:
    """A word of warning where an average without warm-up still holds much of the initial weights."""
    rate, updates = loaded.metadata.get("ema_rate", 0.0), loaded.metadata.get("ema_updates", 0)
    share = 0.0 if loaded.metadata.get("ema_warmup", True) else rate**updates
    return f" (warning: {share:.0%} of this average are the initial weights)" if share > 0.01 else ""


def _check_output(out: Path, overwrite: bool) -> None:
    """ValueError, before any work, where the output is in the way or cannot be written."""
    for path in (out, out.with_suffix(".png")):
        if path.is_dir():
            raise ValueError(f"out {path} is a folder: name a file")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: name another file with --out, or use --overwrite")
    if out.suffix != ".npz":
        raise ValueError(f"out {out} must end in .npz")
    _check_folder("out", out.parent)


def _check_folder(name: str, wanted: Path) -> None:
    """ValueError where the folder is not there and cannot be made, or may not be written to."""
    folder = wanted
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name} {wanted} cannot be written: {folder} is not a folder that you may write to")
