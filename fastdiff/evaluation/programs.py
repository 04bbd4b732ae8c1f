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

from fastdiff.runtime.words import first_line, printable


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
    forward: Any = module.forward
    return {argument.name for argument in forward.schema.arguments}


def output_weight(network: Callable[..., Any], device: torch.device) -> Tensor | None:
    """The weight (K, D) that turns features of StyleGAN's Inception into logits; None if it is not to be found.

    With it one call gives features and probabilities. It is tried on an image: nothing but a name tells it.
    """
    weight = getattr(getattr(network, "output", None), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    image = torch.arange(3 * 64 * 64, device=device).remainder(251).to(torch.uint8).view(1, 3, 64, 64)
    features, probabilities = network(image, return_features=True), network(image, no_output_bias=True)
    if features.shape[1:] != weight.shape[1:] or probabilities.shape[1] != len(weight):
        return None
    same = torch.allclose((features @ weight.T).softmax(dim=1), probabilities, rtol=1e-3, atol=1e-6)
    return weight if same else None


@contextmanager
def calling(path: Path) -> Iterator[None]:
    """Make an error of a program that is called one line that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines()
        in_script = bool(said) and "TorchScript interpreter" in said[0]  # a traceback, the error in its last line
        reason = printable(said[-1])[:100] if in_script else first_line(error)
        raise ValueError(
            f"{path} does not take these images ({reason}): --extractor-size says how large they are, and their number "
            "must not be fixed in the file"
        ) from None


def features_of(output: object, count: int, path: Path) -> Tensor:
    """The features (N, D) float32 in what a program returned for ``count`` images.

    They are its first tensor with two dimensions, or the means over the first one with four. ValueError if there is
    none that has a row for each image.
    """
    parts = list(output.values()) if isinstance(output, Mapping) else output
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    tensors = [part for part in parts if isinstance(part, Tensor) and part.shape[:1] == (count,)]
    flat = [part for part in tensors if part.ndim == 2] or [part.mean(dim=(2, 3)) for part in tensors if part.ndim == 4]
    if not flat:
        found = [str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        raise ValueError(
            f"{path} returns no features ({count}, D) for {count} images, but {', '.join(found) or 'nothing'}"
        )
    return flat[0].float()
