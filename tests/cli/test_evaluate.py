"""fastdiff evaluate nll, and what it refuses."""

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import load_checkpoint
from fastdiff.checkpoint import sha256
from fastdiff.evaluation import files

from ..sampling.support import UPPER, saved
from .conftest import Cli
from .support import SHORT, TINY, Result, contents, refused, succeeded

CPU = ["--compile", "off", "--device", "cpu"]
STEPS = 20


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Seven images of the checkpoint's classes, of which dogs come first in its numbering where cats are missing."""
    folder = tmp_path / "animals"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("dog_1", "more/cat_1", "more/zebra_2", "zebra_1", "zebra_3", "cat_9", "dog_5"):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def evaluate(cli: Cli) -> Cli:
    def run(*args: object) -> Result:
        return cli("evaluate", "nll", *args, *CPU)

    return run


def array(path: Path, name: str = "arr_0") -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
        return file[name]


def test_classes_and_values_as_in_training(cli: Cli, evaluate: Cli, tmp_path: Path) -> None:
    """Of a run with --labels auto; other models keep improved-diffusion's rule."""
    for i in range(6):
        path = tmp_path / "data" / ("cats", "dogs")[i % 2] / f"IMG{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 600 * i, np.uint16)).save(path)
    flags = [*TINY, "--class-cond", *SHORT, "--steps", 1, "--window", "0,4095"]
    succeeded(cli("train", "--data-dir", "data", "--run-dir", "run", *flags))
    result = succeeded(evaluate("run", "--data-dir", "data", "--steps", 2))
    assert "labels: the sub-folders are the classes" in result.out
    said = json.loads((tmp_path / "nll/nll.json").read_text())
    trained = json.loads((tmp_path / "run/config.json").read_text())
    assert (said["labels"], said["data_fingerprint"]) == ("auto", trained["data_fingerprint"])
    refused(evaluate("run", "--data-dir", "data", "--steps", 2, "--labels", "prefix", "--out-dir", "b"), "IMG0.png")


def test_every_file(evaluate: Cli, checkpoint: Path, animals: Path, tmp_path: Path) -> None:
    result = succeeded(evaluate(checkpoint, "--data-dir", animals, "--batch-size", 3, "--plot", "plots/terms.png"))
    folder = tmp_path / "nll"
    names = {"vb_terms.npz", "mse_terms.npz", "xstart_mse_terms.npz", "images.npz", "nll.json"}
    assert {path.name for path in folder.iterdir()} == names
    terms = {name: array(folder / f"{name}_terms.npz") for name in ("vb", "mse", "xstart_mse")}
    assert {(values.shape, values.dtype) for values in terms.values()} == {((STEPS,), np.dtype(np.float32))}
    assert array(folder / "images.npz", "names").tolist() == [
        *("cat_9.png", "dog_1.png", "dog_5.png", "more/cat_1.png", "more/zebra_2.png", "zebra_1.png", "zebra_3.png")
    ]
    total, prior = (array(folder / "images.npz", f"{name}_bpd") for name in ("total", "prior"))
    assert total.shape == prior.shape == (7,)
    assert total.mean() == pytest.approx(terms["vb"].sum() + prior.mean())
    said = json.loads((folder / "nll.json").read_text())
    assert said == {
        "bits_per_dim": total.mean(),
        "standard_error": pytest.approx(total.std(ddof=1) / 7**0.5),
        "prior_bits_per_dim": prior.mean(),
        "images": 7,
        "different_images": 7,
        "labels": "prefix",
        "data_dir": str(animals),
        "data_fingerprint": said["data_fingerprint"],
        "checkpoint": str(checkpoint),
        "sha256": sha256(checkpoint),
        "step": 7,
        "ema_rate": None,
        "timesteps": STEPS,
        "timestep_respacing": "",
        "diffusion_steps": STEPS,
        "clip_denoised": True,
        "seed": 0,
        "precision": "fp32",
    }
    assert re.fullmatch(r"[0-9a-f]{64}", said["data_fingerprint"])
    assert (
        f"\n{total.mean():.4f} bits/dim ± {said['standard_error']:.4f} (prior {prior.mean():.4f}) over 7 images, "
        "raw weights, 20 of 20 steps, seed 0\nwrote nll and plots/terms.png\n"
    ) in result.out
    with Image.open(tmp_path / "plots" / "terms.png") as plot:
        assert (plot.format, plot.size[0] > 1000) == ("PNG", True)
        assert len(plot.convert("RGB").getcolors(2**24) or ()) > 10


def test_it_is_the_bound_of_the_library(evaluate: Cli, checkpoint: Path, animals: Path, tmp_path: Path) -> None:
    """The class of an image is the one that the checkpoint gives its name."""
    from fastdiff import ImageFolder
    from fastdiff.data import normalised
    from fastdiff.diffusion import Philox

    succeeded(evaluate(checkpoint, "--data-dir", animals, "--seed", 5))
    loaded = load_checkpoint(checkpoint)
    folder = ImageFolder(animals, 8)
    x = normalised(torch.from_numpy(np.stack([folder[i][0] for i in range(7)])))
    y = torch.tensor([loaded.class_names.index(Path(name).name.split("_")[0]) for name in folder.names])
    expected = loaded.diffusion.calc_bpd_loop(
        loaded.model, x, model_kwargs={"y": y}, step_noise=Philox(5, torch.arange(7))
    )
    np.testing.assert_allclose(array(tmp_path / "nll" / "images.npz", "total_bpd"), expected["total_bpd"], rtol=1e-5)
    for name in ("vb", "mse", "xstart_mse"):
        mean = expected[name].double().mean(dim=0)
        np.testing.assert_allclose(array(tmp_path / "nll" / f"{name}_terms.npz"), mean, rtol=1e-4, atol=1e-7)


def test_improved_diffusion_s_spelling(evaluate: Cli, checkpoint: Path, animals: Path, tmp_path: Path) -> None:
    flags = ("--num_samples", 9, "--batch_size", 1, "--clip_denoised", "False", "--timestep_respacing", "4")
    result = succeeded(evaluate(checkpoint, "--data_dir", animals, *flags))
    assert " over 9 draws of 7 images, raw weights, 4 of 20 steps, seed 0\n" in result.out
    assert array(tmp_path / "nll" / "vb_terms.npz").shape == (4,)
    assert array(tmp_path / "nll" / "images.npz", "names")[7:].tolist() == ["cat_9.png", "dog_1.png"]
    assert json.loads((tmp_path / "nll" / "nll.json").read_text())["clip_denoised"] is False


def test_a_run_folder_has_averages_to_choose_from(evaluate: Cli, run_dir: Path, shapes: Path) -> None:
    averaged = succeeded(evaluate("runs/a", "--data-dir", shapes, "--num-samples", 1, "--steps", 2, "--out-dir", "a"))
    assert "\nevaluating: 1 images of 8 pixels, 2 steps, seed 0; one process, cpu, fp32, eager" in averaged.out
    assert "bits/dim (prior 0.0" in averaged.out  # of a single image there is no error
    assert " over 1 images, EMA 0.9999, 2 of 20 steps" in averaged.out
    assert json.loads(Path("a/nll.json").read_text())["ema_rate"] == 0.9999
    assert json.loads(Path("a/nll.json").read_text())["standard_error"] is None
    flags = ("--data-dir", shapes, "--num-samples", 1, "--steps", 2, "--ema-rate", "raw", "--precision", "bf16")
    raw = succeeded(evaluate("--out-dir", "b", *flags))  # the newest run
    assert "raw weights" in raw.out
    assert json.loads(Path("b/nll.json").read_text())["precision"] == "bf16"


def test_images_of_one_class_alone(evaluate: Cli, checkpoint: Path, animals: Path, tmp_path: Path) -> None:
    """A data set that would be no good to train on."""
    for path in [*animals.glob("**/cat_*"), *animals.glob("**/dog_*")]:
        path.unlink()
    succeeded(evaluate(checkpoint, "--data-dir", animals, "--steps", 2))
    assert array(tmp_path / "nll" / "images.npz", "names").tolist() == [
        "more/zebra_2.png",
        "zebra_1.png",
        "zebra_3.png",
    ]


def test_super_resolution(evaluate: Cli, animals: Path, tmp_path: Path) -> None:
    saved(tmp_path / "up.safetensors", **UPPER)
    result = succeeded(evaluate("up.safetensors", "--data-dir", animals, "--num-samples", 2, "--steps", 2))
    assert "evaluating: 2 images of 16 pixels" in result.out


@pytest.mark.filterwarnings("default")
def test_a_bare_state_dict(evaluate: Cli, checkpoint: Path, animals: Path, tmp_path: Path) -> None:
    """It has no class names: the data's are numbered in their order, as the checkpoint's are."""
    torch.save(load_checkpoint(checkpoint).model.state_dict(), tmp_path / "model000007.pt")
    described = [
        *("--image-size", 8, "--num-channels", 32, "--num-res-blocks", 1, "--channel-mult", 1, "--class-cond"),
        *("--num-classes", 3, "--num-heads", 4, "--diffusion-steps", STEPS, "--noise-schedule", "cosine"),
    ]
    result = evaluate("model000007.pt", "--data-dir", animals, "--out-dir", "bare", *described, "--steps", 4)
    assert result.status == 0
    assert result.err == (
        "warning: the model has no class names: the classes of the data are numbered in their order, 0 being cat\n"
    )
    assert " over 7 images, raw weights, 4 of 20 steps" in result.out
    succeeded(evaluate(checkpoint, "--data-dir", animals, "--out-dir", "named", "--steps", 4))
    for name in ("vb", "mse", "xstart_mse"):
        np.testing.assert_array_equal(*(array(tmp_path / folder / f"{name}_terms.npz") for folder in ("bare", "named")))


def test_overwriting(evaluate: Cli, checkpoint: Path, animals: Path, tmp_path: Path) -> None:
    plain = (checkpoint, "--data-dir", animals, "--num-samples", 2, "--steps", 2)
    succeeded(evaluate(*plain))
    (tmp_path / "nll" / "mine.txt").write_text("mine")
    (tmp_path / "nll" / "terms.png").write_bytes(b"an older plot")
    flags = (*plain, "--plot", "nll/terms.png")
    before = contents(tmp_path / "nll")
    refused(evaluate(*flags, "--seed", 1), r"out_dir nll holds results: name another folder, or use --overwrite")
    refused(evaluate(*flags, "--out-dir", "other"), r"plot nll/terms\.png exists: .*--overwrite")
    assert contents(tmp_path / "nll") == before
    succeeded(evaluate(*flags, "--seed", 1, "--overwrite"))
    after = contents(tmp_path / "nll")
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] == before[name]} == {"mine.txt"}


def test_what_fails_while_writing_leaves_no_summary(
    evaluate: Cli, checkpoint: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (checkpoint, "--data-dir", animals, "--num-samples", 2, "--steps", 2)
    succeeded(evaluate(*flags))
    real = np.savez

    def full(path: Path, **arrays: Any) -> None:
        if Path(path).name == "images.npz":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, **arrays)

    monkeypatch.setattr(files.np, "savez", full)
    result = evaluate(*flags, "--overwrite")
    refused(result, "No space left")
    assert " bits/dim ± " in result.out  # the work was not for nothing
    left = {path.name for path in (tmp_path / "nll").iterdir()}
    assert left == {"vb_terms.npz", "mse_terms.npz", "xstart_mse_terms.npz", "images.npz"}


def test_a_bound_that_is_not_finite_is_told(evaluate: Cli, animals: Path, tmp_path: Path) -> None:
    saved(tmp_path / "broken.safetensors", last=float("nan"))
    flags = ("--data-dir", animals, "--num-samples", 3, "--steps", 2, "--plot", "terms.png")
    result = succeeded(evaluate("broken.safetensors", *flags))
    assert "\nwarning: the bound of 3 of 3 images is not a finite number, the first is 'cat_9.png': " in result.out
    assert "\nnan bits/dim" in result.out
    said = json.loads((tmp_path / "nll" / "nll.json").read_text(), parse_constant=pytest.fail)
    assert said["bits_per_dim"] is None
    assert np.isnan(array(tmp_path / "nll" / "images.npz", "total_bpd")).all()


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


REFUSALS: list[tuple[tuple[object, ...], list[str]]] = [
    ((), ["no data: name a folder of images with --data-dir"]),
    (("--data-dir", ""), ["--data-dir", "must not be empty"]),
    (("--data-dir", "nowhere"), ["data_dir nowhere does not exist"]),
    (("--data-dir", "empty"), ["no images in data_dir empty"]),
    (("--data-dir", "damaged"), ["none of the 2 images in damaged can be read"]),
    (
        ("--data-dir", "insects"),
        ["the class 'bee', which the model does not know; it knows cat, dog, zebra"],
    ),
    (("--data-dir", "animals", "--labels", "folder"), ["labels folder", "sub-folder"]),
    (("--data-dir", "animals", "--out-dir", "text.txt"), [r"out_dir text\.txt cannot be written: text\.txt is not"]),
    (("--data-dir", "animals", "--out-dir", "text.txt/a"), [r"out_dir text\.txt/a cannot be written"]),
    (("--data-dir", "animals", "--plot", "a.pdf"), [r"plot a\.pdf must end in \.png"]),
    (("--data-dir", "animals", "--plot", "empty.png"), [r"plot empty\.png is a folder"]),
    (("--data-dir", "animals", "--plot", "text.txt/a.png"), [r"plot text\.txt cannot be written"]),
    (("--data-dir", "animals", "--num-samples", 0), ["num_samples must be positive, not 0"]),
    (("--data-dir", "animals", "--num-samples", "all"), ["--num-samples", "valid integer"]),
    (("--data-dir", "animals", "--batch-size", 0), ["batch_size must be positive, not 0"]),
    (("--data-dir", "animals", "--steps", 21), ["timestep_respacing '21'", "21 of 20"]),
    (("--data-dir", "animals", "--steps", 4, "--timestep-respacing", "4"), ["steps and timestep_respacing"]),
    (("--data-dir", "animals", "--seed", 2**64), ["seed", "2.64"]),
    (("--data-dir", "animals", "--ema-rate", "0.9"), [r"ema_rate 0\.9", r"cats\.safetensors"]),
    (("--data-dir", "animals", "--ema-rate", "best"), ["ema_rate", "best", "raw"]),
    (("--data-dir", "animals", "--image-size", 16), ["image_size is 8", "16 on the command line"]),
    (("--data-dir", "animals", "--precision", "fp8"), ["precision", "fp8"]),
    (("--data-dir", "animals", "--timeout", 0), ["timeout"]),
    (("--data-dir", "animals", "--device", "cuda:77"), ["device cuda:77"]),
]


@pytest.mark.parametrize(("flags", "patterns"), REFUSALS, ids=[str(flags) for flags, _ in REFUSALS])
def test_refusals(
    cli: Cli, checkpoint: Path, animals: Path, tmp_path: Path, flags: tuple[object, ...], patterns: list[str]
) -> None:
    (tmp_path / "cats.safetensors").symlink_to(checkpoint)
    (tmp_path / "text.txt").write_text("text")
    for folder in ("empty", "empty.png", "damaged", "insects"):
        (tmp_path / folder).mkdir()
    for name in ("a_1.png", "b_1.jpg"):
        (tmp_path / "damaged" / name).write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for name in ("cat_1", "bee_1"):
        (tmp_path / "insects" / f"{name}.png").write_bytes((animals / "cat_9.png").read_bytes())
    before = everything(tmp_path), contents(tmp_path)
    refused(cli("evaluate", "nll", "cats.safetensors", *flags), *patterns)
    assert (everything(tmp_path), contents(tmp_path)) == before


def test_files_that_are_no_models(evaluate: Cli, run_dir: Path, animals: Path, tmp_path: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, tmp_path / "opt000007.pt")
    for name, pattern in {
        "runs/a/opt000002.safetensors": "of the kind optimizer, not model",
        "opt000007.pt": "is optimizer state, not a model",
        "animals/cat_9.png": r"cat_9\.png",
        "nowhere.safetensors": r"nowhere\.safetensors does not exist",
        "animals": "no checkpoint in animals",
    }.items():
        refused(evaluate(name, "--data-dir", animals), pattern)
    assert not (tmp_path / "nll").exists()


def test_without_matplotlib(evaluate: Cli, checkpoint: Path, animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = r"plot needs matplotlib: pip install matplotlib \(extra 'plot'\)"
    refused(evaluate("nowhere", "--data-dir", "nowhere", "--plot", "terms.png"), missing)  # before any work
    succeeded(evaluate(checkpoint, "--data-dir", animals, "--num-samples", 1, "--steps", 2))


def test_help(cli: Cli) -> None:
    assert {"nll", "fid", "neighbours", "checkpoints"} <= set(succeeded(cli("evaluate")).out.split())
    shown = succeeded(cli("evaluate", "nll", "--help")).out
    assert "Precision of the model; fp32 by default" in shown
    refused(cli("evaluate", "fed"), "fed")
