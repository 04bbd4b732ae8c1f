"""guided-diffusion's command lines, pasted as they stand in its README, and the choice between two projects."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastdiff import build_classifier, build_model
from fastdiff.cli import scripts
from fastdiff.cli.options import SWITCHES, CheckpointArgument, Flags, with_flags, with_old_spelling
from fastdiff.cli.scripts import SCRIPTS, explained, in_our_words
from fastdiff.config import (
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    RuntimeConfig,
    SampleConfig,
    with_multipliers,
)
from fastdiff.interop.recognition import describe
from fastdiff.presets import CLASSIFIER_PRESETS, PRESETS

from ..interop.support import ARCHITECTURE, meta_state
from ..support import randomise
from .conftest import Cli
from .support import PLAIN, refused, succeeded

SAMPLE_FLAGS = "--batch_size 4 --num_samples 100 --timestep_respacing 250"
# The lines of the sections "Classifier guidance", "Upsampling" and "LSUN models", MODEL_FLAGS in their place.
LINES = {
    "64x64_diffusion": "classifier_sample --attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 "
    "--dropout 0.1 --image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 192 "
    "--num_head_channels 64 --num_res_blocks 3 --resblock_updown True --use_new_attention_order True --use_fp16 True "
    "--use_scale_shift_norm True --classifier_scale 1.0 --classifier_path models/64x64_classifier.pt "
    "--classifier_depth 4 --model_path models/64x64_diffusion.pt",
    "128x128_diffusion": "classifier_sample --attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 "
    "--image_size 128 --learn_sigma True --noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True --classifier_scale 0.5 "
    "--classifier_path models/128x128_classifier.pt --model_path models/128x128_diffusion.pt",
    "256x256_diffusion": "classifier_sample --attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 "
    "--image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 "
    "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True --classifier_scale 1.0 "
    "--classifier_path models/256x256_classifier.pt --model_path models/256x256_diffusion.pt",
    "256x256_diffusion_uncond": "classifier_sample --attention_resolutions 32,16,8 --class_cond False "
    "--diffusion_steps 1000 --image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256 "
    "--num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True "
    "--classifier_scale 10.0 --classifier_path models/256x256_classifier.pt "
    "--model_path models/256x256_diffusion_uncond.pt",
    "512x512_diffusion": "classifier_sample --attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 "
    "--image_size 512 --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 "
    "--num_res_blocks 2 --resblock_updown True --use_fp16 False --use_scale_shift_norm True --classifier_scale 4.0 "
    "--classifier_path models/512x512_classifier.pt --model_path models/512x512_diffusion.pt",
    "64_256_upsampler": "super_res_sample --attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 "
    "--large_size 256  --small_size 64 --learn_sigma True --noise_schedule linear --num_channels 192 --num_heads 4 "
    "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True "
    "--model_path models/64_256_upsampler.pt --base_samples 64_samples.npz",
    "128_512_upsampler": "super_res_sample --attention_resolutions 32,16 --class_cond True --diffusion_steps 1000 "
    "--large_size 512 --small_size 128 --learn_sigma True --noise_schedule linear --num_channels 192 "
    "--num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True "
    "--model_path models/128_512_upsampler.pt --base_samples 128_samples.npz",
    "lsun_bedroom": "image_sample --attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 "
    "--dropout 0.1 --image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256 "
    "--num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True "
    "--model_path models/lsun_bedroom.pt",
    "lsun_horse_nodropout": "image_sample --attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 "
    "--dropout 0.0 --image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256 "
    "--num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True "
    "--model_path models/lsun_horse_nodropout.pt",
}
# The section "Training models".
TRAIN_CLASSIFIER = (
    "classifier_train --data_dir path/to/imagenet --iterations 300000 --anneal_lr True --batch_size 256 --lr 3e-4 "
    "--save_interval 10000 --weight_decay 0.05 --image_size 128 --classifier_attention_resolutions 32,16,8 "
    "--classifier_depth 2 --classifier_width 128 --classifier_pool attention --classifier_resblock_updown True "
    "--classifier_use_scale_shift_norm True"
)
IN_25_STEPS = (
    "classifier_sample --model_path /path/to/model.pt --classifier_path path/to/classifier.pt --attention_resolutions "
    "32,16,8 --class_cond True --image_size 128 --learn_sigma True --num_channels 256 --num_heads 4 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True --image_size 128 "
    "--classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 --classifier_pool "
    "attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True --classifier_scale 1.0 "
    "--classifier_use_fp16 True --batch_size 4 --num_samples 50000 --timestep_respacing ddim25 --use_ddim True"
)


FIRST_OF_ITS_OWN = {"64_256_upsampler": "resblock-updown"}
"""The first flag that only guided-diffusion has, where it is not num_head_channels."""


@pytest.fixture(autouse=True)
def _no_logdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)


def translated(line: str) -> tuple[list[str], str]:
    return in_our_words(with_old_spelling(line.split(), SWITCHES | scripts.SWITCHES))


def taken(words: list[str]) -> dict[str, Any]:
    """What a command with the flags of ``fastdiff sample`` and of a classifier receives."""
    app, received = typer.Typer(), dict[str, Any]()

    @app.command()
    @with_flags(SampleConfig, RuntimeConfig, ModelConfig, DiffusionConfig, ClassifierConfig)
    def command(
        flags: Flags,
        checkpoint: CheckpointArgument = None,
        classifier: str = "",
        base_samples: str = "",
        out: Annotated[str, typer.Option()] = "",
    ) -> None:
        files = {"classifier": classifier, "base_samples": base_samples, "checkpoint": str(checkpoint), "out": out}
        received.update(flags, **files)

    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return received


@pytest.mark.parametrize("name", LINES)
def test_a_pasted_line_draws_from_the_released_model(name: str) -> None:
    (command, *words), said = translated(f"{LINES[name]} {SAMPLE_FLAGS}")
    flags = taken(words)
    assert command == "sample"
    assert flags["checkpoint"] == f"models/{name}.pt"
    assert (flags["num_samples"], flags["batch_size"], flags["timestep_respacing"]) == (100, 4, "250")
    assert flags["precision"] == ("auto" if name == "512x512_diffusion" else "fp16")
    assert flags["out"] == "samples_{shape}.npz"
    given = {k: v for k, v in flags.items() if k in {**ModelConfig().to_dict(), **DiffusionConfig().to_dict()}}
    del given["timestep_respacing"]  # the sampler's
    model, process = describe(meta_state(ARCHITECTURE.get(name, name)), "x.pt", given)
    assert model == with_multipliers(PRESETS[name].config(ModelConfig))
    assert process == PRESETS[name].config(DiffusionConfig)
    if "classifier_sample" in LINES[name]:
        classifier = name.removesuffix("_uncond").replace("diffusion", "classifier")
        assert flags["classifier"] == f"models/{classifier}.pt"
        scale = {"128x128_diffusion": 0.5, "256x256_diffusion_uncond": 10.0, "512x512_diffusion": 4.0}.get(name, 1.0)
        assert flags["classifier_scale"] == scale
        assert ClassifierConfig.from_flags(flags) == CLASSIFIER_PRESETS[classifier].config(ClassifierConfig)
        assert said == ""  # improved-diffusion has no such script
    else:
        assert (flags["classifier"], "classifier_scale" in flags) == ("", False)
        script, only = LINES[name].split()[0], FIRST_OF_ITS_OWN.get(name, "num-head-channels")
        reason = f"guided-diffusion's defaults, as only it has --{only}"
        assert said == f"{script}: {reason} (--defaults improved: improved-diffusion's)"
    if "upsampler" in name:
        assert flags["base_samples"] == f"{name.partition('_')[0]}_samples.npz"


def test_the_line_of_25_steps() -> None:
    (command, *words), _ = translated(IN_25_STEPS)
    flags = taken(words)
    assert (command, flags["checkpoint"], flags["classifier"]) == (
        "sample",
        "/path/to/model.pt",
        "path/to/classifier.pt",
    )
    assert (flags["sampler"], flags["timestep_respacing"], flags["num_samples"]) == ("ddim", "ddim25", 50_000)
    assert (flags["precision"], flags["classifier_scale"]) == ("fp16", 1.0)
    assert (flags["diffusion_steps"], flags["noise_schedule"]) == (1000, "linear")  # defaults of the script
    assert ClassifierConfig.from_flags(flags) == CLASSIFIER_PRESETS["128x128_classifier"].config(ClassifierConfig)
    assert translated(IN_25_STEPS.replace("ddim25", "250").replace("--use_ddim True", "--use_ddim False"))[0].count(
        "ddpm"
    )


ALWAYS = "--holdout 0 --no-rescale-timesteps --flip --labels prefix"
CLASSIFIER_DEFAULTS = f"{ALWAYS} --batch-size-per-process 4 --steps 150000 --lr 3e-4 --weight-decay 0.0"


def test_the_line_that_trains_a_classifier() -> None:
    words, said = translated(TRAIN_CLASSIFIER)
    assert (words[0], said) == ("train-classifier", "")
    assert " ".join(words[1:]) == (
        f"{CLASSIFIER_DEFAULTS} --data-dir path/to/imagenet --steps 300000 --batch-size-per-process 256 --lr 3e-4 "
        "--save-interval 10000 --weight-decay 0.05 --image-size 128 --classifier-attention-resolutions 32,16,8 "
        "--classifier-depth 2 --classifier-width 128 --classifier-pool attention --classifier-resblock-updown "
        "--classifier-use-scale-shift-norm --lr-anneal-steps 300000"
    )


@pytest.mark.parametrize(
    ("pasted", "ours"),
    [
        ("--anneal_lr True", "{} --lr-anneal-steps 150000"),
        ("--anneal_lr False", "{}"),
        ("--anneal_lr True --anneal_lr False", "{}"),
        ("--anneal_lr --iterations=7", "{} --steps=7 --lr-anneal-steps 7"),
        ("--preset 64x64_classifier", f"{ALWAYS} --preset 64x64_classifier"),
        # the preset says for how long
        ("--preset 64x64_classifier --anneal_lr True", f"{ALWAYS} --preset 64x64_classifier"),
        ("--noised False --val_data_dir v", "{} --no-noised --val-data-dir v"),
        ("--val_data_dir= --resume_checkpoint=", "{}"),
        ("--classifier_use_fp16 True", "{} --precision fp16 --fp16-scale-growth 1e-3"),
        ("--learn_sigma True --use_kl False --predict_xstart --rescale_learned_sigmas=False", "{}"),
        ("--diffusion_steps 4000 --noise_schedule cosine", "{} --diffusion-steps 4000 --noise-schedule cosine"),
        ("--classifier_use_fp16 False", "{} --precision auto"),
        ("--eval_interval 50 --log_interval 1 --microbatch 2", "{} --eval-interval 50 --log-interval 1 --microbatch 2"),
        ("--classifier_resblock_updown False", "{} --no-classifier-resblock-updown"),
        ("--defaults guided", "{}"),
    ],
)
def test_words_of_classifier_train(pasted: str, ours: str) -> None:
    for name in ("classifier_train", "classifier-train"):
        assert translated(f"{name} {pasted}") == (["train-classifier", *ours.format(CLASSIFIER_DEFAULTS).split()], "")


UNSAID = "--diffusion-steps 1000 --noise-schedule linear --num-heads 4"
UNSCALED = "--no-rescale-timesteps --no-rescale-learned-sigmas"
GUIDED = f"{UNSCALED} --flip"
ORDER = "--no-use-new-attention-order"


@pytest.mark.parametrize(
    ("pasted", "ours", "said"),
    [
        (
            "image_train --lr 1",
            "--batch-size-per-process 1 --lr 1",
            "improved-diffusion's defaults (--defaults guided: ",
        ),
        (
            "image_train --resblock_updown True",
            f"--batch-size-per-process 1 {GUIDED} --resblock-updown",
            "guided-diffusion's defaults, as only it has --resblock-updown (--defaults improved: improved-diffusion",
        ),
        (
            "image_train --sigma_small True",
            "--batch-size-per-process 1 --sigma-small",
            "improved-diffusion's defaults, as only it has --sigma-small (--defaults guided: guided-diffusion's)",
        ),
        (  # as a run's config.json has them
            "image_train --resblock_updown False --sigma_small=False --num_head_channels=-1 --num_head_channels -1",
            "--batch-size-per-process 1 --no-resblock-updown --no-sigma-small --num-head-channels=-1 "
            "--num-head-channels -1",
            "improved-diffusion's defaults (--defaults guided",
        ),
        ("image_train --defaults guided", f"--batch-size-per-process 1 {GUIDED}", ""),
        ("image_train --defaults=guided --lr 1", f"--batch-size-per-process 1 {GUIDED} --lr 1", ""),
        ("image_train --channel_mult 1 --defaults improved", "--batch-size-per-process 1 --channel-mult 1", ""),
        ("image_train --preset lsun_cat --num_head_channels 64", "--preset lsun_cat --num-head-channels 64", ""),
        (
            "super_res_train --use_new_attention_order True",
            f"--batch-size-per-process 1 --image-size 256 --small-size 64 {GUIDED} --use-new-attention-order",
            "guided-diffusion's defaults, as only it has --use-new-attention-order",
        ),
        (
            "image_sample --model_path a.pt --channel_mult=1",
            f"{UNSAID} {UNSCALED} {ORDER} --channel-mult=1 a.pt",
            "guided-",
        ),
        ("image_sample --model_path a.safetensors --channel_mult 1", "--channel-mult 1 a.safetensors", ""),
        ("image_nll --model_path a.pt --defaults guided", f"{UNSAID} {UNSCALED} {ORDER} a.pt", ""),
        (
            "super_res_sample --model_path a.pt --defaults guided",
            f"{UNSAID} --small-size 64 {UNSCALED} {ORDER} --image-size 256 a.pt",
            "",
        ),
        (
            "super_res_sample --model_path a.pt",
            f"{UNSAID} --small-size 64 a.pt",
            "improved-diffusion's defaults (--def",
        ),
        ("classifier_sample --classifier_path c.pt", "--classifier c.pt", ""),
        (
            "classifier_sample --classifier_use_fp16 True --use_fp16 False --classifier_path c.pt --model_path a.pt",
            f"{UNSAID} {UNSCALED} {ORDER} --precision auto --classifier c.pt a.pt",
            "",
        ),
    ],
)
def test_the_defaults_are_one_projects(pasted: str, ours: str, said: str) -> None:
    words, line = translated(pasted)
    name = pasted.split()[0]
    script = SCRIPTS[name]
    words = [word for word in words if word not in ("--out", "samples_{shape}.npz")]
    assert words == [*script.command, *script.defaults, *ours.split()]
    assert line.startswith(f"{name}: {said}") if said else not line


def test_contradicting_choices_are_refused(cli: Cli) -> None:
    refused(
        cli("image_train", "--sigma_small", "True", "--num_head_channels", 64),
        "--sigma-small is a flag of improved-diffusion only, --num-head-channels of guided-diffusion: .*--defaults im",
    )
    refused(cli("image_train", "--defaults", "ours"), "defaults must be one of improved, guided, not 'ours'")
    refused(cli("image_train", "--defaults"), "defaults must be one of improved, guided, not ''")
    refused(cli("classifier_train", "--defaults", "improved"), "improved-diffusion has no script classifier_train")
    refused(cli("classifier_sample", "--classifier_path"), "--classifier-path needs a value")
    refused(cli("train", "--defaults", "guided"), "No such option.*--defaults")


def test_the_defaults_are_said_where_the_log_is_printed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("image_train", "--resblock_updown", "True", "--data_dir", "none")
    line = "image_train: guided-diffusion's defaults, as only it has --resblock-updown (--defaults improved: improved-d"
    for formats, printed in (("stdout,log", True), ("log,csv", False)):
        monkeypatch.setenv("OPENAI_LOG_FORMAT", formats)
        result = cli(*words)
        refused(result, "none does not exist")
        assert (line in result.out) == printed
    assert "\nWith --defaults guided it is guided-diffusion's: fastdiff train" in cli(*words, "--help").out
    assert line not in cli(*words, "-h").out


def test_what_the_scripts_of_guided_diffusion_alone_stand_for() -> None:
    assert explained("classifier_train") == (
        f"fastdiff classifier_train is guided-diffusion's script: fastdiff train-classifier {CLASSIFIER_DEFAULTS} ..."
    )
    assert explained("classifier-sample") == (
        "fastdiff classifier-sample is guided-diffusion's script: fastdiff sample --num-samples 10000 --batch-size 16 "
        "--classifier-scale 1.0 --out 'samples_{shape}.npz' ..."
    )


def test_mpiexec_is_answered_for_its_scripts_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("PMI_SIZE", "4")
    for words in (["classifier_train", "--data_dir", "x"], ["train-classifier"]):
        refused(cli(*words), rf"torchrun --standalone --nproc-per-node=4 -m fastdiff {' '.join(words)}\n")


SMALL = "--num_channels 64 --num_res_blocks 1 --channel_mult 1,2 --image_size 16"
SHORT = "--batch_size 2 --lr_anneal_steps 2 --preview_interval 0"


@pytest.mark.filterwarnings("ignore:the model has no class names")  # a bare state dict
@pytest.mark.parametrize("name", ["64x64_diffusion", "lsun_bedroom", "64_256_upsampler"])
def test_pasted_flags_train_and_sample(cli: Cli, shapes: Path, tmp_path: Path, name: str) -> None:
    """The model is shrunk by flags behind the pasted ones, and fp16, which is slow on a CPU, switched off."""
    words = LINES[name].partition(" --classifier")[0].partition(" --model_path")[0].split()[1:]
    kind, extra = "image", []
    small = [*SMALL.split(), "--use_fp16", "False"]
    if "upsampler" in name:
        kind, extra = "super_res", ["--base_samples", "small.npz"]
        small += ["--large_size", "16", "--small_size", "8"]
        class_names = np.array(["circle", "cross", "square"])
        np.savez("small.npz", np.zeros((3, 8, 8, 3), np.uint8), np.arange(3), class_names=class_names)
    trained = succeeded(cli(f"{kind}_train", "--data_dir", shapes, *words, *small, *SHORT.split(), *PLAIN))
    assert f"{kind}_train: guided-diffusion's defaults, as only it has --" in trained.out
    run = tmp_path / "runs" / "shapes"
    config = json.loads((run / "config.json").read_text())
    assert (config["model"]["resblock_updown"], config["diffusion"]["rescale_timesteps"]) == (True, False)
    ours, bare = run / "ema_0.9999_000002.safetensors", run / "ema_0.9999_000002.pt"
    torch.save(load_file(ours), bare)
    drawn = []
    for path in (ours, bare):
        flags = ["--timestep_respacing", "2", "--batch_size", "2", "--num_samples", "2", "--overwrite", *PLAIN]
        sampled = succeeded(cli(f"{kind}_sample", "--model_path", path, *words, *small, *extra, *flags))
        assert (f"{kind}_sample: guided-diffusion's defaults" in sampled.out) == (path == bare)
        with np.load("samples_2x16x16x3.npz") as samples:
            drawn.append(samples["arr_0"])
    assert np.array_equal(*drawn)


@pytest.mark.parametrize("name", ["64x64_diffusion", "256x256_diffusion_uncond"])
def test_a_pasted_line_is_guided_by_a_classifier(cli: Cli, name: str) -> None:
    """Models and sizes are shrunk, and classes too: a file says how many it has."""
    preset = PRESETS[name].config(ModelConfig)
    small = {"num_channels": 64, "num_res_blocks": 1, "channel_mult": (1, 2), "image_size": 16, "num_classes": 3}
    torch.manual_seed(0)
    model = randomise(build_model(replace(preset, **small)))
    config = ClassifierConfig(16, classifier_width=64, classifier_depth=1, channel_mult=(1, 1), num_classes=3)
    Path("models").mkdir()
    torch.save(model.state_dict(), f"models/{name}.pt")
    classifier = name.removesuffix("_uncond").replace("diffusion", "classifier")
    torch.save(randomise(build_classifier(config)).state_dict(), f"models/{classifier}.pt")
    shrunk = "--num_channels 64 --num_res_blocks 1 --channel_mult 1,2 --image_size 16 --classifier_width 64"
    shrunk += " --classifier_depth 1 --num_samples 3 --timestep_respacing 4 --overwrite"
    drawn = {}
    for scale in (0, 3):
        line = f"{LINES[name]} {shrunk} --classifier_scale {scale}"
        succeeded(cli(*line.split(), *PLAIN))
        with np.load("samples_3x16x16x3.npz") as samples:
            drawn[scale] = samples["arr_0"]
            assert samples["arr_1"].tolist() == [0, 1, 2]
    assert not np.array_equal(drawn[0], drawn[3])


def test_the_pasted_line_trains_a_classifier_that_guides(
    cli: Cli, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", "log")
    shrunk = (
        "--image_size 16 --classifier_width 64 --classifier_depth 1 --channel_mult 1,1 --iterations 2 --batch_size 2"
    )
    line = TRAIN_CLASSIFIER.replace("path/to/imagenet", str(shapes))
    succeeded(cli(*line.split(), *shrunk.split(), *PLAIN))
    config = json.loads(Path("log/config.json").read_text())
    train = config["train"]
    assert (train["steps"], train["lr_anneal_steps"], train["batch_size"], train["lr"]) == (2, 2, 2, 3e-4)
    assert (train["weight_decay"], train["holdout"], train["save_interval"]) == (0.05, 0, 10_000)
    assert config["diffusion"]["rescale_timesteps"] is False
    small = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 1), "learn_sigma": True}
    torch.save(randomise(build_model(ModelConfig(**small))).state_dict(), "model.pt")
    sampled = "classifier_sample --model_path model.pt --image_size 16 --classifier_path log/model000002.safetensors"
    sampled += " --classifier_scale 10.0 --num_samples 4 --timestep_respacing 2"
    succeeded(cli(*sampled.split(), *PLAIN))
    with np.load("log/samples_4x16x16x3.npz") as samples:
        assert samples["class_names"].tolist() == ["circle", "cross", "square", "triangle"]


def test_classifier_sample_wants_its_classifier(cli: Cli) -> None:
    refused(cli("classifier_sample", "--model_path", "m.safetensors"), "name it with --classifier_path")
