"""The values of an LMDB database, read without LMDB, whose library trusts the file: a damaged page ends the process.

The format is that of LMDB 0.9 (data version 1) for little-endian processors of 64 bits: two meta pages, the tree's
branch and leaf pages, and overflow pages, of which a value that is too long for a leaf has a run of its own.
"""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = struct.Struct("<QHHHH")  # number, -, flags, ends of the list of nodes and of the free space
_META = struct.Struct(
    "<II16xIHHQQQQQIHHQQQQQQQ"
)  # behind the header: magic, version, two trees, last page, transaction
_NODE = struct.Struct("<HHHH")  # size of the value or number of the page below (three parts), size of the key
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_IN_OVERFLOW = 1
_NO_PAGE = 2**64 - 1
_PAGE_SIZES = frozenset(2**i for i in range(9, 17))

_Meta = tuple[int, int, int, int, int, int]  # transaction, page size, last page, depth, entries, root


class DamagedDatabase(ValueError):
    """A file is not a sound database; the text says what is wrong with it."""


class Database:
    """An LMDB file, opened for reading: ``len`` is the number of its values. Nothing is written, not even a lock.

    Raises DamagedDatabase if it is none, shorter than it says, or has duplicate keys or several databases.
    """

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path)
        try:
            self._length = path.stat().st_size
            first = self._meta(0)
            newest = max(first, self._meta(first[1]))
            _, self._page_size, self._last, self._depth, self._entries, self._root = newest
            if (promised := (self._last + 1) * self._page_size) > self._length:
                raise DamagedDatabase(f"it has {self._length:,} of {promised:,} bytes")
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return self._entries

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def values(self) -> Iterator[bytes]:
        """Every value, in the order of the keys. Raises DamagedDatabase when it comes to a damaged page."""
        found, pages, before = 0, 0, None
        waiting = [] if self._root == _NO_PAGE else [(self._root, self._depth)]
        while waiting:
            number, depth = waiting.pop()
            if (pages := pages + 1) > self._last:
                raise DamagedDatabase("its pages form a circle")
            page = self._page(number, _LEAF if depth == 1 else _BRANCH)
            nodes = self._nodes(page)
            if depth > 1:
                waiting += [(low | middle << 16 | high << 32, depth - 1) for _, low, middle, high, _ in reversed(nodes)]
                continue
            for at, low, high, flags, key_size in nodes:
                key = page[at : at + key_size]
                if before is not None and key <= before:
                    raise DamagedDatabase(f"the keys of page {number} are out of order")
                before = key
                if (found := found + 1) > self._entries:
                    raise DamagedDatabase(f"more than {self._entries:,} values are found")
                yield self._value(page, at + key_size, low | high << 16, flags)
        if found != self._entries:
            raise DamagedDatabase(f"{found:,} of {self._entries:,} values are found")

    def _meta(self, offset: int) -> _Meta:
        header, content = self._read(offset, _HEADER.size), self._read(offset + _HEADER.size, _META.size)
        magic, version, page_size, *rest = _META.unpack(content)
        flags, depth, _, _, _, entries, root, last, transaction = rest[8:]
        if _HEADER.unpack(header)[2] & _META_PAGE == 0 or magic != _MAGIC:
            raise DamagedDatabase("its first page is none of LMDB")
        if version != _VERSION:
            raise DamagedDatabase(f"its format is version {version}, not {_VERSION}")
        if page_size not in _PAGE_SIZES or (root != _NO_PAGE and not 0 < depth < 2**6):
            raise DamagedDatabase("its first page is damaged")
        if flags:
            raise DamagedDatabase("its keys are of another kind than LSUN's")
        return transaction, page_size, last, depth, entries, root

    def _page(self, number: int, kind: int, size: int | None = None) -> bytes:
        """A page of this kind or, if it has a ``size``, so many bytes of a run of them."""
        if not 1 < number <= self._last:
            raise DamagedDatabase(f"a page {number:,} is not there")
        content = self._read(number * self._page_size, self._page_size if size is None else size)
        own, _, flags, _, _ = _HEADER.unpack_from(content)
        if own != number or not flags & kind:
            raise DamagedDatabase(f"page {number:,} is damaged")
        return content

    def _nodes(self, page: bytes) -> list[tuple[int, int, int, int, int]]:
        """The place of the key, the three numbers and the size of the key of each node."""
        number, _, _, lower, _ = _HEADER.unpack_from(page)
        count = (lower - _HEADER.size) // 2
        if not 0 < count <= (len(page) - _HEADER.size) // 2:
            raise DamagedDatabase(f"page {number:,} is damaged")
        found = []
        for at in struct.unpack_from(f"<{count}H", page, _HEADER.size):
            if not lower <= at <= len(page) - _NODE.size:
                raise DamagedDatabase(f"page {number:,} is damaged")
            node = _NODE.unpack_from(page, at)
            if at + _NODE.size + node[3] > len(page):
                raise DamagedDatabase(f"page {number:,} is damaged")
            found.append((at + _NODE.size, *node))
        return found

    def _value(self, page: bytes, at: int, size: int, flags: int) -> bytes:
        if flags & ~_IN_OVERFLOW:
            raise DamagedDatabase("it holds several databases, or several values of a key")
        here = 8 if flags else size
        if at + here > len(page):
            raise DamagedDatabase("a value goes beyond its page")
        if not flags:
            return page[at : at + size]
        (number,) = struct.unpack_from("<Q", page, at)
        content = self._page(number, _OVERFLOW, _HEADER.size + size)
        if _HEADER.size + size > struct.unpack_from("<I", content, 12)[0] * self._page_size:
            raise DamagedDatabase(f"the value at page {number:,} is longer than its pages")
        return content[_HEADER.size :]

    def _read(self, offset: int, size: int) -> bytes:
        if offset + size > self._length:
            raise DamagedDatabase(f"it has only {self._length:,} bytes")
        self._file.seek(offset)
        content = self._file.read(size)
        if len(content) != size:
            raise DamagedDatabase("it has become shorter")
        return content
