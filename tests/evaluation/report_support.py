"""Run folders for reports, written without a training, and a page as a parser sees it."""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff import ClassifierConfig, DataConfig, DiffusionConfig, ModelConfig, RuntimeConfig, TrainConfig
from fastdiff.config import ClassifierTrainConfig, RunConfig
from fastdiff.evaluation.report import write_report
from fastdiff.sampling import save_grid
from fastdiff.sampling.output import save_npz

CLASSES = ("circle", "cross", "square", "triangle")
NAME = "FD-EfficientNet (n=10,000, efficientnet-lite0)"

Row = dict[str, Any]


def config(class_names: Sequence[str] = CLASSES, classifier: bool = False, **train: Any) -> RunConfig:
    """A run of 100 updates on 12 images of 8 pixels."""
    model: Any = ModelConfig(
        image_size=8, num_channels=32, class_cond=bool(class_names), num_classes=len(class_names) or 1000
    )
    kind: type[TrainConfig] = TrainConfig
    if classifier:
        model, kind = (
            ClassifierConfig(image_size=8, classifier_width=64, num_classes=len(class_names)),
            ClassifierTrainConfig,
        )
    return RunConfig(
        model,
        DiffusionConfig(diffusion_steps=20, noise_schedule="cosine"),
        DataConfig(data_dir="/data/shapes", labels="auto"),
        kind(**{"steps": 100, "batch_size": 4, **train}),
        RuntimeConfig(),
        class_names=tuple(class_names),
        class_counts=(3,) * len(class_names),
        data_fingerprint="0123abcd",
    )


def row(step: int, loss: float | None, **more: Any) -> Row:
    """A row of progress.jsonl with a batch size of 4."""
    terms = {} if loss is None else {"loss": loss, "mse": loss, **{f"loss_q{q}": loss * (1 + q) for q in range(4)}}
    speed = {"grad_norm": 1.5, "skipped": 0, "lr": 1e-3, "images_per_s": 8.0, "data_wait": 0.125}
    return {"step": step, "samples": 4 * step, "loss": loss, **terms, **speed, **more}


def rows(last: int = 100, every: int = 10) -> list[Row]:
    """A loss that falls as 1 / step."""
    return [row(step, every / step) for step in range(every, last + 1, every)]


def write_run(
    folder: Path,
    *,
    of: RunConfig | None = None,
    progress: Iterable[Row] | None = None,
    environment: Mapping[str, Any] | None = None,
    previews: Iterable[int] = (),
    samples: int = 0,
) -> Path:
    """A run folder: config.json and progress.jsonl, and at these steps previews of the raw weights and an EMA."""
    folder.mkdir(parents=True)
    of = of or config()
    values = of.to_dict() | ({} if environment is None else {"environment": dict(environment)})
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    write_rows(folder, rows() if progress is None else progress)
    for step in previews:
        for name in ("raw", "ema_0.9999"):
            (folder / "previews").mkdir(exist_ok=True)
            save_grid(folder / "previews" / f"{step:06d}_{name}.png", images(16, seed=step))
    if samples:
        labels = np.arange(samples) % len(of.class_names)
        names = np.array(of.class_names, np.str_)
        save_npz(folder / "samples.npz", [images(samples)], (samples, 8, 8, 3), arr_1=labels, class_names=names)
    return folder


def write_rows(folder: Path, progress: Iterable[Row]) -> None:
    text = "".join(f"{json.dumps(one)}\n" for one in progress)
    (folder / "progress.jsonl").write_text(text, encoding="utf-8")


def images(count: int, size: int = 8, seed: int = 0) -> Any:
    """Random pixels, uint8 (count, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def evaluation(step: int, fd: float | None, rate: float = 0.9999, name: str = NAME, **figures: float | None) -> Row:
    """A line of evaluation/metrics.jsonl."""
    return {
        "time": "2026-11-30T16:10:29+0000",
        "checkpoint": f"ema_{rate}_{step:06d}.safetensors",
        "step": step,
        "ema_rate": rate,
        "samples": {"count": 10_000, "sampler": "dpm++", "steps": 20},
        "figures": {"fd": fd, **figures},
        "names": {"fd": name},
    }


def write_evaluations(folder: Path, lines: Sequence[Row], best: Row | None = None) -> None:
    """metrics.jsonl, and best.json of one of the lines."""
    (folder / "evaluation").mkdir(exist_ok=True)
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "evaluation" / "metrics.jsonl").write_text(text, encoding="utf-8")
    if best is not None:
        about = {name: best[name] for name in ("checkpoint", "step", "ema_rate")}
        found = {**about, "metric": "fd", "name": best["names"]["fd"], "value": best["figures"]["fd"]}
        (folder / "best.json").write_text(json.dumps(found), encoding="utf-8")


_VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """A page, whose elements must be closed in their order: their names and attributes, and the texts in them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = [name for name, _ in attrs]
        assert len(set(named)) == len(named), f"an attribute twice in <{tag}>: {named}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag == "path", f"<{tag}/> is no element of SVG"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    @property
    def text(self) -> str:
        """What a reader sees, in one line."""
        return " ".join("".join(data for tag, data in self.texts if tag not in ("script", "style")).split())

    @property
    def counts(self) -> Counter[str]:
        return Counter(tag for tag, _ in self.elements)

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        """The attributes of the elements with this name and class."""
        return [a for name, a in self.elements if name == tag and (not kind or kind in a.get("class", "").split())]

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]

    def parts(self, tag: str) -> list[str]:
        return [data for name, data in self.texts if name == tag]


def check(html: str) -> Page:
    """The page, which must be well-formed, keep to itself and run its own script only."""
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.counts["script"] == page.counts["style"] == page.counts["main"] == 1
    ids = page.attributes("id")
    assert len(set(ids)) == len(ids)
    for source in (*page.attributes("src"), *page.attributes("href")):
        assert re.match(r"data:(image/(png|jpeg);base64,[A-Za-z0-9+/=]+|,)$|#\w+$", source), source[:80]
    for target in page.attributes("href"):
        assert target[0] != "#" or target[1:] in ids
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not {"iframe", "object", "embed", "base", "form"} & set(page.counts)
    for tag in ("style", "script"):
        assert not re.search(
            r"url\(|@import|https?:|//|fetch|XMLHttp|innerHTML|eval\(", _code("".join(page.parts(tag)))
        )
    (policy,) = (a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256("".join(page.parts("script")).encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in policy
    return page


def _code(text: str) -> str:
    """Without the lines that are comments."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("//"))


def report(*folders: Path, out: Path) -> Page:
    """Write the report of the runs to ``out`` and read it."""
    write_report(folders, out, overwrite=True)
    return check(out.read_text(encoding="utf-8"))


def points(page: Page, label: str, chart: int = 0) -> list[tuple[int, int]]:
    """The points of the line called ``label`` in one of the charts that have it, in the units of its plot."""
    path = [a for a in page.all("path") if a.get("data-n") == label][chart]["d"]
    at, found = (0, 0), []
    for kind, x, y in re.findall(r"([Ml])(-?\d+),(-?\d+)", path):
        at = (int(x), int(y)) if kind == "M" else (at[0] + int(x), at[1] + int(y))
        found.append(at)
    return found


def titles(page: Page) -> list[str]:
    """The titles of the charts."""
    return re.findall(r'<span class="title">([^<]*)</span>', page.html)
