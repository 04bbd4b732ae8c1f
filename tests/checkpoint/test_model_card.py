"""The model card of a diffusers folder."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from fastdiff import DiffusionConfig, ModelConfig, load_checkpoint, save_checkpoint
from fastdiff.checkpoint import sha256
from fastdiff.checkpoint.conversion import check_target, convert
from fastdiff.checkpoint.model_card import check_license
from fastdiff.config import RunConfig
from fastdiff.interop.diffusers import Scheduler

from ..interop.support import random_model
from ..support import refusal

MODEL = ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(8,))
CLASSES = replace(MODEL, class_cond=True, num_classes=3)
PROCESS = DiffusionConfig(diffusion_steps=30, noise_schedule="cosine", rescale_timesteps=False)
HOSTILE = (
    "<script>alert(1)</script> ![x](http://evil) | **b** | `c` \\| $x$ &lt;",
    "a\n---\nlicense: mit\n# Title\n```\n| cell",
    "[x](javascript:1) www.evil.example \x1b[31m\u202e _i_ ~~s~~ \u2028 :smile: @name " + "n" * 400,
)
ENVIRONMENT = {
    "fastdiff": "0.1.0",
    "torch": "2.13.0+cpu",
    "triton": None,
    "python": "3.11.7",
    "command": "fastdiff train --data-dir /home/me/secret",
    "host": "my-machine",
    "device": "cpu (Intel(R) Xeon(R))",
    "precision": "bf16",
    "compile": True,
    "processes": 2,
}


def save(path: Path, model: ModelConfig = MODEL, process: DiffusionConfig = PROCESS, **about: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = random_model(model).state_dict()
    return save_checkpoint(path, state, model_config=model, diffusion_config=process, **about)


def run_config(**flags: Any) -> dict[str, Any]:
    """What the file of a run says of the run."""
    described = {"data_dir": "/home/me/photos/", "steps": 2000, "batch_size": 8, "lr": 3e-4, "flip": True}
    config = RunConfig.from_flags({**CLASSES.to_dict(), **PROCESS.to_dict(), **described, **flags})
    return replace(config, class_names=("cat", "dog", "eel"), class_counts=(1000, 200, 34)).to_dict()


def card_of(source: Path, *, scheduler: Scheduler = Scheduler.DDIM, license: str = "", name: str = "folder") -> str:
    target = source.parent / name
    convert(source, load_checkpoint(source), target, scheduler, license)
    return (target / "README.md").read_text(encoding="utf-8")


def rows(card: str) -> dict[str, str]:
    """The first two columns of the tables."""
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|", card, re.MULTILINE))


def test_it_says_what_the_file_of_a_run_says(tmp_path: Path) -> None:
    run = run_config(ema_rate="0.99", label_dropout=0.1, holdout=0.05)
    about = {"class_names": ("cat", "dog", "eel"), "step": 1500, "ema_rate": 0.99, "label_dropout": 0.1}
    path = tmp_path / "me" / "cats" / "ema_0.99_001500.safetensors"
    card = card_of(save(path, CLASSES, **about, run_config=run, environment=ENVIRONMENT), license="cc-by-4.0")
    said = ModelCard(card).data
    assert (said.license, said.library_name, said.datasets) == ("cc-by-4.0", "diffusers", None)
    assert said.tags == ["fastdiff", "diffusion", "class-conditional"]
    assert "Licence: cc-by-4.0." in card
    assert "from `ema_0.99_001500.safetensors` of the run `cats`" in card
    assert "The images in `photos`.\nThey are 1,234 images of 3 classes" in card
    assert "| 1 | dog | 200 |" in card
    assert "0.05 of them, chosen by a hash of their names, were held out" in card
    expected = {
        "Parameters": f"{sum(p.numel() for p in random_model(CLASSES).parameters()):,}",
        "Images": "8 × 8 pixels, RGB",
        "Diffusion process": "30 steps, cosine noise schedule",
        "Prediction": "the noise",
        "Updates": "1,500 of 2,000",
        "Weights": "exponential moving average, rate 0.99",
        "Images per update": "8",
        "Learning rate": "0.0003",
        "Labels dropped": "0.1",
        "PyTorch": "`2.13.0+cpu`",
        "device": "`cpu (Intel(R) Xeon(R))`",
        "compiled": "yes",
        "processes": "`2`",
    }
    assert expected.items() <= rows(card).items()
    assert "| Precision | `bf16` |" in card
    assert "mirrored" in card
    assert "Triton" not in card
    assert "No metrics" in card
    assert not re.search("home|secret|my-machine|my_machine", card)  # it is meant to be published


def test_a_bare_file_is_only_described(tmp_path: Path) -> None:
    torch.save(random_model(MODEL).state_dict(), tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt", model_config=MODEL, diffusion_config=PROCESS)
    convert(tmp_path / "model.pt", loaded, tmp_path / "folder", Scheduler.DDIM)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert ModelCard(card).data.license == "other"
    assert ModelCard(card).data.pipeline_tag == "unconditional-image-generation"
    assert "Licence: unknown" in card
    assert "Unknown: the file does not say on which images" in card
    assert "Unknown: the file does not say how" in card
    assert "Environment" not in card
    assert "Classes\n" not in card
    assert rows(card)["Classes"] == "none"


@pytest.mark.parametrize("about", [{"run_config": 3}, {"run_config": {"model": []}, "environment": "here"}])
def test_metadata_of_another_form_count_as_none(tmp_path: Path, about: dict[str, Any]) -> None:
    card = card_of(save(tmp_path / "a.safetensors", **about))
    assert "the file does not say on which images" in card
    assert "Environment" not in card


@pytest.mark.parametrize("model", [MODEL, CLASSES], ids=["unconditional", "by class"])
@pytest.mark.parametrize("scheduler", Scheduler)
def test_its_code_for_diffusers_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: ModelConfig, scheduler: Scheduler
) -> None:
    import diffusers

    learns = replace(model, learn_sigma=True), replace(PROCESS, learn_sigma=True)
    card = card_of(save(tmp_path / "a.safetensors", *learns), scheduler=scheduler, name='it\'s "mine"')
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers.utils.logging, "disable_progress_bar", lambda: None)
    found: dict[str, Any] = {}
    exec(code, found)
    assert len(found["images"]) == 4
    if model.class_cond:
        assert found["images"].dtype == torch.uint8
        assert found["images"].shape == (4, 3, 8, 8)
        assert len(found["images"].unique()) > 10
    else:
        assert found["images"][0].size == (8, 8)


def test_text_from_outside_is_shown_and_nothing_more(tmp_path: Path) -> None:
    run = run_config(data_dir=f"/data/{HOSTILE[0]}")
    about = {"class_names": HOSTILE, "run_config": run, "environment": {"device": HOSTILE[0], "torch": "2`3", "b": []}}
    path = save(tmp_path / "a & <b>.safetensors", CLASSES, **about)
    (tmp_path / "best.json").write_text(json.dumps({"checkpoint": path.name, "name": HOSTILE[2]}))
    entry = {"checkpoint": path.name, "sha256": sha256(path), "figures": {"fd": 1.0}, "names": {"fd": HOSTILE[1]}}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "metrics.jsonl").write_text(json.dumps(entry))
    card = card_of(path, name="<i>f")
    assert ModelCard(card).data.license == "other"
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(ModelCard(card).text)
    inner = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in (*tokens, *inner)}
    assert not kinds & {"link_open", "image", "em_open", "strong_open", "s_open", "html_inline", "heading", "hr"}
    assert [token.content for token in tokens if token.type == "html_block"] == [card.splitlines()[-1] + "\n"]
    shown = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert {HOSTILE[0], "2`3", "a --- license: mit # Title ``` | cell"} <= set(shown)
    assert "<i>f" in shown
    assert sum(text.startswith("[x](javascript:1) www.evil.example \N{REPLACEMENT CHARACTER}[31m") for text in shown)
    assert max(map(len, shown)) < 400
    assert card.count("\n# ") == 1


def evaluation(path: Path, **more: Any) -> str:
    said = {
        "checkpoint": path.name,
        "sha256": sha256(path),
        "samples": {"count": 10000, "sampler": "dpm++", "steps": 20, "seed": 0},
        "reference": {"data": "/home/me/photos", "count": 320},
        "figures": {"fd": 12.345, "kd": 0.012, "kd_deviation": 0.001, "precision": None},
        "names": {"fd": "FD (n=10,000)", "kd": "KD (n=10,000)", "precision": "precision (n=10,000)"},
    }
    return json.dumps(said | more) + "\n"


def test_metrics_of_this_file_and_no_other(tmp_path: Path) -> None:
    path = save(tmp_path / "model000002.safetensors")
    (tmp_path / "evaluation").mkdir()
    lines = [
        evaluation(path, figures={"fd": 99.0}),  # measured again below
        evaluation(path),
        evaluation(path, checkpoint="model000004.safetensors", names={"fd": "another"}),
        evaluation(path, sha256="0" * 64, names={"fd": "of the file that had this name"}),
    ]
    half = b'{"checkpoint": "\xc3'
    (tmp_path / "evaluation" / "metrics.jsonl").write_bytes("".join(lines).encode() + half)
    (tmp_path / "best.json").write_text(json.dumps({"checkpoint": path.name, "name": "FD (n=10,000)"}))
    card = card_of(path)
    how = ", dpm++, 20 steps, against photos"
    assert {name: value for name, value in rows(card).items() if "n=10" in name} == {
        f"FD (n=10,000){how}": "12.35",
        f"KD (n=10,000){how}": "0.012 ± 0.001",
    }
    assert "the best checkpoint of its run by FD" in card
    assert "another" not in card
    assert "of the file" not in card.partition("## Evaluation")[2]
    (tmp_path / "best.json").write_text(json.dumps({"checkpoint": "model000004.safetensors", "name": "FD"}))
    convert(path, load_checkpoint(path), tmp_path / "again", Scheduler.DDIM)
    assert "best checkpoint" not in (tmp_path / "again" / "README.md").read_text()


def test_a_folder_has_no_metrics(tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors")
    card_of(source, name="b")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "metrics.jsonl").write_text(evaluation(source, checkpoint="b"))
    convert(tmp_path / "b", load_checkpoint(source), tmp_path / "c", Scheduler.DDIM)
    assert "No metrics" in (tmp_path / "c" / "README.md").read_text()


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[1]\n3\nnot json\n", b"[" * 100_000, b'{"checkpoint": "a.safetensors"}'], ids=len
)
def test_damaged_metrics_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "evaluation").mkdir()
    for name in ("best.json", "evaluation/metrics.jsonl"):
        (tmp_path / name).write_bytes(content)
    card = card_of(save(tmp_path / "a.safetensors"))
    assert "No metrics of this checkpoint are recorded." in card
    assert "best" not in card


@pytest.mark.parametrize("figures", [[], {"fd": "1"}, {"fd": float("nan")}, {"fd": None}, None])
def test_figures_that_are_no_numbers_are_left_out(tmp_path: Path, figures: Any) -> None:
    path = save(tmp_path / "a.safetensors")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "metrics.jsonl").write_text(evaluation(path, figures=figures))
    assert "No metrics" in card_of(path)


def test_many_classes_are_a_list(tmp_path: Path) -> None:
    names = tuple(f"c{i}" for i in range(1200))
    for count, said in ((1000, "0 c0, 1 c1, 2 c2"), (1200, "0 c0 to 1199 c1199")):
        path = save(
            tmp_path / f"{count}.safetensors",
            replace(MODEL, class_cond=True, num_classes=count),
            class_names=names[:count],
        )
        card = card_of(path, name=f"{count}")
        assert said in card
        assert len(card) < 20_000


def test_a_card_that_somebody_edited_is_not_lost(tmp_path: Path) -> None:
    card_of(save(tmp_path / "a.safetensors"))
    check_target(tmp_path / "a.safetensors", tmp_path / "folder", overwrite=True)
    path = tmp_path / "folder" / "README.md"
    path.write_text(path.read_text().replace("Licence: unknown", "Licence: none, all rights reserved"))
    match = "holds README.md too, which would be lost"
    refusal(lambda: check_target(tmp_path / "a.safetensors", tmp_path / "folder", overwrite=True), match)


@pytest.mark.parametrize("license", ["", "no", "MIT", "a b", "mit\nx: y", "1.0", "null"])
def test_what_is_no_licence(license: str) -> None:
    refusal(lambda: check_license(license), "license must be an identifier in small letters")


def test_licences() -> None:
    for license in ("mit", "apache-2.0", "cc-by-nc-sa-4.0", "other", "gpl-3.0", "bsd-3-clause-clear"):
        check_license(license)
