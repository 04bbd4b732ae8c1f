"""The same figures from any number of processes, and an end that is told once."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastdiff.evaluation.records import read_records

from ..processes import Result, launch
from ..sampling.support import saved
from .colours import pictures, program

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    classes = {"class_cond": True, "num_classes": 4, "class_names": ("circle", "cross", "square", "triangle")}
    return saved(tmp_path_factory.mktemp("model") / "model.safetensors", learn_sigma=True, diffusion_steps=8, **classes)


def evaluate(processes: int, model: Path, data: Path, cwd: Path, *args: object, **environment: object) -> Result:
    """``fastdiff evaluate nll`` alone or as several processes, through a worker that can be told to come to harm."""
    how = ["--data-dir", data, "--cache-dir", cwd / "cache", "--compile", "off", "--device", "cpu", *args]
    return launch(WORKER, ("evaluate", "nll", model, *how), cwd, environment, processes)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {
        f"{path.stem} {name}": values for path in sorted(folder.glob("*.npz")) for name, values in np.load(path).items()
    }


@pytest.mark.slow
def test_two_processes_find_what_one_does(model: Path, shapes: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        flags = ("--num-samples", 17, "--batch-size", 5, "--out-dir", processes)
        result = evaluate(processes, model, shapes, tmp_path, *flags)
        assert result.status == 0, result
        assert result.out.count(" bits/dim ± ") == 1
    alone, shared = arrays(tmp_path / "1"), arrays(tmp_path / "2")
    assert alone.keys() == shared.keys()
    for name, values in alone.items():
        if name.endswith("names"):
            assert shared[name].tolist() == values.tolist()
        else:
            np.testing.assert_allclose(shared[name], values, rtol=1e-6, err_msg=name)
    one, two = (json.loads((tmp_path / name / "nll.json").read_text()) for name in ("1", "2"))
    assert one == {name: pytest.approx(said, rel=1e-6) if type(said) is float else said for name, said in two.items()}


@pytest.mark.slow
def test_more_processes_than_images(model: Path, shapes: Path, tmp_path: Path) -> None:
    result = evaluate(2, model, shapes, tmp_path, "--num-samples", 1, "--steps", 2)
    assert result.status == 0, result
    assert arrays(tmp_path / "nll")["images total_bpd"].shape == (1,)
    assert " over 1 images, " in result.out


@pytest.mark.parametrize(("kind", "status"), [("SIGINT", 130), pytest.param("SIGTERM", 143, marks=pytest.mark.slow)])
def test_a_signal(model: Path, shapes: Path, tmp_path: Path, kind: str, status: int) -> None:
    harm = {"SIGNAL": kind, "SIGNAL_AFTER_STEPS": 13}
    result = evaluate(1, model, shapes, tmp_path, "--batch-size", 4, **harm)
    assert result.status == status
    assert f"stopped by {kind}: 4 of 12 images were done, " in result.out
    assert "bits/dim; nothing is written" in result.out
    assert "Traceback" not in result.err
    assert not (tmp_path / "nll").exists()


@pytest.mark.slow
def test_a_signal_to_one_of_two(model: Path, shapes: Path, tmp_path: Path) -> None:
    harm = {"SIGNAL": "SIGINT", "SIGNAL_AFTER_STEPS": 3, "SIGNAL_RANK": 1}
    result = evaluate(2, model, shapes, tmp_path, **harm)
    assert result.status != 0
    assert result.out.count("stopped by SIGINT: 6 of 12 images were done, ") == 1, result
    assert not (tmp_path / "nll").exists()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_what_fails_on_one_is_told_once(model: Path, shapes: Path, tmp_path: Path, rank: int) -> None:
    result = evaluate(2, model, shapes, tmp_path, FAIL_AFTER_STEPS=3, FAIL_RANK=rank)
    assert result.status != 0
    told = [line for line in result.err.splitlines() if "error: " in line and "has lost 7 bytes" in line]
    assert told == ["process 1: " * rank + "error: decoded.npy, the decoded images, has lost 7 bytes"], result
    assert not (tmp_path / "nll").exists()


@pytest.mark.slow
def test_bad_input_is_told_once(model: Path, tmp_path: Path) -> None:
    result = evaluate(2, model, tmp_path / "nowhere", tmp_path)
    assert result.status != 0
    assert result.err.count("error: data_dir") == 1, result


def test_two_processes_compare_what_one_does(model: Path, shapes: Path, tmp_path: Path) -> None:
    """Three of seven samples are the second process's, and five of twelve images of the reference."""
    how = ("--extractor", program(tmp_path / "colours.pt"), "--trust", "--extractor-size", 8, "--num-samples", 7)
    plain = ("--batch-size", 2, "--compile", "off", "--precision", "fp32", "--device", "cpu", "--cache-dir", tmp_path)
    for processes in (1, 2):
        place = ("evaluate", "fid", model, shapes, "--out-dir", tmp_path / str(processes))
        result = launch(None, (*place, *how, *plain), tmp_path, {}, processes)
        assert result.status == 0, result
        assert result.out.count("FD-colours (n=7, colours at 8 pixels)") == 1
    (one,), (two,) = (read_records(tmp_path / name) for name in ("1", "2"))
    assert two["figures"] == pytest.approx(one["figures"], rel=1e-6, abs=1e-9)
    assert not list(tmp_path.glob("[12]/.features*"))


def test_more_processes_than_samples(shapes: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(3))
    how = ("--extractor", program(tmp_path / "colours.pt"), "--trust", "--extractor-size", 8, "--device", "cpu")
    result = launch(None, ("evaluate", "fid", "a.npz", shapes, *how, "--cache-dir", tmp_path), tmp_path, {}, 4)
    assert result.status == 0, result
    assert "FD-colours (n=3, colours at 8 pixels)" in result.out


def test_what_is_wrong_with_an_extractor_is_told_once(shapes: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(3))
    how = ("--extractor", program(tmp_path / "colours.pt"), "--device", "cpu", "--cache-dir", tmp_path)
    result = launch(None, ("evaluate", "fid", "a.npz", shapes, *how), tmp_path, {}, 2)
    assert result.status != 0
    assert result.err.count("error: ") == 1
    assert "--trust" in result.err
