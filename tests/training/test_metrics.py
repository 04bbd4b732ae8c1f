"""What a run reports."""

import json
import math
from pathlib import Path

import pytest
import torch

from fastdiff.training.metrics import LossSums, ProgressFiles


def test_means_over_all_and_over_quarters() -> None:
    sums = LossSums(torch.device("cpu"))
    sums.add({"loss": torch.tensor([1.0, 2.0]), "mse": torch.tensor([3.0, 4.0])}, torch.tensor([0, 7]), 8)
    sums.add({"loss": torch.tensor([6.0]), "mse": torch.tensor([5.0])}, torch.tensor([6]), 8)
    sums.add_grad_norm(torch.tensor(2.0))
    sums.add_grad_norm(torch.tensor(4.0))
    read = sums.read()
    assert read == {
        "loss": 3.0,
        "loss_q0": 1.0,
        "loss_q3": 4.0,
        "mse": 4.0,
        "mse_q0": 3.0,
        "mse_q3": 4.5,
        "grad_norm": 3.0,
    }
    again = sums.read()  # begun again: the mean of nothing
    assert again.keys() == {"grad_norm"}
    assert math.isnan(again["grad_norm"])


@pytest.mark.parametrize(("steps", "quarters"), [(4, [0, 1, 2, 3]), (10, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]), (1, [0])])
def test_quarters_are_the_originals(steps: int, quarters: list[int]) -> None:
    for t, quarter in enumerate(quarters):
        sums = LossSums(torch.device("cpu"))
        sums.add({"loss": torch.tensor([1.0])}, torch.tensor([t]), steps)
        assert sums.read().keys() - {"loss", "grad_norm"} == {f"loss_q{quarter}"}


def test_a_nan_does_not_outlive_its_line() -> None:
    sums = LossSums(torch.device("cpu"))
    sums.add({"loss": torch.tensor([math.nan])}, torch.tensor([0]), 4)
    sums.add_grad_norm(torch.tensor(math.inf))
    assert math.isnan(sums.read()["loss"])
    sums.add({"loss": torch.tensor([1.0])}, torch.tensor([0]), 4)
    sums.add_grad_norm(torch.tensor(1.0))
    assert sums.read() == {"loss": 1.0, "loss_q0": 1.0, "grad_norm": 1.0}


def test_files_are_cut_back_to_the_step(tmp_path: Path) -> None:
    with ProgressFiles(tmp_path, 0, tensorboard=False) as files:
        for step in (1, 2, 3):
            files.write({"step": step, "loss": step / 2})
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    with ProgressFiles(tmp_path, 2, tensorboard=False) as files:
        files.write({"step": 3, "loss": 7.0})
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3"]
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 7.0}]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with ProgressFiles(tmp_path, 0, tensorboard=False) as files:
        files.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    text = (tmp_path / "progress.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None}
    with ProgressFiles(tmp_path, 1, tensorboard=False):
        pass
    assert json.loads((tmp_path / "progress.jsonl").read_text())["loss"] is None
