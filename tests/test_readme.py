"""The commands of the READMEs, run in an empty folder by someone who has photos and nothing else."""

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from string import Template

import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from fastdiff import ModelConfig, build_model
from fastdiff.data import cifar10
from fastdiff.data.shapes import write_shapes
from fastdiff.presets import PRESETS

from .cli.conftest import Cli, cli
from .cli.support import PLAIN
from .data.archive_support import tar
from .data.test_cifar10 import ROWS, python_members

ROOT = Path(__file__).parents[1]
ENGLISH, PORTUGUESE = READMES = ("README.md", "README.pt-BR.md")
__all__ = ["cli"]  # the fixture

SMALL = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
SHRUNK = {
    "train": "--batch-size 2 --steps 2 --preview-interval 0",
    "train-classifier": "--batch-size 2 --steps 2 --classifier-width 64 --classifier-depth 1",
    "image_train": "--batch_size 2 --steps 2 --preview-interval 0",
    "sample": "--batch-size 2",
    "image_sample": "--batch_size 2",
    "evaluate": "--batch-size 2",
}
"""What is put behind a command: of a flag that is given twice the last one counts."""


def commands(readme: str) -> list[str]:
    """Every line in the blocks of a README, without its comment."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = (re.sub(r"\s+#.*", "", line) for line in "\n".join(blocks).splitlines())
    return [line for line in lines if line]


def text_of(readme: str) -> str:
    """A README without its blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / readme).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_both_have_the_same_commands_and_headings() -> None:
    assert commands(ENGLISH) == commands(PORTUGUESE)
    levels = [re.findall(r"^#+ ", text_of(readme), re.MULTILINE) for readme in READMES]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", text_of(readme)):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("readme", READMES)
def test_flags_that_the_text_names_exist(cli: Cli, readme: str) -> None:
    pages = [
        (),
        ("train",),
        ("train-classifier",),
        ("sample",),
        ("benchmark",),
        ("convert",),
        ("evaluate", "fid"),
        ("data", "check"),
    ]
    known = " ".join(cli(*page, "--help").out for page in pages) + " --large-size --nproc-per-node --defaults "
    for flag in {
        flag
        for code in re.findall(r"`([^`]+)`", text_of(readme))
        for flag in re.findall(r"--[a-z-]+", code.replace("_", "-"))
    }:
        assert re.search(rf"{flag}(?![\w-])", known), flag


def test_the_commands_run(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as they stand there; models and lengths are shrunk."""
    for name in ("OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR"):
        monkeypatch.delenv(name, raising=False)
    preset = PRESETS["cifar10_uncond"]
    monkeypatch.setitem(PRESETS, "cifar10_uncond", replace(preset, flags={**preset.flags, **SMALL}))  # type: ignore[arg-type]
    monkeypatch.setattr(cifar10, "_ROWS", ROWS)
    _prepare(cli, tmp_path)
    variables: dict[str, str] = {}
    ran = 0
    for line in commands(ENGLISH):
        words = shlex.split(Template(line).safe_substitute(variables))
        if words[0] == "export":
            variables |= [words[1].split("=", 1)]  # type: ignore[list-item]
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            continue
        with monkeypatch.context() as patch:
            while "=" in words[0]:
                patch.setenv(*words.pop(0).split("=", 1))
            if words[0] == "torchrun":
                parsed = get_args_parser().parse_args(words[1:])
                assert (parsed.module, parsed.training_script) == (True, "fastdiff")
                words = ["fastdiff", *parsed.training_script_args]
                several = "--run-dir runs/several" if words[1] == "train" else ""  # the same run was begun above
                words += several.split()
            assert words[0] == "fastdiff", line
            result = cli(*words[1:], *_shrunk(words))
        assert result.status == 0, (line, result)
        ran += 1
    assert ran > 20
    made = (
        "logs/model000002.safetensors moved/model200001.safetensors samples.npz pngs contact.png photos.zip"
        " neighbours.png report.html runs/photos/best.json nll/nll.json runs/photos-classifier a.gif"
        " cifar/cifar_train cifar.safetensors cifar.pt cifar_diffusers/model_index.json"
    )
    for name in made.split():
        assert (tmp_path / name).exists(), name


def _shrunk(words: list[str]) -> list[str]:
    command = words[1]
    more = SHRUNK.get(command, "").split()
    if "--minutes" in words:
        more[more.index("--steps") : more.index("--steps") + 2] = ["--minutes", "0.01"]
    if command in ("train", "image_train", "image_sample"):
        more += [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    if command == "train-classifier":
        more += ["--image-size", "32", "--channel-mult", "1,2", *PLAIN]
    if command in ("train", "image_train"):
        more += PLAIN
        if command == "train":
            more += ["--class-cond", "--label-dropout", "0.1"]
        if "--resume_checkpoint" in words:
            more += ["--steps", "200001"]
    if command in ("sample", "image_sample", "evaluate"):
        more += PLAIN
        if "--base-samples" not in words and "--indices" not in words:
            more += ["--num-samples", "2"]
        more += ["--timestep-respacing", "2"] if re.search("respacing", " ".join(words)) else ["--steps", "2"]
        if "--interpolate" in words:
            more += ["--class", "cat"]
    return more


def _prepare(cli: Cli, folder: Path) -> None:
    """What the README takes for granted: photos, archives, small images, two models, and the checkpoints of others."""
    photos = folder / "photos"
    write_shapes(photos, 8, 32, seed=0)
    for path in photos.iterdir():
        path.rename(photos / path.name.replace("circle", "cat"))
    write_shapes(folder / "small_images", 2, 8, seed=1)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 33), "red").save(folder / name)
    tar(folder / "cifar-10-python.tar.gz", python_members(), "w:gz")
    model = build_model(ModelConfig(**SMALL, learn_sigma=True))
    for name in ("cifar10_uncond_50M_500K.pt", "old/model200000.pt", "old/ema_0.9999_200000.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), folder / name)
    tiny = ["--num-channels", 32, "--num-res-blocks", 1, "--channel-mult", 1, "--attention-resolutions", 8]
    for run, sizes in (("base", ("--image-size", 8)), ("upsampler", ("--image-size", 32, "--small-size", 8))):
        words = [
            "train",
            "--data-dir",
            photos,
            "--run-dir",
            f"runs/{run}",
            *tiny,
            "--diffusion-steps",
            40,
            *sizes,
            *SHRUNK["train"].split(),
        ]
        assert cli(*words, *PLAIN).status == 0
        os.utime(folder / "runs" / run, (0, 0))
