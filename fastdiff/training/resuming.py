"""How a run starts: resumed at its newest checkpoint or at another run's step, or from a checkpoint's weights."""

from pathlib import Path

from torch import Tensor

from fastdiff import checkpoint
from fastdiff.checkpoint import ClassifierWeights, Weights
from fastdiff.data.classes import composed, listed
from fastdiff.interop.openai_run import read_run, step_of
from fastdiff.training.fine_tuning import (
    Initial,
    carried_over,
    classifier_carried_over,
    configuration,
    read_initial,
    read_initial_classifier,
)
from fastdiff.training.held_out import doubts
from fastdiff.training.parallel import own_part, whole_of
from fastdiff.training.state import average_path
from fastdiff.training.trainer import Trainer


def resume(trainer: Trainer) -> None:
    """Resume from the run's newest intact checkpoint; ValueError if all are damaged, or it does not fit. Collective."""
    run_dir, world = trainer.run_dir, trainer.world
    step = world.from_main(lambda: _newest_whole(trainer))
    if step is None:
        trainer.log(f"{run_dir} holds no checkpoint yet: starting from scratch")
        return
    if step > (steps := trainer.config.train.steps):
        world.refuse(f"{run_dir} is at step {step}, but steps is {steps}: give a larger --steps")
    added = world.on_all(lambda: trainer.state.load(run_dir, step))
    trainer.log(f"resumed at step {step}")
    for left_out in world.from_main(lambda: _left_out(trainer, step)):
        trainer.log(f"warning: {left_out} to continue it")
    for average in added:
        trainer.log(f"the {average.name} is new: it starts from the weights")


def _left_out(trainer: Trainer, step: int) -> list[str]:
    """The averages that were saved with ``step`` and are not continued, with what to add for each."""
    kept = {average_path(average, trainer.run_dir, step) for average in trainer.state.averages}
    found = []
    for flag, word, prefix in (("--ema-rate", "EMA of rate", "ema"), ("--ema-lengths", "average of length", "average")):
        for path in sorted(trainer.run_dir.glob(f"{prefix}_*_{step:06}.safetensors")):
            if path not in kept and "ema_updates" in checkpoint.read_metadata(path):  # it was not reconstructed
                what = word.rpartition(" ")[2]
                found.append(f"the {word} {path.name.split('_')[1]} ends here: add the {what} to {flag}")
    return found


def _newest_whole(trainer: Trainer) -> int | None:
    steps = checkpoint.saved_steps(trainer.run_dir)
    for step in reversed(steps):
        try:
            checkpoint.verify_step(trainer.run_dir, step)
        except checkpoint.NewerFormat:
            raise  # it is not damaged, and resuming from an earlier step would overwrite it
        except ValueError as error:
            trainer.log(f"warning: cannot resume at step {step}: {error}")
        else:
            return step
    if steps:
        raise ValueError(f"none of the {len(steps)} checkpoints in {trainer.run_dir} can be resumed")
    return None


def resume_from(trainer: Trainer, path: Path) -> None:
    """Resume in this run folder from another run's modelNNNNNN file, improved-diffusion's (.pt) or fastdiff's.

    EMAs and optimizer state beside it are loaded too. ValueError if something does not fit. Collective.
    """
    world, step = trainer.world, step_of(path)
    if step >= (steps := trainer.config.train.steps):
        world.refuse(f"{path} is at step {step}, but steps is {steps}: give a larger --steps")
    if path.suffix == ".pt":
        world.on_all(lambda: _resume_from_openai(trainer, path))
    else:
        world.from_main(lambda: checkpoint.verify_step(path.parent, step, offer=True))
        metadata = world.on_all(lambda: checkpoint.read_metadata(path, kind=trainer.objective.kind))
        names, ours = tuple(map(composed, metadata["class_names"])), trainer.config.class_names
        if names and names != ours:
            world.refuse(
                f"{path} has the classes {listed(names)}, and the data {listed(ours) or 'none'}: "
                "--init-from matches them by name"
            )
        for line in doubts(trainer.config.train, metadata, path):
            trainer.log(line)
        for average in world.on_all(lambda: trainer.state.load(path.parent, step)):
            trainer.log(f"no {average.name} beside it: this one starts from the weights")
    trainer.log(f"resumed at step {step} from {path}")


def _resume_from_openai(trainer: Trainer, path: Path) -> None:
    train = trainer.config.train
    run = read_run(path, train.ema_rate)
    trainer.state.load_openai(run)
    for rate in train.ema_rate:
        if rate not in run.averages:
            trainer.log(f"no {run.average_path(rate).name} beside it: this EMA starts from the weights")
    if run.optimizer is None:
        trainer.log(f"no {run.optimizer_path.name} beside it: the optimizer state starts empty")
    for name, ours in (("lr", train.lr), ("weight_decay", train.weight_decay)):
        theirs = run.setting(name)
        if theirs not in (None, ours) and not (name == "lr" and train.lr_anneal_steps):
            flag = name.replace("_", "-")
            trainer.log(f"its optimizer had {name} {theirs:g}, but the run continues with --{flag} {ours:g}")


def init_from(trainer: Trainer, path: Path, weights: Initial | None = None) -> None:
    """Start from the weights of a checkpoint, which this process may have read; ValueError if they do not fit.

    Collective.
    """
    config, state, world, named = trainer.config, trainer.state, trainer.world, trainer.dataset.named
    said = config.model.to_dict() | config.diffusion.to_dict()

    def fresh(name: str) -> Tensor:
        held = state.weights[name]
        return whole_of(own_part(held), held).detach().cpu()

    read = read_initial_classifier if config.classifies else read_initial
    found: Initial = world.on_all(lambda: weights or read(path, said))
    if isinstance(found, ClassifierWeights):
        count = config.model.num_classes
        initial, lines = classifier_carried_over(found, fresh, config.class_names, count, named)
    else:
        model: Weights = found
        world.on_all(lambda: configuration(model, said))  # rejects weights that do not fit this configuration
        initial, lines = carried_over(model, state.weights, fresh, config.class_names, named)
    lines += doubts(config.train, found.metadata, path)
    world.on_all(lambda: state.set_weights(initial, path))
    for average in state.averages:
        average.load(state.parameters, updates=0)
    for line in (*lines, f"weights from {path}"):
        trainer.log(line)
