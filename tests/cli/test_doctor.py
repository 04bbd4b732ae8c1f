"""``fastdiff doctor``: every line says what was found and what it means."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff.cli import doctor as module
from fastdiff.runtime import device as runtime_device
from fastdiff.runtime import threads as runtime_threads

from .conftest import Cli
from .support import succeeded


def lines(cli: Cli) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in succeeded(cli("doctor")).out.splitlines()}


def test_what_is_found(cli: Cli) -> None:
    found = lines(cli)
    assert found["fastdiff"].startswith(fastdiff.__version__)
    assert found["torch"].startswith(torch.__version__)
    expected = {"device", "precision", "triton", "compiler", "threads", "disk", "cache", *module.EXTRAS}
    assert expected <= set(found)
    threads = torch.get_num_threads()
    assert found["threads"].startswith(f"{threads} thread{'s' * (threads > 1)} on ")
    assert found["diffusers"].startswith("installed: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_what_it_means(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_device, "has_compiler", lambda _: False)
    monkeypatch.setattr(runtime_device, "has_native_bf16", lambda _: False)
    monkeypatch.setattr(os, "getloadavg", lambda: (64.0, 1.0, 1.0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    monkeypatch.setattr(runtime_threads, "usable_cores", lambda: 0.5)
    monkeypatch.setattr(module, "EXTRAS", {"no_such_package": "nothing"})
    found = lines(cli)
    assert "runs are eager" in found["compiler"]
    assert found["precision"].startswith("auto is fp32 (bf16 is not native here")
    assert found["load"] == "64.0 in the last minute: other work will slow a run down"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "more than the cores: OMP_NUM_THREADS=1" in lines(cli)["threads"]
    monkeypatch.setattr(runtime_threads, "usable_cores", lambda: 8)
    assert "fewer than the cores: OMP_NUM_THREADS=8" in lines(cli)["threads"]
    monkeypatch.setattr(runtime_threads, "usable_cores", lambda: 2.5)
    assert lines(cli)["threads"] == "2 threads on 2.5 usable cores: one per core"
    assert "1.0 GiB free" in found["disk"]
    assert "20 bytes per parameter" in found["disk"]
    assert (
        found["no_such_package"]
        == "not installed, needed only for nothing: pip install -c constraints.txt no_such_package"
    )
    assert found["device"].startswith("cpu with ")
