"""``fastdiff convert`` and bare state dicts on the command line."""

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import (
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    build_classifier,
    build_model,
    load_checkpoint,
    load_classifier,
    save_checkpoint,
    save_classifier,
)
from fastdiff.checkpoint import conversion
from fastdiff.config import with_multipliers
from fastdiff.presets import CLASSIFIER_PRESETS, PRESETS, Preset, described_by

from ..interop.support import CLASSIFIERS, GOLDEN, random_model
from ..support import randomise
from .conftest import Cli
from .support import PLAIN, contents, refused, succeeded

MODEL = ModelConfig(
    image_size=32, num_channels=32, num_res_blocks=1, channel_mult=(1, 2, 2, 2), num_heads=2, learn_sigma=True
)
COSINE = DiffusionConfig(diffusion_steps=4000, noise_schedule="cosine", learn_sigma=True)
FLAGS = ("--num-heads", 2, "--diffusion-steps", 4000, "--noise-schedule", "cosine")
SMALL = replace(MODEL, image_size=8, channel_mult=(1,), attention_resolutions=(8,))
"""For what does not depend on the architecture: one level costs a quarter of four. Its size is to be told."""
SMALL_FLAGS = ("--image-size", 8, *FLAGS)


def save(
    path: str, model: ModelConfig = MODEL, process: DiffusionConfig = COSINE, **about: Any
) -> Mapping[str, Tensor]:
    state = random_model(model).state_dict()
    if path.endswith(".pt"):
        torch.save(state, path)
    else:
        save_checkpoint(path, state, model_config=model, diffusion_config=process, **about)
    return state


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_there_and_back_through_every_format(cli: Cli) -> None:
    state = save("a.pt")
    out = succeeded(cli("convert", "a.pt", "b.safetensors", *FLAGS)).out
    assert "a.pt -> b.safetensors" in out
    assert "largest difference 0 (0 relative)" in out
    loaded = load_checkpoint("b.safetensors")
    assert (loaded.model_config, loaded.diffusion_config) == (MODEL, COSINE)
    out = succeeded(cli("convert", "b.safetensors", "ddpm", "--scheduler", "ddpm")).out
    assert "the 4000 steps became 1000, every 4th" in out
    relative = re.search(r"largest difference \S+ \((\S+) relative\)", out)
    assert relative
    assert 0 < float(relative[1]) < 1e-4
    succeeded(cli("convert", "ddpm", "c.pt"))
    back = torch.load("c.pt", weights_only=True)
    assert same(state, back)
    assert {value.dtype for value in back.values()} == {torch.float32}
    assert all(value.is_contiguous() for value in back.values())
    out = succeeded(cli("convert", "ddpm", "ddim")).out  # from one scheduler to the other
    assert "the learned variance is dropped" in out
    assert "use_clipped_model_output=True" in out
    succeeded(cli("convert", "ddim", "d.safetensors"))
    assert load_checkpoint("d.safetensors").model_config == replace(MODEL, learn_sigma=False)
    assert not list(Path().glob(".*"))


def test_a_model_of_patches_goes_there_and_back(cli: Cli) -> None:
    """Its outputs are compared at a size that its patches and levels divide, which 64 pixels are not."""
    model = replace(MODEL, image_size=96, patch_size=3, channel_mult=(1, 1), attention_resolutions=(16,))
    state = save("a.safetensors", model)
    out = succeeded(cli("convert", "a.safetensors", "b.pt")).out
    assert "lack patch_size 3 and channel_mult 1,1 at image_size 96: change unet.py and script_util.py" in out
    assert "60x60 pixels: largest difference 0 " in out
    succeeded(cli("convert", "b.pt", "c.safetensors", "--image-size", 96, *FLAGS))
    loaded = load_checkpoint("c.safetensors")
    assert (loaded.model_config, loaded.diffusion_config) == (model, COSINE)
    assert same(state, loaded.model.state_dict())


@pytest.mark.parametrize(
    ("name", "full"),
    [
        *((name, False) for name in ("cifar10_uncond", "imagenet64_cond", "upsample_256", "64x64_diffusion")),
        # what makes other keys than these is in tests/parity/test_state_dicts.py, at the full width too
        *(
            pytest.param(name, name == "cifar10_uncond", marks=pytest.mark.slow)
            for name in GOLDEN
            if name not in ("imagenet64_cond", "upsample_256", "64x64_diffusion")
        ),
    ],
)
def test_a_converted_pt_has_the_originals_keys_shapes_and_dtypes(cli: Cli, name: str, full: bool) -> None:
    """At a quarter of the width or less the keys and their order are the same."""
    flags = GOLDEN[name]["flags"]
    names = ModelConfig.__dataclass_fields__.keys()
    narrow = {"num_channels": 64 if flags.get("num_head_channels") else 32}
    small = {k: v for k, v in flags.items() if k in names} | ({} if full else narrow)
    config = ModelConfig(**small, **({"image_size": flags["large_size"]} if "large_size" in flags else {}))
    state = build_model(config).state_dict()
    save_checkpoint("a.safetensors", state, model_config=config, diffusion_config=COSINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_difference", lambda *_: "not compared")  # of an image of 256 pixels
        succeeded(cli("convert", "a.safetensors", "b.pt"))
    written = torch.load("b.pt", weights_only=True)
    assert type(written) is dict
    assert list(written) == list(GOLDEN[name]["state_dict"])
    widths = {key: tuple(value.shape) for key, value in written.items()}
    assert widths == {key: tuple(value.shape) for key, value in state.items()}
    if full:
        assert widths == {key: tuple(shape) for key, shape in GOLDEN[name]["state_dict"].items()}
    assert {value.dtype for value in written.values()} == {torch.float32}


def test_the_flags_for_the_original_are_printed(cli: Cli) -> None:
    process = replace(COSINE, rescale_timesteps=False, predict_xstart=True)
    model = replace(MODEL, attention_resolutions=(8,), class_cond=True, num_classes=3)
    save("a.safetensors", model, process, class_names=("cat", "dog", "eel"), label_dropout=0.1)
    out = succeeded(cli("convert", "a.safetensors", "b.pt")).out
    assert (
        "--image_size 32 --num_channels 32 --num_res_blocks 1 --num_heads 2 --attention_resolutions 8 --learn_sigma "
        "True --class_cond True --diffusion_steps 4000 --noise_schedule cosine --predict_xstart True "
        "--rescale_timesteps False\n" in out
    )
    assert "0 cat, 1 dog, 2 eel" in out
    assert "set NUM_CLASSES = 3" in out
    assert "label -1" in out
    assert "channel_mult" not in out
    save("c.safetensors", replace(MODEL, image_size=64, small_size=32))
    out = succeeded(cli("convert", "c.safetensors", "d.pt")).out
    assert "--large_size 64 --small_size 32 " in out
    assert "lack channel_mult 1,2,2,2 at image_size 64" in out


GUIDED = replace(
    MODEL,
    channel_mult=(0.5, 1, 1.5),
    num_channels=64,
    num_heads=4,
    num_head_channels=32,
    resblock_updown=True,
    use_new_attention_order=True,
)
UNSCALED = DiffusionConfig(learn_sigma=True, rescale_timesteps=False, rescale_learned_sigmas=False)
GUIDED_FLAGS = ("--image-size", 32, "--num-head-channels", 32, "--use-new-attention-order", "--diffusion-steps", 1000)


def test_a_model_of_guided_diffusion_goes_there_and_back_unchanged(cli: Cli) -> None:
    state = save("a.pt", GUIDED)
    succeeded(cli("convert", "a.pt", "b.safetensors", *GUIDED_FLAGS, "--noise-schedule", "linear"))
    loaded = load_checkpoint("b.safetensors")
    assert (loaded.model_config, loaded.diffusion_config) == (GUIDED, UNSCALED)
    out = succeeded(cli("convert", "b.safetensors", "c.pt")).out
    assert same(state, torch.load("c.pt", weights_only=True))
    assert "guided-diffusion's scripts lack channel_mult 0.5,1,1.5 at image_size 32: change script_util.py" in out
    assert "the flags for guided-diffusion's scripts are:\n  --image_size 32 --num_channels 64 " in out
    assert "--num_head_channels 32 --resblock_updown True --use_new_attention_order True\n" in out
    refused(
        cli("convert", "a.pt", "d.pt"), r"a\.pt is a bare state dict: .*given: --image-size, --num-heads \(or --num-he"
    )
    refused(cli("convert", "b.safetensors", "d"), r"diffusers cannot express channel_mult 0\.5,1,1\.5: it embeds")


def test_a_model_of_guided_diffusion_goes_to_diffusers_and_back(cli: Cli) -> None:
    save("a.safetensors", replace(GUIDED, channel_mult=(1, 2), attention_resolutions=(16,)), UNSCALED)
    out = succeeded(cli("convert", "a.safetensors", "folder", "--scheduler", "ddpm")).out
    relative = re.search(r"largest difference \S+ \((\S+) relative\)", out)
    assert relative
    assert float(relative[1]) < 1e-4
    succeeded(cli("convert", "folder", "b.safetensors"))
    there, back = (load_checkpoint(path) for path in ("a.safetensors", "b.safetensors"))
    assert back.model_config == replace(there.model_config, use_new_attention_order=False)  # diffusers has no order
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([700.0])
    with torch.no_grad():
        torch.testing.assert_close(back.model(x, t), there.model(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["b.pt", "folder"])
def test_what_a_model_is_told_of_augmentation_stays_here(cli: Cli, target: str) -> None:
    """Samples do not depend on it, so that the others' files hold the rest of the model."""
    state = dict(save("a.safetensors", replace(SMALL, augment_dim=9)))
    out = succeeded(cli("convert", "a.safetensors", target, *(() if target == "b.pt" else ("--scheduler", "ddpm")))).out
    assert "the layer that is told of --augment in training is not written: samples do not depend on it\n" in out
    if target == "b.pt":
        del state["augment_emb.weight"]
        assert same(state, torch.load(target, weights_only=True))
    succeeded(cli("convert", "a.safetensors", "c.safetensors"))
    assert load_checkpoint("c.safetensors").model_config == replace(SMALL, augment_dim=9)


def test_class_names_do_not_command_the_terminal(cli: Cli) -> None:
    save("a.safetensors", SMALL, class_names=("a\x1b[2J\nb",))
    assert (
        "the class names are not written: 0 a\N{REPLACEMENT CHARACTER}[2J"
        in cli("convert", "a.safetensors", "b.pt").out
    )


def test_what_a_checkpoint_says_of_itself_stays(cli: Cli) -> None:
    save("a.safetensors", SMALL, step=9, class_names=("a",), ema_rate=0.99)
    succeeded(cli("convert", "a.safetensors", "b.safetensors"))
    loaded = load_checkpoint("b.safetensors")
    assert (loaded.step, loaded.class_names, loaded.metadata["ema_rate"]) == (9, ("a",), 0.99)


CLASSIFIER = ClassifierConfig(
    image_size=24,
    classifier_width=64,
    classifier_depth=1,
    classifier_attention_resolutions=(12,),
    channel_mult=(1, 1),
    classifier_pool="adaptive",
    num_classes=3,
)
OF_CLASSIFIER = DiffusionConfig(diffusion_steps=400, noise_schedule="cosine", rescale_timesteps=False)


def classifier_state(config: ClassifierConfig = CLASSIFIER) -> Mapping[str, Tensor]:
    return randomise(build_classifier(config), seed=0).state_dict()


def test_a_classifier_goes_there_and_back(cli: Cli) -> None:
    state = classifier_state()
    about: dict[str, Any] = {"class_names": ("cat", "dog", "eel"), "step": 9, "noised": False, "run_config": {"a": 1}}
    save_classifier("a.safetensors", state, config=CLASSIFIER, diffusion_config=OF_CLASSIFIER, **about)
    out = succeeded(cli("convert", "a.safetensors", "b.pt")).out
    assert out.splitlines() == [
        "a.safetensors -> b.pt",
        "the class names are not written: 0 cat, 1 dog, 2 eel",
        "that it was trained on clean images, and so guides nothing, is not written",
        "guided-diffusion's scripts lack channel_mult 1,1 at image_size 24: change script_util.py",
        "guided-diffusion's scripts have 1000 classes: set out_channels=3 in create_classifier of script_util.py",
        "the file holds tensors only; the flags for guided-diffusion's scripts are:",
        "  --image_size 24 --classifier_width 64 --classifier_depth 1 --classifier_attention_resolutions 12 "
        "--classifier_pool adaptive --diffusion_steps 400 --noise_schedule cosine",
        "and those that fastdiff may ask for:",
        "  --image-size 24 --diffusion-steps 400 --noise-schedule cosine --no-rescale-timesteps",
        "outputs at 4 timesteps, 24x24 pixels: largest difference 0 (0 relative)",
    ]
    assert same(state, torch.load("b.pt", weights_only=True))
    flags = out.splitlines()[-2].split()
    assert "not known" not in succeeded(cli("convert", "b.pt", "c.safetensors", *flags)).out
    loaded = load_classifier("c.safetensors")
    assert (loaded.config, loaded.diffusion_config, loaded.class_names) == (CLASSIFIER, OF_CLASSIFIER, ())
    assert same(state, loaded.model.state_dict())
    out = succeeded(cli("convert", "b.pt", "d.safetensors", "--image-size", 24)).out
    assert "the process of its training is not known: --diffusion-steps and --noise-schedule add it" in out
    assert load_classifier("d.safetensors").diffusion_config is None
    refused(
        cli("convert", "c.safetensors", "e.pt", "--diffusion-steps", 500), "diffusion_steps is 400 in c.safetensors"
    )
    refused(cli("convert", "b.pt", "e.safetensors"), "does not say its image size: give image_size")
    succeeded(cli("convert", "a.safetensors", "e.safetensors"))
    loaded = load_classifier("e.safetensors")
    assert (loaded.step, loaded.class_names, loaded.metadata["run_config"]) == (9, ("cat", "dog", "eel"), {"a": 1})
    assert loaded.metadata["noised"] is False
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize("name", ["64x64_classifier", "512x512_classifier"])
def test_a_converted_classifier_has_the_originals_keys(cli: Cli, name: str) -> None:
    """At half the width, which changes no key."""
    config = replace(CLASSIFIER_PRESETS[name].config(ClassifierConfig), classifier_width=64)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build_classifier(config).state_dict().items()}
    save_classifier("a.safetensors", {key: torch.zeros(shape) for key, shape in shapes.items()}, config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_difference", lambda *_: "not compared")
        out = succeeded(cli("convert", "a.safetensors", "b.pt")).out
    written = torch.load("b.pt", weights_only=True, mmap=True)
    assert list(written) == list(CLASSIFIERS[name]["state_dict"])
    assert {key: value.shape for key, value in written.items()} == shapes
    assert "lack" not in out
    depth = " --classifier_depth 4" if name == "64x64_classifier" else ""
    assert f"scripts are:\n  --image_size {config.image_size} --classifier_width 64{depth}\n" in out
    assert "may ask" not in out


def test_a_classifier_that_does_not_come_out_the_same_is_not_written(cli: Cli) -> None:
    save_classifier("a.safetensors", classifier_state(), config=CLASSIFIER)
    real = torch.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", lambda state, path: real({k: v * 1.01 for k, v in state.items()}, path))
        refused(cli("convert", "a.safetensors", "b.pt"), r"b\.pt was not written: its outputs would differ")
    assert not list(Path().glob("*b*"))


def test_the_run_of_a_classifier_is_converted(cli: Cli, shapes: Path) -> None:
    flags = ("--image-size", 8, "--classifier-width", 64, "--classifier-depth", 1, "--channel-mult", 1, "--steps", 1)
    run = ("--classifier-attention-resolutions", "", "--diffusion-steps", 20, "--noise-schedule", "cosine")
    result = cli("train-classifier", "--data-dir", shapes, "--run-dir", "run", *flags, *run, "--batch-size", 4, *PLAIN)
    assert result.status == 0
    out = succeeded(cli("convert", "run", "b.pt")).out
    assert "run/model000001.safetensors -> b.pt" in out
    assert "--diffusion-steps 20 --noise-schedule cosine\n" in out
    refused(cli("convert", "run", "folder"), "is a classifier, which diffusers cannot express")
    assert not Path("folder").exists()


def test_only_a_folder_gets_a_model_card(cli: Cli) -> None:
    process = replace(COSINE, diffusion_steps=1000, sigma_small=True, learn_sigma=False)
    save("a.safetensors", replace(SMALL, learn_sigma=False), process, class_names=("a|b",))
    for target in ("b.safetensors", "b.pt"):
        succeeded(cli("convert", "a.safetensors", target))
        refused(
            cli("convert", "a.safetensors", target, "--license", "mit", "--overwrite"), "license mit is for the mod"
        )
    assert not list(Path().rglob("README.md"))
    succeeded(cli("convert", "a.safetensors", "folder", "--license", "mit"))
    card = Path("folder/README.md").read_text()
    assert "\nlicense: mit\n" in card
    refused(cli("convert", "a.safetensors", "other", "--license", "My own"), "license must be an identifier")
    (commands,) = re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
    for line in commands.splitlines():
        assert cli(*shlex.split(line)[1:], *(PLAIN if " sample " in line else ())).status == 0
    assert Path("model.safetensors").exists()
    assert "--sigma-small" in commands
    assert load_checkpoint("model.safetensors").diffusion_config == process


def test_a_run_folder_is_converted(cli: Cli, run_dir: Path) -> None:
    out = succeeded(cli("convert", run_dir, "b.pt")).out
    assert re.search(r"runs/a/ema_0\.9999_000002\.safetensors -> b\.pt", out)
    refused(cli("convert", run_dir, run_dir / "ema_0.9999_000002.safetensors", "--overwrite"), "SRC itself")
    refused(cli("convert", run_dir, run_dir, "--overwrite"), "SRC itself")
    refused(cli("convert", run_dir, run_dir.parent, "--overwrite"), "or contains it")


def test_files_are_replaced_only_when_told(cli: Cli) -> None:
    save("a.pt", SMALL)
    for target in ("b.safetensors", "b.pt", "folder"):
        succeeded(cli("convert", "a.pt", target, *SMALL_FLAGS))
        before = contents(Path())
        refused(cli("convert", "a.pt", target, *SMALL_FLAGS), rf"{target} exists: .*--overwrite")
        assert contents(Path()) == before
        succeeded(cli("convert", "a.pt", target, *SMALL_FLAGS, "--overwrite"))
        assert contents(Path()).keys() == before.keys()


def test_what_is_no_target_stays_untouched(cli: Cli) -> None:
    save("a.pt", SMALL)
    for folder in ("photos", "x.pt"):
        Path(folder).mkdir()
        (Path(folder) / "me.jpg").write_bytes(b"only copy")
    Path("file").write_text("text")
    before = contents(Path())
    refused(
        cli("convert", "a.pt", "photos", *SMALL_FLAGS, "--overwrite"), "photos exists and is not a diffusers folder"
    )
    refused(cli("convert", "a.pt", "x.pt", *SMALL_FLAGS, "--overwrite"), r"x\.pt exists and is not a file")
    succeeded(cli("convert", "a.pt", "pipeline", *SMALL_FLAGS))
    for name in ("vae.bin", "unet/notes.txt"):
        Path("pipeline", name).write_text("mine")
        message = f"pipeline holds {name} too, which would be lost"
        refused(cli("convert", "a.pt", "pipeline", *SMALL_FLAGS, "--overwrite"), message)
        Path("pipeline", name).unlink()
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if to.name == "pipeline" and self.name == "pipeline":  # the new one; the old one has left its place by then
            raise OSError("it went wrong")
        return real(self, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        refused(cli("convert", "a.pt", "pipeline", *SMALL_FLAGS, "--overwrite"), "it went wrong")
    assert Path("pipeline/model_index.json").exists()
    shutil.rmtree("pipeline")
    refused(cli("convert", "a.pt", "file", *SMALL_FLAGS, "--overwrite"), "file exists and is not a diffusers folder")
    assert contents(Path()) == before


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and files that are none or that some formats cannot express. Not to be written to."""
    folder = tmp_path_factory.mktemp("inputs")
    state = save(f"{folder}/a.pt")
    save(f"{folder}/wide.safetensors", replace(MODEL, image_size=64, channel_mult=(1, 2, 3, 4), num_heads=4))
    save(f"{folder}/odd.safetensors", SMALL, replace(COSINE, diffusion_steps=1500))
    torch.save({"state": {}, "param_groups": []}, folder / "opt.pt")
    torch.save({key: value for key, value in state.items() if key != "out.2.bias"}, folder / "other.pt")
    classifier = build_classifier(ClassifierConfig(classifier_width=64, classifier_depth=1, channel_mult=(1, 1)))
    torch.save(classifier.state_dict(), folder / "classifier.pt")
    return folder


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [
        (("a.pt", "b.bin"), (r"b\.bin", r"\.safetensors or \.pt")),
        (("a.pt", "new/b.pt"), ("new is not a folder",)),
        (("a.pt", "file/b.pt"), ("file is not a folder",)),
        (("a.pt", "a.pt"), ("SRC itself",)),
        (("a.pt", "./link.pt", "--overwrite"), ("SRC itself",)),
        (("none.pt", "b.pt"), (r"none\.pt does not exist",)),
        (("empty", "b.pt"), ("no checkpoint in empty",)),
        (("opt.pt", "b.pt"), (r"opt\.pt is optimizer state, not a model",)),
        (("file", "b.pt"), ("file is damaged or not a PyTorch checkpoint",)),
        (
            ("a.pt", "b.pt"),
            (r"a\.pt is a bare .*--num-heads \(or --num-head-channels\), --diffusion-steps and --noise-schedule",),
        ),
        (("a.pt", "b.pt", *FLAGS, "--num-res-blocks", 2), ("num_res_blocks is 1 in", "given as 2")),
        (("a.pt", "b.pt", "--preset", "cifar10_uncond"), ("num_channels is 32 in", "given as 128")),
        (("a.pt", "b.pt", "--preset", "none"), ("preset must be one of",)),
        (("a.pt", "b.pt", "--preset", "64x64_classifier"), ("is a classifier, and a diffusion model is wanted",)),
        (
            ("classifier.pt", "b"),
            (r"classifier\.pt is a classifier, which diffusers cannot express: convert to \.pt or",),
        ),
        (
            ("classifier.pt", "b.pt", "--num-heads", 2),
            ("num_heads is a flag of diffusion models, and .* is a classif",),
        ),
        (("classifier.pt", "b.pt", "--diffusion-steps", 50), ("process of its training: give --noise-schedule, too",)),
        (("classifier.pt", "b.pt", "--learn-sigma"), ("learn_sigma means nothing for a classifier",)),
        (
            ("classifier.pt", "b.pt", "--preset", "64x64_diffusion"),
            ("is a diffusion model, and a classifier is wanted",),
        ),
        (("classifier.pt", "b.pt", "--classifier-depth", 3), ("classifier_depth is 1 in .* given as 3",)),
        (
            ("a.pt", "b.pt", *FLAGS, "--classifier-depth", 1),
            ("is a flag of classifiers, and a.pt is not a classifier",),
        ),
        (("a.pt", "b", *FLAGS, "--scheduler", "pndm"), ("scheduler must be one of ddim, ddpm",)),
        (
            ("other.pt", "b.pt"),
            (
                r"other\.pt is not a model of .*nearest, --preset .* first 'time_embed.0.weight': .128, 32. instead of",
                "from a model of its sizes, 1 tensors differ, first 'out.2.bias': absent",
            ),
        ),
        (("wide.safetensors", "b"), ("cannot express 4 heads of 24 and 32 channels",)),
        (("wide.safetensors", "b.pt", "--num-heads", 1), ("num_heads is 4 in",)),
        (("whole", "b.pt"), (r"unet/config\.json cannot be read",)),
        (("odd.safetensors", "b"), ("rescale_timesteps with diffusion_steps 1500",)),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    cli: Cli, inputs: Path, arguments: tuple[object, ...], patterns: tuple[str, ...]
) -> None:
    for path in inputs.iterdir():
        shutil.copy(path, path.name)
    Path("file").write_text("text")
    Path("link.pt").symlink_to("a.pt")
    Path("empty").mkdir()
    (Path("whole") / "unet").mkdir(parents=True)
    before = contents(Path())
    refused(cli("convert", *arguments), *patterns)
    assert contents(Path()) == before
    assert not list(Path().glob(".*"))


def test_a_model_that_does_not_come_out_the_same_is_not_written(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff.interop import diffusers

    save("a.pt", SMALL)
    real = diffusers.unet_state
    monkeypatch.setattr(diffusers, "unet_state", lambda *a: {k: v * 1.01 for k, v in real(*a).items()})
    refused(cli("convert", "a.pt", "b", *SMALL_FLAGS), "b was not written: its outputs would differ")
    assert not list(Path().glob("*b*"))


@pytest.mark.parametrize("target", ["b.pt", "b.safetensors", "b"])
def test_a_full_disk_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    from fastdiff.checkpoint import files

    def full(error: Exception) -> Any:
        def fail(*_: object, **__: object) -> None:
            raise error

        return fail

    save("a.pt", SMALL)
    monkeypatch.setattr(torch, "save", full(RuntimeError("PytorchStreamWriter failed writing file: no space\nat 0x1")))
    monkeypatch.setattr(files, "save_file", full(SafetensorError("No space left on device")))
    monkeypatch.setattr(safetensors.torch, "save_file", full(SafetensorError("No space left on device")))
    refused(cli("convert", "a.pt", target, *SMALL_FLAGS), "cannot be written", "(?i)no space")
    assert not list(Path().glob("*b*"))


def test_a_schedule_that_is_none_of_ours_is_asked_for(cli: Cli) -> None:
    save("a.pt", SMALL)
    succeeded(cli("convert", "a.pt", "folder", *SMALL_FLAGS))
    path = Path("folder/scheduler/scheduler_config.json")
    options = json.loads(path.read_text())
    options["trained_betas"] = [beta / 2 for beta in options["trained_betas"]]
    path.write_text(json.dumps(options))
    refused(
        cli("convert", "folder", "b.pt"),
        "has no noise schedule that fastdiff can name: give --diffusion-steps and --noise-schedule",
    )
    succeeded(cli("convert", "folder", "b.safetensors", "--diffusion-steps", 500, "--noise-schedule", "linear"))
    assert load_checkpoint("b.safetensors").diffusion_config == DiffusionConfig(diffusion_steps=500)
    refused(cli("convert", "folder", "c.pt", *SMALL_FLAGS, "--num-channels", 64), "num_channels is 32 in folder and 64")


ONE_STEP = ("--num-samples", 1, "--sampler", "ddim", "--steps", 1)


def test_a_released_checkpoint_is_drawn_from_by_preset_or_by_flags(cli: Cli) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in GOLDEN["cifar10_uncond"]["state_dict"].items():  # small on the disk, random from row to row
        rows = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator) * 0.02
        state[key] = rows.expand(shape)
    torch.save(state, "cifar.pt")
    succeeded(cli("sample", "cifar.pt", "--preset", "cifar10_uncond", *ONE_STEP, *PLAIN, "--out", "a.npz"))
    flags = ("--diffusion-steps", 4000, "--noise-schedule", "cosine", "--num-heads", 4)
    succeeded(cli("sample", "cifar.pt", *flags, *ONE_STEP, *PLAIN, "--out", "b.npz"))
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    refused(
        cli("sample", "cifar.pt", *flags[:4], *ONE_STEP, *PLAIN),
        "--num-heads .or --num-head-channels. .or --preset cifar10_",
    )
    refused(
        cli("sample", "cifar.pt", "--preset", "imagenet64_uncond", *ONE_STEP, *PLAIN),
        "channel_mult is 1,2,2,2 in cifar.pt, but given as 1,2,3,4",
    )


@pytest.mark.parametrize("name", [*(name for name in GOLDEN if "resblock_updown" in GOLDEN[name]["flags"]), "lsun_cat"])
def test_a_preset_alone_loads_guided_diffusions_files(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As use_fp16 saves them, the convolutions half; the presets' models are narrower here, of one block a level."""
    narrow = {**PRESETS[name].flags, "num_channels": 64, "num_res_blocks": 1}
    monkeypatch.setitem(PRESETS, name, Preset("narrow", narrow))  # type: ignore[arg-type]
    config = PRESETS[name].config(ModelConfig)
    torch.manual_seed(0)
    state = {
        key: value.half() if value.ndim > 2 and not key.startswith("out.") else value
        for key, value in build_model(config).state_dict().items()
    }
    torch.save(state, "x.pt")
    loaded = load_checkpoint("x.pt", given=described_by(name))
    process = PRESETS[name].config(DiffusionConfig)
    assert (loaded.model_config, loaded.diffusion_config) == (with_multipliers(config), process)
    found = loaded.model.state_dict()
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(torch.equal(value.float(), found[key]) for key, value in state.items())
    refused(cli("convert", "x.pt", "y.pt"), "x.pt is a bare state dict: .* what it lacks must be given: ")


@pytest.mark.slow
def test_a_whole_released_model_of_guided_diffusion_is_drawn_from(cli: Cli) -> None:
    """296 million parameters, as use_fp16 saves them: 0.6 GB."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in GOLDEN["64x64_diffusion"]["state_dict"].items():
        z = torch.randn(shape, generator=generator)
        weight = (1 + 0.1 * z if key.endswith("weight") else 0.1 * z) if len(shape) == 1 else z / z[0].numel() ** 0.5
        state[key] = weight.half() if len(shape) > 2 else weight
    torch.save(state, "64x64_diffusion.pt")
    words = ("--num-samples", 1, "--class", 207, "--steps", 2, *PLAIN)
    succeeded(cli("sample", "64x64_diffusion.pt", "--preset", "64x64_diffusion", *words, "--out", "a.npz"))
    flags = ("--num-head-channels", 64, "--use-new-attention-order", "--diffusion-steps", 1000)
    succeeded(cli("sample", "64x64_diffusion.pt", *flags, "--noise-schedule", "cosine", *words, "--out", "b.npz"))
    for other, flag in (("c", "--no-use-new-attention-order"), ("d", "--num-head-channels=32")):
        more = ("--noise-schedule", "cosine", flag)
        succeeded(cli("sample", "64x64_diffusion.pt", *flags, *more, *words, "--out", f"{other}.npz"))
    images = {name: np.load(f"{name}.npz")["arr_0"] for name in "abcd"}
    assert images["a"].shape == (1, 64, 64, 3)
    assert np.array_equal(images["a"], images["b"])
    assert not any(np.array_equal(images["a"], images[other]) for other in "cd")


def test_a_bare_super_resolution_model_beside_another_is_to_be_converted_first(cli: Cli, checkpoint: Path) -> None:
    save("up.pt", replace(MODEL, small_size=8))
    refused(
        cli("sample", checkpoint, "--super-res", "up.pt"),
        r"super_res up\.pt does not store its settings: fastdiff convert up\.pt",
    )
