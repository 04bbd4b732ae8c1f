"""``fastdiff data``: unpack archives into folders of images, check a folder, pack it into one file."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.help import Paneled
from fastdiff.cli.options import DebugFlag, path_argument, path_option
from fastdiff.config import DataConfig, ImagesConfig, Labels

if TYPE_CHECKING:
    from fastdiff.data.survey import Survey
    from fastdiff.data.threads import Progress

app = typer.Typer(
    help="Prepare images for training: unpack archives, check a folder, pack it into one file.",
    rich_markup_mode=None,
)


Out = Annotated[Path, path_argument(help="Folder to create.")]
_HELP = {field.name: field.metadata["help"] for field in fields(ImagesConfig)}
LabelsFlag = Annotated[Labels | None, typer.Option(help=_HELP["labels"].partition(";")[0] + ". [default: auto]")]
LabelFileFlag = Annotated[Path | None, path_option(help=_HELP["label_file"])]
MaxPixelsFlag = Annotated[int | None, typer.Option(min=1, help=_HELP["max_pixels"])]
WindowFlag = Annotated[str | None, typer.Option(metavar="LOW,HIGH", help=_HELP["window"])]
_CLASSES, _UNREADABLE = 20, 10


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(cls=Paneled)
def cifar10(
    source: Annotated[
        Path,
        path_argument(metavar="SRC", help="cifar-10-python.tar.gz or -binary, or its unpacked folder."),
    ],
    out: Out,
    debug: DebugFlag = False,
) -> None:
    """Unpack CIFAR-10's archive into OUT/cifar_train and OUT/cifar_test."""
    from fastdiff.data.cifar10 import CLASSES, prepare_cifar10

    with _bar("images") as progress:
        count = prepare_cifar10(source, out, progress)
    typer.echo(f"{count:,} images in {len(CLASSES)} classes in {out}")
    _go_on(out / "cifar_train", 32, "--class-cond")


@app.command(cls=Paneled)
def lsun(
    source: Annotated[
        Path,
        path_argument(metavar="SRC", help="A folder such as bedroom_train_lmdb, or its zip."),
    ],
    out: Out,
    image_size: Annotated[int, typer.Option(min=1, max=4096, help="Side of the stored squares in pixels.")] = 256,
    prefix: Annotated[str, typer.Option(help="Prefix of the file names.")] = "bedroom",
    limit: Annotated[int | None, typer.Option(min=1, help="Take only this many images, the first ones.")] = None,
    debug: DebugFlag = False,
) -> None:
    """Make a folder of square images from an LSUN database."""
    from fastdiff.data.lsun import prepare_lsun

    with _bar("images") as progress:
        count, unreadable = prepare_lsun(source, out, image_size, prefix, limit, progress)
    typer.echo(f"{count:,} images in {out}" + (f", {unreadable:,} could not be read" if unreadable else ""))
    _go_on(out, image_size)


@app.command(cls=Paneled)
def imagenet(
    source: Annotated[
        Path,
        path_argument(
            metavar="SRC",
            help="ILSVRC2012_img_train.tar, a folder of its class tars, or any tar or zip of images.",
        ),
    ],
    out: Out,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Store PNG files of this size instead of the original files.")
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Make a folder of images, with a sub-folder for each class, from ImageNet's archives."""
    from fastdiff.data.imagenet import prepare_imagenet

    with _bar("MiB", unit=2**20) as progress:
        found = prepare_imagenet(source, out, image_size, progress)
    reasons = "".join(f", left out {count:,} ({reason})" for reason, count in found.left_out.items())
    typer.echo(f"{found.images:,} images in {found.folders:,} sub-folders in {out}{reasons}")
    _go_on(out, image_size or 64, *(("--class-cond", "--labels", "folder") if found.folders > 1 else ()))


@app.command(cls=Paneled)
def check(
    path: Annotated[Path, path_argument(metavar="DIR", help="Folder of images, or a .zip or .npz of them.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Image size of the model; by default 64, or that of the .npz.")
    ] = None,
    labels: LabelsFlag = None,
    label_file: LabelFileFlag = None,
    max_pixels: MaxPixelsFlag = None,
    window: WindowFlag = None,
    sheet: Annotated[
        Path | None,
        path_option(metavar="FILE", help="Draw up to 100 images as the model sees them into this .png file."),
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Check every image of a data set: report counts and sizes, unreadable files, and warnings."""
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ValueError(f"sheet {sheet} does not end in .png: name another file")
    from fastdiff.data.survey import survey
    from fastdiff.runtime.files import whole

    # opened first: a sheet that cannot be written fails before any image is read
    with _bar("images") as progress, nullcontext() if sheet is None else whole(sheet) as file:
        found = survey(_images(path, labels, label_file, max_pixels, window), image_size, progress)
        if file is not None:
            from fastdiff.sampling.output import save_grid

            save_grid(file, found.shown, names=found.captions)
    _print_table(path, found)
    for note in found.notes:
        typer.echo(note)
    for doubt in found.doubts:
        typer.echo(f"warning: {path} has {doubt}", err=True)
    if sheet is not None:
        typer.echo(f"drew {len(found.shown)} images in {sheet}")


@app.command(cls=Paneled)
def pack(
    source: Annotated[Path, path_argument(metavar="DIR", help="Folder of images.")],
    out: Annotated[
        Path,
        path_argument(help="File to write: a .zip of the image files, or an .npz of their pixels at one size."),
    ],
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images in an .npz, in pixels.")] = None,
    labels: LabelsFlag = None,
    label_file: LabelFileFlag = None,
    max_pixels: MaxPixelsFlag = None,
    window: WindowFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Pack a folder of images into one file that fastdiff train --data-dir reads directly."""
    kind = out.suffix.lower()
    if kind not in (".zip", ".npz"):
        raise ValueError(f"{out} must end in .zip, for the image files, or in .npz, for pixels of one size")
    if kind == ".npz" and image_size is None:
        raise ValueError(f"{out} holds pixels of one size: say which with --image-size")
    if kind == ".zip" and (image_size or labels or label_file or max_pixels or window):
        raise ValueError(
            "image_size, labels, label_file, max_pixels and window are chosen when a .zip is trained on: leave them "
            "out, or pack an .npz"
        )
    from fastdiff.data.packing import pack_npz, pack_zip

    notes: tuple[str, ...] = ()

    with _bar("images") as progress:
        if image_size is None or kind == ".zip":
            told = f"{pack_zip(source, out, progress):,} files"
        else:
            packed = pack_npz(_images(source, labels, label_file, max_pixels, window), out, image_size, progress)
            told, notes = packed.preflight.line(), packed.notes
    for note in notes:
        typer.echo(note)
    typer.echo(f"{out}: {told}, {out.stat().st_size / 2**20:,.1f} MiB")
    _go_on(out, image_size or 64)


def _images(
    path: Path, labels: Labels | None, label_file: Path | None, max_pixels: int | None, window: str | None
) -> DataConfig:
    """The images at ``path``, read as the flags say; without --labels as the files suggest."""
    given = {"labels": labels, "label_file": label_file and str(label_file), "max_pixels": max_pixels, "window": window}
    flags = {name: value for name, value in given.items() if value is not None}
    if not label_file:
        flags.setdefault("labels", Labels.AUTO)
    return DataConfig.from_flags({"data_dir": str(path), **flags})


@contextmanager
def _bar(what: str, unit: int = 1) -> "Iterator[Progress]":
    """A progress bar on a terminal. SIGTERM and SIGHUP leave the block as Ctrl-C does, so that cleanup runs."""
    from fastdiff.cli.display import Display
    from fastdiff.runtime.signals import signals_as_exceptions

    with signals_as_exceptions(), Display() as display:
        yield lambda done, total: display.advance(what, done // unit, total // unit)


def _go_on(folder: Path, image_size: int, *flags: str) -> None:
    command = ["fastdiff", "train", "--data-dir", str(folder), "--image-size", str(image_size), *flags]
    typer.echo(f"train with: {shlex.join(command)}")


def _print_table(path: Path, found: "Survey") -> None:
    from rich.console import Console
    from rich.table import Table

    from fastdiff.runtime.words import printable

    table = Table(title=printable(str(path)), show_header=False, title_justify="left")
    preflight = found.preflight
    table.add_row("images", f"{sum(preflight.counts.values()):,}")
    kinds = sorted(preflight.counts.items(), key=lambda item: (-item[1], item[0]))
    table.add_row("kinds", _lines([f"{count:,} {kind}" for kind, count in kinds], len(kinds)))
    (width, height), (wide, high) = preflight.smallest, preflight.largest
    table.add_row("sizes", f"{width}x{height} to {wide}x{high}, cut to {found.image_size}x{found.image_size}")
    if found.class_counts:
        counts = [f"{count:,} {name}" for name, count in found.class_counts.items()]
        table.add_row(f"{len(counts):,} {'class' if len(counts) == 1 else 'classes'}", _lines(counts, _CLASSES))
    if found.unreadable:
        told = [f"{item.name} ({item.reason})" for item in found.unreadable]
        table.add_row(f"{len(told):,} unreadable", _lines(told, _UNREADABLE))
    if preflight.left_out:
        told = [f"{item.name} ({item.reason})" for item in preflight.left_out]
        table.add_row(f"{len(told):,} left out", _lines(told, _UNREADABLE))
    Console(highlight=False, markup=False, emoji=False).print(table)


def _lines(texts: Sequence[str], most: int) -> str:
    from fastdiff.runtime.words import printable

    more = [f"and {len(texts) - most:,} more"] if len(texts) > most else []
    return "\n".join([printable(text) for text in texts[:most]] + more)
