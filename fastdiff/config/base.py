"""The base of every configuration: type coercion, errors that name field and value, conversion to and from JSON."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, ClassVar, Self, get_args, get_origin


def option(default: Any, help: str, *, path: bool = False, panel: str = "", shown: Any = None) -> Any:
    """A dataclass field with its help text for the command line.

    ``path`` marks the path of a file or folder; ``panel`` is the part of the help that shows it, if not the class's;
    ``shown`` is the default of the flag, if the command line has another one than the field.
    """
    shown = default if shown is None else shown
    return field(default=default, metadata={"help": help, "path": path, "panel": panel, "shown": shown})


class Config:
    """Base class: coerces enums and numbers, names field and value in its errors, converts to and from JSON."""

    panel: ClassVar[str] = "Options"
    """The part of a command's help that shows the fields."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, f.name)
            kinds = get_args(f.type) or (f.type,)
            if isinstance(kinds[0], type) and issubclass(kinds[0], StrEnum):
                if get_origin(f.type) is tuple:
                    object.__setattr__(self, f.name, _members(kinds[0], f.name, value))
                elif value is not None or len(kinds) == 1:
                    object.__setattr__(self, f.name, _member(kinds[0], f.name, value))
            elif f.type is bool and not isinstance(value, bool):
                raise ValueError(f"{f.name} must be true or false, not {value!r}")
            elif f.type is str and not isinstance(value, str):
                raise ValueError(f"{f.name} must be text, not {value!r}")
            elif f.type in (int, float):
                object.__setattr__(self, f.name, number(f.type, f.name, value))
        self.check()

    def check(self) -> None:
        """Raise ValueError, naming field and value, if the fields are inconsistent."""

    def require(self, holds: bool, name: str, what: str) -> None:
        """Unless ``holds``, raise ValueError, which says that field ``name`` must be ``what``."""
        if not holds:
            raise ValueError(f"{name} must be {what}, not {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-serialisable dict."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v
            for f in fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict. Unknown names are a ValueError, missing ones take the default."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], base: Self | None = None) -> Self:
        """A configuration from the flags that are its fields; other fields come from ``base`` or the defaults."""
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        values = base.to_dict() if base is not None else {}
        return cls.from_dict(values | {name: value for name, value in flags.items() if name in names})


def _member(enum: type[StrEnum], name: str, value: Any) -> StrEnum:
    try:
        return enum(value)
    except ValueError:
        raise ValueError(f"{name} must be one of {', '.join(enum)}, not {value!r}") from None


def _members(enum: type[StrEnum], name: str, value: object) -> tuple[StrEnum, ...]:
    """Parse 'a,b' or a sequence of words into members, each once and in the order of ``enum``; one or more."""
    words = value.split(",") if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    found = [word.strip() for word in words if isinstance(word, str)]
    if not found or len(found) < len(words) or not set(found) <= set(enum):
        raise ValueError(f"{name} must be one or more of {','.join(enum)}, not {value!r}")
    return tuple(member for member in enum if member in found)


def number(kind: type, name: str, value: object) -> int | float:
    """``value`` as int or float; ValueError, naming the field, if it is not a number or not finite."""
    # NumPy's scalars are numbers, too
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        raise ValueError(f"{name} must be {'a whole number' if kind is int else 'a number'}, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value!r}")
    return kind(value)


def tuple_of(kind: Callable[[Any], Any], name: str, value: object) -> tuple[Any, ...]:
    """Parse '16,8', 16, [16, 8] or (16, 8) into a tuple of ``kind``; ValueError names the field."""
    parts: list[Any]
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
    elif isinstance(value, Real):
        parts = [value]
    elif isinstance(value, Iterable):
        parts = list(value)
    else:
        raise ValueError(f"{name} must be numbers separated by commas, not {value!r}")
    try:
        numbers = tuple(kind(part) for part in parts)
        if any(isinstance(part, Real) and whole != part for whole, part in zip(numbers, parts, strict=True)):
            raise ValueError  # 1.5 in a field of integers
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers separated by commas, not {value!r}") from None
    return numbers


def differences(one: Config, other: Config) -> list[tuple[str, Any, Any]]:
    """The fields in which two configurations of one class differ, as (name, one's value, other's value)."""
    before, after = one.to_dict(), other.to_dict()
    return [(name, before[name], after[name]) for name in before if before[name] != after[name]]


def refuse_contradiction(flags: Mapping[str, Any], where: str, *configs: Config) -> None:
    """Raise ValueError, naming the first such flag, if a flag contradicts ``configs``, which come from ``where``."""
    for config in configs:
        found = differences(config, config.from_flags(flags, base=config))
        for name, theirs, mine in sorted(found, key=lambda difference: difference[0] not in flags):
            raise ValueError(f"{name} is {theirs} in {where} and {mine} on the command line: leave the flag out")


def in_words(changes: Iterable[tuple[str, Any, Any]]) -> str:
    """The differences as one log line; empty if there are none."""
    return ", ".join(f"{name} {json.dumps(old)} becomes {json.dumps(new)}" for name, old, new in changes)
