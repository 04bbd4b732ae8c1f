"""``--resume_checkpoint``: an improved-diffusion run, or another one of ours, goes on in a run folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdiff import build_model
from fastdiff.checkpoint import saved_steps

from .conftest import MODEL, Cli
from .support import PLAIN, TINY, contents, refused, succeeded

SHORT = ["--preview_interval", "0", "--batch_size", "4", *PLAIN]


def config_of(run_dir: Path) -> dict[str, dict[str, object]]:
    return json.loads((run_dir / "config.json").read_text())


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """model000010.pt with an average and an optimizer, of a model with improved-diffusion's 1000 classes."""
    config = replace(MODEL, num_classes=1000)
    state = dict(build_model(config).state_dict())
    folder = tmp_path / "original"
    folder.mkdir()
    torch.save(state, folder / "model000010.pt")
    torch.save(state, folder / "ema_0.9999_000010.pt")
    one = torch.zeros(sum(value.numel() for value in state.values()))
    moments = {0: {"step": 11, "exp_avg": one, "exp_avg_sq": one + 1}}  # flattened, of a run in fp16
    torch.save({"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]}, folder / "opt000010.pt")
    return folder / "model000010.pt"


def test_a_pasted_command_goes_on(cli: Cli, shapes: Path, tmp_path: Path, original: Path) -> None:
    result = cli(
        *("image_train", "--data_dir", shapes, *TINY, "--class_cond", "True", *SHORT),
        *("--resume_checkpoint", original, "--lr_anneal_steps", "12"),
    )
    assert f"resumed at step 10 from {original}" in succeeded(result).out
    run_dir = tmp_path / "runs" / "shapes"
    assert saved_steps(run_dir) == [12]
    assert config_of(run_dir)["model"]["num_classes"] == 1000  # as the file has them, whatever the data has
    assert (run_dir / "ema_0.9999_000012.safetensors").exists()
    # and goes on from what it saved here, with the same flags or without
    words = ["--data_dir", shapes, "--run-dir", run_dir, "--resume", "--resume_checkpoint", original, "--steps", "13"]
    result = succeeded(cli("train", *words, "--lr_anneal_steps", "0", "--batch_size", "4"))
    assert "resumed at step 12" in result.out
    assert f"the weights of {original} are not used" in result.out
    assert saved_steps(run_dir) == [12, 13]


def test_without_a_length_it_takes_as_many_steps_more(cli: Cli, shapes: Path, tmp_path: Path, original: Path) -> None:
    flags = [*TINY, "--class_cond", *SHORT, "--resume_checkpoint", original]
    result = cli("train", "--data_dir", shapes, *flags, "--steps", "10")
    refused(result, "model000010.pt is at step 10, but steps is 10: give a larger --steps")
    assert not (tmp_path / "runs" / "shapes" / "config.json").exists()
    # it cannot be run to its end here: what it decides shows before the first update
    missing = original.with_name("opt000010.pt")
    missing.write_bytes(b"damaged")
    refused(cli("train", "--data_dir", shapes, *flags), "opt000010.pt holds more than tensors")
    log = (tmp_path / "runs" / "shapes" / "log.txt").read_text()
    assert "200,000 more steps, as neither --steps nor --lr-anneal-steps is given" in log


def test_our_own_checkpoint_in_its_folder_and_in_another(cli: Cli, train: Cli, shapes: Path, tmp_path: Path) -> None:
    succeeded(train("runs/a", "--steps", 4, "--save-interval", 2))
    folder = tmp_path / "runs" / "a"
    flags = ["--data-dir", shapes, *TINY, "--class-cond", *SHORT, "--steps", "6"]
    older = folder / "model000002.safetensors"
    before = contents(folder)
    refused(
        cli("train", *flags, "--resume-checkpoint", older),
        r"model000002\.safetensors: the run in .*a is already at step 4; use --resume instead, or name",
    )
    assert contents(folder) == before
    succeeded(cli("train", *flags, "--resume-checkpoint", older, "--run-dir", "runs/b"))
    assert contents(folder) == before
    assert saved_steps(tmp_path / "runs" / "b") == [6]
    succeeded(cli("train", *flags, "--resume-checkpoint", folder / "model000004.safetensors"))
    assert saved_steps(folder) == [2, 4, 6]
    both = [(tmp_path / "runs" / run / "model000006.safetensors") for run in "ab"]
    from safetensors.torch import load_file

    one, other = map(load_file, both)
    assert all(torch.equal(one[key], other[key]) for key in one)  # whichever way it went


def test_our_own_checkpoint_keeps_the_rule_of_its_classes(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    for path in shapes.iterdir():
        name = tmp_path / "data" / path.stem.split("_")[0] / path.name.replace("_", "")
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(path.read_bytes())
    flags = ["train", "--data-dir", "data", *TINY, "--class-cond", *SHORT]
    succeeded(cli(*flags, "--run-dir", "a", "--steps", 1))
    result = succeeded(cli(*flags, "--run-dir", "b", "--steps", 2, "--resume-checkpoint", "a/model000001.safetensors"))
    assert "in 4 classes: circle, cross, square, triangle" in result.out
    assert "newly initialised" not in result.out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model000099.pt", r"model000099\.pt does not exist"),
        ("ema_0.9999_000010.pt", r"is not called modelNNNNNN\.pt, .*--init-from"),
        ("opt000010.pt", r"is not called modelNNNNNN\.pt"),
    ],
)
def test_names_that_are_refused(
    cli: Cli, shapes: Path, tmp_path: Path, original: Path, name: str, message: str
) -> None:
    flags = [*TINY, "--class_cond", *SHORT, "--resume_checkpoint", original.with_name(name), "--steps", "12"]
    refused(cli("train", "--data_dir", shapes, *flags), message)
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_is_refused(cli: Cli, shapes: Path, tmp_path: Path, original: Path) -> None:
    flags = ["--data_dir", shapes, *TINY, "--class_cond", *SHORT, "--resume_checkpoint", original, "--steps", "12"]
    refused(cli("train", *flags, "--num_channels", "64"), "has another architecture")
    refused(cli("train", *flags, "--class_cond", "False"), "another architecture: label_emb.weight")
    refused(cli("train", *flags, "--init-from", original), "init_from and resume_checkpoint both say")
    average = original.with_name("ema_0.9999_000010.pt")
    torch.save({"x": torch.zeros(2)}, average)
    refused(cli("train", *flags), r"ema_0\.9999_000010\.pt has another architecture")
    average.unlink()
    torch.save({"state": {}, "param_groups": []}, original)
    refused(cli("train", *flags), "is optimizer state, not a model")
    assert not (tmp_path / "runs" / "shapes" / "config.json").exists()
