"""A training run from its settings to its exit status: plans it, opens or resumes the folder, and trains."""

import shlex
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastdiff.checkpoint import Lease
from fastdiff.config import (
    FAST_STEPS,
    ClassifierConfig,
    Compile,
    ModelConfig,
    Parallel,
    Precision,
    Recipe,
    RunConfig,
    StartConfig,
    TrainConfig,
    is_table_size,
)
from fastdiff.data import Dataset, load_shared
from fastdiff.diffusion import build_diffusion
from fastdiff.interop.openai_run import step_of
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.display import Lines
from fastdiff.runtime.distributed import World, launcher
from fastdiff.runtime.environment import environment
from fastdiff.training import recipe, resuming, run_folder, trackers
from fastdiff.training.fine_tuning import Initial
from fastdiff.training.held_out import hold_out
from fastdiff.training.plan import Plan, decide
from fastdiff.training.recipe import TimeLimit
from fastdiff.training.trainer import Trainer


@dataclass(frozen=True)
class Ended:
    """The folder of a run that ended, and its process's exit status: 0, or 128 plus the signal number."""

    run_dir: Path
    status: int


def run(
    flags: Mapping[str, Any],
    start: StartConfig,
    world: World,
    display: Lines,
    classifier: bool = False,
    command: str = "",
) -> Ended:
    """Train with the flags, or resume the run in their folder with its configuration and the flags. Collective.

    It trains a diffusion model, or a ``classifier``. ``flags`` are fields of a run's configurations, and ``start`` is
    their StartConfig; an absent flag was not given. ``command`` is what the run's files say was called.
    """
    began = time.perf_counter()
    with ExitStack() as held:
        held.enter_context(world.explained("use a smaller model, or --parallel fsdp on several GPUs"))
        read: list[Initial] = []
        plan = world.from_main(lambda: decide(dict(flags), start, world, held, classifier, read))
        return Ended(plan.run_dir, _carry_out(plan, world, display, held, read, command, began))


def _carry_out(
    plan: Plan, world: World, display: Lines, held: ExitStack, read: list[Initial], command: str, began: float
) -> int:
    """Load the images, open the folder, and train; returns the exit status. Takes the weights from ``read``, if any.

    The run ``began`` at that time.perf_counter().
    """
    run_dir, config = plan.run_dir, plan.config

    def resolve() -> Runtime:
        if plan.resuming or config.recipe is Recipe.IMPROVED or "batch_size" in plan.given:
            _refuse_division(config.train, world.size)
        build_diffusion(config.diffusion)  # an invalid respacing must fail before the images are read
        if world.main:
            trackers.refuse_missing(config.train)
        return Runtime.resolve(config.runtime, world.local_rank if world.size > 1 else None)

    runtime = world.on_all(resolve)
    if plan.dry and config.runtime.compile is not Compile.ON:
        runtime = replace(runtime, compile=Compile.OFF)  # it would take minutes
    world.check(runtime.device)
    dataset = load_shared(
        config.data,
        config.decoded_size,
        labelled=config.labelled,
        world=world,
        display=display,
        reading=config.reading,
    )
    config, changes = world.on_all(lambda: _with_data(plan, dataset))
    limit: TimeLimit | None = None
    if not plan.resuming and (config.recipe is Recipe.AUTO or plan.minutes is not None):
        config, limit, chosen = world.on_all(lambda: _with_recipe(plan, config, dataset, runtime, world, began))
        changes += chosen
    among, held_out, said = hold_out(config, dataset, world, display)

    def open_folder() -> run_folder.Log | run_folder.Shown | run_folder.Silence:
        if not world.main:
            return run_folder.Silence()
        if plan.dry:
            return run_folder.Shown(display.line)
        if not plan.resuming:
            held.enter_context(Lease(run_dir, launcher()))
            run_folder.refuse_other_run(run_dir)  # another may have started meanwhile
        return held.enter_context(run_folder.Log(run_dir, display.line))

    log = world.on_all(open_folder)
    for line in (*plan.notes, f"data: {dataset.preflight.line()}", *dataset.notes, *changes, *said):
        log(line)
    trainer = Trainer(config, dataset, runtime, run_dir, log, world, among, held_out, limit)
    config = trainer.config
    trainer.environment = environment(trainer.runtime, world.size, trainer.model_calls, command)
    if plan.resuming:
        resuming.resume(trainer)
    if (given := plan.init_from or plan.resume_checkpoint) is not None and trainer.state.step:
        log(f"the weights of {given} are not used: the run continues with its own")
    elif plan.init_from is not None:
        resuming.init_from(trainer, plan.init_from, read.pop() if read else None)
    elif plan.resume_checkpoint is not None:
        resuming.resume_from(trainer, plan.resume_checkpoint)
    if config.train.fp16_scale_growth and runtime.precision is not Precision.FP16:
        log(f"fp16_scale_growth has no effect: precision {runtime.precision} needs no loss scale")
    log(f"model: {trainer.state.num_parameters / 1e6:.1f} M parameters, {_described(config.model)}")
    log(f"on: {world.describe()}, {trainer.runtime.describe(trainer.model_calls)}")
    if plan.dry:
        log(trainer.rehearsed())
        return 0
    log(
        f"run: {run_dir.resolve()}, step {trainer.state.step} of {config.train.steps}, "
        f"a checkpoint every {config.train.save_interval} steps and at the end"
    )
    try:
        status = trainer.run(partial(display.advance, "step"))
    except (ValueError, OSError):
        if world.main and not plan.resuming and trainer.state.step == 0:
            # nothing was trained: let a second attempt use the same folder
            (run_dir / "config.json").unlink(missing_ok=True)
        raise
    command = "train-classifier" if config.classifies else "train"
    again = ["fastdiff", command, "--data-dir", config.data.data_dir, "--run-dir", str(run_dir), "--resume"]
    drawing = ["fastdiff", "sample", str(run_dir), "--out", "samples.npz"]
    if isinstance(config.model, ClassifierConfig):
        drawing = ["fastdiff", "sample", "MODEL", "--classifier", str(run_dir), "--out", "samples.npz"]
    elif config.recipe is Recipe.IMPROVED and config.diffusion.diffusion_steps > FAST_STEPS:
        drawing += ["--sampler", "dpm++", "--steps", str(FAST_STEPS)]
    if small := getattr(config.model, "small_size", None):
        drawing += ["--base-samples", f"FOLDER-OF-{small}-PIXEL-IMAGES"]
    log(f"resume with: {shlex.join(again)}" if status else f"sample with: {shlex.join(drawing)}")
    return status


def _with_recipe(
    plan: Plan, config: RunConfig, dataset: Dataset, runtime: Runtime, world: World, began: float
) -> tuple[RunConfig, TimeLimit | None, list[str]]:
    """The configuration with the recipe's settings, the run's time limit if it has one, and lines for the log."""
    auto, minutes, said = config.recipe is Recipe.AUTO, plan.minutes, list[str]()
    if auto:
        if minutes is None and "steps" not in plan.given and runtime.device.type == "cpu":
            minutes = recipe.MINUTES_ON_A_CPU
        images, timed = len(dataset.images), minutes is not None
        config, chosen = recipe.decided(config, plan.given, images, runtime.device, world.size, timed)
        _refuse_division(config.train, world.size)
        said.append(recipe.said(chosen))
    if minutes is None:
        return config, None, said
    first = 0 if plan.resume_checkpoint is None else step_of(plan.resume_checkpoint)
    return config, TimeLimit(began + 60 * minutes, plan.given, auto, first), said


def _described(model: ModelConfig | ClassifierConfig) -> str:
    """The size of the model's images, and its levels."""
    widths = "num_channels"
    if isinstance(model, ClassifierConfig):
        model, widths = model.encoder(), "classifier_width"
    chosen = "" if is_table_size(model.grid_size) or model.channel_mult else ", chosen for the size"
    if not model.channel_mult and model.grid_size == 512 and not model.small_size and model.multipliers[0] == 1:
        chosen = f", whose first 1 is 0.5 if {widths} is a multiple of 64"
    patches = f" in patches of {model.patch_size}" if model.patch_size > 1 else ""
    return f"{model.image_size} pixels{patches}, channel_mult {','.join(map(str, model.multipliers))}{chosen}"


def _refuse_division(train: TrainConfig, processes: int) -> None:
    """ValueError if ``processes`` cannot share the work."""
    if processes > 1 and train.parallel is Parallel.FSDP and train.microbatch == "auto":
        raise ValueError("microbatch auto: not with --parallel fsdp, whose processes run in lockstep; give a number")
    if (batch_size := train.batch_size) % processes:
        below = batch_size // processes * processes
        near = f"{below} or {below + processes}" if below else f"{processes}"
        raise ValueError(
            f"batch_size {batch_size} does not divide among {processes} processes: use {near}, or "
            "--batch-size-per-process"
        )


def _with_data(plan: Plan, dataset: Dataset) -> tuple[RunConfig, list[str]]:
    """The configuration with the data's classes, class counts and fingerprint, and lines for the log.

    ValueError if the run continues with other data, or its model has other classes or too few.
    """
    config, names, notes = plan.config, dataset.class_names, []
    if dataset.labels is not None:
        if not plan.fixed_classes:
            config = replace(config, model=replace(config.model, num_classes=len(names)))
        if config.class_names and config.class_names != names:
            raise ValueError(f"the data has the classes {', '.join(names)}, the run {', '.join(config.class_names)}")
        if len(names) > config.model.num_classes:
            raise ValueError(f"num_classes {config.model.num_classes} is too small: the data has {len(names)} classes")
        counts = Counter(dataset.labels.tolist())
        config = replace(config, class_names=names, class_counts=tuple(counts[i] for i in range(len(names))))
    if plan.resuming and config.data_fingerprint not in ("", dataset.fingerprint):
        said = f"the images in {config.data.data_dir} are not the ones this run was trained on"
        if not plan.allow_changes:
            raise ValueError(f"{said}: restore them, use --allow-changes, or start a new run with --init-from")
        notes.append(f"warning: {said}")
    return replace(config, data_fingerprint=dataset.fingerprint), notes
