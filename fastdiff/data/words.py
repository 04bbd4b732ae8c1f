"""Names that others chose, as they can be shown and used, and what others' errors say."""

import re
from pathlib import Path


class ArchiveError(ValueError):
    """An archive cannot be used; the text says why, and the remedy."""


def printable(text: str) -> str:
    """File names may hold line breaks, terminal codes or bytes of another encoding."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def first_line(error: BaseException) -> str:
    """What an error says, for a line of ours."""
    said = printable(str(error).partition("\n")[0])[:100]
    return said or ("truncated" if isinstance(error, EOFError) else type(error).__name__)


def safe_name(archive: Path, name: str) -> str:
    """A member's name below the archive's root, with "/"; ArchiveError for one that leads elsewhere.

    That of the root itself, as a tar of "." has it, is empty.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or re.match("[A-Za-z]:", name):
        raise ArchiveError(
            f"{archive} holds {printable(name)}, a name that leads out of its folder: do not use it, or pack it again"
        )
    return "/".join(part for part in parts if part not in ("", "."))


def safe_file_name(archive: Path, name: str) -> str:
    """As safe_name, of a file, which must have one."""
    if not (safe := safe_name(archive, name)):
        raise ArchiveError(f"{archive} holds a file without a name: pack it again")
    return safe
