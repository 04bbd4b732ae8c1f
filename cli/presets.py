"""``fastdiff presets``: list the values of --preset."""

import shutil
import textwrap

import typer


def presets() -> None:
    """List the presets and their flags: the diffusion models, then the classifiers."""
    from fastdiff.presets import CLASSIFIER_PRESETS, PRESETS

    width = max(shutil.get_terminal_size().columns, 40)
    for title, known in (("Diffusion models", PRESETS), ("Classifiers", CLASSIFIER_PRESETS)):
        typer.echo(f"{title}\n")
        for name, preset in known.items():
            flags = " ".join(_flag(field, value) for field, value in preset.flags.items())
            lines = textwrap.wrap(flags, width - 4, break_long_words=False, break_on_hyphens=False)
            typer.echo("\n    ".join([f"{name}  {preset.about}", *lines]))
        typer.echo()


def _flag(field: str, value: object) -> str:
    name = field.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
