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
from fastdiff.training.run_folder import read_config

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
    succeeded(cli("train", *data, *diffusion, "--recipe", "improved"))
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


def test_a_released_classifiers_flags(cli: Cli, shapes: Path) -> None:
    """--preset sets them, the length of the run too, and other flags override it; unused ones leave no trace."""
    small = ["--image-size", "8", "--classifier-width", "64", "--classifier-depth", "1", "--channel-mult", "1"]
    data = ["--data-dir", shapes, "--run-dir", "run", "--batch-size", "2", *small, *PLAIN]
    succeeded(cli("train-classifier", "--preset", "64x64_classifier", "--lr-anneal-steps", "2", *data))
    loaded = load_classifier("run")
    process = DiffusionConfig(noise_schedule="cosine", rescale_timesteps=False)
    assert (loaded.step, loaded.diffusion_config) == (2, process)
    config = read_config(Path("run"))
    assert (config.train.lr, config.train.weight_decay) == (6e-4, 0.2)
    assert config.diffusion == process
    refused(cli("train-classifier", "--preset", "64x64_diffusion", *data[:2]), "is a diffusion model, and a classifier")


def test_the_script_of_guided_diffusion(cli: Cli, shapes: Path) -> None:
    """It trains on every image, as guided-diffusion does, and measures on those of --val_data_dir."""
    flags = (
        "--iterations 2 --anneal_lr True --batch_size 2 --lr 3e-4 --weight_decay 0.05 --log_interval 1 --noised True"
    )
    flags += " --image_size 8 --classifier_width 64 --classifier_depth 1 --channel_mult 1 --val_data_dir="
    flags += " --classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True"
    out = succeeded(cli("classifier_train", "--data_dir", shapes, *flags.split(), "--run-dir", "run", *PLAIN)).out
    assert "no image is held out, so that no accuracy is measured" in out
    config = read_config(Path("run"))
    assert (config.train.steps, config.train.lr_anneal_steps, config.train.batch_size) == (2, 2, 2)
    assert not config.diffusion.rescale_timesteps


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--label-dropout", "0.1"], "No such option: --label-dropout"),
        (["--class-cond"], "No such option: --class-cond"),
        (["--holdout", "2"], "holdout must be at least 0 and below 1, not 2.0"),
        (["--classifier-pool", "average"], "'average' is not one of"),
        (["--val-data-dir", "nowhere"], "data_dir .*nowhere does not exist"),
        (["--init-from", "nowhere"], "nowhere does not exist"),
        (["--preset", "lsun_cat"], "preset lsun_cat is a diffusion model, and a classifier is wanted: one of 64x64_cl"),
        (["--preset", "64x64"], "preset must be one of 64x64_classifier, .*, not '64x64'"),
    ],
)
def test_bad_input(cli: Cli, shapes: Path, flags: list[str], pattern: str) -> None:
    refused(cli("train-classifier", "--data-dir", shapes, "--run-dir", "run", *TINY, *flags), pattern)
    assert not Path("run").exists()


def test_no_data(cli: Cli) -> None:
    refused(cli("train-classifier", *TINY), "no data: name a folder of images with --data-dir")
