"""Unpack ImageNet's archives, or any tar or zip of images, to a folder of image files."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from fastdiff.data.archives import Member, reading, safe_name, tar_in
from fastdiff.data.images import MAX_BYTES, UnreadableImage, load
from fastdiff.data.kinds import EXTENSIONS, START, extension, unread, unread_inside
from fastdiff.data.threads import Progress, in_order
from fastdiff.runtime.files import whole
from fastdiff.runtime.words import printable


@dataclass(frozen=True)
class Extracted:
    """The number of images unpacked, of the sub-folders that hold them, and of files left out by reason."""

    images: int
    folders: int
    left_out: dict[str, int]


def prepare_imagenet(
    source: Path, out: Path, image_size: int | None = None, on_progress: Progress | None = None
) -> Extracted:
    """Unpack the images of an archive into ``out``; a nested tar becomes a sub-folder with the tar's name.

    ``source`` is ILSVRC2012_img_train.tar, a folder of the class tars in it, or any tar or zip of images, which keep
    their folders. With ``image_size`` images are stored as PNG files of that size, cropped as for training, instead of
    their original bytes. ``on_progress(done, total)`` is called with the bytes of the current archive. Raises
    ValueError if ``archives.reading`` refuses an archive, if it holds no usable image, or if ``out`` is not empty.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be positive, not {image_size}")
    left_out: Counter[str] = Counter()
    images, folders = 0, set[str]()
    with whole(out) as folder:
        folder.mkdir()

        def unpacked() -> Iterator[Path]:
            for member in _members(source, on_progress):
                if any(part.startswith(".") for part in member.name.split("/")):
                    left_out["hidden"] += 1  # training skips hidden files, too
                elif extension(member.name) not in ("", *EXTENSIONS):
                    left_out[unread(member.name) or "not an image"] += 1
                elif member.size > MAX_BYTES:
                    left_out[f"over {MAX_BYTES:,} bytes"] += 1
                else:
                    path = folder / member.name
                    member.write(path)
                    if not extension(member.name) and (reason := _unread_inside(path)) is not None:
                        path.unlink()
                        left_out[reason] += 1
                    else:
                        yield path

        def finish(path: Path) -> tuple[Path, str | None]:
            """The image's path relative to the folder, and the reason why it cannot be used, or None."""
            inside = path.relative_to(folder)
            if image_size is None:
                return inside, None
            try:
                image = Image.fromarray(load(path, image_size))
            except UnreadableImage as error:
                return inside, error.reason
            finally:
                path.unlink()
            try:
                with path.with_suffix(".png").open("xb") as file:
                    image.save(file, "PNG")
            except FileExistsError:
                raise ValueError(f"{source} holds {printable(path.stem)} with two extensions: rename one") from None
            return inside, None

        with closing(in_order(finish, unpacked())) as results:
            for inside, reason in results:
                if reason is None:
                    images += 1
                    folders |= {inside.parts[0]} if len(inside.parts) > 1 else set()
                else:
                    left_out[reason] += 1
        if not images:
            raise ValueError(f"{source} holds no images that can be used")
    return Extracted(images, len(folders), dict(left_out))


def _unread_inside(path: Path) -> str | None:
    with path.open("rb") as file:
        return unread_inside(file.read(START))


def _members(source: Path, on_progress: Progress | None) -> Iterator[Member]:
    """The files of an archive or of a folder of archives; a nested tar becomes a folder with the tar's name."""
    if source.is_dir():
        tars = sorted(source.glob("*.tar"))
        if not tars:
            raise ValueError(f"{source} is a folder without .tar files: if it holds images, train on it directly")
        for tar in tars:
            with reading(tar, on_progress) as members:
                yield from _in_folder(tar.stem, members)
        return
    with reading(source, on_progress) as members:
        for member in members:
            if member.name.endswith(".tar"):
                yield from _in_folder(member.name.removesuffix(".tar"), tar_in(member))
            else:
                yield member


def _in_folder(name: str, members: Iterator[Member]) -> Iterator[Member]:
    return (replace(m, name=safe_name(m.archive, f"{name}/{m.name}")) for m in members)  # the tar may be called ..
