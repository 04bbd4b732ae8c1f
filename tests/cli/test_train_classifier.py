"""``fastdiff train-classifier``: its flags, and what other commands make of its run."""

import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from fastdiff import load_classifier
from fastdiff.config import (
    UNUSED_BY_CLASSIFIERS,
    ClassifierConfig,
    ClassifierTrainConfig,
    DataConfig,
    DiffusionConfig,
    RuntimeConfig,
    StartConfig,
)

from .conftest import Cli
from .support import PLAIN, refused, succeeded

TINY = [
    *("--image-size", "8", "--classifier-width", "64", "--classifier-depth", "1", "--channel-mult", "1"),
    *("--classifier-attention-resolutions", "", "--diffusion-steps", "20", "--noise-schedule", "cosine"),
    *("--batch-size", "4", "--steps", "1", *PLAIN),
]


def test_the_flags_are_the_fields_that_it_uses(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = succeeded(cli("train-classifier", "--help")).out
    for config in (StartConfig, DataConfig, ClassifierTrainConfig, ClassifierConfig, DiffusionConfig, RuntimeConfig):
        for f in fields(config):
            flag = f"--{f.name.replace('_', '-')}"
            assert any(flag in (word, f"{word}/--no") for word in text.replace("/", " ").split()) == (
                f.name not in UNUSED_BY_CLASSIFIERS
            ), flag
    assert "[default: 0.0003]" in text
    assert "[default: 0.05]" in text


def test_a_run(cli: Cli, shapes: Path) -> None:
    """It lies beside the run of a diffusion model on the same images, which sample takes when nothing is named."""
    data = ["--data-dir", shapes, "--labels", "prefix"]
    out = succeeded(cli("train-classifier", *data, *TINY, "--classifier_use_scale_shift_norm", "False")).out
    assert "held out: 2 of these images, not trained on" in out
    assert "sample with: fastdiff sample MODEL --classifier runs/shapes-classifier --out samples.npz" in out
    loaded = load_classifier("runs/shapes-classifier")
    assert (loaded.config.num_classes, loaded.config.classifier_use_scale_shift_norm) == (4, False)
    refused(cli("train-classifier", *data, *TINY), "runs/shapes-classifier already holds a run: use --resume")
    refused(cli("sample"), "model000001.safetensors is a classifier, not a diffusion model")
    diffusion = ["--image-size", "8", "--num-channels", "32", "--num-res-blocks", "1", "--channel-mult", "1"]
    diffusion += ["--attention-resolutions", "", "--batch-size", "4", "--steps", "1", "--preview-interval", "0", *PLAIN]
    succeeded(cli("train", *data, *diffusion))
    os.utime("runs/shapes-classifier/model000001.safetensors")
    text = succeeded(cli("sample", "--steps", "2", "--num-samples", "1", *PLAIN)).out
    assert "model: runs/shapes/ema_0.9999_000001.safetensors, step 1" in text
    refused(cli("train", "--resume", "--run-dir", "runs/shapes-classifier"), "is the run of a classifier")
    succeeded(cli("train-classifier", "--resume", "--run-dir", "runs/shapes-classifier", "--steps", "2"))
    assert load_classifier("runs/shapes-classifier@2").step == 2
    config = ["--config", "runs/shapes-classifier/config.json", "--run-dir", "again", "--steps", "1"]
    succeeded(cli("train-classifier", *config))
    again, before = load_classifier("again"), load_classifier("runs/shapes-classifier@1")
    weights = before.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--label-dropout", "0.1"], "No such option: --label-dropout"),
        (["--class-cond"], "No such option: --class-cond"),
        (["--holdout", "2"], "holdout must be at least 0 and below 1, not 2.0"),
        (["--classifier-pool", "average"], "'average' is not one of"),
        (["--val-data-dir", "nowhere"], "data_dir .*nowhere does not exist"),
        (["--init-from", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_input(cli: Cli, shapes: Path, flags: list[str], pattern: str) -> None:
    refused(cli("train-classifier", "--data-dir", shapes, "--run-dir", "run", *TINY, *flags), pattern)
    assert not Path("run").exists()


def test_no_data(cli: Cli) -> None:
    refused(cli("train-classifier", *TINY), "no data: name a folder of images with --data-dir")
