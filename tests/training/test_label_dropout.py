"""A share of the images is trained without its class, whatever the batches that they come in."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import TrainConfig
from fastdiff.config import RunConfig
from fastdiff.data import batches
from fastdiff.kernels import philox_uint32
from fastdiff.models import NULL_CLASS
from fastdiff.runtime.distributed import World
from fastdiff.training import objective, update
from fastdiff.training.objective import TIMESTEP_STREAM, with_null_class
from fastdiff.training.run_folder import read_config, write_config
from fastdiff.training.update import Updater

from .support import run_config, trainer

MANY = 100_000
NUMBERS = torch.arange(MANY)


def dropped(share: float, seed: int = 0, numbers: Tensor = NUMBERS) -> Tensor:
    """Which of the samples lose their class, (N,) bool."""
    labels = numbers % 7
    found = with_null_class(TrainConfig(label_dropout=share, seed=seed), labels, numbers)
    null = found == NULL_CLASS
    assert torch.equal(found[~null], labels[~null])
    return null


@pytest.mark.parametrize("share", [1e-3, 0.1, 0.5, 0.999])
def test_the_share(share: float) -> None:
    """To four standard deviations, and evenly: in the first samples as in the last."""
    for part in dropped(share).double().chunk(4):
        assert abs(float(part.mean()) - share) < 4 * (share * (1 - share) / len(part)) ** 0.5


def test_none_and_all() -> None:
    assert not dropped(1e-12).any()
    assert dropped(1 - 1e-12).all()


def test_it_hangs_on_seed_and_sample_alone() -> None:
    whole = dropped(0.3)
    order = torch.randperm(MANY, generator=torch.Generator().manual_seed(0))[:1000]
    assert torch.equal(dropped(0.3, numbers=order), whole[order])
    assert bool((dropped(0.2) <= whole).all())  # a smaller share is a part of a larger one
    # what are correlations, of deviation 1 / sqrt(N)
    other = dropped(0.3, seed=1)
    word = philox_uint32(0, NUMBERS, TIMESTEP_STREAM, 1)[:, 0]
    for by_chance in (other, word, whole.roll(1)):
        assert abs(float(torch.corrcoef(torch.stack([whole, by_chance]).double())[0, 1])) < 4 * MANY**-0.5


def labels_seen(
    tmp_path: Path, shapes: Path, updates: int, world: World | None = None, resumed_at: int = 0, **flags: Any
) -> list[Tensor]:
    """What the model is given as y by a process's share of each update."""
    subject = trainer(tmp_path, shapes, class_cond=True, batch_size=12, label_dropout=0.4, **flags)
    world = world or World()
    seen: list[Tensor] = []

    def forward(*args: Any, y: Tensor) -> Tensor:
        seen.append(y)
        return subject.forward(*args, y=y)

    apply = Updater(subject.config, subject.state, subject.objective, subject.module, forward, world)
    subject.state.step = resumed_at
    share = 12 // world.size
    rows = slice(world.rank * share, (world.rank + 1) * share)
    data = batches(subject.dataset, subject.config.data, 12, 0, resumed_at, rows=rows)
    found = []
    for _ in range(updates - resumed_at):
        apply(*next(data))
        found.append(torch.cat(seen))
        seen.clear()
    data.close()
    return found


def test_the_batches_do_not_matter(tmp_path: Path, shapes: Path) -> None:
    """Micro-batches, a resume and several processes leave out the same classes."""
    whole = torch.stack(labels_seen(tmp_path, shapes, 3))  # (updates, 12)
    told = batches(trainer(tmp_path, shapes, class_cond=True).dataset, run_config(shapes).data, 12, 0, 0)
    for row in whole:
        _, labels = next(told)
        assert labels is not None
        assert torch.equal(row, torch.where(row == NULL_CLASS, row, labels))
    told.close()
    null = whole == NULL_CLASS
    assert 0 < null.sum() < null.numel()
    assert not torch.equal(null[0], null[1])
    assert torch.equal(torch.stack(labels_seen(tmp_path, shapes, 3, microbatch=5)), whole)
    assert torch.equal(torch.stack(labels_seen(tmp_path, shapes, 3, resumed_at=1)), whole[1:])
    parts = [torch.stack(labels_seen(tmp_path, shapes, 3, World(rank=r, size=3))) for r in range(3)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("class_cond", [False, True])
def test_without_it_nothing_is_drawn(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, class_cond: bool
) -> None:
    steps = []

    def words(seed: int, samples: Tensor, step: int, elements: int) -> Tensor:
        steps.append(step)
        return philox_uint32(seed, samples, step, elements)

    for module in (objective, update):
        monkeypatch.setattr(module, "philox_uint32", words)
    trainer(tmp_path, shapes, class_cond=class_cond, steps=2).run()
    assert steps == [TIMESTEP_STREAM] * 2


# The run's settings


def test_a_model_without_classes_is_refused(shapes: Path) -> None:
    with pytest.raises(ValueError, match=r"^label_dropout 0\.1 needs a class-conditional model: .*--class-cond$"):
        run_config(shapes, label_dropout=0.1)
    assert run_config(shapes, label_dropout=0.1, class_cond=True).train.label_dropout == 0.1


@pytest.mark.parametrize("share", [-0.1, 1.0, 1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"^label_dropout must be (finite|at least 0 and below 1), not "):
        TrainConfig(label_dropout=share)


def read_after(config: RunConfig, run_dir: Path, change: Callable[[dict[str, Any]], object]) -> RunConfig:
    """What is read where config.json was changed."""
    write_config(config, run_dir)
    path = run_dir / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return read_config(run_dir)


def test_config_json(tmp_path: Path, shapes: Path) -> None:
    config = run_config(shapes, class_cond=True, label_dropout=0.25)
    config = replace(config, class_names=("a", "b"), class_counts=(3, 0))
    assert read_after(config, tmp_path, lambda values: None) == config

    def as_before(values: dict[str, Any]) -> None:
        del values["class_counts"], values["train"]["label_dropout"]

    older = read_after(config, tmp_path, as_before)
    assert (older.class_counts, older.train.label_dropout, older.class_names) == ((), 0.0, ("a", "b"))
    for damage in (3, ["many"], [None]):
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            read_after(config, tmp_path, lambda values, damage=damage: values.update(class_counts=damage))
