"""Plans a training run from its flags and its folder: to begin, to start from weights, or to resume."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdiff.checkpoint import Lease, saved_steps
from fastdiff.config import DiffusionConfig, Labels, Recipe, RunConfig, StartConfig, TrainConfig
from fastdiff.config.base import differences, in_words, refuse_contradiction
from fastdiff.config.run import NO_DATA
from fastdiff.interop.openai_run import step_of
from fastdiff.presets import CLASSIFIER_PRESETS, PRESETS, with_preset
from fastdiff.runtime.distributed import World, launcher, restarted
from fastdiff.training import fine_tuning, recipe, run_folder
from fastdiff.training.fine_tuning import Initial, read_initial, read_initial_classifier

_FIXED = ("noised", "holdout")  # else what is measured would count images that were trained on


@dataclass(frozen=True)
class Plan:
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


def decide(
    flags: dict[str, Any], start: StartConfig, world: World, held: ExitStack, classifier: bool, read: list[Initial]
) -> Plan:
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
    return Plan(
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
