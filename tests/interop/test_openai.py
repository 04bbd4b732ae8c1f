"""improved-diffusion's .pt files: their tensors, and nothing else."""

import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch

from fastdiff.interop.openai import load_state_dict


def test_tensors_come_back(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(3, 2), "b": torch.arange(4), "c": torch.randn(2).half()}
    for new_format in (True, False):
        torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=new_format)
        loaded = load_state_dict(tmp_path / "m.pt")
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) and loaded[key].dtype == state[key].dtype for key in state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state": {}, "param_groups": []}, "is optimizer state, not a model: name the model"),
        ({"a": 3}, "not a bare state dict"),
        ({}, "not a bare state dict"),
        ([torch.zeros(2)], "not a bare state dict"),
        (torch.zeros(2), "not a bare state dict"),
        ({"model": {"a": torch.zeros(2)}}, "not a bare state dict"),
        (
            {"step": 3, "ema": {"time_embed.0.weight": torch.zeros(2)}},
            r"save it alone, .*torch\.load\('m\.pt'\)\['ema'\]",
        ),
        ({1: torch.zeros(2)}, "1 is not a dense tensor with a string key"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "'a' is not a dense tensor"),
        ({"a": torch.zeros(2, device="meta")}, "'a' is not a dense tensor"),
        (torch.nn.Linear(2, 2), "not loaded"),
    ],
    ids=str,
)
def test_anything_else_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=rf"m\.pt .*{message}"):
        load_state_dict(tmp_path / "m.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_what_a_wrapper_puts_before_every_key_is_left_out(tmp_path: Path, prefix: str) -> None:
    state = {"time_embed.0.weight": torch.randn(3, 2), "out.2.bias": torch.randn(3)}
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "m.pt")
    loaded = load_state_dict(tmp_path / "m.pt")
    assert list(loaded) == list(state)
    torch.save({**{prefix + key: value for key, value in state.items()}, "more": torch.zeros(1)}, tmp_path / "m.pt")
    assert prefix + "out.2.bias" in load_state_dict(tmp_path / "m.pt")  # not before every one: left to be refused


class Code:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_never_runs(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "it-ran", tmp_path / "m.pt"
    content = {"a": torch.zeros(2), "b": Code(str(mark))}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"m\.pt"):
        load_state_dict(path)
    assert not mark.exists()
    if form == "pickle":  # the trap works
        pickle.loads(path.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_damage_of_any_kind_is_one_clear_error(tmp_path: Path, new_format: bool) -> None:
    """torch.load raises nearly anything on damaged bytes; all of it is a ValueError that names the file."""
    path = tmp_path / "m.pt"
    torch.save({"a": torch.randn(8, 8), "b": torch.randn(3)}, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    rng = random.Random(0)
    messages = []
    for i in range(300):
        data = bytearray(whole)
        if i % 2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(4):
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a second line on the terminal
            try:
                load_state_dict(path)  # a changed number inside a tensor goes unnoticed
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) > 150
    assert all("m.pt" in message and "\n" not in message for message in messages)
