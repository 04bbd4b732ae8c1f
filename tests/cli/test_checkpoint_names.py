"""One way to name a checkpoint, in every command and in Python; and what is damaged is drawn from by none of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastdiff
from fastdiff.checkpoint import saved_steps

from ..sampling.support import UPPER, command, saved
from .conftest import Cli
from .support import PLAIN, SHORT, TINY, Result, refused, succeeded

RATES = "0.5,0.99"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """a with the steps 2 and 4, and up, which enlarges its images. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    flags = (*TINY, *SHORT, "--class-cond", "--save-interval", 2, "--steps", 4, "--ema-rate", RATES, "--lr", "1e-2")
    command("train", "--data-dir", shapes, "--run-dir", folder / "a", *flags)
    command("train", "--data-dir", shapes, "--run-dir", folder / "up", *flags, "--image-size", 16, "--small-size", 8)
    return folder


@pytest.fixture
def runs(cli: Cli, trained: Path, tmp_path: Path) -> Path:
    """runs/a and runs/up in the current folder."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


Command = Callable[[Cli, Path, str], Result]


def init_from(cli: Cli, shapes: Path, name: str) -> Result:
    flags = ("--data-dir", shapes, "--run-dir", "begun", *SHORT, "--steps", 1)
    return cli("train", *flags, "--init-from", name)


def resume_checkpoint(cli: Cli, shapes: Path, name: str) -> Result:
    flags = ("--data-dir", shapes, "--run-dir", "gone-on", *SHORT, "--ema-rate", RATES)
    return cli("train", *flags, "--steps", 5, "--resume-checkpoint", name)


def resume(cli: Cli, shapes: Path, name: str) -> Result:
    return cli("train", "--resume", "--run-dir", name, "--steps", 5)


def sample(cli: Cli, shapes: Path, name: str) -> Result:
    return cli("sample", name, "--num-samples", 2, "--steps", 1, *PLAIN)


def super_res(cli: Cli, shapes: Path, name: str) -> Result:
    upper = name.replace("runs/a", "runs/up")
    return cli("sample", "runs/a@4", "--num-samples", 2, "--steps", 1, *PLAIN, "--super-res", upper)


def evaluate(cli: Cli, shapes: Path, name: str) -> Result:
    return cli("evaluate", "nll", name, "--data-dir", shapes, "--num-samples", 2, "--steps", 2, *PLAIN)


def convert(cli: Cli, shapes: Path, name: str) -> Result:
    return cli("convert", name, "converted.safetensors")


def python(cli: Cli, shapes: Path, name: str) -> Result:
    try:
        loaded = fastdiff.load_checkpoint(name)
        images = fastdiff.sample(name, 2, steps=1, device="cpu", precision="fp32", compile="off")
    except ValueError as error:
        return Result(2, "", f"error: {error}\n")
    assert images.shape == (2, 8, 8, 3)
    return Result(0, f"{loaded.metadata.get('ema_rate', 'raw')}_{loaded.step:06d}", "")


READERS: list[Command] = [init_from, resume_checkpoint, sample, super_res, evaluate, convert, python]
NAMES = {
    "runs/a": "ema_0.99_000004",
    "runs/a@2": "ema_0.99_000002",
    "runs/a/ema_0.5_000004.safetensors": "ema_0.5_000004",
    "runs/a/model000002.safetensors": "model000002",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_every_command_takes_every_name(cli: Cli, shapes: Path, runs: Path, reader: Command, name: str) -> None:
    if reader is resume_checkpoint and "ema" in name:
        refused(reader(cli, shapes, name), r"ema_0.5_000004.safetensors is not called modelNNNNNN.pt")
        return
    result = reader(cli, shapes, name)
    assert (result.status, result.err) == (0, ""), result
    file = NAMES[name]
    if reader is resume_checkpoint:  # with everything that lies beside it
        file = f"model{file[-6:]}"
        assert saved_steps(Path("gone-on")) == [5] or file == "model000002"
    if reader is super_res:
        assert f"runs/up/{file}.safetensors" in result.out
    elif reader is python:
        assert result.out in (file.replace("ema_", ""), file.replace("model", "raw_"))
    else:
        assert f"runs/a/{file}.safetensors" in result.out


def test_a_run_goes_on_from_its_newest_step_alone(cli: Cli, shapes: Path, runs: Path) -> None:
    for name in ("runs/a@2", "runs/a@best"):
        begun = cli("train", "--data-dir", shapes, "--run-dir", name, *TINY, *SHORT, "--steps", 1)
        for result in (resume(cli, shapes, name), begun):
            refused(
                result,
                f"run_dir {name} names step .*: start another --run-dir with --resume-checkpoint {name}",
            )
    refused(
        resume(cli, shapes, "runs/b"), "^error: run_dir runs/b holds no run to resume: .*; there are runs/a, runs/up$"
    )
    succeeded(resume(cli, shapes, "runs/a"))
    assert 5 in saved_steps(runs / "a")


def test_the_average_is_chosen_by_its_rate(cli: Cli, shapes: Path, runs: Path) -> None:
    for rate, file in (("0.5", "ema_0.5_000002"), ("raw", "model000002"), ("0.99", "ema_0.99_000002")):
        for words in (
            ("sample", "runs/a@2", "--num-samples", 1, "--steps", 1, *PLAIN, "--overwrite"),
            ("evaluate", "nll", "runs/a@2", "--data-dir", shapes, "--num-samples", 1, "--steps", 1, "--overwrite"),
            ("convert", "runs/a@2", "x.safetensors", "--overwrite"),
        ):
            assert f"{file}.safetensors" in succeeded(cli(*words, "--ema-rate", rate)).out
        loaded = fastdiff.load_checkpoint("runs/a@2", ema_rate=0.0 if rate == "raw" else float(rate))
        assert loaded.step == 2
        assert loaded.metadata.get("ema_rate", "raw") == (rate if rate == "raw" else float(rate))


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/a@3", r"runs/(a|up) has no step 3: it has 2, 4"),
        ("runs/a@best", r"runs/(a|up)@best: the best step is not known; fastdiff evaluate checkpoints"),
        ("runs/a@last", r"runs/(a|up)@last: 'last' is not a step; name one, such as"),
        ("runs", r"(no checkpoint in runs: train a model first|runs is not a file)"),
        ("typo", "typo does not exist"),
        ("typo@2", "typo@2 does not exist"),
    ],
)
def test_what_names_none(cli: Cli, shapes: Path, runs: Path, reader: Command, name: str, said: str) -> None:
    refused(reader(cli, shapes, name), said)


def test_a_name_with_an_at_sign_stands_for_itself(cli: Cli, shapes: Path, runs: Path) -> None:
    shutil.copytree(runs / "a", "at@2")
    assert "at@2/ema_0.99_000004" in succeeded(sample(cli, shapes, "at@2")).out


# What the file says of the model


def test_a_file_says_the_model_to_begin_with(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    flags = {"num_heads": 2, "diffusion_steps": 30, "use_scale_shift_norm": False, "dropout": 0.2}
    saved(tmp_path / "m.safetensors", class_cond=True, num_classes=2, class_names=("star", "square"), **flags)
    out = succeeded(init_from(cli, shapes, "m.safetensors")).out
    assert "3 of 4 classes are not in m.safetensors, newly initialised: circle, cross, triangle\n" in out
    config = json.loads((tmp_path / "begun/config.json").read_text())
    assert (config["model"]["num_heads"], config["model"]["num_classes"]) == (2, 4)
    assert (config["diffusion"]["diffusion_steps"], config["diffusion"]["predict_xstart"]) == (30, True)
    before, after = (load_file(path) for path in ("m.safetensors", "begun/model000001.safetensors"))
    torch.testing.assert_close(after["label_emb.weight"][2], before["label_emb.weight"][1], rtol=0, atol=1e-3)  # square
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-heads", 2), "num_heads is 4 in m.safetensors and 2 on the command line: leave the flag out"),
        (("--num-channels", 64), "num_channels is 32 in"),
        (("--num-res-blocks", 2), "num_res_blocks is 1 in"),
        (("--channel-mult", "1,1"), r"channel_mult is \(1,\) in"),
        (("--attention-resolutions", 8), "attention_resolutions is"),
        (("--no-predict-xstart",), "predict_xstart is True in"),
        (("--no-use-scale-shift-norm",), "use_scale_shift_norm is True in"),
        (("--small-size", 4), "small_size is None in"),
        (("--resblock-updown",), "resblock_updown is False in m.safetensors and True on the command line"),
        (("--use-new-attention-order",), "use_new_attention_order is False in"),
        (("--num-head-channels", 16), "num_heads is 4 in m.safetensors and one per 16 channels on the command line"),
        (("--preset", "256x256_classifier"), "256x256_classifier is a classifier, and a diffusion model is wanted"),
        (("--preset", "cifar10_uncond"), "in m.safetensors and"),
    ],
)
def test_weights_that_would_mean_nothing_are_refused(
    cli: Cli, shapes: Path, tmp_path: Path, flags: tuple[object, ...], said: str
) -> None:
    saved(tmp_path / "m.safetensors")
    result = cli("train", "--data-dir", shapes, "--run-dir", "r", *SHORT, "--init-from", "m.safetensors", *flags)
    refused(result, said)
    assert not (tmp_path / "r").exists()


def test_what_fine_tuning_changes_is_said(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors", attention_resolutions=(8,))
    flags = ("--image-size", 16, "--noise-schedule", "linear", "--diffusion-steps", 50, "--learn-sigma", "--class-cond")
    result = cli(
        "train", "--data-dir", shapes, "--run-dir", "r", *SHORT, "--init-from", "m.safetensors", *flags, "--steps", 1
    )
    out = succeeded(result).out
    assert "m.safetensors is changed: image_size 8 becomes 16, diffusion_steps 20 becomes 50, noise_schedule" in out
    assert "m.safetensors has no classes: the embedding of circle, cross, square, triangle is newly initialised" in out
    assert "learn_sigma differs: the last layer is newly initialised" in out
    config = json.loads((tmp_path / "r/config.json").read_text())["model"]
    assert (config["image_size"], config["attention_resolutions"]) == (16, [16])  # the same level


def test_classes_are_left_out_by_a_word(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors", class_cond=True, num_classes=2, class_names=("a", "b"))
    flags = ("--data-dir", shapes, "--run-dir", "r", *SHORT, "--steps", 1, "--no-class-cond")
    out = succeeded(cli("train", *flags, "--init-from", "m.safetensors")).out
    assert "the classes of m.safetensors are dropped: this model is not class-conditional" in out


def test_classes_without_names_go_by_number_and_it_is_said(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors", class_cond=True, num_classes=4)
    out = succeeded(init_from(cli, shapes, "m.safetensors")).out
    assert "m.safetensors has no class names: classes are matched by number, 0 being circle" in out


def test_a_bare_state_dict_says_its_architecture(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    loaded = fastdiff.load_checkpoint(saved(tmp_path / "m.safetensors", use_scale_shift_norm=False))
    torch.save(loaded.model.state_dict(), "model.pt")
    flags = ("--data-dir", shapes, "--run-dir", "r", *SHORT, "--steps", 1, "--image-size", 8)
    succeeded(cli("train", *flags, "--init-from", "model.pt"))
    assert json.loads((tmp_path / "r/config.json").read_text())["model"]["use_scale_shift_norm"] is False
    refused(cli("train", *flags[:2], "--run-dir", "s", "--init-from", "model.pt", "--num-channels", 64), "num_channels")


def test_a_bare_state_dict_of_guided_diffusion_is_asked_for_its_heads(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    flags = {"resblock_updown": True, "channel_mult": (1, 1), "num_heads": 2, "use_new_attention_order": True}
    before = fastdiff.load_checkpoint(saved(tmp_path / "m.safetensors", **flags)).model.state_dict()
    torch.save(before, "model.pt")
    words = ("--data-dir", shapes, "--run-dir", "r", *SHORT, "--steps", 1, "--lr", "1e-9", "--image-size", 8)
    asks = r"model\.pt is a bare state dict: .*given: --num-heads \(or --num-head-channels\), --use-new-attention-order"
    refused(cli("train", *words, "--init-from", "model.pt"), asks)
    said = (
        "--num-head-channels",
        16,
        "--use-new-attention-order",
        "--diffusion-steps",
        30,
        "--noise-schedule",
        "linear",
    )
    succeeded(cli("train", *words, "--init-from", "model.pt", *said))
    config = json.loads((tmp_path / "r/config.json").read_text())["model"]
    assert (config["resblock_updown"], config["num_head_channels"]) == (True, 16)
    after = load_file("r/model000001.safetensors")
    assert all(torch.allclose(before[key], after[key], rtol=0, atol=1e-6) for key in before)


def test_going_on_with_other_classes_is_refused(cli: Cli, tmp_path: Path, runs: Path) -> None:
    from fastdiff.data.shapes import write_shapes

    write_shapes(tmp_path / "few", 12, 8, seed=0)
    for path in (tmp_path / "few").glob("square*"):
        path.rename(path.with_name(path.name.replace("square", "oval")))
    refused(
        resume_checkpoint(cli, tmp_path / "few", "runs/a"),
        "has the classes circle, cross, square, triangle, and the data circle, cross, oval, triangle: --init-from",
    )


# Damage


def flip(path: Path, byte: int, bit: int = 0) -> None:
    with path.open("rb+") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def damaged(name: str, reader: Command, shapes: Path) -> str:
    """The file of runs/a or of runs/up that the reader reads."""
    return name.replace("runs/a", "runs/up") if reader is super_res else name


@pytest.mark.parametrize("reader", READERS, ids=lambda command: command.__name__)
@pytest.mark.parametrize(
    ("part", "copied"),
    [("tensors", False), ("header", False), ("manifest", False), ("tensors", True), ("header", True)],
)
def test_one_flipped_bit_is_refused(
    cli: Cli, shapes: Path, runs: Path, reader: Command, part: str, copied: bool
) -> None:
    stem = "model000004" if reader is resume_checkpoint else "ema_0.99_000004"
    path = Path(damaged(f"runs/a/{stem}.safetensors", reader, shapes))
    size, header = path.stat().st_size, int.from_bytes(path.read_bytes()[:8], "little")
    random = np.random.default_rng(size)
    target, places = path, {"tensors": (8 + header, size), "header": (0, 8 + header)}.get(part, (0, 0))
    if part == "manifest":
        target = path.with_name("manifest000004.json")
        places = 0, target.stat().st_size
    flip(target, int(random.integers(*places)), int(random.integers(8)))
    name = "runs/a"
    if copied and reader is not resume_checkpoint:  # which goes on with what lies beside the file, the manifest too
        shutil.copy(path, f"runs/up/{stem[:3]}.safetensors" if reader is super_res else f"{stem[:3]}.safetensors")
        name = "runs/a/ema.safetensors" if reader is super_res else "ema.safetensors"
    refused(reader(cli, shapes, name), "damaged|not a fastdiff checkpoint|newer fastdiff|is missing")
    assert not list(Path().glob("samples*"))
    assert not Path("converted.safetensors").exists()


def test_the_step_before_is_offered(cli: Cli, shapes: Path, runs: Path) -> None:
    path = runs / "a/ema_0.99_000004.safetensors"
    flip(path, path.stat().st_size - 100)
    for reader in (sample, evaluate, convert, init_from):
        refused(
            reader(cli, shapes, "runs/a"),
            r"ema_0.99_000004.safetensors is damaged: its SHA-256 does not match the saved one; "
            "step 2 is intact: name runs/a@2, or one of its files",
        )
    assert "ema_0.99_000002" in succeeded(sample(cli, shapes, "runs/a@2")).out


def test_a_lost_average_is_not_replaced_by_another(cli: Cli, shapes: Path, runs: Path) -> None:
    (runs / "a/ema_0.99_000004.safetensors").unlink()
    for reader in (sample, evaluate, convert, init_from, python):
        refused(
            reader(cli, shapes, "runs/a"),
            "ema_0.99_000004.safetensors is missing: restore it, or choose another with --ema",
        )
    refused(
        resume_checkpoint(cli, shapes, "runs/a"),
        "ema_0.99_000004.safetensors is missing; step 2 is intact: name runs/a@2",
    )
    assert "ema_0.99_000002" in succeeded(sample(cli, shapes, "runs/a@2")).out


def test_a_damaged_configuration_is_restored_from_a_checkpoint(cli: Cli, shapes: Path, runs: Path) -> None:
    (runs / "a/config.json").write_text("{")
    refused(
        resume(cli, shapes, "runs/a"),
        "config.json is damaged.*: move it away, and --resume uses the configuration in model000004",
    )
    (runs / "a/config.json").unlink()
    assert "resumed at step 4" in succeeded(resume(cli, shapes, "runs/a")).out
    assert json.loads((runs / "a/config.json").read_text())["train"]["steps"] == 5


# Paths


def test_the_home_folder(cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    shutil.copytree(shapes, home / "shapes")
    monkeypatch.setenv("HOME", str(home))
    flags = (*TINY, *SHORT, "--steps", 1)
    succeeded(cli("train", "--data-dir=~/shapes", "--run-dir=~/r", *flags))
    succeeded(cli("train", "--data-dir=~/shapes", "--run-dir=~/r2", *SHORT, "--steps", 1, "--init-from=~/r"))
    files = ("--out=~/s.npz", "--png-dir=~/pngs", "--trajectory=~/t.png")
    succeeded(cli("sample", "~/r", "--num-samples", 1, "--steps", 1, *PLAIN, *files))
    saved(home / "up.safetensors", **UPPER)
    succeeded(
        cli("sample", "~/r", "--num-samples", 1, "--steps", 1, *PLAIN, "--super-res=~/up.safetensors", "--out=~/u.npz")
    )
    succeeded(cli("convert", "~/r", "~/r.pt"))
    evaluated = ("--data-dir=~/shapes", "--num-samples", 1, "--steps", 1, "--out-dir=~/nll", *PLAIN)
    succeeded(cli("evaluate", "nll", "~/r", *evaluated))
    assert {"r", "r2", "s.npz", "pngs", "t.png", "u.npz", "r.pt", "nll"} <= {path.name for path in home.iterdir()}
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "--out", ""),
        ("sample", "--png-dir", " "),
        ("train", "--data-dir", ""),
        ("train", "--data-dir", "x", "--run-dir", ""),
        ("train", "--data-dir", "x", "--init-from", ""),
        ("evaluate", "nll", "--out-dir", ""),
        ("demo", "--run-dir", ""),
    ],
)
def test_an_empty_path_is_named(cli: Cli, words: tuple[str, ...]) -> None:
    refused(cli(*words), f"'{words[-2]}': a path must not be empty: name a file or folder")
