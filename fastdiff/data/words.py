"""Make untrusted names safe to show and to use, and quote the errors of other libraries."""

import re
from pathlib import Path


class ArchiveError(ValueError):
    """An archive cannot be used; the text says why, and the remedy."""


def printable(text: str) -> str:
    """Replace unprintable characters: file names may hold line breaks, terminal codes or bytes of another encoding."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to quote in another message."""
    said = printable(str(error).partition("\n")[0])[:100]
    return said or ("truncated" if isinstance(error, EOFError) else type(error).__name__)


def safe_name(archive: Path, name: str) -> str:
    """A member's name relative to the archive's root, with "/"; ArchiveError if it leads out of the root.

    The name of the root itself, which a tar of "." contains, is empty.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or re.match("[A-Za-z]:", name):
        raise ArchiveError(
            f"{archive} holds {printable(name)}, a name that leads out of its folder: do not use it, or pack it again"
        )
    return "/".join(part for part in parts if part not in ("", "."))


def safe_file_name(archive: Path, name: str) -> str:
    """Like safe_name, for a file, whose name must not be empty."""
    if not (safe := safe_name(archive, name)):
        raise ArchiveError(f"{archive} holds a file without a name: pack it again")
    return safe
