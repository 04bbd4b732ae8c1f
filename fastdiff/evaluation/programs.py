"""Networks that come as programs: TorchScript files and exported programs. To load one is to run what it says.

torch.jit.load runs the file's own code, and torch.export.load unpickles objects of it and evaluates its expressions:
both may do anything. Whoever calls this module has decided to trust the file.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.runtime.words import first_line


def load_torchscript(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """The module of a TorchScript file, for evaluation; ValueError if it cannot be loaded."""
    with _loading(path):
        module: torch.jit.ScriptModule = torch.jit.load(path, map_location=device)
        return module.eval()


def load_exported(path: Path, device: torch.device) -> Callable[..., Any]:
    """The module of a file of torch.export.save; ValueError if it cannot be loaded."""
    from torch.export.passes import move_to_device_pass  # imports the compiler

    with _loading(path), path.open("rb") as file:
        program = torch.export.load(file)
        # The graph names the devices of the tensors that it makes.
        return move_to_device_pass(program, device).module()


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Make an error one line that names the file; PyTorch also logs it, and warns that TorchScript is deprecated."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise ValueError(
            f"{path} cannot be loaded ({first_line(error)}): it may be damaged, or of another version of PyTorch"
        ) from None
    finally:
        logging.disable(disabled)


def arguments_of(module: torch.jit.ScriptModule) -> set[str]:
    """The names of the arguments that a TorchScript module takes."""
    return {argument.name for argument in module._c._get_method("forward").schema.arguments}


@contextmanager
def calling(path: Path, images: Tensor) -> Iterator[None]:
    """Make an error of a program that is called with these images one line that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shape = "x".join(map(str, images.shape))
        raise ValueError(
            f"{path} does not take images of shape {shape} ({first_line(error)}): set --extractor-size, and export it "
            "for any number of images"
        ) from None


def features_of(output: object, count: int, path: Path) -> Tensor:
    """The features (N, D) float32 in what a program returned for ``count`` images.

    They are its first tensor with two dimensions, or the means over the first one with four. ValueError if there is
    none, or it has not a row for each image.
    """
    parts = list(
        output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else [output]
    )
    tensors = [part for part in parts if isinstance(part, Tensor) and part.shape[:1] == (count,)]
    flat = [part for part in tensors if part.ndim == 2] or [part.mean(dim=(2, 3)) for part in tensors if part.ndim == 4]
    if not flat:
        shapes = ", ".join(
            str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts
        )
        raise ValueError(f"{path} returns no features ({count}, D) for {count} images, but {shapes or 'nothing'}")
    return flat[0].float()
