"""fastdiff train: what it makes of its flags, and what lies in the run folder afterwards."""

import csv
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fastdiff import load_checkpoint
from fastdiff.training.metrics import COLUMNS

from ..processes import Job
from ..training.support import content
from .conftest import Cli
from .support import PLAIN, SHORT, TINY, contents, refused, succeeded


def config_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "config.json").read_text())


def weights(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_a_run_folder_holds_what_the_plan_says(train: Cli, tmp_path: Path) -> None:
    flags = ("--steps", 5, "--save-interval", 2, "--ema-rate", "0.9,0.5", "--log-interval", 2, "--preview-interval", 5)
    flags += ("--diffusion-steps", 4)  # which a preview takes
    result = succeeded(train("runs/cats", *flags))
    run_dir = tmp_path / "runs/cats"
    kinds = ("model{:06d}", "ema_0.9_{:06d}", "ema_0.5_{:06d}", "opt{:06d}")
    checkpoints = {kind.format(step) + ".safetensors" for kind in kinds for step in (2, 4, 5)}
    checkpoints |= {f"manifest{step:06d}.json" for step in (2, 4, 5)}
    assert {path.name for path in run_dir.iterdir()} == checkpoints | {
        *("config.json", "progress.csv", "progress.jsonl", "log.txt", "previews", ".lease")
    }
    previews = {path.name for path in (run_dir / "previews").iterdir()}
    assert previews == {"000005_raw.png", "000005_ema_0.9.png", "000005_ema_0.5.png"}
    for name in previews:
        with Image.open(run_dir / "previews" / name) as image:
            assert (image.mode, image.width) == ("RGB", 8 * 42)  # four classes, their names above
    log = (run_dir / "log.txt").read_text()
    for word in ("12 images (12 png, 8x8) in 4 classes: circle, cross, square, triangle", str(run_dir), "step 4/5"):
        assert word in log, word
        assert word in result.out, word
    assert "fastdiff sample runs/cats" in result.out  # how to go on


def test_progress_files_hold_the_same_lines(train: Cli, tmp_path: Path) -> None:
    succeeded(train("r", "--steps", 5, "--log-interval", 2))
    with (tmp_path / "r/progress.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "r/progress.jsonl").read_text().splitlines()]
    assert tuple(table[0]) == COLUMNS
    original = {"step", "samples", "loss", "mse", "vb", "grad_norm", "lg_loss_scale"}
    assert original | {f"{term}_q{q}" for term in ("loss", "mse", "vb") for q in range(4)} <= set(COLUMNS)
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert [line["samples"] for line in lines] == [8, 16, 20]
    for row, line in zip(table, lines, strict=True):
        assert {name: float(text) for name, text in row.items() if text} == line
        assert line["loss"] == pytest.approx(line["mse"])
        assert line["grad_norm"] > 0
        assert "vb" not in line  # the variance is not learned
        assert "lg_loss_scale" not in line  # no fp16


def test_the_configuration_is_whole(train: Cli, tmp_path: Path) -> None:
    succeeded(train("r", "--steps", 1, "--dropout", 0.1, "--lr", 3e-4, "--flip", "--no-ema-warmup"))
    config = config_of(tmp_path / "r")
    assert config["model"]["num_classes"] == 4
    assert config["model"]["dropout"] == 0.1
    assert config["diffusion"]["diffusion_steps"] == 20
    assert config["data"]["flip"] is True
    assert config["train"]["lr"] == 3e-4
    assert config["train"]["ema_warmup"] is False
    assert config["class_names"] == ["circle", "cross", "square", "triangle"]
    loaded = load_checkpoint(tmp_path / "r/model000001.safetensors")
    assert loaded.class_names == ("circle", "cross", "square", "triangle")
    assert (loaded.step, loaded.model_config.num_classes, loaded.model_config.channel_mult) == (1, 4, (1,))


def test_the_run_folder_is_named_after_the_data(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    succeeded(cli("train", "--data-dir", shapes, *TINY, *SHORT, "--steps", 1))
    assert (tmp_path / "runs/shapes/model000001.safetensors").exists()


def test_the_originals_spelling(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    old = "--image_size 16 --num_channels 32 --num_res_blocks 1 --learn_sigma True --class_cond False "
    old += "--use_scale_shift_norm=False --diffusion_steps 30 --noise_schedule linear --lr 1e-3 --batch_size 4 "
    old += "--lr_anneal_steps 2 --save_interval 1 --ema_rate 0.9 --schedule_sampler uniform --microbatch -1 "
    old += "--channel_mult 1"
    succeeded(cli("train", "--data_dir", shapes, "--run-dir", "r", *old.split(), "--preview_interval", 0, *PLAIN))
    config = config_of(tmp_path / "r")
    assert config["model"]["image_size"] == 16
    assert config["model"]["learn_sigma"] is config["diffusion"]["learn_sigma"] is True
    assert config["model"]["class_cond"] is config["model"]["use_scale_shift_norm"] is False
    assert config["class_names"] == []
    # without --steps, lr_anneal_steps is how long the run lasts
    assert config["train"]["steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "r/progress.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert rows[-1]["lr"] == pytest.approx(5e-4)
    assert "vb" in rows[-1]
    assert weights(tmp_path / "r/model000002.safetensors")["out.2.weight"].shape[0] == 6


def test_steps_win_over_lr_anneal_steps(train: Cli, tmp_path: Path) -> None:
    succeeded(train("r", "--steps", 1, "--lr-anneal-steps", 50))
    assert config_of(tmp_path / "r")["train"]["steps"] == 1


def test_resume_takes_lr_anneal_steps_as_the_total_too(train: Cli, tmp_path: Path) -> None:
    succeeded(train("r", "--lr-anneal-steps", 1))
    succeeded(train("r", "--lr-anneal-steps", 3, "--resume"))
    assert (tmp_path / "r/model000003.safetensors").exists()


def test_a_preset_is_overridden_flag_by_flag(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    small = ["--image-size", 8, "--num-channels", 32, "--num-res-blocks", 1, "--channel-mult", 1]
    small += ["--diffusion-steps", 20, "--no-learn-sigma", "--steps", 1]
    succeeded(cli("train", "--data-dir", shapes, "--run-dir", "r", "--preset", "cifar10_uncond", *small, *SHORT))
    config = config_of(tmp_path / "r")
    assert (config["model"]["dropout"], config["diffusion"]["noise_schedule"]) == (0.3, "cosine")  # the preset's
    assert (config["model"]["num_channels"], config["train"]["batch_size"]) == (32, 4)  # the flags'
    assert config["model"]["learn_sigma"] is config["diffusion"]["learn_sigma"] is False


def test_resume_goes_on_where_the_run_stopped(train: Cli, run_dir: Path, tmp_path: Path) -> None:
    succeeded(train("straight", "--steps", 4))
    result = succeeded(train("runs/a", "--steps", 4, "--resume"))
    assert "resumed at step 2" in result.out
    for name in ("model", "ema_0.9999_", "opt"):
        one, other = (weights(tmp_path / run / f"{name}000004.safetensors") for run in ("straight", "runs/a"))
        assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys()), name


def test_resume_needs_no_flags_of_the_model(cli: Cli, shapes: Path, run_dir: Path) -> None:
    result = succeeded(cli("train", "--data-dir", shapes, "--run-dir", "runs/a", "--resume", "--steps", 3, *PLAIN))
    assert "resumed at step 2" in result.out
    assert config_of(run_dir)["train"]["batch_size"] == 4


def test_resume_takes_flags_that_say_the_same(train: Cli, cli: Cli, shapes: Path) -> None:
    """10 timesteps are too few for the default schedule, but not for the run's own."""
    succeeded(train("r", "--steps", 1, "--diffusion-steps", 10))
    flags = ("--diffusion-steps", 10, "--image-size", 8, "--steps", 2)
    succeeded(cli("train", "--data-dir", shapes, "--run-dir", "r", "--resume", *flags, *PLAIN))


def test_resume_of_a_finished_run_changes_nothing(train: Cli, run_dir: Path) -> None:
    files = (run_dir / "model000002.safetensors", run_dir / "progress.csv")
    before = [path.read_bytes() for path in files]
    succeeded(train("runs/a", "--steps", 2, "--resume"))
    after = [path.read_bytes() for path in files]
    assert after == before


def test_resume_on_an_empty_folder_begins_afresh(train: Cli, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    result = succeeded(train("r", "--steps", 1, "--resume"))
    assert "starting from scratch" in result.out
    assert (tmp_path / "r/model000001.safetensors").exists()


def test_resume_falls_back_to_the_checkpoint_before_a_damaged_one(train: Cli, tmp_path: Path) -> None:
    succeeded(train("r", "--steps", 4, "--save-interval", 2))
    path = tmp_path / "r/model000004.safetensors"
    whole = content(path)
    path.write_bytes(path.read_bytes()[:1000])
    result = train("r", "--steps", 4, "--resume")
    assert result.status == 0
    assert "resumed at step 2" in result.out
    said = result.out + result.err
    assert "warning" in said
    assert "model000004.safetensors is damaged" in said
    assert content(path) == whole  # made again, the same


def test_resume_is_refused_where_no_checkpoint_is_whole(train: Cli, run_dir: Path) -> None:
    (run_dir / "opt000002.safetensors").write_bytes(b"")
    refused(train("runs/a", "--steps", 4, "--resume"), "runs/a", "resume")


def test_init_from_takes_the_weights_and_begins_at_0(train: Cli, run_dir: Path, tmp_path: Path) -> None:
    source = run_dir / "ema_0.9999_000002.safetensors"
    result = succeeded(train("r", "--steps", 1, "--lr", 1e-30, "--init-from", source))
    assert f"weights from {source}" in result.out
    ours, theirs = weights(tmp_path / "r/model000001.safetensors"), weights(source)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key])


def test_init_from_with_other_classes_keeps_all_but_their_embedding(train: Cli, run_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "two"
    data.mkdir()
    for name in ("cat_1.png", "dog_1.png"):
        Image.new("RGB", (8, 8), "red").save(data / name)
    source = run_dir / "model000002.safetensors"
    result = train("r", "--data-dir", data, "--steps", 1, "--batch-size", 2, "--lr", 1e-30, "--init-from", source)
    assert f"2 of 2 classes are not in {source}, newly initialised: cat, dog" in succeeded(result).out
    ours, theirs = weights(tmp_path / "r/model000001.safetensors"), weights(source)
    assert ours["label_emb.weight"].shape[0] == 2
    for key in theirs.keys() - {"label_emb.weight"}:
        torch.testing.assert_close(ours[key], theirs[key])


def test_super_resolution_trains(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    flags = (*TINY, *SHORT, "--small-size", 4, "--steps", 2, "--preview-interval", 2, "--diffusion-steps", 4)
    succeeded(cli("train", "--data-dir", shapes, "--run-dir", "r", *flags))
    assert weights(tmp_path / "r/model000002.safetensors")["input_blocks.0.0.weight"].shape[1] == 6
    assert (tmp_path / "r/previews/000002_raw.png").exists()
    refused(cli("sample", "r", *PLAIN), "super-resolution")


def test_images_of_another_size_are_scaled_and_the_corrupt_one_is_named(train: Cli, tmp_path: Path) -> None:
    data = tmp_path / "mixed"
    data.mkdir()
    Image.new("L", (20, 30), 100).save(data / "a_1.png")
    Image.new("RGB", (9, 5), "blue").save(data / "b_1.jpg")
    (data / "b_2.png").write_bytes(b"")
    result = succeeded(train("r", "--data-dir", data, "--batch-size", 2, "--steps", 1))
    assert "left out 1: b_2.png (empty file)" in result.out
    refused(train("s", "--data-dir", data, "--batch-size", 2, "--steps", 1, "--strict"), r"b_2\.png", "strict")
    assert not (tmp_path / "s").exists()


def test_labels_by_folder(train: Cli, tmp_path: Path) -> None:
    for name in ("cats/x_1.png", "dogs/x_2.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), "green").save(path)
    flags = ("--data-dir", tmp_path / "data", "--labels", "folder", "--batch-size", 2, "--steps", 1)
    succeeded(train("r", *flags))
    assert config_of(tmp_path / "r")["class_names"] == ["cats", "dogs"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photos of two animals, in sub-folders of a folder, under the names that a camera gave them."""
    for i in range(12):
        path = tmp_path / "photos" / ("cats", "dogs")[i % 2] / f"IMG{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(path)
    return tmp_path / "photos"


def test_sub_folders_are_classes_by_default(train: Cli, photos: Path, tmp_path: Path) -> None:
    flags = ("--data-dir", photos, "--batch-size", 2)
    result = succeeded(train("r", *flags, "--steps", 1))
    line = "labels: the sub-folders are the classes; --labels prefix takes the file names"
    assert line in result.out
    assert line in (tmp_path / "r/log.txt").read_text()
    config = config_of(tmp_path / "r")
    assert (config["class_names"], config["class_counts"]) == (["cats", "dogs"], [6, 6])
    assert (config["data"]["labels"], config["reading"]) == ("auto", 2)
    succeeded(train("r", *flags, "--steps", 2, "--resume"))
    succeeded(train("s", *flags, "--steps", 1, "--labels", "folder"))
    assert config_of(tmp_path / "s")["data_fingerprint"] == config["data_fingerprint"]


@pytest.mark.parametrize("how", ["--labels", "--preset", "script"])
@pytest.mark.filterwarnings("ignore:.*nearly one class per image")
def test_the_original_rule_where_it_is_asked_for(
    cli: Cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", "r")
    more = {"--labels": ["--labels", "prefix"], "--preset": ["--preset", "fork_128", "--precision", "fp32"]}.get(
        how, []
    )
    command = ["image_train"] if how == "script" else ["train", "--run-dir", "r"]
    flags = [*TINY, "--class-cond", "--data-dir", photos, "--preview-interval", 0, "--compile", "off"]
    flags += ["--steps", 1, "--batch-size", 2, "--num-classes", 12, "--device", "cpu"]
    result = cli(*command, *flags, *more)
    assert result.status == 0, result
    assert "labels:" not in result.out
    config = config_of(tmp_path / "r")
    assert (config["data"]["labels"], len(config["class_names"])) == ("prefix", 12)


def test_a_run_of_an_earlier_version_resumes_with_its_images(train: Cli, photos: Path, tmp_path: Path) -> None:
    """Its config.json says neither how files are read nor of the flags that are new."""
    flags = ("--data-dir", photos, "--batch-size", 2)
    succeeded(train("r", *flags, "--steps", 1, "--labels", "folder"))
    Image.new("RGB", (8, 8)).save(photos / "cats/scan.tif")
    refused(train("r", *flags, "--steps", 2, "--resume"), "are not the ones this run was trained on")
    config = config_of(tmp_path / "r")
    del config["reading"]
    for name in ("label_file", "window", "max_pixels"):
        del config["data"][name]
    (tmp_path / "r/config.json").write_text(json.dumps(config))
    result = succeeded(train("r", *flags, "--steps", 2, "--resume"))
    assert "left out 1: cats/scan.tif" in result.out
    assert config_of(tmp_path / "r")["reading"] == 1
    succeeded(train("r", *flags, "--steps", 3, "--resume"))


def test_classes_from_a_label_file(train: Cli, cli: Cli, photos: Path, tmp_path: Path) -> None:
    rows = [f"{path.name},{'warm' if int(path.stem[3:]) > 5 else 'cold'}" for path in photos.rglob("*.png")]
    (tmp_path / "labels.csv").write_text("\n".join(["image,class", *rows]))
    flags = ("--data-dir", photos, "--batch-size", 2, "--label-file", "labels.csv")
    succeeded(train("r", *flags, "--steps", 1))
    config = config_of(tmp_path / "r")
    assert (config["class_names"], config["class_counts"]) == (["cold", "warm"], [6, 6])
    assert config["data"]["label_file"] == str(tmp_path / "labels.csv")
    succeeded(train("r", *flags, "--steps", 2, "--resume"))
    refused(
        train("r", *flags[:-2], "--steps", 3, "--resume", "--labels", "folder"), "the data has the classes cats, dogs"
    )
    succeeded(cli("train", "--config", "r/config.json", "--run-dir", "again", "--steps", 1))
    assert config_of(tmp_path / "again")["data_fingerprint"] == config["data_fingerprint"]
    refused(train("s", *flags[:-1], "nowhere.csv"), r"label_file nowhere\.csv does not exist, nor is it in .*photos")
    (tmp_path / "labels.csv").rename(photos / "labels.csv")
    result = succeeded(cli("train", "--run-dir", "u", *TINY, *SHORT, "--data-dir", photos, "--steps", 1))
    assert (
        f"labels: labels.csv is not used: --class-cond --label-file {photos}/labels.csv takes the classes from it"
        in result.out
    )
    assert "left out 1: labels.csv (not an image)" in result.out


def test_images_that_are_nearly_black_are_told(train: Cli, cli: Cli, tmp_path: Path) -> None:
    for i in range(4):
        path = tmp_path / f"scans/a_{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 1000 * i, np.uint16)).save(path)
    flags = ["train", "--data-dir", "scans", *TINY, *SHORT, "--steps", 1]
    with warnings.catch_warnings(action="default"):
        result = cli(*flags, "--run-dir", "r")
    assert result.status == 0
    assert re.fullmatch(
        r"warning: .*4 of 4 16-bit images without a value above 3,000.* --window 0,4095 .*\n", result.err
    )
    succeeded(cli(*flags, "--run-dir", "s", "--window", "0,4095"))
    assert config_of(tmp_path / "s")["data"]["window"] == [0, 4095]
    refused(cli(*flags, "--run-dir", "t", "--window", "9,3"), "window must be two numbers, black and white", "9.*3")
    refused(cli(*flags, "--run-dir", "t", "--max-pixels", 10), "none of the 4 images", "raise it with --max-pixels")


def test_a_batch_larger_than_the_data_is_a_warning(shapes: Path, tmp_path: Path) -> None:
    flags = ["--run-dir", "r", *TINY, *SHORT, "--batch-size", "20", "--steps", "1"]
    result = Job(None, ["train", "--data-dir", shapes, *flags], cwd=tmp_path).finish()
    assert result.status == 0, result
    assert "batch_size 20 is larger than the 12 images" in result.out + result.err
    assert (tmp_path / "r/model000001.safetensors").exists()


def test_weights_do_not_depend_on_the_log(train: Cli, tmp_path: Path) -> None:
    """Previews, log lines and checkpoints on the way draw no number that training draws."""
    flags = ("--steps", 3, "--dropout", 0.1, "--diffusion-steps", 4)
    succeeded(train("quiet", *flags))
    succeeded(train("loud", *flags, "--preview-interval", 2, "--save-interval", 1, "--log-interval", 1))
    one, other = (weights(tmp_path / run / "model000003.safetensors") for run in ("quiet", "loud"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    succeeded(train("other", *flags, "--seed", 1))
    third = weights(tmp_path / "other/model000003.safetensors")
    assert not all(torch.equal(one[key], third[key]) for key in one)
    assert np.isfinite([float(value.sum()) for value in third.values()]).all()


def test_resume_keeps_the_precision_that_the_run_was_begun_with(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    run = ["train", "--data-dir", shapes, "--run-dir", "runs/a", *TINY, "--batch-size", "4", "--preview-interval", "0"]
    succeeded(cli(*run, "--steps", 1, "--precision", "fp16", "--device", "cpu"))
    assert "fp16" in succeeded(cli("train", "--run-dir", "runs/a", "--steps", 2, "--resume")).out
    assert "fp32" in succeeded(cli("train", "--run-dir", "runs/a", "--steps", 3, "--resume", "--precision", "fp32")).out


def test_a_dry_run_shows_what_would_be_trained_and_leaves_nothing(train: Cli, tmp_path: Path) -> None:
    result = succeeded(train("runs/dry", "--steps", 1000, "--dry-run"))
    for said in ("data: 12 images", "model: 0.2 M parameters, 8 pixels", "on: one process, cpu"):
        assert said in result.out
    last = result.out.splitlines()[-1]
    found = re.fullmatch(
        r"dry run: ([\d.]+) images/s .*, about (.+) for 1000 updates, [\d.]+ GiB; nothing was trained, .*", last
    )
    assert found, last
    assert float(found[1]) > 0
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_resumed_run_changes_nothing(run_dir: Path, cli: Cli) -> None:
    before = contents(run_dir)
    result = succeeded(cli("train", "--run-dir", run_dir, "--resume", "--steps", 9, "--dry-run"))
    assert "resumed at step 2" in result.out
    assert result.out.splitlines()[-1].startswith("dry run: ")
    assert contents(run_dir) == before


def test_an_edited_config_is_told(run_dir: Path, cli: Cli) -> None:
    """The run continues with what config.json says, but not without a word."""
    path = run_dir / "config.json"
    config = json.loads(path.read_text())
    config["train"]["lr"] = 0.5
    config["model"]["dropout"] = 0.25
    path.write_text(json.dumps(config))
    out = succeeded(cli("train", "--run-dir", run_dir, "--resume", "--steps", 3)).out
    assert (
        "changed in config.json since model000002.safetensors: dropout 0.0 becomes 0.25, lr 0.0001 becomes 0.5" in out
    )
    assert "changed in config.json" not in succeeded(cli("train", "--run-dir", run_dir, "--resume", "--steps", 4)).out
