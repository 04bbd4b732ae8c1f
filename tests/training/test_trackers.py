"""Where the log goes besides the run folder's own files."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdiff import TrainConfig, train
from fastdiff.training.trackers import Sink, open_sinks

ABOUT = {"train": {"lr": 1e-4}, "class_names": ["cat"]}
ROW = {"step": 10, "loss": 0.5, "skipped": 0}


class Service:
    """A module with the calls that wandb and trackio share, which notes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails: set[str] = set()
        module: Any = ModuleType(name)
        module.init = self.init
        module.Image = lambda path: ("image", path)
        monkeypatch.setitem(sys.modules, name, module)

    def note(self, name: str, values: Any) -> None:
        self.calls.append((name, values))
        if name in self.fails:
            raise ConnectionError("no route\nto host")

    def init(self, **kwargs: Any) -> "Service":
        self.note("init", kwargs)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.note("log", (step, values))

    def finish(self) -> None:
        self.note("finish", None)


def run_of(sink: Sink, picture: Path) -> None:
    sink.write(ROW)
    sink.image("raw", picture, 10)
    sink.write({**ROW, "step": 20})
    sink.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "runs/cats").mkdir(parents=True)
    return tmp_path / "runs/cats"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.full((8, 4, 3), 200, np.uint8)).save(tmp_path / "raw.png")
    return tmp_path / "raw.png"


def test_nothing_is_asked_for(run_dir: Path) -> None:
    assert open_sinks(TrainConfig(), run_dir, ABOUT, pytest.fail) == []
    assert not list(run_dir.iterdir())


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_lines_and_images(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, picture: Path, name: str
) -> None:
    service = Service(monkeypatch, name)
    monkeypatch.chdir(run_dir)  # the name of . is that of the folder
    (sink,) = open_sinks(TrainConfig(tracker=name), Path(), ABOUT, pytest.fail)
    run_of(sink, picture)
    (_, init), *rest = service.calls
    assert (init["project"], init["name"], init["config"]) == ("fastdiff", "cats", ABOUT)
    assert rest == [
        ("log", (10, {"loss": 0.5, "skipped": 0})),
        ("log", (10, {"raw": ("image", str(picture))})),
        ("log", (20, {"loss": 0.5, "skipped": 0})),
        ("finish", None),
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, run_dir: Path, name: str) -> None:
    service = Service(monkeypatch, name)
    other = run_dir.parent / "dogs"
    other.mkdir()
    for folder in (run_dir, run_dir, other):
        open_sinks(TrainConfig(tracker=name), folder, ABOUT, pytest.fail)
    first, second, third = (init for _, init in service.calls)
    assert [init["resume"] for init in (first, second, third)] == ["never", "allow", "never"]
    if name == "wandb":
        assert first["id"] == second["id"] != third["id"]
        assert re.fullmatch(r"\w+", first["id"])
        assert first["dir"] == str(run_dir)
    else:
        assert first.keys() == {"project", "name", "config", "resume"}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize(("fails", "calls"), [("init", 1), ("log", 2), ("finish", 5)])
def test_a_service_that_fails_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, picture: Path, name: str, fails: str, calls: int
) -> None:
    service = Service(monkeypatch, name)
    service.fails = {fails}
    lines: list[str] = []
    (sink,) = open_sinks(TrainConfig(tracker=name), run_dir, ABOUT, lines.append)
    run_of(sink, picture)
    assert lines == [f"warning: {name} failed and is off for the rest of this run: no route to host"]
    assert len(service.calls) == calls


def test_a_service_does_not_swallow_ctrl_c(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    service = Service(monkeypatch, "wandb")
    (sink,) = open_sinks(TrainConfig(tracker="wandb"), run_dir, ABOUT, pytest.fail)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    service.note = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        sink.write(ROW)


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_told_before_the_images_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    flags: dict[str, Any] = {"tensorboard": True} if name == "tensorboard" else {"tracker": name}
    with pytest.raises(ValueError, match=rf"^{name} is not installed: pip install {name}$"):
        train(tmp_path / "no images", tmp_path / "run", device="cpu", **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, run_dir: Path, name: str) -> None:
    service = Service(monkeypatch, "wandb")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    config = TrainConfig(tensorboard=True) if name == "tensorboard" else TrainConfig(tracker=name)
    with pytest.raises(ValueError, match=rf"^{name} is not installed: pip install {name}$"):
        open_sinks(config, run_dir, ABOUT, pytest.fail)
    assert not service.calls
    assert not list(run_dir.iterdir())


class Writer:
    """TensorBoard's writer, which notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, folder: Path, purge_step: int) -> "Writer":
        self.calls.append(("open", folder.name, purge_step))
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, value, step))

    def add_image(self, name: str, pixels: np.ndarray[Any, Any], step: int, dataformats: str) -> None:
        self.calls.append((name, pixels.shape, step, dataformats))

    def close(self) -> None:
        self.calls.append(("close",))


def test_tensorboard_gets_lines_and_images(monkeypatch: pytest.MonkeyPatch, run_dir: Path, picture: Path) -> None:
    writer = Writer()
    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (sink,) = open_sinks(TrainConfig(tensorboard=True), run_dir, ABOUT, pytest.fail)
    run_of(sink, picture)
    scalars = [("loss", 0.5), ("skipped", 0)]
    assert writer.calls == [
        ("open", "tensorboard", 10),
        *((*scalar, 10) for scalar in scalars),
        ("raw", (8, 4, 3), 10, "HWC"),
        *((*scalar, 20) for scalar in scalars),
        ("close",),
    ]


def test_tensorboard_itself_shows_no_step_twice(run_dir: Path, picture: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(tensorboard=True)
    for loss, steps in ((1.0, (10, 20, 30)), (2.0, (20, 30, 40))):  # killed after 30, resumed from 10
        (sink,) = open_sinks(config, run_dir, ABOUT, pytest.fail)
        for step in steps:
            sink.write({"step": step, "loss": loss})
            sink.image("raw", picture, step)
        sink.close()
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 1.0), (20, 2.0), (30, 2.0), (40, 2.0)]
    assert [e.step for e in events.Images("raw")] == [10, 20, 30, 40]
