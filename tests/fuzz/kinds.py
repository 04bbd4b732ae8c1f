"""What is damaged, the command that reads it, and when its result is right."""

import io
import json
import pickle
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from fastdiff import load_checkpoint
from fastdiff.checkpoint import save_classifier
from fastdiff.cli.app import main
from fastdiff.data import cifar10
from fastdiff.data.shapes import write_shapes
from fastdiff.sampling.job import Job

from ..cli.support import PLAIN, SHORT, TINY
from ..evaluation.colours import pictures, program
from ..sampling.support import CLASSES, PROCESS, UPPER, classifier_of, saved
from .mutations import mutated, mutated_text

Damage = Callable[[bytes, Random], bytes]

TEXT = (".json", ".jsonl", ".csv", ".txt", ".toml", ".yaml")


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    ``make`` writes sound inputs into a folder; ``names`` are the files of it that are damaged, one at a time (a glob);
    ``words`` is the command, run in the folder; ``wrong`` says, after exit status 0 with this output, what is wrong
    with the result in the folder, compared with the folder of the undamaged run, or returns an empty text.
    """

    make: Callable[[Path], None]
    names: str
    words: Sequence[str]
    wrong: Callable[[Path, Path, str], str] = field(default=lambda found, sound, out: "")

    def damage(self, folder: Path, random: Random) -> str:
        """Damage one file; returns its name."""
        path = random.choice(sorted(p for p in folder.glob(self.names) if p.is_file()))
        change: Damage = mutated_text if path.suffix in TEXT else mutated
        before = path.read_bytes()
        after = change(before, random)
        path.write_bytes(after if after != before else before[:-1])
        return str(path.relative_to(folder))


def run(words: Sequence[str]) -> tuple[int, str, str]:
    """``fastdiff`` with these words in this process: exit status, stdout and stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["fastdiff", *words]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, out.getvalue(), err.getvalue()


def _sound(*words: object) -> None:
    status, _, err = run([str(word) for word in words])
    assert status == 0, err


def _images(folder: Path) -> None:
    write_shapes(folder / "images", 2, 16, seed=0)
    picture = Image.open(folder / "images" / "circle_00000.png")
    for suffix, how in ((".jpg", {}), (".gif", {}), (".webp", {"lossless": True}), (".bmp", {}), (".tif", {})):
        picture.save(folder / "images" / f"more_1{suffix}", **how)
    picture.convert("RGBA").save(folder / "images" / "alpha_1.png")
    picture.save(folder / "images" / "progressive_1.jpeg", progressive=True)


def _packed(name: str, *more: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_shapes(folder / "shapes", 4, 16, seed=0)
        _sound("data", "pack", folder / "shapes", folder / name, *more)
        shutil.rmtree(folder / "shapes")

    return make


def _checkpoint(folder: Path) -> None:
    saved(folder / "model.safetensors", **CLASSES)


def _state_dict(folder: Path) -> None:
    _checkpoint(folder)
    torch.save(load_checkpoint(folder / "model.safetensors").model.state_dict(), folder / "model.pt")
    (folder / "model.safetensors").unlink()


def _guided(folder: Path) -> None:
    saved(folder / "model.safetensors")
    classifier = classifier_of(3)
    about = {"config": classifier.config, "diffusion_config": PROCESS, "class_names": CLASSES["class_names"]}
    save_classifier(folder / "classifier.safetensors", classifier, **about)


def _upsampler(folder: Path) -> None:
    saved(folder / "upper.safetensors", **UPPER)
    write_shapes(folder / "small", 3, 8, seed=0)


def _run(folder: Path) -> None:
    write_shapes(folder / "shapes", 8, 8, seed=0)
    flags = ("--data-dir", folder / "shapes", "--run-dir", folder / "run", "--save-interval", 1, "--class-cond")
    _sound("train", *flags, *TINY, *SHORT, "--steps", 2)


def _unfinished(folder: Path) -> None:
    _checkpoint(folder)
    with patch.object(Job, "_write", side_effect=OSError("no room")):
        status, _, err = run([str(word) for word in _draw(folder / "model.safetensors", folder / "s.npz", 4, 2)])
    assert (status, "no room" in err) == (2, True), err


def _draw(model: object, out: object, count: int = 1, batch: int = 1) -> tuple[object, ...]:
    how = ("--steps", 2, "--num-samples", count, "--batch-size", batch, "--out", out)
    return ("sample", model, *how, *PLAIN)


def _cifar_batches(binary: bool = False) -> dict[str, bytes]:
    """The six files of CIFAR-10, of two images each."""
    cifar10._ROWS = 2  # of 10,000: a batch of the archive is small
    pixels = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    batch = {b"data": pixels, b"labels": [3, 5], b"batch_label": b"one", b"filenames": [b"a.png", b"b.png"]}
    data = pickle.dumps(batch, protocol=2)
    if binary:
        data = b"".join(bytes([label]) + row.tobytes() for label, row in zip((3, 5), pixels, strict=True))
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {f"{name}.bin" if binary else name: data for name in names}


def _cifar(name: str, mode: str = "") -> Callable[[Path], None]:
    """The archive of this name, written in this mode of tarfile, or without one the folder that it unpacks to."""

    def make(folder: Path) -> None:
        files = _cifar_batches(binary="binary" in name)
        if mode:
            _tar(folder / name, {f"cifar-10-batches-py/{file}": data for file, data in files.items()}, mode)
            return
        (folder / name).mkdir()
        for file, data in files.items():
            (folder / name / file).write_bytes(data)

    return make


def _tar(path: Path, files: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _imagenet(name: str, mode: str) -> Callable[[Path], None]:
    """A tar with two classes, as tars in it, written in this mode of tarfile; or a zip."""

    def make(folder: Path) -> None:
        write_shapes(folder / "shapes", 2, 16, seed=0)
        images = {path.name: path.read_bytes() for path in sorted((folder / "shapes").iterdir())}
        shutil.rmtree(folder / "shapes")
        if not mode:
            with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
                for file, data in images.items():
                    archive.writestr(f"some/{file}", data)
            return
        _tar(folder / "class", images, "w")
        inner = (folder / "class").read_bytes()
        (folder / "class").unlink()
        _tar(
            folder / name,
            {"n01440764.tar": inner, "n01443537.tar": inner, "more/a.png": next(iter(images.values()))},
            mode,
        )

    return make


def _lsun(folder: Path) -> None:
    import lmdb

    with lmdb.open(str(folder / "lsun"), map_size=2**20) as database, database.begin(write=True) as writing:
        for i in range(3):
            file = io.BytesIO()
            Image.new("RGB", (20, 16), (40 * i, 0, 0)).save(file, "WEBP")
            writing.put(f"{i:040d}".encode(), file.getvalue())


def _zipped_lsun(folder: Path) -> None:
    _lsun(folder)
    with zipfile.ZipFile(folder / "lsun.zip", "w") as archive:
        archive.write(folder / "lsun" / "data.mdb", "lsun/data.mdb")
    shutil.rmtree(folder / "lsun")


def _labelled(name: str, text: str) -> Callable[[Path], None]:
    """Eight images and a label file."""

    def make(folder: Path) -> None:
        write_shapes(folder / "images", 8, 16, seed=0)
        for i, path in enumerate(sorted((folder / "images").iterdir())):
            path.rename(path.with_name(f"{i}.png"))
        (folder / "images" / name).write_text(text)

    return make


_ROWS = [(f"{i}.png", "cat" if i % 2 else "dog") for i in range(8)]
_LABELS = {
    "dataset.json": json.dumps({"labels": [[file, int(name == "cat")] for file, name in _ROWS]}),
    "metadata.jsonl": "".join(json.dumps({"file_name": file, "label": name}) + "\n" for file, name in _ROWS),
    "metadata.csv": "".join(f"{file},{name}\n" for file, name in (("file_name", "label"), *_ROWS)),
    "hot.csv": "file,cat,dog\n" + "".join(f"{f},{int(n == 'cat')},{int(n == 'dog')}\n" for f, n in _ROWS),
    "names.json": json.dumps({file: {"class_name": name, "note": [1, None]} for file, name in _ROWS}),
}


def _diffusers(folder: Path) -> None:
    saved(folder / "model.safetensors", rescale_timesteps=False)
    _sound("convert", folder / "model.safetensors", folder / "pipeline")
    (folder / "model.safetensors").unlink()


def _statistics(folder: Path) -> None:
    """Samples, an extractor that takes no time, statistics of other images, and a record of a run."""
    program(folder / "net.pt")
    np.savez(folder / "samples.npz", pictures(40))
    np.savez(folder / "other.npz", pictures(60, seed=1))
    _sound(*_fid("samples.npz", "other.npz", folder), "--save-stats", folder / "stats.npz")
    shutil.rmtree(folder / "evaluation")
    (folder / "other.npz").unlink()


def _fid(samples: str, reference: str, folder: Path = Path()) -> tuple[object, ...]:
    how = ("--extractor", folder / "net.pt", "--extractor-size", 8, "--trust", "--out-dir", folder / "evaluation")
    return ("evaluate", "fid", folder / samples, folder / reference, *how, "--device", "cpu")


def _measured(folder: Path) -> None:
    _run(folder)
    about = {"checkpoint": "ema_0.9999_000002.safetensors", "step": 2, "ema_rate": 0.9999, "figures": {"fd": 2.5}}
    names = {"names": {"fd": "FD-x (n=4, x)"}, "samples": {"count": 4}, "extractor": {"name": "x"}}
    (folder / "run" / "evaluation").mkdir()
    (folder / "run" / "evaluation" / "metrics.jsonl").write_text(json.dumps(about | names) + "\n")
    (folder / "run" / "best.json").write_text(json.dumps(about | {"metric": "fd", "name": "FD-x", "value": 2.5}))
    shutil.rmtree(folder / "shapes")
    for path in (folder / "run").glob("*.safetensors"):
        path.unlink()  # the report reads none, and copying them takes time


def _settings(folder: Path) -> None:
    _checkpoint(folder)
    (folder / "a.toml").write_text(
        'sampler = "ddim"\neta = 0.5\nseed = 3\nclip-denoised = false\n[more]\nclass = "cat"\n'
    )
    (folder / "b.yaml").write_text("sampler: ddim\neta: 0.5\nseed: 3\nclip_denoised: false\nclass: [cat, dog]\n")
    (folder / "c.json").write_text('{"sampler": "ddim", "eta": 0.5, "more": {"seed": 3, "class": "cat"}}')


def _other_images(found: Path, sound: Path, out: str) -> str:
    """What is drawn is what the sound input draws."""
    with np.load(found / "s.npz") as ours, np.load(sound / "s.npz") as theirs:
        same = all(np.array_equal(ours[name], theirs[name]) for name in ("arr_0", "arr_1") if name in theirs)
        return "" if same and ours.files == theirs.files else "other images were drawn without a word"


def _other_weights(found: Path, sound: Path, out: str) -> str:
    """A resumed run ends with the weights of the sound one, or says what changed."""
    ours, theirs = (load_checkpoint(folder / "run", ema_rate=0).model.state_dict() for folder in (found, sound))
    if ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours):
        return ""
    told = out.replace("changed: steps 2 becomes 3", "")  # which the command itself asks for
    return "" if "warning" in told or "changed" in told else "other weights were trained without a word"


def _fewer_counted(found: Path, sound: Path, out: str) -> str:
    """As many images are counted as there are in the sound input, or what is left out is told."""
    names = {name for place in (sound, sound / "images") if place.is_dir() for name in _images_of(place)}
    counted = re.search(r"images\W+([\d,]+)", out)
    told = any(word in out for word in ("left out", "unreadable"))
    return "" if told or (counted and int(counted[1].replace(",", "")) >= len(names)) else f"fewer images: {out}"


def _images_of(place: Path) -> list[str]:
    """The names of the images in a folder, or in the zip in it."""
    zips = [name for path in place.glob("*.zip") for name in zipfile.ZipFile(path).namelist()]
    return zips or [path.name for path in place.iterdir() if path.suffix not in TEXT and path.is_file()]


def _other_number(found: Path, sound: Path, out: str) -> str:
    """As many images are unpacked: nothing else shows damage in a file without checksums."""
    ours, theirs = (len(list((folder / "out").rglob("*.png"))) for folder in (found, sound))
    return "" if ours == theirs else f"{theirs - ours} images are missing without a word"


def _other_figures(found: Path, sound: Path, out: str) -> str:
    """The figures are those of the sound statistics, or a line says what is unusual about them."""
    ours, theirs = (
        json.loads((folder / "evaluation" / "metrics.jsonl").read_text())["figures"] for folder in (found, sound)
    )
    return "" if ours == theirs or "warning" in out else "other figures without a word"


def _fewer_images(found: Path, sound: Path, out: str) -> str:
    """What is unpacked is what the sound archive holds, or the difference is told."""
    ours, theirs = (
        {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
        for folder in (found, sound)
    )
    told = any(word in out for word in ("skip", "left out", "damaged", "warning", "missing", "could not be read"))
    return "" if told or set(ours) >= set(theirs) else f"{len(theirs) - len(ours)} images are missing without a word"


_UNSAID = ("--image-size", "8", "--num-heads", "4", "--diffusion-steps", "20", "--noise-schedule", "cosine")
_UNSAID += ("--predict-xstart",)
_SETTINGS = (*map(str, _draw("model.safetensors", "s.npz")), "--overwrite")
_RESUME = ("train", "--run-dir", "run", "--resume", "--steps", "3", *SHORT[2:])

KINDS: dict[str, Kind] = {
    "image": Kind(_images, "images/*", ("data", "check", "images"), _fewer_counted),
    "npz": Kind(_packed("a.npz", "--image-size", "16"), "*", ("data", "check", "a.npz")),
    "zip": Kind(_packed("a.zip"), "*", ("data", "check", "a.zip"), _fewer_counted),
    "safetensors": Kind(_checkpoint, "*", tuple(map(str, _draw("model.safetensors", "s.npz"))), _other_images),
    "pt": Kind(_state_dict, "*", (*map(str, _draw("model.pt", "s.npz")), *_UNSAID), _other_images),
    "classifier": Kind(
        _guided,
        "classifier*",
        (*map(str, _draw("model.safetensors", "s.npz")), "--classifier", "classifier.safetensors"),
        _other_images,
    ),
    "base-samples": Kind(
        _upsampler, "small/*", (*map(str, _draw("upper.safetensors", "s.npz", 3)), "--base-samples", "small")
    ),
    "run": Kind(_run, "run/*", _RESUME, _other_weights),
    "run-config": Kind(_run, "run/config.json", _RESUME, _other_weights),
    "job": Kind(
        _unfinished, "s.npz.parts/*", tuple(map(str, _draw("model.safetensors", "s.npz", 4, 2))), _other_images
    ),
    "cifar": Kind(_cifar("cifar.tar.gz", "w:gz"), "*", ("data", "cifar10", "cifar.tar.gz", "out"), _fewer_images),
    "cifar-tar": Kind(_cifar("cifar.tar", "w"), "*", ("data", "cifar10", "cifar.tar", "out"), _other_number),
    "cifar-binary": Kind(_cifar("binary.tar", "w"), "*", ("data", "cifar10", "binary.tar", "out"), _other_number),
    "cifar-folder": Kind(_cifar("cifar"), "cifar/*", ("data", "cifar10", "cifar", "out"), _other_number),
    "imagenet": Kind(_imagenet("a.tar", "w"), "*", ("data", "imagenet", "a.tar", "out"), _fewer_images),
    "imagenet-gz": Kind(_imagenet("a.tar.gz", "w:gz"), "*", ("data", "imagenet", "a.tar.gz", "out"), _fewer_images),
    "imagenet-zip": Kind(_imagenet("a.zip", ""), "*", ("data", "imagenet", "a.zip", "out"), _fewer_images),
    "imagenet-small": Kind(
        _imagenet("a.tar", "w"), "*", ("data", "imagenet", "a.tar", "out", "--image-size", "8"), _fewer_images
    ),
    "lsun": Kind(_lsun, "lsun/data.mdb", ("data", "lsun", "lsun", "out"), _fewer_images),
    "lsun-zip": Kind(_zipped_lsun, "*", ("data", "lsun", "lsun.zip", "out"), _fewer_images),
    "statistics": Kind(_statistics, "s*.npz", tuple(map(str, _fid("samples.npz", "stats.npz"))), _other_figures),
    "report": Kind(_measured, "run/**/*.json*", ("report", "run", "--out", "report.html")),
    "runs": Kind(_measured, "run/**/*.json*", ("runs", ".")),
    "diffusers": Kind(_diffusers, "pipeline/*/*", ("convert", "pipeline", "model.safetensors")),
    **{
        f"labels-{name}": Kind(
            _labelled(name, text),
            f"images/{name}",
            ("data", "check", "images", *(("--label-file", name) if name in ("hot.csv", "names.json") else ())),
            _fewer_counted,
        )
        for name, text in _LABELS.items()
    },
    **{
        f"config-{name.partition('.')[2]}": Kind(_settings, name, (*_SETTINGS, "--config", name))
        for name in ("a.toml", "b.yaml", "c.json")
    },
}
"""By name."""
