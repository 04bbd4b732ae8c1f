"""LMDB's files: what its own library wrote is read as it reads it, and nothing that a damaged one says is believed."""

import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from fastdiff.data.lmdb_file import DamagedDatabase, Database

from ..support import refusal


def written(folder: Path, fill: Callable[[lmdb.Environment], None], **options: object) -> Path:
    with lmdb.open(str(folder), map_size=2**24, **options) as environment:
        fill(environment)
    return folder / "data.mdb"


def put(environment: lmdb.Environment, values: dict[bytes, bytes]) -> None:
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


def some(count: int, longest: int, seed: int = 0) -> dict[bytes, bytes]:
    """Values of all lengths up to ``longest``, of which long ones have pages of their own."""
    rng = random.Random(seed)
    keys = rng.sample(range(10**6), count)
    return {b"%d" % key + b"k" * rng.randrange(60): rng.randbytes(rng.randrange(longest)) for key in keys}


def by_lmdb(path: Path) -> list[bytes]:
    with (
        lmdb.open(str(path.parent), readonly=True, lock=False) as environment,
        environment.begin() as transaction,
        transaction.cursor() as cursor,
    ):
        return [bytes(value) for value in cursor.iternext(keys=False)]


def read(path: Path) -> list[bytes]:
    database = Database(path)
    try:
        values = list(database.values())
        assert len(values) == len(database)
        return values
    finally:
        database.close()


def changed(environment: lmdb.Environment) -> None:
    """Freed pages and two transactions, each of which has a meta page."""
    put(environment, some(3000, 100))
    put(environment, some(100, 9000, seed=1))
    with environment.begin(write=True) as transaction:
        for key in [*some(3000, 100)][::2]:
            transaction.delete(key)


@pytest.mark.parametrize(
    "fill",
    [
        lambda environment: None,
        lambda environment: put(environment, {b"a": b""}),
        lambda environment: put(
            environment, {b"a": b"x" * 3 * 4096, b"b": b"y" * (4096 - 16), b"c": b"z" * (4096 - 15)}
        ),
        lambda environment: put(environment, some(40, 5000)),
        lambda environment: put(environment, some(6000, 200)),
        changed,
    ],
    ids=["empty", "one", "long", "short and long", "three levels", "changed"],
)
def test_what_lmdb_wrote(tmp_path: Path, fill: Callable[[lmdb.Environment], None]) -> None:
    path = written(tmp_path / "db", fill)
    assert read(path) == by_lmdb(path)


def test_nothing_is_written(tmp_path: Path) -> None:
    path = written(tmp_path / "db", lambda environment: put(environment, some(10, 100)))
    (tmp_path / "db" / "lock.mdb").unlink()
    before = path.read_bytes()
    read(path)
    assert (os.listdir(tmp_path / "db"), path.read_bytes()) == (["data.mdb"], before)


def test_other_kinds_of_databases(tmp_path: Path) -> None:
    def several(environment: lmdb.Environment) -> None:
        put_in = environment.open_db(b"inner")
        with environment.begin(write=True) as transaction:
            transaction.put(b"a", b"b", db=put_in)

    path = written(tmp_path / "several", several, max_dbs=2)
    assert refusal(lambda: read(path)) == "it holds several databases, or several values of a key"
    path = written(tmp_path / "numbers", lambda environment: put(environment, {b"a": b"b"}))
    content = bytearray(path.read_bytes())
    for page in (0, 4096):
        content[page + 16 + 24 + 48 + 4] |= 8  # the flag of integer keys
    path.write_bytes(content)
    assert refusal(lambda: read(path)) == "its keys are of another kind than LSUN's"


def test_a_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    path = written(tmp_path / "db", lambda environment: put(environment, some(30, 4000)))
    content = path.read_bytes()
    for length in (*range(0, 300, 7), *range(300, len(content), 997), len(content) - 1):
        path.write_bytes(content[:length])
        refusal(lambda: read(path))


def test_damage_anywhere(tmp_path: Path) -> None:
    """As many values as before, or a refusal: no other error, no endless walk, little memory."""
    path = written(tmp_path / "db", lambda environment: put(environment, some(60, 3000)))
    content, rng = path.read_bytes(), random.Random(0)
    count, damaged = len(read(path)), 0
    tracemalloc.start()
    for _ in range(600):
        other = bytearray(content)
        page = rng.randrange(len(content) // 4096) * 4096
        at = page + rng.randrange(120 if rng.random() < 0.8 else 4096)
        size = rng.choice((1, 2, 4, 8))
        other[at : at + size] = rng.choice((rng.randbytes(size), b"\xff" * size, bytes(size)))
        path.write_bytes(other[: len(content)])
        try:
            assert len(read(path)) == count
        except DamagedDatabase:
            damaged += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert damaged > 50
    assert peak < 2**24


def one_leaf(tmp_path: Path) -> tuple[Path, bytearray, int, int]:
    """A file with one leaf and two long values, and the offsets of the leaf and of its first node."""
    path = written(tmp_path / "db", lambda environment: put(environment, {b"a": b"x" * 9000, b"b": b"y" * 9000}))
    content = bytearray(path.read_bytes())
    meta = max((0, 4096), key=lambda page: struct.unpack_from("<Q", content, page + 16 + 128)[0])
    leaf = struct.unpack_from("<Q", content, meta + 16 + 24 + 48 + 40)[0] * 4096
    return path, content, leaf, leaf + struct.unpack_from("<H", content, leaf + 16)[0]


@pytest.mark.parametrize(
    ("offset", "form", "value", "said"),
    [
        (0, "<I", 10**9, "it has only"),  # the size of the long value
        (0, "<I", 13_000, "is longer than its pages"),
        (9, "<Q", 2**40, r"a page 1,099,511,627,776 is not there"),
        (9, "<Q", 1, r"a page 1 is not there"),
        (6, "<H", 60_000, "is damaged"),  # of the key
        (4, "<H", 7, "several databases"),
    ],
)
def test_a_node_that_leads_elsewhere(tmp_path: Path, offset: int, form: str, value: int, said: str) -> None:
    path, content, _, node = one_leaf(tmp_path)
    struct.pack_into(form, content, node + offset, value)
    path.write_bytes(content)
    refusal(lambda: read(path), said)


def test_pages_in_a_circle(tmp_path: Path) -> None:
    path = written(tmp_path / "db", lambda environment: put(environment, some(200, 100)))
    content = bytearray(path.read_bytes())
    meta = max((0, 4096), key=lambda page: struct.unpack_from("<Q", content, page + 16 + 128)[0])
    tree = meta + 16 + 24 + 48
    depth, root = struct.unpack_from("<H", content, tree + 6)[0], struct.unpack_from("<Q", content, tree + 40)[0]
    assert depth == 2
    for page in (0, 4096):
        struct.pack_into("<H", content, page + 16 + 24 + 48 + 6, 60)  # so deep
    at = root * 4096
    for place in struct.unpack_from(f"<{(struct.unpack_from('<H', content, at + 12)[0] - 16) // 2}H", content, at + 16):
        struct.pack_into("<HHH", content, at + place, root & 0xFFFF, root >> 16, 0)  # and every child is the root
    path.write_bytes(content)
    refusal(lambda: read(path), "its pages form a circle")


def test_keys_out_of_order(tmp_path: Path) -> None:
    path, content, leaf, _ = one_leaf(tmp_path)
    first, second = struct.unpack_from("<HH", content, leaf + 16)
    struct.pack_into("<HH", content, leaf + 16, second, first)
    path.write_bytes(content)
    refusal(lambda: read(path), "keys of page .* are out of order")
