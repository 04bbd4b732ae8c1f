"""The help of a command: its options in panels, as wide as the terminal."""

import shutil
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

OUTPUT, OTHER = "Output", "Other"
OF_STATE_DICTS = " of a state dict (.pt)"
"""The end of the names of panels that only --help-all shows."""

_ALL = "fastdiff.help-all"
_NARROW = 60


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.meta[_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


HelpAllFlag = Annotated[
    bool,
    typer.Option(
        "--help-all", is_eager=True, callback=_show_all, help="Also show the flags for bare state dicts (.pt)."
    ),
]


class Paneled(TyperCommand):
    """A command that shows its options by panel, in the order of each panel's first option."""

    def get_help(self, ctx: Any) -> str:
        """The help, as wide as the terminal: click's own is between 50 and 80 columns wide."""
        ctx.terminal_width = max(shutil.get_terminal_size().columns - 2, 38)
        return super().get_help(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the panels."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                argument = parameter.param_type_name == "argument"
                name = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or OTHER
                panels.setdefault(name, []).append(record)
        panels[OTHER] = panels.pop(OTHER, [])
        for name, records in panels.items():
            if records and (_ALL in ctx.meta or not name.endswith(OF_STATE_DICTS)):
                with formatter.section(name):
                    formatter.write_dl(records, col_max=10 if formatter.width < _NARROW else 32)
