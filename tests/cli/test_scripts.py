"""improved-diffusion's command lines, pasted as they stand in its READMEs; what both projects' scripts share."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastdiff.cli import scripts
from fastdiff.cli.options import SWITCHES, with_old_spelling
from fastdiff.cli.scripts import SCRIPTS, in_our_words

from .conftest import Cli
from .support import PLAIN, Result, refused, succeeded

# The groups of the section "Models and Hyperparameters", as they stand there: model, diffusion and training flags.
GROUPS = {
    "baseline": (
        "--image_size 64 --num_channels 128 --num_res_blocks 3",
        "--diffusion_steps 4000 --noise_schedule linear",
        "--lr 1e-4 --batch_size 128",
    ),
    "imagenet64_uncond": (
        "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True",
        "--diffusion_steps 4000 --noise_schedule cosine",
        "--lr 1e-4 --batch_size 128",
    ),
    "cifar10_uncond": (
        "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3",
        "--diffusion_steps 4000 --noise_schedule cosine",
        "--lr 1e-4 --batch_size 128",
    ),
    "imagenet64_cond": (
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True",
        "--diffusion_steps 4000 --noise_schedule cosine --rescale_learned_sigmas False --rescale_timesteps False",
        "--lr 3e-4 --batch_size 2048",
    ),
    "upsample": (
        "--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True",
        "--diffusion_steps 4000 --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False",
        "--lr 3e-4 --batch_size 256",
    ),
    "lsun_1e-4": (
        "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
        "--use_scale_shift_norm False --attention_resolutions 16",
        "--diffusion_steps 1000 --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False",
        "--lr 1e-4 --batch_size 128",
    ),
    "lsun_2e-5": (
        "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
        "--use_scale_shift_norm False --attention_resolutions 16",
        "--diffusion_steps 1000 --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False "
        "--use_scale_shift_norm False",
        "--lr 2e-5 --batch_size 128",
    ),
    "imagenet64_vlb": (
        "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True",
        "--diffusion_steps 4000 --noise_schedule cosine --use_kl True",
        "--lr 1e-4 --batch_size 128 --schedule_sampler loss-second-moment",
    ),
    "cifar10_vlb": (
        "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3",
        "--diffusion_steps 4000 --noise_schedule cosine --use_kl True",
        "--lr 1e-4 --batch_size 128 --schedule_sampler loss-second-moment",
    ),
    "fork": (
        "--image_size 128 --num_channels 192 --num_res_blocks 2 --attention_resolutions 32,16 --dropout 0.1 "
        "--learn_sigma True --use_scale_shift_norm True --class_cond False",
        "--diffusion_steps 4000 --noise_schedule linear",
        "--lr 1e-4 --batch_size 16 --use_fp16 True --save_interval 20000",
    ),
}

# What is shrunk stands behind the pasted words: of a flag that is given twice the last counts.
SMALL = "--num_channels 32 --num_res_blocks 1 --image_size 16 --channel_mult 1,2"
SHORT = "--batch_size 2 --lr_anneal_steps 2 --preview_interval 0"


@pytest.fixture
def logdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "log"))
    return tmp_path / "log"


def config_of(run_dir: Path) -> dict[str, dict[str, object]]:
    return json.loads((run_dir / "config.json").read_text())


# whose every flag another group has, too
WITHIN_OTHERS = ("imagenet64_uncond", "lsun_1e-4", "imagenet64_vlb")


@pytest.mark.filterwarnings("ignore:the model has no class names")  # a bare state dict
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in WITHIN_OTHERS)) for name in GROUPS]
)
def test_a_pasted_group_trains_and_samples(cli: Cli, shapes: Path, logdir: Path, name: str) -> None:
    model, process, training = (flags.split() for flags in GROUPS[name])
    # guided-diffusion has the flag --channel_mult
    names, small, extra = ("image_train", "image_sample"), [*SMALL.split(), "--defaults", "improved"], []
    if name == "upsample":
        names = "super_res_train", "super_res_sample"
        small += ["--large_size", "16", "--small_size", "8"]
        class_names = np.array(["circle", "cross", "square"])
        np.savez("small.npz", np.zeros((3, 8, 8, 3), np.uint8), np.arange(3), class_names=class_names)
        extra = ["--base_samples", "small.npz"]
    # fp16 is slow on a CPU, and as a pasted flag it is tried once
    plain = ["--compile", "off", "--device", "cpu"] if "--use_fp16" in training else PLAIN
    succeeded(cli(names[0], "--data_dir", shapes, *model, *process, *training, *small, *SHORT.split(), *plain))
    found = config_of(logdir)
    assert found["train"]["batch_size"] == 2
    assert found["train"]["ema_warmup"] is False
    assert found["diffusion"]["rescale_timesteps"] is ("--rescale_timesteps" not in process)
    assert found["model"]["class_cond"] is ("--class_cond" in model and "True" in model[-1])
    ours, bare = logdir / "ema_0.9999_000002.safetensors", logdir / "ema_0.9999_000002.pt"
    torch.save(load_file(ours), bare)  # as the original would have saved it
    drawn = []
    for path in (ours, bare):
        sampled = cli(
            *(names[1], "--model_path", path, *model, *process, *small, *extra, "--timestep_respacing", "2"),
            *("--batch_size", "2", "--num_samples", "2", "--overwrite", *PLAIN),
        )
        succeeded(sampled)
        with np.load(logdir / "samples_2x16x16x3.npz") as samples:
            assert samples["arr_0"].shape == (2, 16, 16, 3)
            assert ("arr_1" in samples) is found["model"]["class_cond"]
            drawn.append(samples["arr_0"])
    assert np.array_equal(*drawn)


def test_the_same_words_with_fastdiffs_own_commands(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    """The line of the fork, in which one word is changed."""
    pasted = " ".join(GROUPS["fork"]).split()
    small = f"{SMALL} --batch_size 2 --lr_anneal_steps 2 --preview_interval 0 --use_fp16 False".split()
    succeeded(cli("train", "--data_dir", shapes, *pasted, *small, "--compile", "off", "--device", "cpu"))
    found = config_of(tmp_path / "runs" / "shapes")
    assert found["runtime"]["precision"] == "auto"
    assert found["train"]["fp16_scale_growth"] == 0
    assert found["train"]["ema_warmup"] is True


TRAIN = [
    *("--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1"),
    *("--diffusion_steps", "20", "--noise_schedule", "cosine", "--batch_size", "4"),
    *("--preview_interval", "0", "--lr_anneal_steps", "2"),
]


def test_fp16_as_there(cli: Cli, shapes: Path, logdir: Path) -> None:
    """lg_loss_scale begins at 20, falls by 1 with an update that overflows and grows by 1e-3 with one that does not."""
    succeeded(cli("image_train", "--data_dir", shapes, *TRAIN, "--use_fp16", "--compile", "off", "--device", "cpu"))
    found = config_of(logdir)
    assert found["runtime"]["precision"] == "fp16"
    assert found["train"]["fp16_scale_growth"] == 1e-3
    with safe_open(logdir / "opt000002.safetensors", framework="pt") as file:
        (said,) = map(json.loads, file.metadata().values())
    grown = float(np.log2(said["scaler"]["scale"])) - 20
    assert any(abs(grown - wanted) < 1e-6 for wanted in (2e-3, 1e-3 - 1, -2))


def test_a_flag_without_a_meaning_is_told(cli: Cli, shapes: Path, logdir: Path) -> None:
    result = succeeded(cli("image_train", "--data_dir", shapes, *TRAIN, "--fp16_scale_growth", "0.01", *PLAIN))
    assert result.out.count("fp16_scale_growth has no effect: precision fp32 needs no loss scale") == 1


def test_ddim_respacing_without_ddim_stays_ancestral(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--model_path", checkpoint, "--timestep_respacing", "ddim5", "--num_samples", "2", *PLAIN]
    for ddim, name in (("False", "5 ddpm steps"), ("True", "5 ddim steps")):
        assert name in succeeded(cli("image_sample", *flags, "--use_ddim", ddim, "--overwrite")).out
    assert (tmp_path / "samples_2x8x8x3.npz").exists()  # without OPENAI_LOGDIR here


@pytest.mark.parametrize(
    ("pasted", "ours"),
    [
        ("train --large_size 256 --small_size 64", "train --image-size 256 --small-size 64"),
        (
            "image-train --batch_size 3",
            "train --recipe improved --no-ema-warmup --labels prefix --batch-size-per-process 1 "
            "--batch-size-per-process 3",
        ),
        (
            "image_train --preset=p --batch_size 3",
            "train --recipe improved --no-ema-warmup --labels prefix --preset=p --batch-size-per-process 3",
        ),
        ("super_res_sample --model_path a.pt --preset=p", "{} --preset=p a.pt"),
        ("train --resume_checkpoint= --lr 1", "train --lr 1"),
        ("sample --model_path a.pt --model_path b.pt --use_ddim", "sample --sampler ddim b.pt"),
        ("train --resume_checkpoint a --resume_checkpoint= --lr 1", "train --lr 1"),
        ("train --use_fp16 True --use_fp16 False", "train --precision fp16 --precision auto"),
        ("convert --model_path a b", "convert --model-path a b"),
        ("sample --use_ddim True --use_ddim False x", "sample --sampler ddim --sampler ddpm x"),
        ("image_sample --model_path a.safetensors", "{} a.safetensors"),
        ("image_sample --model_path a.pt --preset p", "{} --preset p a.pt"),
        ("image_sample --model_path a.pt", "{} --diffusion-steps 1000 --noise-schedule linear --num-heads 4 a.pt"),
        ("image_sample --use_ddim False", "{} --sampler ddpm"),  # of the newest run
        (
            "image_nll --model_path a.safetensors",
            "evaluate nll --num-samples 1000 --batch-size 1 --labels prefix a.safetensors",
        ),
        ("train --use_fp16 yes", "train --precision fp16 --fp16-scale-growth 1e-3"),
        ("train --use_fp16=1 --fp16_scale_growth=0.1", "train --precision fp16 --fp16-scale-growth=0.1"),
    ],
)
def test_words(monkeypatch: pytest.MonkeyPatch, pasted: str, ours: str) -> None:
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    sampling = "sample --num-samples 10000 --batch-size 16"
    words, _ = in_our_words(with_old_spelling(pasted.split(), SWITCHES | scripts.SWITCHES))
    if "{}" in ours:
        assert " ".join(words).startswith(sampling)
        words = [w for w in words if w not in ("--out", "samples_{shape}.npz")]
        ours = ours.format(sampling)
    assert words == ours.split()


@pytest.mark.parametrize(
    "pasted", ["image_train --resume_checkpoint", "image_sample --model_path --num_samples 3", "sample --base-samples"]
)
def test_a_variable_that_was_not_set_is_no_reason_to_begin_afresh(cli: Cli, pasted: str) -> None:
    """``--resume_checkpoint $CKPT`` without a CKPT."""
    refused(cli(*pasted.split()), r"--(resume-checkpoint|model-path|base-samples) needs a value: name a file, or leave")


@pytest.mark.parametrize("script", [name for name, script in SCRIPTS.items() if not script.only_guided])
def test_help_says_what_a_script_is(cli: Cli, script: str) -> None:
    result = cli(script, "--help")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(f"fastdiff {script} is improved-diffusion's script: fastdiff ")
    trains = SCRIPTS[script].command == ("train",)
    assert ("\nWith --defaults guided it is guided-diffusion's: fastdiff train " in result.out) == trains
    told, usage, _ = result.out.partition("Usage: ")
    assert usage
    assert "--defaults guided" in told.splitlines()[-2]  # a blank line follows


def test_scripts_are_not_on_the_first_page(cli: Cli) -> None:
    assert not any(script in cli("--help").out for script in SCRIPTS)


def test_logdir_is_the_run_folder(cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", "log")
    succeeded(cli("train", "--data_dir", shapes, *TRAIN, *PLAIN))
    assert (tmp_path / "log" / "model000002.safetensors").exists()
    succeeded(cli("sample", "--steps", 2, "--num-samples", 1, *PLAIN))  # the newest there
    refused(cli("train", "--data_dir", shapes, *TRAIN, *PLAIN), "log already holds a run")
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", "blob")
    succeeded(cli("train", "--data_dir", shapes, *TRAIN, *PLAIN))
    assert (tmp_path / "blob" / "model000002.safetensors").exists()
    succeeded(cli("train", "--data_dir", shapes, *TRAIN, "--run-dir", "named", *PLAIN))  # a flag goes before both
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", "gs://bucket/x")
    refused(cli("train", "--data_dir", shapes, *TRAIN, *PLAIN), "DIFFUSION_BLOB_LOGDIR gs://bucket/x: only folders")
    monkeypatch.setenv("OPENAI_LOGDIR", "s3://bucket/y")
    refused(cli("image_sample", "--model_path", "x.pt"), "OPENAI_LOGDIR s3://bucket/y: only folders")


def test_log_format(cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv,tensorboard")
    result = succeeded(cli("train", "--data_dir", shapes, *TRAIN, *PLAIN))
    assert result.out == ""  # stdout is not among them
    assert succeeded(cli("sample", "--steps", 2, "--num-samples", 1, *PLAIN)).out == ""
    assert config_of(tmp_path / "runs" / "shapes")["train"]["tensorboard"] is True
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,parquet")
    refused(
        cli("train", "--data_dir", shapes, *TRAIN, *PLAIN), "OPENAI_LOG_FORMAT names parquet: there are stdout, log"
    )


@pytest.mark.parametrize(("size", "rank"), [("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")])
def test_mpiexec_is_answered_with_torchrun(cli: Cli, monkeypatch: pytest.MonkeyPatch, size: str, rank: str) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(size, "8")
    monkeypatch.setenv(rank, "0")
    line = r"torchrun --standalone --nproc-per-node=8 -m fastdiff image_train --data_dir 'my images'\n"
    refused(cli("image_train", "--data_dir", "my images"), line)
    monkeypatch.setenv(rank, "3")
    assert cli("image_train", "--data_dir", "my images") == Result(2, "", "")  # the first one has said it
    monkeypatch.setenv(rank, "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    line = r"on each machine \(8 processes in all\): torchrun --nnodes=2 --rdzv-backend=c10d \S+ --nproc-per-node=4 -m"
    refused(cli("image_train", "--data_dir", "my images"), line)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "0")
    refused(cli("train"), "--nproc-per-node=1 -m fastdiff train")
    assert cli("--version").status == 0
    monkeypatch.setenv(size, "1")
    refused(cli("image_train", "--data_dir", "my images"), "my images does not exist")
