"""Changes to a file's bytes: what disks, transfers and hands do to them."""

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e308, -1e-9, 0.5)
ODD_VALUES: tuple[Any, ...] = (None, True, "", "x" * 300, "../..", "\x1b[31m", [], {}, [[]], *ODD_NUMBERS)


def mutated(data: bytes, random: Random) -> bytes:
    """The bytes after one to three changes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(_CHANGES)(data, random)
    return data


def mutated_text(data: bytes, random: Random) -> bytes:
    """JSON with one value changed, or a line of other text; sometimes its bytes."""
    if random.random() < 0.3:
        return mutated(data, random)
    try:
        document = json.loads(data)
    except (ValueError, UnicodeDecodeError):
        return _other_number(data, random)
    return json.dumps(_changed(document, random)).encode()


def _changed(value: Any, random: Random) -> Any:
    """The document with one entry, at any depth, replaced, removed or renamed."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        name = random.choice(list(value))
        match random.randrange(6):
            case 0:
                return {key: entry for key, entry in value.items() if key != name}
            case 1:
                return {(f"{key}x" if key == name else key): entry for key, entry in value.items()}
        return {key: (_changed(entry, random) if key == name else entry) for key, entry in value.items()}
    if isinstance(value, list) and value and random.random() < 0.7:
        at = random.randrange(len(value))
        return [*value[:at], _changed(value[at], random), *value[at + 1 :]]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.5:
        return random.choice((value + 1, value - 1, -value, 10 * value, value / 3, str(value)))
    return random.choice(ODD_VALUES)


def _other_number(data: bytes, random: Random) -> bytes:
    """The bytes with one of their numbers or words replaced."""
    found = list(re.finditer(rb"[\w.+-]+", data))
    if not found:
        return mutated(data, random)
    word = random.choice(found)
    new = str(random.choice(ODD_VALUES)).encode()
    return data[: word.start()] + new + data[word.end() :]


def _flipped(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _inserted(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice((1, 4, 100))) + data[at:]


def _removed(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + data[at + random.choice((1, 4, 100)) :]


def _zeroed(data: bytes, random: Random) -> bytes:
    at, length = random.randrange(len(data) + 1), random.choice((1, 8, 512))
    return data[:at] + bytes(min(length, len(data) - at)) + data[at + length :]


def _repeated(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    part = data[at : at + random.choice((4, 64, 1000))]
    return data[:at] + part + data[at:]


def _moved(data: bytes, random: Random) -> bytes:
    at, to, length = random.randrange(len(data) + 1), random.randrange(len(data) + 1), random.choice((4, 64))
    return data[:to] + data[at : at + length] + data[to + length :]


def _large_number(data: bytes, random: Random) -> bytes:
    """Four or eight bytes become a number that a header may hold."""
    size = random.choice((2, 4, 8))
    number = random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**16 - 1, 2**63)) % 2 ** (8 * size)
    at = random.randrange(len(data) + 1)
    return data[:at] + number.to_bytes(size, random.choice(("little", "big"))) + data[at + size :]


_CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(_flipped, _flipped, _flipped, _cut, _cut, _inserted, _removed),
    *(_zeroed, _repeated, _moved, _large_number, _large_number),
)
