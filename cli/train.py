"""``fastdiff train``: a folder of images in, a run folder out."""

import shlex
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.improved_diffusion import log_folder, log_formats
from fastdiff.cli.options import (
    DebugFlag,
    Flags,
    PresetFlag,
    all_flags,
    build,
    path_option,
    refuse_contradiction,
    with_flags,
)
from fastdiff.config import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    Parallel,
    Precision,
    RuntimeConfig,
    TrainConfig,
    is_table_size,
)
from fastdiff.config.base import differences, in_words

if TYPE_CHECKING:
    from fastdiff.cli.display import Display
    from fastdiff.data import Dataset
    from fastdiff.runtime.distributed import World
    from fastdiff.training.run_folder import RunConfig


@with_flags(DataConfig, TrainConfig, ModelConfig, DiffusionConfig, RuntimeConfig)
def train(
    flags: Flags,
    run_dir: Annotated[Path | None, path_option(help="Folder of the run; by default runs/NAME of the data.")] = None,
    preset: PresetFlag = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Resume although the data set or the diffusion process has changed."),
    ] = False,
    init_from: Annotated[Path | None, path_option(help="Begin with the weights of this checkpoint.")] = None,
    resume_checkpoint: Annotated[
        Path | None,
        path_option(
            help="Go on from another run's modelNNNNNN.pt (improved-diffusion's) or .safetensors, with its averages "
            "and its optimizer."
        ),
    ] = None,
    batch_size_per_process: Annotated[
        int | None, typer.Option(min=1, help="Images per update and process, instead of --batch-size.")
    ] = None,
    timeout: Annotated[
        int, typer.Option(min=1, help="Seconds after which a process that waits for the others gives up.")
    ] = 600,
    debug: DebugFlag = False,
) -> None:
    """Train a model on a folder of images.

    Several processes share the work when torchrun starts them: torchrun --nproc-per-node=8 -m fastdiff train ...
    """
    status = run_training(
        flags,
        run_dir,
        preset=preset,
        resume=resume,
        allow_changes=allow_changes,
        init_from=init_from,
        resume_checkpoint=resume_checkpoint,
        batch_size_per_process=batch_size_per_process,
        timeout=timeout,
    )
    raise typer.Exit(status)


def run_training(
    flags: Flags,
    run_dir: Path | None,
    *,
    preset: str | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    init_from: Path | None = None,
    resume_checkpoint: Path | None = None,
    batch_size_per_process: int | None = None,
    timeout: int = 600,
) -> int:
    """Train as preset and flags say, or go on as the folder's run and flags do; returns the exit status."""
    run_dir = run_dir or log_folder()
    if "tensorboard" in log_formats():
        flags = {"tensorboard": True} | flags
    if init_from is not None and resume_checkpoint is not None:
        raise ValueError("init_from and resume_checkpoint both say what to begin with: give one of them")
    if resume_checkpoint is not None:
        from fastdiff.training.fine_tuning import find_initial

        resume_checkpoint = find_initial(resume_checkpoint, raw=True)
        if _is_of(run_dir, resume_checkpoint):
            run_dir, resume, resume_checkpoint = resume_checkpoint.parent, True, None
    if not flags.get("data_dir") and not resume:
        raise ValueError("no data: name a folder of images with --data-dir")
    if "steps" not in flags and flags.get("lr_anneal_steps", 0) > 0:
        flags = flags | {"steps": flags["lr_anneal_steps"]}  # improved-diffusion's way to say how long
    data = Path(flags.get("data_dir", "")).resolve()
    run_dir = run_dir or Path("runs") / ((data.stem if data.is_file() else data.name) or "root")
    if "data_dir" in flags and run_dir.resolve().is_relative_to(Path(flags["data_dir"]).resolve()):
        raise ValueError(f"run_dir {run_dir} lies inside the data folder, whose images it would add to: name another")
    from fastdiff.runtime.distributed import World

    if batch_size_per_process is not None and "batch_size" in flags:
        raise ValueError("batch_size and batch_size_per_process both say how large a batch is: give one of them")
    world = World.join(timeout)
    if batch_size_per_process is not None:
        flags = flags | {"batch_size": batch_size_per_process * world.size}
    with ExitStack() as held:
        held.enter_context(world.explained())
        plan = world.from_main(
            lambda: _decide(flags, preset, run_dir, resume, allow_changes, held, init_from, resume_checkpoint)
        )
        status = _run(plan, world, held)
    world.leave()
    return status


@dataclass(frozen=True)
class _Plan:
    """The run to train, what it begins with, and what is to be said of it: as the first process has decided."""

    run_dir: Path
    config: "RunConfig"
    resuming: bool
    fixed_classes: bool
    allow_changes: bool
    init_from: Path | None
    resume_checkpoint: Path | None
    notes: list[str]


def _is_of(run_dir: Path | None, path: Path) -> bool:
    """Whether a checkpoint to go on from is the newest one of the run folder; ValueError where it is an older one."""
    from fastdiff.checkpoint import saved_steps
    from fastdiff.interop.openai_run import step_of

    step, folder = step_of(path), path.parent
    if not path.is_file():
        raise ValueError(f"resume_checkpoint {path} does not exist")
    if path.suffix != ".safetensors" or (run_dir or folder).resolve() != folder.resolve():
        return False
    if step != (newest := max(saved_steps(folder), default=step)):
        raise ValueError(
            f"resume_checkpoint {path}: the run in {folder} is at step {newest} by now; use --resume instead, or name "
            "another --run-dir to go on from here"
        )
    return True


def _decide(
    flags: Flags,
    preset: str | None,
    run_dir: Path,
    resume: bool,
    allow_changes: bool,
    held: ExitStack,
    init_from: Path | None,
    resume_checkpoint: Path | None,
) -> _Plan:
    """What the flags and the folder ask for.

    A folder that holds a run is held from here on, so that no other process writes to it.
    """
    from fastdiff.checkpoint import Lease, saved_steps
    from fastdiff.runtime.distributed import launcher, restarted
    from fastdiff.training import fine_tuning, run_folder

    notes = []
    if restarted() and not resume and launcher() and Lease.begun_by(run_dir) == launcher():
        resume = True
        notes.append("torchrun started this process anew: going on with the run")
    if not resume or not run_folder.holds_run(run_dir):
        run_folder.refuse_other_run(run_dir)
        if resume and not flags.get("data_dir"):
            raise ValueError(_no_run(run_dir))
        if resume:
            notes.append(f"{run_dir} holds no run yet: beginning afresh")
        fixed = "num_classes" in flags
        flags = all_flags(flags, preset)
        if init_from is not None:
            init_from = fine_tuning.find_initial(init_from)  # once for all: a run may save another step meanwhile
            flags, said = fine_tuning.flags_to_fine_tune(init_from, flags)
            notes += said
        elif resume_checkpoint is not None:
            flags, said = fine_tuning.flags_to_resume(resume_checkpoint, flags)
            fixed = "num_classes" in flags
            notes += said
        config = _new_run(flags)
        return _Plan(run_dir, config, False, fixed, allow_changes, init_from, resume_checkpoint, notes)
    held.enter_context(Lease(run_dir, launcher()))
    if init_from is not None and not saved_steps(run_dir):
        init_from = fine_tuning.find_initial(init_from)  # a run that came to no checkpoint still begins with it
    config, changes = _continued_run(run_folder.RunConfig.read(run_dir), flags, run_dir, allow_changes)
    return _Plan(run_dir, config, True, True, allow_changes, init_from, resume_checkpoint, notes + changes)


def _no_run(run_dir: Path) -> str:
    """What is wrong with a --resume that names no run, nor data to begin one with."""
    there = sorted(str(path.parent) for path in run_dir.parent.glob("*/config.json"))
    found = f"; there are {', '.join(there[:10])}" if there else ""
    return f"run_dir {run_dir} holds no run to resume: name another with --run-dir, or images with --data-dir{found}"


def _run(plan: _Plan, world: "World", held: ExitStack) -> int:
    from fastdiff.checkpoint import Lease
    from fastdiff.cli.display import Display
    from fastdiff.diffusion import build_diffusion
    from fastdiff.runtime.device import Runtime
    from fastdiff.runtime.distributed import launcher
    from fastdiff.training import Trainer, run_folder

    run_dir, config, resuming = plan.run_dir, plan.config, plan.resuming

    def resolve() -> Runtime:
        _refuse_division(config.train, world.size)
        build_diffusion(config.diffusion)  # a respacing that does not fit is told before the images are read
        return Runtime.resolve(config.runtime, world.local_rank if world.size > 1 else None)

    runtime = world.together(resolve)
    world.check(runtime.device)
    display = held.enter_context(Display(silent=not world.main or "stdout" not in log_formats()))
    dataset = _load(config, display, world)
    config, changes = world.together(lambda: _with_data(plan, dataset))

    def open_folder() -> run_folder.Log | run_folder.Silence:
        if not world.main:
            return run_folder.Silence()
        if not resuming:
            held.enter_context(Lease(run_dir, launcher()))
            run_folder.refuse_other_run(run_dir)  # another one may have begun meanwhile
        return held.enter_context(run_folder.Log(run_dir, display.line))

    log = world.together(open_folder)
    for line in (*plan.notes, f"data: {dataset.preflight.line()}", *changes):
        log(line)
    trainer = Trainer(config, dataset, runtime, run_dir, log, world)
    if resuming:
        trainer.resume()
    if (given := plan.init_from or plan.resume_checkpoint) is not None and trainer.state.step:
        log(f"the weights of {given} are not taken: the run goes on with its own")
    elif plan.init_from is not None:
        trainer.init_from(plan.init_from)
    elif plan.resume_checkpoint is not None:
        trainer.resume_from(plan.resume_checkpoint)
    if config.train.fp16_scale_growth and runtime.precision is not Precision.FP16:
        log(f"fp16_scale_growth has no meaning: precision {runtime.precision} needs no loss scale")
    train = trainer.config.train
    log(f"model: {describe_model(config.model, trainer.state.num_parameters)}")
    log(f"on: {world.describe()}, {runtime.describe(trainer.model_calls)}")
    log(
        f"run: {run_dir.resolve()}, step {trainer.state.step} of {train.steps}, "
        f"a checkpoint every {train.save_interval} steps and at the end"
    )
    try:
        status = trainer.run(lambda step, steps, note: display.advance("step", step, steps, note))
    except (ValueError, OSError):
        if world.main and not resuming and trainer.state.step == 0:
            # nothing came of it: a second attempt needs no other folder
            (run_dir / "config.json").unlink(missing_ok=True)
        raise
    again = ["fastdiff", "train", "--data-dir", config.data.data_dir, "--run-dir", str(run_dir), "--resume"]
    drawing = ["fastdiff", "sample", str(run_dir), "--out", "samples.npz"]
    log(f"go on with: {shlex.join(again)}" if status else f"sample with: {shlex.join(drawing)}")
    return status


def _refuse_division(train: TrainConfig, processes: int) -> None:
    """ValueError where so many processes cannot share the work."""
    if processes > 1 and train.parallel is Parallel.FSDP and train.microbatch == "auto":
        raise ValueError("microbatch auto: not with --parallel fsdp, whose processes run in step; name a number")
    if (batch_size := train.batch_size) % processes:
        below = batch_size // processes * processes
        near = f"{below} or {below + processes}" if below else f"{processes}"
        raise ValueError(
            f"batch_size {batch_size} does not divide among {processes} processes: use {near}, or "
            "--batch-size-per-process"
        )


def _load(config: "RunConfig", display: "Display", world: "World") -> "Dataset":
    """The images. Of the processes of a machine one decodes them, and the others find what it wrote."""
    from fastdiff.data import load_dataset

    dataset = world.one_by_machine_first(
        lambda: load_dataset(
            config.data,
            config.model.image_size,
            labelled=config.model.class_cond,
            on_progress=lambda done, total: display.advance("images", done, total),
            processes=world.local_size,
        )
    )
    display.finish("images")
    prints = world.gathered(dataset.fingerprint)
    if (other := next((rank for rank, found in enumerate(prints) if found != prints[0]), None)) is not None:
        world.refuse(
            f"data_dir {config.data.data_dir}: process {other} sees other images than process 0; every machine needs "
            "the same folder"
        )
    return dataset


def _with_data(plan: _Plan, dataset: "Dataset") -> tuple["RunConfig", list[str]]:
    """The run with what the data say of themselves, and what is to be said of that."""
    config, notes = plan.config, []
    if dataset.labels is not None:
        config = _with_classes(config, dataset.class_names, given=plan.fixed_classes)
        counts = Counter(dataset.labels.tolist())
        config = replace(config, class_counts=tuple(counts[i] for i in range(len(dataset.class_names))))
    if plan.resuming and config.data_fingerprint not in ("", dataset.fingerprint):
        said = f"the images in {config.data.data_dir} are not those that the run was trained on"
        if not plan.allow_changes:
            raise ValueError(f"{said}: restore them, go on with --allow-changes, or begin anew with --init-from")
        notes.append(f"warning: {said}")
    return replace(config, data_fingerprint=dataset.fingerprint), notes


def _new_run(flags: Flags) -> "RunConfig":
    """The run that the flags describe; ValueError where a configuration does not hold together."""
    data, model, diffusion = build(DataConfig, flags), build(ModelConfig, flags), build(DiffusionConfig, flags)
    if not data.data_dir:
        raise ValueError("no data: name a folder of images with --data-dir")
    train = build(TrainConfig, flags)
    from fastdiff.training.run_folder import RunConfig

    return RunConfig(model, diffusion, _absolute(data), train, build(RuntimeConfig, flags))


def _continued_run(
    config: "RunConfig", flags: Flags, run_dir: Path, allow_changes: bool
) -> tuple["RunConfig", list[str]]:
    """The run of the folder with the flags that may change on the way, and what is to be said of them.

    The model never changes, the process only where that is allowed.
    """
    refuse_contradiction(flags, str(run_dir), config.model)
    diffusion, notes = build(DiffusionConfig, flags, base=config.diffusion), []
    if differing := in_words(differences(config.diffusion, diffusion)):
        if not allow_changes:
            raise ValueError(
                f"{run_dir} has another process ({differing}): leave the flags out, or go on with --allow-changes"
            )
        notes.append(f"warning: the process changes: {differing}")
    changed = replace(
        config,
        diffusion=diffusion,
        data=_absolute(build(DataConfig, flags, base=config.data)),
        train=build(TrainConfig, flags, base=config.train),
        runtime=build(RuntimeConfig, flags, base=config.runtime),
    )
    if differing := in_words(differences(config.train, changed.train)):
        notes.append(f"changed: {differing}")
    return changed, notes


def _absolute(data: DataConfig) -> DataConfig:
    """A run may be resumed from elsewhere."""
    return replace(data, data_dir=str(Path(data.data_dir).resolve()))


def _with_classes(config: "RunConfig", names: tuple[str, ...], given: bool) -> "RunConfig":
    """The run with the data's classes; ``given`` says that num_classes must stay as it is."""
    if not given:
        config = replace(config, model=replace(config.model, num_classes=len(names)))
    if config.class_names and config.class_names != names:
        raise ValueError(f"the data has the classes {', '.join(names)}, the run {', '.join(config.class_names)}")
    if len(names) > config.model.num_classes:
        raise ValueError(f"num_classes {config.model.num_classes} is too small: the data has {len(names)} classes")
    return replace(config, class_names=names)


def describe_model(config: ModelConfig, parameters: int) -> str:
    """Size and widths of a model in words."""
    chosen = "" if is_table_size(config.image_size) or config.channel_mult else ", chosen for the size"
    mult = ",".join(map(str, config.multipliers))
    return f"{parameters / 1e6:.1f} M parameters, {config.image_size} pixels, channel_mult {mult}{chosen}"
