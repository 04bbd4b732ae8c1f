"""Going on from the files of a run of improved-diffusion or guided-diffusion, and their way to scale the loss."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.interop.openai_run import MOMENTS, step_of
from fastdiff.training import Trainer
from fastdiff.training.metrics import ProgressFiles
from fastdiff.training.resuming import resume_from

from .support import file, randomise, same, trainer, weights

FLAGS: dict[str, Any] = {"ema_rate": "0.9999,0.5", "lr": 1e-3, "class_cond": True, "weight_decay": 0.01}
KINDS = ("model", "ema_0.9999_", "ema_0.5_", "opt")


def as_openai_saves(trained: Trainer, folder: Path, flattened: str = "", whole_steps: bool = False) -> Path:
    """The state of a trainer as the files that the original would have written."""
    folder.mkdir(parents=True, exist_ok=True)
    state, step = trained.state, trained.state.step
    path = folder / f"model{step:06d}.pt"
    torch.save(weights(trained), path)
    for ema in state.emas:
        average = dict(zip(state.weights, ema.tensors(), strict=True))
        torch.save(average, folder / f"ema_{ema.rate}_{step:06d}.pt")
    content = state.optimizer.state_dict()  # as PyTorch itself writes it, numbered in the parameters' order
    states = [{key: content["state"][i][key].clone() for key in MOMENTS} for i in range(len(state.parameters))]
    if flattened:  # runs in fp16 keep all parameters as one, guided-diffusion's as vectors and others
        groups = [states]
        if flattened == "guided":
            groups = [[s for s in states if (s["exp_avg"].ndim > 1) == others] for others in (False, True)]
        shapes = [(-1,), (1, -1)]
        states = [
            {"step": group[0]["step"]}
            | {key: torch.cat([s[key].contiguous().flatten() for s in group]).view(shape) for key in MOMENTS[1:]}
            for group, shape in zip(groups, shapes, strict=False)
        ]
    if whole_steps:  # as older releases of PyTorch counted
        states = [one | {"step": int(one["step"])} for one in states]
    group = content["param_groups"][0] | {"params": list(range(len(states)))}
    torch.save({"state": dict(enumerate(states)), "param_groups": [group]}, folder / f"opt{step:06d}.pt")
    return path


Trained = Callable[[int], Trainer]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Trained:
    """Runs to a step, each trained once for all tests. Not to be changed."""

    @functools.cache
    def run(steps: int) -> Trainer:
        subject = randomise(trainer(tmp_path_factory.mktemp("trained") / "run", shapes, steps=steps, **FLAGS))
        subject.run()
        return subject

    return run


@pytest.mark.parametrize(
    ("flattened", "whole_steps"), [("", False), ("improved", False), ("guided", False), ("", True)]
)
def test_it_goes_on_exactly(tmp_path: Path, shapes: Path, trained: Trained, flattened: str, whole_steps: bool) -> None:
    straight = trained(4)
    begun = trained(2)
    path = as_openai_saves(begun, tmp_path / "original", flattened, whole_steps)
    resumed = trainer(tmp_path / "resumed", shapes, steps=4, **FLAGS)
    resume_from(resumed, path)
    assert resumed.state.step == 2
    assert resumed.log[-1] == f"resumed at step 2 from {path}"
    resumed.run()
    for kind in KINDS:
        one, other = (file(run.run_dir / f"{kind}000004.safetensors")[0] for run in (straight, resumed))
        # what no original keeps
        assert same(*({k: v for k, v in t.items() if k not in ("log_sums", "guard")} for t in (one, other))), kind


def test_a_run_of_our_own_goes_on_in_another_folder(tmp_path: Path, shapes: Path, trained: Trained) -> None:
    resumed = trainer(tmp_path / "resumed", shapes, steps=4, **FLAGS)
    resume_from(resumed, trained(2).run_dir / "model000002.safetensors")
    resumed.run()
    for kind in KINDS:
        assert same(*(file(run.run_dir / f"{kind}000004.safetensors")[0] for run in (trained(4), resumed)))


def test_what_is_missing_is_told(tmp_path: Path, shapes: Path, trained: Trained) -> None:
    begun = trained(1)
    path = as_openai_saves(begun, tmp_path / "original")
    for name in ("ema_0.5_000001.pt", "opt000001.pt"):
        path.with_name(name).unlink()
    resumed = trainer(tmp_path / "resumed", shapes, steps=2, **FLAGS | {"lr": 5e-4, "ema_lengths": 0.1})
    resume_from(resumed, path)
    said = "\n".join(resumed.log)
    assert "no ema_0.5_000001.pt beside it: this EMA starts from the weights" in said
    assert "no opt000001.pt beside it: the optimizer state starts empty" in said
    state = resumed.state
    assert same(dict(zip(state.weights, state.emas[1].tensors(), strict=True)), weights(begun))
    assert [(power.updates, power.since) for power in state.powers] == [(1, 1)]
    assert not state.optimizer.state
    resumed.run()
    assert (tmp_path / "resumed" / "model000002.safetensors").exists()


@pytest.mark.parametrize("flattened", ["", "improved", "guided"])
def test_the_order_of_the_tensors_in_the_file_does_not_count(
    tmp_path: Path, shapes: Path, trained: Trained, flattened: str
) -> None:
    """Of the optimizer's state it is the model's."""
    begun = trained(2)
    path = as_openai_saves(begun, tmp_path / "original", flattened)
    found = []
    for order in (list, sorted):
        torch.save({key: weights(begun)[key] for key in order(weights(begun))}, path)
        resumed = trainer(tmp_path / order.__name__, shapes, steps=4, **FLAGS)
        resume_from(resumed, path)
        found.append([resumed.state.optimizer.state[p]["exp_avg"] for p in resumed.state.parameters])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    ours = [begun.state.optimizer.state[p]["exp_avg"] for p in begun.state.parameters]
    assert all(torch.equal(one, other) for one, other in zip(found[0], ours, strict=True))


def test_another_learning_rate_is_told(tmp_path: Path, shapes: Path, trained: Trained) -> None:
    begun = trained(1)
    path = as_openai_saves(begun, tmp_path / "original")
    resumed = trainer(tmp_path / "resumed", shapes, steps=2, **FLAGS | {"lr": 5e-4, "weight_decay": 0.0})
    resume_from(resumed, path)
    assert "its optimizer had lr 0.001, but the run continues with --lr 0.0005" in resumed.log
    assert "its optimizer had weight_decay 0.01, but the run continues with --weight-decay 0" in resumed.log


def test_the_originals_progress_is_kept(tmp_path: Path, shapes: Path, trained: Trained) -> None:
    begun = trained(1)
    path = as_openai_saves(begun, tmp_path / "original")
    there = path.with_name("progress.csv")
    there.write_text("step,loss\n1,2\n")
    resumed = trainer(path.parent, shapes, steps=2, **FLAGS)
    resume_from(resumed, path)
    resumed.run()
    assert path.with_name("progress.original.csv").read_text() == "step,loss\n1,2\n"
    assert "is not from this run: renamed to progress.original.csv" in "\n".join(resumed.log)
    assert len(there.read_text().splitlines()) == 2
    path.with_name("progress.jsonl").unlink()
    ProgressFiles(path.parent, 0, resumed.log)  # and never replaced
    assert path.with_name("progress.original.csv").read_text() == "step,loss\n1,2\n"
    assert path.with_name("progress.original.2.csv").exists()


def test_nothing_is_saved_before_an_update(tmp_path: Path, shapes: Path, trained: Trained) -> None:
    """There would be no optimizer's state to save, and nothing new."""
    begun = trained(1)
    path = as_openai_saves(begun, tmp_path / "original")
    path.with_name("opt000001.pt").unlink()
    resumed = trainer(tmp_path / "resumed", shapes, steps=2, **FLAGS)
    resume_from(resumed, path)
    resumed._save()
    resumed.saver.wait()
    assert not list((tmp_path / "resumed").glob("*.safetensors"))


def test_a_step_behind_the_end_is_refused(tmp_path: Path, shapes: Path, trained: Trained) -> None:
    begun = trained(2)
    path = as_openai_saves(begun, tmp_path / "original")
    with pytest.raises(ValueError, match="is at step 2, but steps is 2: give a larger --steps"):
        resume_from(trainer(tmp_path / "resumed", shapes, steps=2, **FLAGS), path)


def _another_shape(content: Any) -> Any:
    content["state"][0]["exp_avg"] = torch.zeros(3)
    return content


def _one_less(content: Any) -> Any:
    del content["state"][0]
    return content


def _without_moment(content: Any) -> Any:
    del content["state"][1]["exp_avg_sq"]
    return content


def _of_integers(content: Any) -> Any:
    content["state"][0]["exp_avg"] = content["state"][0]["exp_avg"].long()
    return content


def _negative_square(content: Any) -> Any:
    content["state"][0]["exp_avg_sq"] -= 1
    return content


def _endless_step(content: Any) -> Any:
    content["state"][0]["step"] = 10**400
    return content


def _nan_step(content: Any) -> Any:
    content["state"][0]["step"] = torch.tensor(torch.nan)
    return content


def _nowhere(content: Any) -> Any:
    content["state"][0]["exp_avg"] = content["state"][0]["exp_avg"].to("meta")
    return content


def _sparse(content: Any) -> Any:
    content["state"][0]["exp_avg"] = content["state"][0]["exp_avg"].to_sparse()
    return content


def _step_of_many(content: Any) -> Any:
    content["state"][0]["step"] = torch.zeros(2)
    return content


@pytest.mark.parametrize(
    "damage",
    [
        *(_another_shape, _one_less, _without_moment, _of_integers, _step_of_many),
        *(_negative_square, _endless_step, _nan_step, _nowhere, _sparse),
        *(lambda _: {"state": {}}, lambda _: {"state": [1]}, lambda _: {"state": torch.zeros(2)}, lambda _: [1]),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(
    tmp_path: Path, shapes: Path, trained: Trained, damage: Callable[[Any], Any]
) -> None:
    begun = trained(1)
    path = as_openai_saves(begun, tmp_path / "original")
    beside = path.with_name("opt000001.pt")
    torch.save(damage(torch.load(beside)), beside)
    with pytest.raises(ValueError, match=re.escape(f"{beside} is not the optimizer state of the model beside it")):
        resume_from(trainer(tmp_path / "resumed", shapes, steps=2, **FLAGS), path)


def test_another_architecture_is_refused(tmp_path: Path, shapes: Path, trained: Trained) -> None:
    begun = trained(1)
    path = as_openai_saves(begun, tmp_path / "original")
    other = trainer(tmp_path / "other", shapes, steps=2, **FLAGS | {"num_channels": 64})
    with pytest.raises(ValueError, match="another architecture"):
        resume_from(other, path)
    torch.save({"a": torch.zeros(1)}, path.with_name("ema_0.5_000001.pt"))
    with pytest.raises(ValueError, match=r"ema_0\.5_000001\.pt has another architecture"):
        resume_from(trainer(tmp_path / "again", shapes, steps=2, **FLAGS), path)


@pytest.mark.parametrize("name", ["ema_0.9999_010000.pt", "model.pt", "opt000001.pt", "model1.bin", "xmodel000001.pt"])
def test_a_name_without_a_step_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not called modelNNNNNN\.pt, .*--init-from"):
        step_of(Path("folder") / name)


def test_the_loss_scale_of_the_original(tmp_path: Path, shapes: Path) -> None:
    """lg_loss_scale begins at 20, grows by fp16_scale_growth with an update and falls by 1 with one that overflows."""
    run = trainer(tmp_path / "a", shapes, "fp16", steps=1, fp16_scale_growth=0.01)
    scaler = run.state.scaler
    assert scaler.get_scale() == 2.0**20
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    lg = 20.0
    for gradient, change in ((1.0, 0.01), (1.0, 0.01), (float("inf"), -1), (float("nan"), -1), (1.0, 0.01)):
        scaler.scale(torch.ones(1))
        parameter.grad = torch.full((1,), gradient)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        lg += change
        assert abs(float(torch.tensor(scaler.get_scale()).log2()) - lg) < 1e-5


def test_without_it_the_scale_is_pytorchs(tmp_path: Path, shapes: Path) -> None:
    run = trainer(tmp_path / "a", shapes, "fp16", steps=1)
    assert run.state.scaler.state_dict() == torch.amp.GradScaler("cpu").state_dict()
