"""Bad input is one line that names thing and remedy, exit status 2, no traceback, and nothing is lost."""

import io
import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastdiff import DiffusionConfig, build_model, save_checkpoint
from fastdiff.cli import app
from fastdiff.data.shapes import write_shapes

from ..parity.support import load_json
from .conftest import DIFFUSION, MODEL, Cli
from .support import PLAIN, SHORT, TINY, Result, contents, refused, succeeded


def test_no_data(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no image")
    refused(cli("train"), "--data-dir")
    refused(cli("train", "--data-dir", "nowhere"), "nowhere does not exist")
    refused(cli("train", "--data-dir", "texts/a.txt"), r"a\.txt is not a folder")
    refused(cli("train", "--data-dir", "empty"), "no images in .*empty.* found no files")
    refused(cli("train", "--data-dir", "texts"), "no images in .*texts.*txt")
    refused(cli("train", "--data-dir", "broken"), r"broken.*a\.png")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "patterns"),
    [
        (["--noise-schedule", "sine"], ["noise.schedule", "sine", "linear", "cosine"]),
        (["--precision", "fp8"], ["precision", "fp8", "bf16"]),
        (["--kernels", "cuda"], ["kernels", "cuda", "triton", "reference"]),
        (["--image-size", "big"], ["image.size", "integer"]),
        (["--learn_sigma=perhaps"], ["learn.sigma", "perhaps", "true or false"]),
        (["--attention-resolutions", "16,x"], ["attention_resolutions", "16,x"]),
        (["--preset", "cifar"], ["preset", "'cifar'", "cifar10_uncond"]),
        (["--no-such-flag", "3"], ["no-such-flag"]),
        (["--lrr", "3"], ["--lrr", r"--lr\b"]),
        (["--steps"], ["--steps"]),
        (["--steps", "0"], ["steps", "0"]),
        (["--lr", "nan"], ["lr", "nan"]),
        (["--ema-rate", "1.0"], ["ema_rate", r"1\.0"]),
        (["--image-size", "36", "--channel-mult", "1,2,2,2"], ["image_size 36", "multiple of 8", "32 or 40"]),
        (
            ["--image-size", "36", "--channel-mult", "1,2,2", "--patch-size", "4"],
            ["image_size 36", "3 levels of patches of 4 pixels", "multiple of 16", "32 or 48"],
        ),
        (["--patch-size", "0"], ["patch_size must be positive"]),
        (["--image-size", "32", "--patch-size", "64"], ["patch_size must be at most image_size 32, not 64"]),
        (["--image-size", "4096", "--patch-size", "512"], ["patch_size must be at most 418, not 512"]),
        (["--num-channels", "40"], ["num_channels", "40", "32"]),
        (["--num-heads", "5"], ["num_heads 5"]),
        (["--diffusion-steps", "20", "--noise-schedule", "linear"], ["diffusion_steps 20", "cosine"]),
        (["--diffusion-steps", "10"], ["diffusion_steps 10", "21"]),
        (["--device", "tpu"], ["device", "tpu", "cpu"]),
        (["stray"], ["stray"]),
    ],
    ids=lambda value: "_".join(value) if value and value[0].startswith(("-", "stray")) else "",
)
def test_flags(cli: Cli, shapes: Path, tmp_path: Path, flags: list[str], patterns: list[str]) -> None:
    refused(cli("train", "--data-dir", shapes, *flags), *patterns)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [["--sampler", "euler"], ["--nosuch"], ["--eta", "-1"], ["--num-samples", "0"]])
def test_flags_of_sample(cli: Cli, checkpoint: Path, flags: list[str]) -> None:
    refused(cli("sample", checkpoint, *flags), flags[0].removeprefix("--").replace("-", "."))


def test_an_unknown_command(cli: Cli) -> None:
    refused(cli("trian"), "trian", "train")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(cli: Cli, shapes: Path, checkpoint: Path, tmp_path: Path) -> None:
    refused(cli("train", "--data-dir", shapes, "--device", "cuda"), "cuda", "--device cpu")
    refused(cli("sample", checkpoint, "--device", "cuda:1"), "cuda:1", "--device cpu")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_that_are_not_there(cli: Cli, shapes: Path, checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--run-dir", "r", *TINY, *SHORT, "--steps", 1)
    refused(cli("train", "--data-dir", shapes, *flags, "--kernels", "triton"), "triton", "auto")
    refused(cli("sample", checkpoint, "--kernels", "triton", *PLAIN), "triton", "auto")
    assert not (tmp_path / "samples.npz").exists()
    succeeded(cli("train", "--data-dir", shapes, *flags))  # the failed attempt does not stand in the way


def test_debug_shows_the_traceback(cli: Cli) -> None:
    result = cli("train", "--data-dir", "nowhere", "--debug")
    assert result.status == 2
    assert "Traceback (most recent call last)" in result.err
    assert re.search("ValueError: data_dir .*nowhere does not exist", result.err)


def test_debug_shows_no_traceback_of_success(cli: Cli, checkpoint: Path) -> None:
    succeeded(cli("sample", checkpoint, "--num-samples", 1, "--steps", 1, "--debug", *PLAIN))


# Runs that exist


def test_a_folder_that_holds_a_run_is_kept(train: Cli, run_dir: Path) -> None:
    before = contents(run_dir)
    refused(train("runs/a", "--steps", 3), "runs/a", "--resume", "--run-dir")
    assert contents(run_dir) == before


def test_the_demo_keeps_a_run_too(cli: Cli, run_dir: Path) -> None:
    before = contents(run_dir)
    refused(cli("demo", "--run-dir", run_dir), "already holds a run: name another folder with --run-dir, or delete")
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("flags", "patterns"),
    [
        (["--num-channels", 64], ["num_channels", "32", "64"]),
        (["--noise-schedule", "linear", "--diffusion-steps", 1000], ["noise_schedule|diffusion_steps"]),
        (["--no-class-cond"], ["class_cond"]),
        (["--dropout", 0.5], ["dropout", r"0\.5"]),
        (["--num-classes", 9], ["num_classes", "9", "4"]),
    ],
)
def test_a_contradiction_on_resume(train: Cli, run_dir: Path, flags: list[object], patterns: list[str]) -> None:
    before = contents(run_dir)
    refused(train("runs/a", "--steps", 3, "--resume", *flags), "runs/a", *patterns)
    assert contents(run_dir) == before


def test_resume_with_other_classes(train: Cli, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data/cat_1.png")
    before = contents(run_dir)
    refused(train("runs/a", "--data-dir", "data", "--steps", 3, "--resume"), "cat", "circle")
    assert contents(run_dir) == before


def test_a_damaged_config_json(train: Cli, run_dir: Path) -> None:
    for text in ("{", "[]", '{"model": 3}', json.dumps({"model": {"image_size": "x"}})):
        (run_dir / "config.json").write_text(text)
        before = contents(run_dir)
        refused(train("runs/a", "--steps", 3, "--resume"), "config.json|image_size")
        assert contents(run_dir) == before


def test_too_few_classes(train: Cli, tmp_path: Path) -> None:
    refused(train("r", "--num-classes", 2, "--steps", 1), "num_classes 2", "4")
    assert not (tmp_path / "r/config.json").exists()


def test_tensorboard_that_is_not_installed(
    train: Cli, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = contents(run_dir)
    refused(train("runs/a", "--steps", 3, "--resume", "--tensorboard"), r"pip install \S*tensorboard")
    after = contents(run_dir)
    assert after["progress.csv"] == before["progress.csv"]
    assert after["progress.jsonl"] == before["progress.jsonl"]
    refused(train("new", "--steps", 1, "--tensorboard"), r"pip install \S*tensorboard")
    succeeded(train("new", "--steps", 1))  # the failed attempt does not stand in the way


# Files that are no checkpoint


def opt_file(run_dir: Path, folder: Path) -> Path:
    return run_dir / "opt000002.safetensors"


def truncated(run_dir: Path, folder: Path) -> Path:
    path = folder / "truncated.safetensors"
    path.write_bytes((run_dir / "model000002.safetensors").read_bytes()[:-100])
    return path


def empty(run_dir: Path, folder: Path) -> Path:
    (folder / "empty.safetensors").touch()
    return folder / "empty.safetensors"


def absurd_header(run_dir: Path, folder: Path) -> Path:
    path = folder / "absurd.safetensors"
    path.write_bytes(b"\xff" * 8 + b"{}")
    return path


def foreign(run_dir: Path, folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, folder / "foreign.safetensors")
    return folder / "foreign.safetensors"


def mismatched(run_dir: Path, folder: Path) -> Path:
    path = folder / "mismatched.safetensors"
    return save_checkpoint(path, {"a": torch.zeros(3)}, model_config=MODEL, diffusion_config=DIFFUSION)


def truncated_pt(run_dir: Path, folder: Path) -> Path:
    torch.save(load_file(run_dir / "model000002.safetensors"), folder / "whole.pt")
    path = folder / "truncated.pt"
    path.write_bytes((folder / "whole.pt").read_bytes()[:5000])
    return path


def empty_pt(run_dir: Path, folder: Path) -> Path:
    (folder / "empty.pt").touch()
    return folder / "empty.pt"


def text_pt(run_dir: Path, folder: Path) -> Path:
    (folder / "text.pt").write_text("<!doctype html><title>404 Not Found</title>")
    return folder / "text.pt"


def other_pt(run_dir: Path, folder: Path) -> Path:
    model = build_model(replace(MODEL, num_classes=4, learn_sigma=True))
    torch.save(model.state_dict(), folder / "other.pt")
    return folder / "other.pt"


def opt_pt(run_dir: Path, folder: Path) -> Path:
    model = torch.nn.Linear(2, 2)
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), folder / "opt010000.pt")
    return folder / "opt010000.pt"


def folder_without_checkpoint(run_dir: Path, folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


def missing(run_dir: Path, folder: Path) -> Path:
    return folder / "missing.safetensors"


FILES: list[tuple[Callable[[Path, Path], Path], str]] = [
    (opt_file, "optimizer"),
    (truncated, "damaged|truncated|incomplete"),
    (empty, "damaged|empty|incomplete"),
    (absurd_header, "damaged"),
    (foreign, "not a fastdiff checkpoint"),
    (mismatched, "another architecture"),
    (truncated_pt, "damaged|truncated|incomplete"),
    (empty_pt, "damaged|empty|incomplete"),
    (text_pt, "not|damaged"),
    (other_pt, r"learn_sigma is True in .*, but given as False"),
    (opt_pt, "optimizer"),
    (folder_without_checkpoint, "no checkpoint|is not a file"),
    (missing, "does not exist"),
]


@pytest.mark.parametrize(("make", "pattern"), FILES, ids=[make.__name__ for make, _ in FILES])
def test_what_is_no_checkpoint_is_no_model(
    sample: Cli, train: Cli, run_dir: Path, tmp_path: Path, make: Callable[[Path, Path], Path], pattern: str
) -> None:
    path = make(run_dir, tmp_path)
    before = contents(run_dir)
    flags = ("--class-cond", "--num-classes", 4, "--no-learn-sigma", *TINY) if path.suffix == ".pt" else ()
    refused(sample(path, *flags), path.name.replace(".", r"\."), pattern)
    assert not (tmp_path / "samples.npz").exists()
    if make is not other_pt:  # fine-tuning gives it another last layer
        refused(train("new", "--steps", 1, "--init-from", path), path.name.replace(".", r"\."))
    assert not (tmp_path / "new/config.json").exists()
    assert contents(run_dir) == before


class Code:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "plain.pt", "named.safetensors", "named.bin"])
def test_pickled_code_never_runs(sample: Cli, train: Cli, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "it-ran"
    if name.startswith(("zip", "legacy")):
        content = {"time_embed.0.weight": torch.zeros(3), "x": Code(mark)}
        torch.save(content, name, _use_new_zipfile_serialization=name.startswith("zip"))
    else:
        Path(name).write_bytes(pickle.dumps({"x": Code(mark)}))
    refused(sample(name, *TINY), name.replace(".", r"\."))
    refused(train("new", "--steps", 1, "--init-from", name), name.replace(".", r"\."))
    assert not mark.exists()
    with Path(name).open("rb") as file:  # the trap works
        if name.startswith(("plain", "named")):
            pickle.load(file)
            assert mark.exists()


def test_nothing_to_sample_from(sample: Cli) -> None:
    refused(sample(), "runs", "fastdiff train")
    Path("runs/a").mkdir(parents=True)
    refused(sample(), "runs", "fastdiff train")
    refused(sample("runs/a"), "runs/a", "fastdiff train")


# Respacing


RESPACING_ERRORS = [case for case in load_json("respacing.json") if case.get("error")]


@pytest.mark.parametrize("case", RESPACING_ERRORS, ids=lambda case: f"{case['num_timesteps']}:{case['spec']}")
def test_respacing_specs_that_do_not_fit(sample: Cli, train: Cli, tmp_path: Path, case: dict[str, object]) -> None:
    diffusion = DiffusionConfig(diffusion_steps=case["num_timesteps"], noise_schedule="cosine")
    save_checkpoint("m.safetensors", build_model(MODEL), model_config=MODEL, diffusion_config=diffusion)
    refused(sample("m.safetensors", "--timestep-respacing", case["spec"]), "timestep_respacing", str(case["spec"]))
    steps = ("--diffusion-steps", case["num_timesteps"])
    refused(train("r", *steps, "--timestep-respacing", case["spec"]), "timestep_respacing", str(case["spec"]))
    assert not (tmp_path / "samples.npz").exists()
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("spec", ["five", "ddim", "ddimx", "-3", "0", "1.5", "5,", "0,0", "ddim0"])
def test_respacing_specs_that_are_none(sample: Cli, checkpoint: Path, spec: str) -> None:
    refused(sample(checkpoint, f"--timestep-respacing={spec}"), "timestep_respacing", spec)


def test_more_steps_than_there_are(sample: Cli, checkpoint: Path) -> None:
    refused(sample(checkpoint, "--steps", 21), "steps|timestep_respacing", "21", "20")


# Outputs that cannot be written


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled when drawing begins: what cannot be written must be told before the work."""
    from fastdiff import sampling

    begun: list[int] = []
    real = sampling.generate

    def generate(*args: object, **kwargs: object) -> object:
        begun.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(sampling, "generate", generate)
    return begun


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--out", "somefile/out.npz"], "somefile"),
        (["--out", "somefile/deeper/out.npz"], "somefile"),
        (["--out", "folder.npz"], r"folder\.npz"),
        (["--out", "images.png"], r"\.npz"),
        (["--png-dir", "somefile"], "somefile"),
        (["--png-dir", "somefile/pngs"], "somefile"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_an_unwritable_output(
    sample: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], name: str
) -> None:
    Path("somefile").write_text("kept")
    Path("folder.npz").mkdir()
    begun = counting(monkeypatch)
    refused(sample(checkpoint, "--num-samples", 1, "--steps", 2, *flags), name)
    assert Path("somefile").read_text() == "kept"
    assert not begun


def test_a_run_folder_that_cannot_be(train: Cli) -> None:
    Path("somefile").write_text("kept")
    refused(train("somefile", "--steps", 1), "somefile", "--run-dir")
    refused(train("somefile/run", "--steps", 1), "somefile", "--run-dir")
    assert Path("somefile").read_text() == "kept"


def disk_full(*args: object, **kwargs: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_is_an_error_like_any_other(
    train: Cli, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors reports it as an exception of its own, which is no OSError."""
    before = contents(run_dir)
    monkeypatch.setattr("fastdiff.checkpoint.files.save_file", disk_full)
    monkeypatch.setattr("fastdiff.training.saver.RETRY_DELAYS", (0.0,))
    result: Result = train("runs/a", "--steps", 3, "--resume")
    refused(result, "No space left on device", r"model000003\.safetensors")
    saved = {name: data for name, data in contents(run_dir).items() if name.endswith(".safetensors")}
    assert saved == {name: data for name, data in before.items() if name.endswith(".safetensors")}
    assert [path.name for path in run_dir.glob(".*")] == [".lease"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_name_that_cannot_be_encoded_is_escaped(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "é写真"
    write_shapes(folder, 2, 8, seed=0)
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    for arguments, status in ((["data", "check", folder], 0), (["sample", folder / "nothing"], 2)):
        monkeypatch.setattr(sys, "argv", ["fastdiff", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert (ended.value.code or 0) == status
    for stream in streams.values():
        stream.flush()
        written = stream.buffer.getvalue()  # type: ignore[attr-defined]
        assert b"\\u5199" in written or "写".encode() in written  # click takes ASCII for a mistake, and UTF-8 instead


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--learning-rate", "1e-4"], r"No such option: --learning-rate .*--lr"),
        (["train", "--learning_rate", "1e-4"], r"No such option: --learning-rate .*--lr"),
        (["train", "--resolution", "64"], r"No such option: --resolution .*--image-size"),
        (["sample", "--sampler", "dpmpp"], r"'dpmpp' is not one of .*; did you mean dpm\+\+\?$"),
        (["sample", "--sampler", "plms"], r"'plms' is not one of [^;]*$"),
    ],
)
def test_what_was_probably_meant_is_named(arguments: list[str], said: str, cli: Cli) -> None:
    refused(cli(*arguments), said)
