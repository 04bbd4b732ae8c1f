"""A training run from its settings to its exit status: resolves flags, opens or resumes the folder, and trains."""

import shlex
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastdiff.checkpoint import Lease, saved_steps
from fastdiff.config import (
    FAST_STEPS,
    ClassifierConfig,
    Compile,
    DiffusionConfig,
    Labels,
    ModelConfig,
    Parallel,
    Precision,
    Recipe,
    RunConfig,
    StartConfig,
    TrainConfig,
    is_table_size,
)
from fastdiff.config.base import differences, in_words, refuse_contradiction
from fastdiff.config.run import NO_DATA
from fastdiff.data import Dataset, load_shared
from fastdiff.diffusion import build_diffusion
from fastdiff.interop.openai_run import step_of
from fastdiff.presets import CLASSIFIER_PRESETS, PRESETS, with_preset
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.display import Lines
from fastdiff.runtime.distributed import World, launcher, restarted
from fastdiff.runtime.environment import environment
from fastdiff.training import fine_tuning, recipe, resuming, run_folder, trackers
from fastdiff.training.fine_tuning import Initial, read_initial, read_initial_classifier
from fastdiff.training.held_out import hold_out
from fastdiff.training.recipe import TimeLimit
from fastdiff.training.trainer import Trainer

_FIXED = ("noised", "holdout")  # else what is measured would count images that were trained on


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
        plan = world.from_main(lambda: _decide(dict(flags), start, world, held, classifier, read))
        return Ended(plan.run_dir, _carry_out(plan, world, display, held, read, command, began))


@dataclass(frozen=True)
class _Plan:
    """The run to train, its initial weights and lines for the log, as rank 0 decided.

    ``given`` are the flags that the recipe leaves alone.
    """

    run_dir: Path
    config: RunConfig
    resuming: bool
    fixed_classes: bool
    allow_changes: bool
    given: frozenset[str]
    minutes: float | None
    init_from: Path | None
    resume_checkpoint: Path | None
    dry: bool
    notes: list[str]


def _decide(
    flags: dict[str, Any], start: StartConfig, world: World, held: ExitStack, classifier: bool, read: list[Initial]
) -> _Plan:
    """Make a plan from the flags and the folder.

    If the folder contains a run, its lease is held from here on, so that no other process writes to it. Weights that
    are read for their configuration are added to ``read``.
    """
    run_dir = Path(start.run_dir) if start.run_dir else None
    init_from = Path(start.init_from) if start.init_from else None
    resume_checkpoint = Path(start.resume_checkpoint) if start.resume_checkpoint else None
    resume, notes = start.resume, []
    if resume_checkpoint is not None:
        resume_checkpoint = fine_tuning.find_initial(resume_checkpoint, raw=True)
        if _is_of(run_dir, resume_checkpoint):
            run_dir, resume, resume_checkpoint = resume_checkpoint.parent, True, None
    if not flags.get("data_dir") and not resume:
        raise ValueError(NO_DATA)
    flags = _with_steps(flags)
    data = Path(flags.get("data_dir", "")).resolve()
    name = (data.stem if data.is_file() else data.name) or "root"
    run_dir = run_dir or Path("runs") / (f"{name}-classifier" if classifier else name)
    if flags.get("data_dir"):
        if run_dir.resolve().is_relative_to(data):
            raise ValueError(f"run_dir {run_dir} is inside the data folder and would add images to it: name another")
        flags["data_dir"] = str(data)  # absolute: the run may be resumed from another working directory
    if flags.get("val_data_dir"):
        flags["val_data_dir"] = str(Path(flags["val_data_dir"]).resolve())
    if (labels := Path(flags.get("label_file", ""))).is_file():  # else it is the name of a file in the data
        flags["label_file"] = str(labels.resolve())
    if start.batch_size_per_process is not None:
        flags["batch_size"] = start.batch_size_per_process * world.size
    if restarted() and not resume and launcher() and Lease.begun_by(run_dir) == launcher():
        resume = True
        notes.append("torchrun restarted this process: resuming the run")
    continues = resume and run_folder.holds_run(run_dir)
    if continues:
        held.enter_context(Lease(run_dir, launcher()))
        if init_from is not None and not saved_steps(run_dir):
            init_from = fine_tuning.find_initial(init_from)  # a run without a checkpoint still starts from it
        config = run_folder.read_config(run_dir)
        if config.classifies != classifier:
            its = "classifier: resume it with fastdiff train-classifier"
            its = its if config.classifies else "diffusion model: resume it with fastdiff train"
            raise ValueError(f"{run_dir} is the run of a {its}")
        if edited := run_folder.edited(config, run_dir):
            notes.append(edited)
        config, said = _continued(config, flags, run_dir, start.allow_changes)
        fixed_classes, given = True, frozenset(flags)
    else:
        if not start.dry_run:
            run_folder.refuse_other_run(run_dir)
        if resume and not flags.get("data_dir"):
            there = sorted(str(path.parent) for path in run_dir.parent.glob("*/config.json"))
            found = f"; there are {', '.join(there[:10])}" if there else ""
            raise ValueError(
                f"run_dir {run_dir} holds no run to resume: name another with --run-dir, or images with "
                f"--data-dir{found}"
            )
        if resume:
            notes.append(f"{run_dir} holds no run yet: starting from scratch")
        fixed_classes, said = "num_classes" in flags, []
        if start.preset is None and resume_checkpoint is None and not flags.get("label_file"):
            flags = {"labels": Labels.AUTO} | flags  # released models and their runs have improved-diffusion's rule
        flags = _with_steps(with_preset(flags, start.preset, presets=CLASSIFIER_PRESETS if classifier else PRESETS))
        if init_from is not None:
            init_from = fine_tuning.find_initial(init_from)  # resolved once: a run may save another step meanwhile
            read.append((read_initial_classifier if classifier else read_initial)(init_from, flags))
            flags, said = fine_tuning.flags_to_fine_tune(read[0], flags)
        elif resume_checkpoint is not None:
            flags, said = fine_tuning.flags_to_resume(
                resume_checkpoint, flags, classifier, timed=start.minutes is not None
            )
            fixed_classes = "num_classes" in flags
        improved = classifier or start.preset is not None or resume_checkpoint is not None
        source = start.recipe if "recipe" in flags or not improved else Recipe.IMPROVED
        given = frozenset(flags)
        if source is Recipe.AUTO:
            flags = recipe.with_prediction(flags)
        config = replace(RunConfig.from_flags(flags, classifier=classifier), recipe=source)
    if continues and start.minutes is not None:
        notes.append(f"minutes has no effect: the run continues to its {config.train.steps} updates")
    notes += said
    return _Plan(
        run_dir,
        config,
        continues,
        fixed_classes,
        start.allow_changes,
        given,
        start.minutes,
        init_from,
        resume_checkpoint,
        start.dry_run,
        notes,
    )


def _with_steps(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with a number of steps, if only lr_anneal_steps is given: improved-diffusion's flag for the length."""
    anneal = TrainConfig.from_flags(flags).lr_anneal_steps
    return flags | {"steps": anneal} if "steps" not in flags and anneal > 0 else flags


def _is_of(run_dir: Path | None, path: Path) -> bool:
    """Whether a checkpoint to resume from is the newest one of the run folder; ValueError if it is an older one."""
    step, folder = step_of(path), path.parent
    if not path.is_file():
        raise ValueError(f"resume_checkpoint {path} does not exist")
    if path.suffix != ".safetensors" or (run_dir or folder).resolve() != folder.resolve():
        return False
    if step != (newest := max(saved_steps(folder), default=step)):
        raise ValueError(
            f"resume_checkpoint {path}: the run in {folder} is already at step {newest}; use --resume instead, or name "
            "another --run-dir to resume from here"
        )
    return True


def _continued(
    config: RunConfig, flags: Mapping[str, Any], run_dir: Path, allow_changes: bool
) -> tuple[RunConfig, list[str]]:
    """The folder's configuration with the flags that may change during a run, and lines for the log.

    The model never changes; the diffusion process changes only if ``allow_changes``.
    """
    refuse_contradiction(flags, str(run_dir), config.model)
    fixed = {name: value for name, value in flags.items() if name in _FIXED}
    refuse_contradiction(fixed, str(run_dir), config.train)
    if config.train.holdout:
        theirs, ours = config.train.val_data_dir, flags.get("val_data_dir", config.train.val_data_dir)
        if bool(theirs) != bool(ours):
            measures = f"the images of {theirs}" if theirs else "a share of its images, which it does not train on"
            raise ValueError(f"{run_dir} measures {measures}, which cannot change: leave val_data_dir as it is")
    diffusion, notes = DiffusionConfig.from_flags(flags, base=config.diffusion), []
    if differing := in_words(differences(config.diffusion, diffusion)):
        if not allow_changes:
            raise ValueError(
                f"{run_dir} has another diffusion process ({differing}): leave the flags out, or use --allow-changes"
            )
        notes.append(f"warning: the diffusion process changes: {differing}")
    if config.train.lr_anneal_steps == config.train.steps:  # the decay ends with the run, also with a longer one
        flags = {"lr_anneal_steps": flags.get("steps", config.train.steps)} | dict(flags)
    changed = RunConfig.from_flags(flags, base=config)
    if changed.model != config.model:
        raise ValueError(
            f"augment {changed.data.augment:g}: the model of {run_dir} is not told of it; leave it out, or start a new "
            "run with --init-from"
        )
    if differing := in_words(differences(config.train, changed.train)):
        notes.append(f"changed: {differing}")
    return changed, notes


def _carry_out(
    plan: _Plan, world: World, display: Lines, held: ExitStack, read: list[Initial], command: str, began: float
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
    trainer.environment = environment(runtime, world.size, trainer.model_calls, command)
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
    log(f"on: {world.describe()}, {runtime.describe(trainer.model_calls)}")
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
    plan: _Plan, config: RunConfig, dataset: Dataset, runtime: Runtime, world: World, began: float
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
    chosen = "" if is_table_size(model.image_size) or model.channel_mult else ", chosen for the size"
    if not model.channel_mult and model.image_size == 512 and not model.small_size and model.multipliers[0] == 1:
        chosen = f", whose first 1 is 0.5 if {widths} is a multiple of 64"
    return f"{model.image_size} pixels, channel_mult {','.join(map(str, model.multipliers))}{chosen}"


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


def _with_data(plan: _Plan, dataset: Dataset) -> tuple[RunConfig, list[str]]:
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
