"""``fastdiff presets``: list the values of --preset."""

from rich.console import Console
from rich.table import Table


def presets() -> None:
    """List the presets and their flags."""
    from fastdiff.presets import PRESETS

    table = Table("preset", "for", "flags")
    for name, preset in PRESETS.items():
        table.add_row(
            name, preset.about, " ".join(f"--{k.replace('_', '-')} {_word(v)}" for k, v in preset.flags.items())
        )
    Console().print(table)


def _word(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
