"""The files of extractors: what they are, found out without running anything, and the weights in them."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from fastdiff.interop.recognition import differing_keys, first_difference, refuse_integers, shapes_of
from fastdiff.runtime.files import other_kind
from fastdiff.runtime.words import first_line, printable

Network = TypeVar("Network", bound=nn.Module)

STATE_DICT, TORCHSCRIPT, EXPORTED = "a state dict", "a TorchScript program", "an exported program"
WANTED = (
    "name a TorchScript file, an exported program (.pt2), the weights of the FID Inception or of EfficientNet-Lite0 "
    "(.pth), or efficientnet-lite0"
)


def kind_of_file(path: Path) -> str:
    """TORCHSCRIPT or EXPORTED, or STATE_DICT, which any other file may be.

    ValueError if there is no file, if its first bytes are those of another kind, and if a program is damaged.
    """
    if not path.is_file():
        raise ValueError(f"extractor {path} {'is not a file' if path.exists() else 'does not exist'}: {WANTED}")
    with path.open("rb") as file:
        start = file.read(64)
    if (what := other_kind(start)) is not None:
        raise ValueError(f"{path} is {what}")
    if path.suffix == ".safetensors" or start[8:10] == b'{"':
        raise ValueError(f"{path} is a safetensors file, which holds no extractor: {WANTED}")
    if not zipfile.is_zipfile(path):
        return STATE_DICT
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name.partition("/")[2] for name in archive.namelist()]
            if "archive_format" in inside:
                kind = EXPORTED
            elif "constants.pkl" in inside:
                kind = TORCHSCRIPT
            else:
                return STATE_DICT
            damaged = archive.testzip()  # compares every checksum, as PyTorch does not
    except Exception as error:  # the reader can raise almost anything on damaged bytes
        raise ValueError(f"{path} is damaged ({first_line(error)}): copy it again") from None
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {printable(damaged)} in it does not have its checksum; copy it again")
    return kind


def with_weights(make: Callable[[], Network], state: dict[str, Tensor], path: Path) -> Network:
    """The network with these weights; ValueError if the shapes are not its own."""
    network = make()
    # How often a batch norm was updated is of no use here, and some translations leave it out.
    theirs, ours = (
        {key: shape for key, shape in shapes_of(s).items() if not key.endswith("num_batches_tracked")}
        for s in (state, network.state_dict())
    )
    if differing := differing_keys(theirs, ours):
        raise ValueError(f"{path} has not the weights of this network: {first_difference(differing, theirs, ours)}")
    refuse_integers({key: state[key] for key in ours}, path)
    network.load_state_dict(state, strict=False)
    return network
