"""fastdiff sample: which model it takes, which images it draws, and the files that it writes."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from fastdiff.runtime import threads
from fastdiff.sampling import job

from ..sampling.support import CLASSES, SMOOTH, UPPER, saved
from .conftest import Cli
from .support import SHORT, TINY, refused, succeeded


def images_in(path: Path | str) -> NDArray[np.uint8]:
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"]


def labels_in(path: Path | str) -> NDArray[np.int64]:
    with np.load(path, allow_pickle=False) as file:
        return file["arr_1"]


def test_without_a_name_it_takes_the_newest_runs_average_and_says_so(train: Cli, sample: Cli, tmp_path: Path) -> None:
    succeeded(train("runs/new", "--steps", 2, "--save-interval", 1, "--ema-rate", "0.5,0.99"))
    succeeded(train("runs/old", "--steps", 3))
    for path in (tmp_path / "runs/old").iterdir():
        os.utime(path, (1, 1))
    result = succeeded(sample("--num-samples", 2, "--steps", 2))
    assert "runs/new/ema_0.99_000002.safetensors" in result.out
    assert images_in("samples.npz").shape == (2, 8, 8, 3)
    assert "runs/old/ema_0.9999_000003" in succeeded(sample("runs/old", "--steps", 2, "--out", "b.npz")).out


def test_the_npz_is_the_originals(sample: Cli, checkpoint: Path) -> None:
    result = succeeded(
        sample(checkpoint, "--num-samples", 5, "--batch-size", 2, "--steps", 4, "--out", "deep/er/s.npz")
    )
    with np.load("deep/er/s.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1", "class_names", "indices", "seed", "settings"]
        assert file["indices"].tolist() == [0, 1, 2, 3, 4]
        assert (int(file["seed"]), file["seed"].dtype) == (0, np.uint64)
        assert json.loads(str(file["settings"]))["sampler"] == "ddpm"
        assert (file["arr_0"].shape, file["arr_0"].dtype) == ((5, 8, 8, 3), np.uint8)
        assert file["arr_1"].dtype == np.int64
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1]  # all classes in turn
        assert len({image.tobytes() for image in file["arr_0"]}) == 5
    assert "step 7" in result.out
    assert "deep/er/s.npz" in result.out
    with Image.open("deep/er/s.png") as grid:
        assert grid.mode == "RGB"
        # 3 columns, 2 rows, 8 pixels and 2 between, each pixel 8 wide, and the classes' names above
        names = grid.height - 8 * (2 * 10 + 2)
        assert (grid.width, names > 8) == (8 * (3 * 10 + 2), True)
        first = np.asarray(grid)[names + 16 : names + 80 : 8, 16:80:8]
    assert np.array_equal(first, images_in("deep/er/s.npz")[0])


def test_without_classes_there_is_no_arr_1(train: Cli, sample: Cli) -> None:
    succeeded(train("r", "--no-class-cond", "--steps", 1))
    succeeded(sample("r", "--num-samples", 2, "--steps", 2))
    with np.load("samples.npz") as file:
        assert "arr_1" not in file.files
    refused(sample("r", "--class", "square", "--out", "b.npz"), "class", "square")


def test_png_files_are_the_images(sample: Cli, checkpoint: Path) -> None:
    succeeded(sample(checkpoint, "--num-samples", 4, "--steps", 3, "--png-dir", "pngs"))
    names = sorted(path.name for path in Path("pngs").iterdir())
    assert names == ["cat_000000.png", "cat_000003.png", "dog_000001.png", "zebra_000002.png"]
    drawn = images_in("samples.npz")
    for name in names:
        with Image.open(Path("pngs") / name) as image:
            assert np.array_equal(np.asarray(image), drawn[int(name[-10:-4])])


def test_png_files_of_a_model_with_more_classes_than_names(train: Cli, sample: Cli) -> None:
    succeeded(train("r", "--num-classes", 6, "--steps", 1))
    succeeded(sample("r", "--num-samples", 7, "--steps", 2, "--png-dir", "pngs"))
    assert len(list(Path("pngs").iterdir())) == 7


def test_a_class_by_name_and_by_index(sample: Cli, checkpoint: Path) -> None:
    flags = ("--num-samples", 3, "--steps", 3)
    succeeded(sample(checkpoint, *flags, "--class", "dog", "--out", "name.npz"))
    succeeded(sample(checkpoint, *flags, "--class", 1, "--out", "index.npz"))
    succeeded(sample(checkpoint, *flags, "--class", "zebra", "--out", "other.npz"))
    assert labels_in("name.npz").tolist() == labels_in("index.npz").tolist() == [1, 1, 1]
    assert np.array_equal(images_in("name.npz"), images_in("index.npz"))
    assert not np.array_equal(images_in("name.npz"), images_in("other.npz"))


@pytest.mark.parametrize(("wanted", "near"), [("zebr", "zebra"), ("Dog", "dog"), ("3", "cat"), ("-1", "cat")])
def test_an_unknown_class_offers_those_nearby(sample: Cli, checkpoint: Path, wanted: str, near: str) -> None:
    refused(sample(checkpoint, "--class", wanted), wanted, near)
    assert not Path("samples.npz").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--sampler", "ddpm"),
        ("--sampler", "ddim"),
        ("--sampler", "ddim", "--eta", 0.7),
        ("--sampler", "dpm++-sde"),
    ],
)
def test_the_same_seed_draws_the_same_images_whatever_the_batch_size(
    sample: Cli, checkpoint: Path, flags: tuple[object, ...]
) -> None:
    flags += ("--steps", 5)
    for size, count in ((3, 3), (1, 3), (2, 3), (3, 2)):
        out = f"{size}-{count}.npz"
        succeeded(sample(checkpoint, *flags, "--batch-size", size, "--num-samples", count, "--seed", 3, "--out", out))
    whole = images_in("3-3.npz").astype(int)
    for name in ("1-3.npz", "2-3.npz", "3-2.npz"):
        other = images_in(name)
        # a convolution may sum in another order for another batch: a rounding, no other image
        assert np.abs(whole[: len(other)] - other).max() <= 1, name
    succeeded(sample(checkpoint, *flags, "--num-samples", 3, "--seed", 4, "--out", "seed.npz"))
    assert np.abs(whole - images_in("seed.npz")).max() > 20


def test_ddim_without_eta_is_another_path_than_ddpm(sample: Cli, checkpoint: Path) -> None:
    for i, flags in enumerate((("--sampler", "ddpm"), ("--sampler", "ddim"), ("--sampler", "ddim", "--eta", 1))):
        assert (
            "6 dd" in succeeded(sample(checkpoint, *flags, "--steps", 6, "--num-samples", 2, "--out", f"{i}.npz")).out
        )
    ddpm, ddim, eta = (images_in(f"{i}.npz").astype(int) for i in range(3))
    assert np.abs(ddpm - ddim).max() > 20
    assert np.abs(eta - ddim).max() > 20


@pytest.mark.parametrize("sampler", ["dpm++", "dpm++-sde", "heun"])
def test_few_step_samplers(sample: Cli, checkpoint: Path, sampler: str) -> None:
    flags = ("--num-samples", 2, "--steps", 5)
    result = succeeded(sample(checkpoint, "--sampler", sampler, *flags))
    assert f"5 {sampler} steps" in result.out
    succeeded(sample(checkpoint, "--sampler", "ddim", *flags, "--out", "ddim.npz"))
    assert not np.array_equal(images_in("samples.npz"), images_in("ddim.npz"))


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "dpm++-sde", "heun"])
def test_eta_is_ddims_alone(sample: Cli, checkpoint: Path, sampler: str) -> None:
    refused(sample(checkpoint, "--sampler", sampler, "--eta", 0.5), "eta", "ddim", sampler.replace("+", r"\+"))


def test_steps_and_respacing_say_the_same(sample: Cli, checkpoint: Path) -> None:
    flags = ("--num-samples", 2, "--sampler", "ddim")
    assert "5 ddim steps" in succeeded(sample(checkpoint, *flags, "--steps", 5, "--out", "a.npz")).out
    assert "5 ddim steps" in succeeded(sample(checkpoint, *flags, "--timestep-respacing", 5, "--out", "b.npz")).out
    assert "6 ddim" in succeeded(sample(checkpoint, *flags, "--timestep_respacing", "4,2", "--out", "c.npz")).out
    assert "5 ddim" in succeeded(sample(checkpoint, *flags, "--timestep-respacing", "ddim5", "--out", "d.npz")).out
    assert np.array_equal(images_in("a.npz"), images_in("b.npz"))
    assert not np.array_equal(images_in("a.npz"), images_in("d.npz"))  # the stride ends at 16, not at 19
    refused(sample(checkpoint, "--steps", 5, "--timestep-respacing", 5), "steps", "timestep_respacing")


def test_clipping_can_be_turned_off(sample: Cli, checkpoint: Path) -> None:
    for flag in ("--clip-denoised", "--no-clip-denoised"):
        succeeded(sample(checkpoint, flag, "--num-samples", 2, "--steps", 5, "--out", f"{flag}.npz"))
    assert not np.array_equal(images_in("--clip-denoised.npz"), images_in("--no-clip-denoised.npz"))


def test_existing_files_are_kept_without_overwrite(sample: Cli, checkpoint: Path) -> None:
    succeeded(sample(checkpoint, "--num-samples", 1, "--steps", 2))
    before = Path("samples.npz").read_bytes(), Path("samples.png").read_bytes()
    refused(sample(checkpoint, "--num-samples", 2, "--steps", 2), r"samples\.npz", "--overwrite")
    Path("samples.npz").rename("elsewhere.npz")
    refused(sample(checkpoint, "--num-samples", 2, "--steps", 2), r"samples\.png", "--overwrite")
    Path("elsewhere.npz").rename("samples.npz")
    assert (Path("samples.npz").read_bytes(), Path("samples.png").read_bytes()) == before
    succeeded(sample(checkpoint, "--num-samples", 2, "--steps", 2, "--overwrite"))
    assert len(images_in("samples.npz")) == 2


def test_existing_png_files_are_kept_without_overwrite(sample: Cli, checkpoint: Path) -> None:
    mine = Path("pngs/cat_000000.png")
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    flags = ("--num-samples", 1, "--steps", 2, "--png-dir", "pngs")
    refused(sample(checkpoint, *flags), "pngs", "--overwrite")
    assert mine.read_bytes() == b"mine"
    assert not Path("samples.npz").exists()  # refused before the work


def test_flags_that_agree_change_nothing(sample: Cli) -> None:
    """People who know the original repeat some of the flags of the training: none of the rest may change by it."""
    saved(Path("m.safetensors"), **CLASSES, diffusion_steps=8)
    steps = ("--diffusion-steps", 8)
    succeeded(sample("m.safetensors", "--num-samples", 2, "--out", "a.npz"))
    for i, flags in enumerate((("--image-size", 8), ("--class-cond",), steps, (*TINY, *steps))):
        result = succeeded(sample("m.safetensors", "--num-samples", 2, "--out", f"{i}.npz", *flags))
        assert "8 ddpm steps" in result.out, flags
        assert np.array_equal(images_in(f"{i}.npz"), images_in("a.npz")), flags


def test_diffusion_steps_that_only_the_files_own_schedule_allows(train: Cli, sample: Cli) -> None:
    succeeded(train("r", "--diffusion-steps", 10, "--steps", 1))
    succeeded(sample("r", "--num-samples", 1, "--diffusion-steps", 10))


@pytest.mark.parametrize(
    ("name", "value", "own"),
    [
        ("image-size", "16", "8"),
        ("num-channels", "64", "32"),
        ("diffusion-steps", "1000", "20"),
        ("no-class-cond", "", "True"),
        ("learn-sigma", "", "False"),
        ("no-rescale-timesteps", "", "True"),
    ],
)
def test_flags_that_contradict_the_file_are_refused(
    sample: Cli, checkpoint: Path, name: str, value: str, own: str
) -> None:
    field = name.removeprefix("no-").replace("-", "_")
    result = sample(checkpoint, f"--{name}", *([value] if value else []), "--num-samples", 1, "--steps", 2)
    refused(result, field, value, own, checkpoint.name)
    assert not Path("samples.npz").exists()


def test_another_schedule_is_refused(sample: Cli, checkpoint: Path) -> None:
    refused(sample(checkpoint, "--noise-schedule", "linear", "--num-samples", 1, "--steps", 2), "linear", "cosine")
    assert not Path("samples.npz").exists()


def test_a_bare_state_dict_is_drawn_from_with_its_flags(sample: Cli, checkpoint: Path) -> None:
    torch.save(load_file(checkpoint), "bare.pt")
    refused(sample("bare.pt"), r"bare\.pt", "--preset")
    flags = ("--num-heads", 4, *TINY)  # what else there is to say, the file says
    draw = ("--num-samples", 2, "--steps", 5)
    succeeded(sample("bare.pt", *flags, *draw, "--out", "bare.npz"))
    succeeded(sample(checkpoint, *draw))
    assert np.array_equal(images_in("bare.npz"), images_in("samples.npz"))


def test_a_presets_training_flags_are_not_taken_for_the_samplers(sample: Cli, checkpoint: Path) -> None:
    """cifar10_uncond trains in batches of 128; drawing keeps its own batch size."""
    torch.save(load_file(checkpoint), "bare.pt")
    flags = ("--preset", "cifar10_uncond", "--no-learn-sigma", "--class-cond", "--num-classes", 3, *TINY)
    seen = []
    from fastdiff.sampling import engine

    real = engine.generate

    def spy(*args: object, **kwargs: object) -> object:
        seen.append(args[2].batch_size)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "generate", spy)
        succeeded(sample("bare.pt", *flags, "--num-samples", 1, "--steps", 2))
    assert seen == [16]


def test_numbered_images_keep_their_names_and_classes(sample: Cli, checkpoint: Path) -> None:
    succeeded(sample(checkpoint, "--num-samples", 6, "--steps", 3, "--out", "whole.npz"))
    succeeded(sample(checkpoint, "--indices", "5, 0,3-4", "--steps", 3, "--png-dir", "pngs"))
    with np.load("samples.npz") as file:
        assert file["indices"].tolist() == [5, 0, 3, 4]
        assert json.loads(str(file["settings"]))["indices"] == "5,0,3-4"
    assert labels_in("samples.npz").tolist() == [2, 0, 0, 1]
    names = sorted(path.name for path in Path("pngs").iterdir())
    assert names == ["cat_000000.png", "cat_000003.png", "dog_000004.png", "zebra_000005.png"]
    assert np.abs(images_in("samples.npz").astype(int) - images_in("whole.npz")[[5, 0, 3, 4]]).max() <= 1


@pytest.mark.parametrize("name", ["t.gif", "deep/er/t.png"])
def test_a_trajectory_shows_how_the_first_image_came_about(sample: Cli, checkpoint: Path, name: str) -> None:
    result = succeeded(sample(checkpoint, "--indices", "4,2", "--steps", 5, "--trajectory", name))
    assert f"wrote {name}, the steps of image 4" in result.out
    image = images_in("samples.npz")[0]
    with Image.open(name) as picture:
        frames = getattr(picture, "n_frames", 1)
        picture.seek(frames - 1)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    if name.endswith("gif"):
        assert frames == 6
        last = pixels[::8, ::8]
    else:
        assert pixels.shape == (8 * 12, 8 * (6 * 10 + 2), 3)
        last = pixels[16:80:8, 8 * (5 * 10 + 2) :: 8][:, :8]
    # a GIF has 256 colours, which an image of 64 pixels does not use up
    assert np.abs(last - image).max() <= 1
    refused(sample(checkpoint, "--out", "b.npz", "--trajectory", name), name.replace(".", r"\."), "--overwrite")


def test_trajectories_of_several_images(sample: Cli, checkpoint: Path) -> None:
    flags = ("--indices", "4,2,7", "--steps", 5, "--trajectory", "t.png", "--trajectory-images", 2)
    result = succeeded(sample(checkpoint, *flags))
    assert "wrote t.png, the steps of image 4, 2" in result.out
    with Image.open("t.png") as picture:
        assert picture.size == (8 * (6 * 10 + 2), 8 * (2 * 10 + 2))


def test_a_trajectory_of_a_cascade_ends_with_the_larger_image(sample: Cli, checkpoint: Path) -> None:
    saved(Path("up.safetensors"), **UPPER, **CLASSES)
    flags = ("--num-samples", 2, "--steps", 4, "--super-res", "up.safetensors")
    result = succeeded(sample(checkpoint, *flags, "--trajectory", "t.gif"))
    assert "enlarged by: up.safetensors, step 7" in result.out
    assert "2 images of 16 pixels, 8 ddpm steps" in result.out
    with Image.open("t.gif") as picture:
        assert picture.n_frames == 5
        picture.seek(4)
        last = np.asarray(picture.convert("RGB"))[::4, ::4].astype(int)
    assert np.abs(last - images_in("samples.npz")[0]).max() <= 1


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (("cat", "dog", "zebra"), 7),
        (("línea\n\x1b[31m", "日本語", "a very long name of a class that nobody can read"), 5),
        (("../../etc", "", "."), 4),
        (("cat",), 5),  # more classes than names
        ((), 5),
        (tuple(f"class {i}" for i in range(20)), 45),  # more classes than columns
    ],
)
def test_grids_and_files_of_any_class_names(sample: Cli, tmp_path: Path, names: tuple[str, ...], count: int) -> None:
    saved(Path("m.safetensors"), class_cond=True, num_classes=max(3, len(names)), class_names=names)
    flags = ("--num-samples", count, "--batch-size", 45, "--steps", 1, "--png-dir", "pngs")
    succeeded(sample("m.safetensors", *flags))
    with Image.open("samples.png") as grid:
        assert len(grid.convert("RGB").getcolors(2**20)) > 50
    assert len(list(Path("pngs").iterdir())) == count
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "samples.npz", "samples.png", "pngs"}


def test_guidance_from_training_to_images(train: Cli, sample: Cli) -> None:
    succeeded(train("r", "--steps", 3, "--label-dropout", 0.5, "--lr", 1e-2, "--no-ema-warmup", "--ema-rate", 0.1))
    flags = ("r", "--num-samples", 4, "--steps", 5)
    for scale in (1, 0, 4):
        succeeded(sample(*flags, "--guidance-scale", scale, "--out", f"{scale}.npz"))
    plain, without, strong = (images_in(f"{scale}.npz").astype(int) for scale in (1, 0, 4))
    assert np.abs(plain - without).max() > 0
    assert np.abs(strong - without).mean() > 2 * np.abs(plain - without).mean()
    with np.load("4.npz") as file:
        assert json.loads(str(file["settings"]))["guidance_scale"] == 4.0


def test_classes_as_often_as_in_the_data(cli: Cli, sample: Cli, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("cat_1", "cat_2", "cat_3", "eel_1"):
        Image.new("RGB", (8, 8)).save(data / f"{name}.png")
    succeeded(cli("train", "--data-dir", data, "--run-dir", "r", *TINY, "--class-cond", *SHORT, "--steps", 1))
    flags = ("r", "--steps", 1, "--class-mix", "data")
    succeeded(sample(*flags, "--num-samples", 200, "--batch-size", 100))
    labels = labels_in("samples.npz")
    assert 120 < np.sum(labels == 0) < 180
    assert set(labels) == {0, 1}
    succeeded(sample(*flags, "--indices", "190-199,3", "--out", "part.npz"))
    assert labels_in("part.npz").tolist() == labels[[*range(190, 200), 3]].tolist()


def test_an_interpolation_of_two_files(sample: Cli, tmp_path: Path) -> None:
    saved(Path("m.safetensors"), **{**SMOOTH, "diffusion_steps": 40, "last": 0.02})  # fewer steps, and smoother
    images = np.random.default_rng(0).integers(50, 200, (2, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"{i}.png")
    flags = ("--interpolate", "0.png", "1.png", "--sampler", "ddim", "--no-clip-denoised")
    succeeded(sample("m.safetensors", *flags, "--num-samples", 3))
    way = images_in("samples.npz").astype(int)
    assert np.abs(way[0] - images[0]).mean() < 2
    assert np.abs(way[-1] - images[1]).mean() < 2


def test_a_job_that_others_slow_down_says_so_once(
    sample: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = [1.0], [0]

    def perf_counter() -> float:
        """Steps of one second, and after twenty of them of ten."""
        calls[0] += 1
        now[0] += 1.0 if calls[0] <= 20 else 10.0
        return now[0]

    monkeypatch.setattr(job, "time", SimpleNamespace(perf_counter=perf_counter))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "load_average", lambda: 6.3 if calls[0] > 20 else 1.0)
    result = succeeded(sample(checkpoint, "--num-samples", 6, "--batch-size", 2, "--steps", 20))
    (line,) = (line for line in result.out.splitlines() if line.startswith("warning"))
    assert line == (
        "warning: steps take 10.0 times as long as at the start, and the load is 6.3 on 2 cores: other processes use "
        "them; OMP_NUM_THREADS=1 may be faster than 2 threads that wait for each other"
    )
