"""Which timesteps of a long process a shorter one keeps (Nichol & Dhariwal 2021, section 4)."""

from collections.abc import Sequence
from itertools import accumulate, repeat

DDIM_PREFIX = "ddim"


def space_timesteps(num_timesteps: int, spec: str | Sequence[int]) -> set[int]:
    """The timesteps to keep of ``num_timesteps``.

    ``spec`` is a count ("250"), counts for sections of equal length ("10,15,20", or a sequence of them), or "ddimN":
    N steps at a fixed whole stride, as in the DDIM paper. Each section's first and last step are kept.

    ValueError where the spec is not one of these, asks for more steps than there are, or no whole stride fits.
    """
    if isinstance(spec, str) and spec.startswith(DDIM_PREFIX):
        return _strided(num_timesteps, _count(spec.removeprefix(DDIM_PREFIX), spec), spec)
    counts = [_count(part, spec) for part in (spec.split(",") if isinstance(spec, str) else spec)]
    if not any(counts):
        raise ValueError(f"timestep_respacing {spec!r} keeps no timestep")
    length, longer = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        size = length + (section < longer)
        if count > size:
            raise ValueError(f"timestep_respacing {spec!r} asks for {count} of {size} timesteps")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # The original adds the stride up; multiplying rounds some halves the other way and keeps other timesteps.
        kept.update(start + round(place) for place in accumulate(repeat(stride, count - 1), initial=0.0) if count)
        start += size
    return kept


def _strided(num_timesteps: int, count: int, spec: str) -> set[int]:
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return set(kept)
    raise ValueError(f"timestep_respacing {spec!r}: no whole stride gives {count} of {num_timesteps} timesteps")


def _count(part: str | int, spec: str | Sequence[int]) -> int:
    try:
        count = int(part)
    except (TypeError, ValueError):
        count = -1
    if count < 0:
        raise ValueError(
            f"timestep_respacing {spec!r} is not a count (250), counts per section (10,15,20) or ddimN (ddim50)"
        )
    return count
