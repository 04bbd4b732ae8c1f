"""Extractors by file: programs, which need trust, and files that are not what they say."""

import hashlib
import logging
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checkpoint.files import write_tensors
from fastdiff.evaluation import extractors
from fastdiff.evaluation.extractors import open_extractor
from fastdiff.evaluation.resizing import resized_like_pillow

from ..support import refusal

MEAN, DEVIATION = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class StyleGANs(nn.Module):
    """The arguments of StyleGAN's inception-2015-12-05.pt: levels in, of any size; features or probabilities out."""

    def __init__(self, sharper: float = 1.0) -> None:
        super().__init__()
        self.output = nn.Linear(6, 4)
        self.sharper = sharper
        self.calls = 0

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        self.calls += 1
        assert img.dtype == torch.uint8
        x = img.to(torch.float32) / 255
        features = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        if return_features:
            return features
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return (self.sharper * F.linear(features, self.output.weight, bias)).softmax(dim=1)


class Means(nn.Module):
    """The means of the channels, among other things."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": x.mean(), "tokens": x.flatten(2), "maps": x, "pooled": x.mean(dim=(2, 3))}


class Maps(nn.Module):
    """A feature map (N, 3, 20, 20), from images of that size only."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(), x.view(-1, 3, 20, 20) * 2


class Nothing(nn.Module):
    """No features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)


class NotFinite(nn.Module):
    """Features of which one is no number."""

    def forward(self, x: Tensor) -> Tensor:
        features = x.mean(dim=(2, 3))
        features[-1, 1] = torch.nan
        return features


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module.eval()).save(str(path))
    return path


def exported(module: nn.Module, path: Path, *, fixed: bool = False) -> Path:
    batch = None if fixed else ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(module.eval(), (torch.zeros(2, 3, 20, 20),), dynamic_shapes=batch), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def images(count: int = 3, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def prepared(size: int) -> Tensor:
    """What a program should see of images()."""
    return (resized_like_pillow(images(), size) / 255 - MEAN) / DEVIATION


def test_a_program_needs_trust(tmp_path: Path) -> None:
    path = scripted(Means(), tmp_path / "means.pt")
    said = refusal(lambda: open_extractor(path))
    assert "is a TorchScript program, which can run any code" in said
    assert sha256(path) in said
    assert "--trust" in said
    assert open_extractor(path, trust=True).sha256 == sha256(path)


@pytest.mark.parametrize("sharper", [1.0, 2.0])
def test_styleGANs_program_gives_features_and_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharper: float
) -> None:
    stand_in = StyleGANs(sharper)
    path = scripted(stand_in, tmp_path / "renamed.pt")
    assert "--trust" in refusal(lambda: open_extractor(path))
    monkeypatch.setitem(extractors.KNOWN, sha256(path), "inception-2015-12-05")
    extractor = open_extractor(path)
    assert (extractor.name, extractor.family) == ("inception-2015-12-05", "")
    assert extractor.resizing == "299 pixels, bilinear (TensorFlow 1's)"
    assert extractor.gives_probabilities
    assert not extractor.gives_spatial
    calls = extractor._network.calls
    found = extractor(images())
    assert found.probabilities is not None
    # One call serves for both if the weight that StyleGAN's file has makes the probabilities of the features.
    assert extractor._network.calls - calls == (1 if sharper == 1 else 2)
    assert torch.allclose(found.features, stand_in(images(), return_features=True), atol=1e-6)
    assert torch.allclose(found.probabilities, stand_in(images(), no_output_bias=True), atol=1e-6)


def test_a_trusted_program_with_styleGANs_arguments_is_not_called_inception(tmp_path: Path) -> None:
    extractor = open_extractor(scripted(StyleGANs(), tmp_path / "mine.pt"), trust=True)
    assert (extractor.name, extractor.family) == ("mine", "mine")
    assert extractor.resizing == "as the program does it"
    assert extractor(images()).features.shape == (3, 6)


def test_another_program_sees_normalised_images(tmp_path: Path) -> None:
    extractor = open_extractor(scripted(Means(), tmp_path / "dinov2_vits14.pt"), trust=True)
    assert (extractor.name, extractor.family) == ("dinov2_vits14 at 224 pixels", "dinov2_vits14")
    assert extractor.resizing == "224 pixels, bicubic (Pillow's)"
    assert not extractor.gives_probabilities
    found = extractor(images())
    assert found.probabilities is None
    assert torch.allclose(found.features, prepared(224).mean(dim=(2, 3)), atol=1e-6)


def test_an_exported_program_is_averaged_over_space(tmp_path: Path) -> None:
    path = exported(Maps(), tmp_path / "maps.pt2")
    assert "is an exported program, which can run any code" in refusal(lambda: open_extractor(path))
    extractor = open_extractor(path, trust=True, size=20)
    assert torch.allclose(extractor(images()).features, 2 * prepared(20).mean(dim=(2, 3)), atol=1e-6)
    said = refusal(lambda: open_extractor(path, trust=True)(images()))
    assert "does not take these images" in said
    assert "--extractor-size" in said
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("maps/archive_format", "pt2")
    assert "cannot be loaded" in refusal(lambda: open_extractor(path, trust=True))


def test_a_program_that_takes_other_images_is_refused(tmp_path: Path) -> None:
    extractor = open_extractor(scripted(Maps(), tmp_path / "maps.pt"), trust=True)
    assert "RuntimeError: shape '[-1, 3, 20, 20]' is invalid" in refusal(lambda: extractor(images()))
    assert "at least 1" in refusal(lambda: open_extractor(tmp_path / "maps.pt", trust=True, size=0))


def test_a_program_without_features_is_refused(tmp_path: Path) -> None:
    extractor = open_extractor(scripted(Nothing(), tmp_path / "nothing.pt"), trust=True, size=4)
    assert refusal(lambda: extractor(images())).endswith("returns no features (3, D) for 3 images, but (3, 3, 16)")


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    extractor = open_extractor(scripted(NotFinite(), tmp_path / "broken.pt"), trust=True, size=4)
    assert "extractor broken at 4 pixels gives features that are not finite" in refusal(lambda: extractor(images()))


def a_checkpoint(path: Path) -> None:
    write_tensors(path, {"time_embed.0.weight": torch.zeros(2)}, {"kind": "model"})


def of_another_network(path: Path) -> None:
    torch.save({"time_embed.0.weight": torch.zeros(2)}, path)


def a_whole_module(path: Path) -> None:
    torch.save(nn.Linear(1, 1), path)


def a_truncated_program(path: Path) -> None:
    whole = scripted(StyleGANs(), path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def a_damaged_program(path: Path) -> None:
    program = StyleGANs()
    whole = bytearray(scripted(program, path).read_bytes())
    whole[whole.index(program.output.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("a.pt", None, "does not exist: name a TorchScript file"),
        ("a.pt", Path.mkdir, "is not a file: name a TorchScript file"),
        ("a.pt", lambda path: path.write_bytes(b""), "is damaged or not a PyTorch checkpoint"),
        ("a.pt", lambda path: path.write_text("<!DOCTYPE html>"), "is a web page"),
        ("a.pth", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "is a Git LFS pointer"),
        ("a.safetensors", a_checkpoint, "is a safetensors file, which holds no extractor: name a TorchScript file"),
        ("a.pt", a_checkpoint, "is a safetensors file, which holds no extractor"),
        ("a.pth", of_another_network, "has the weights of another network ('time_embed.0.weight'): name a TorchScript"),
        ("a.pth", a_whole_module, "holds more than tensors"),
        ("a.pt", a_truncated_program, "is damaged or not a PyTorch checkpoint"),
        ("a.pt", a_damaged_program, "does not have its checksum; copy it again"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_extractor_is_refused(
    tmp_path: Path, name: str, write: Callable[[Path], object] | None, said: str
) -> None:
    path = tmp_path / name
    if write is not None:
        write(path)
    assert said in refusal(lambda: open_extractor(path, trust=True))


def test_a_program_that_does_not_load_is_refused_without_a_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **kwargs: object) -> None:
        logging.getLogger("torch.export").warning("a traceback")
        raise RuntimeError("version 99\nand a traceback")

    monkeypatch.setattr(torch.jit, "load", load)
    path = scripted(Means(), tmp_path / "means.pt")
    said = refusal(lambda: open_extractor(path, trust=True))
    assert "cannot be loaded (version 99): it may be damaged, or of another version of PyTorch" in said
    assert not caplog.records
    logging.getLogger("torch.export").warning("heard again")
    assert caplog.records
