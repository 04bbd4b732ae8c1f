"""The settings of the runs and where they ran, as tables: what differs first, everything on demand."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from fastdiff.config import (
    ClassifierConfig,
    ClassifierTrainConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    RuntimeConfig,
    TrainConfig,
)
from fastdiff.evaluation.report.markup import MISSING, counted, name, setting, text
from fastdiff.evaluation.report.run import Run

_PARTS: dict[str, tuple[type[Config], type[Config]]] = {
    "model": (ModelConfig, ClassifierConfig),
    "diffusion": (DiffusionConfig, DiffusionConfig),
    "data": (DataConfig, DataConfig),
    "train": (TrainConfig, ClassifierTrainConfig),
    "runtime": (RuntimeConfig, RuntimeConfig),
}
"""The parts of config.json, each with its class for a diffusion model and for a classifier."""

_ENVIRONMENT = {
    "fastdiff": "fastdiff",
    "commit": "commit",
    "torch": "PyTorch",
    "triton": "Triton",
    "python": "Python",
    "command": "command",
    "device": "device",
    "processes": "processes",
    "precision": "precision",
    "kernels": "kernels",
    "compile": "compile",
    "host": "host",
    "started": "started",
}
_LOGGED = {"model": "model", "on": "machine"}
_ABSENT = object()


@dataclass(frozen=True)
class _Row:
    """A setting: its name, its help text, the value of each run and the defaults; _ABSENT is one that a run lacks."""

    name: str
    help: str
    values: tuple[Any, ...]
    defaults: tuple[Any, ...]

    @property
    def differs(self) -> bool:
        """Whether the runs have different values."""
        return any(value != self.values[0] for value in self.values)

    @property
    def changed(self) -> bool:
        """Whether a run has another value than the default."""
        return any(_changed(value, default) for value, default in zip(self.values, self.defaults, strict=True))


def _changed(value: Any, default: Any) -> bool:
    return value is not _ABSENT and default is not _ABSENT and value != default


def settings(runs: Sequence[Run]) -> str:
    """The section of settings: those that differ between the runs, or from the defaults, and all of them, folded."""
    groups = {title: rows for part in _PARTS if (rows := _rows(runs, part)) for title in [_title(runs, part)]}
    if not groups:
        return '<section id="settings"><h2>Settings</h2><p class="quiet">They are unknown.</p></section>\n'
    several = len(runs) > 1
    chosen = {t: [row for row in rows if (row.differs if several else row.changed)] for t, rows in groups.items()}
    chosen = {title: rows for title, rows in chosen.items() if rows}
    what = "Different between the runs" if several else "Different from the defaults"
    none = "All runs have the same settings." if several else "All settings are the defaults."
    first = _table(runs, chosen) if chosen else f'<p class="quiet">{none}</p>'
    count = sum(map(len, groups.values()))
    return (
        '<section id="settings"><h2>Settings</h2>\n'
        '<input type="checkbox" id="explain"><label for="explain">Explain the settings</label>\n'
        f"<h3>{what}</h3>\n{first}<details><summary>All {counted(count, 'setting')}, those that are not the default "
        f"in bold</summary>\n{_table(runs, groups)}</details></section>\n"
    )


def _title(runs: Sequence[Run], part: str) -> str:
    return _PARTS[part][all(run.classifies for run in runs)].panel


def _rows(runs: Sequence[Run], part: str) -> list[_Row]:
    """The settings of a part of config.json, in the order of the fields, then those that this version does not know."""
    kinds = [_PARTS[part][run.classifies] for run in runs]
    known = {f.name: f for kind in kinds for f in fields(kind)}  # type: ignore[arg-type]  # every Config is a dataclass
    there = dict.fromkeys([*known, *(name for run in runs for name in run.part(part))])
    rows = []
    for key in there:
        values = tuple(run.part(part).get(key, _ABSENT) for run in runs)
        if all(value is _ABSENT for value in values):
            continue
        defaults = tuple(_default(kind, key) for kind in kinds)
        rows.append(_Row(key, known[key].metadata["help"] if key in known else "", values, defaults))
    return rows


def _default(kind: type[Config], key: str) -> Any:
    """The default of the flag, in config.json's types."""
    for f in fields(kind):  # type: ignore[arg-type]
        if f.name == key:
            shown = f.metadata["shown"]
            shown = f.default if shown in ("", ()) else shown
            return list(shown) if isinstance(shown, tuple) else shown
    return _ABSENT


def _table(runs: Sequence[Run], groups: dict[str, list[_Row]]) -> str:
    several = len(runs) > 1
    titles = (
        [f'<span class="key c{i}"></span> {name(run.name)}' for i, run in enumerate(runs)] if several else ["value"]
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in [*titles, *([] if several else ["default"])])
    body = ""
    for title, rows in groups.items():
        body += (
            f'<tr class="group"><th colspan="{len(runs) + 1 + (not several)}" scope="colgroup">{text(title)}</th></tr>'
        )
        for row in rows:
            cells = "".join(_cell(v, d) for v, d in zip(row.values, row.defaults, strict=True))
            cells += "" if several else f'<td class="quiet">{text(_written(row.defaults[0]))}</td>'
            help = f'<span class="help">{text(row.help)}</span>' if row.help else ""
            body += f'<tr><th scope="row" title="{text(row.help)}">{text(row.name)}{help}</th>{cells}</tr>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of settings"><table class="settings">'
        f'<thead><tr><th scope="col">setting</th>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'
    )


def _cell(value: Any, default: Any) -> str:
    written = text(_written(value))
    return f'<td class="changed">{written}</td>' if _changed(value, default) else f"<td>{written}</td>"


def _written(value: Any) -> str:
    return MISSING if value is _ABSENT else setting(value)


def environment(runs: Sequence[Run]) -> str:
    """The section that says where the runs ran, as config.json and the log say."""
    columns = [_about(run) for run in runs]
    keys = [key for key in (*_ENVIRONMENT, *_LOGGED) if any(key in column for column in columns)]
    if not keys:
        return ""
    several = len(runs) > 1
    titles = "".join(f'<th scope="col"><span class="key c{i}"></span> {name(r.name)}</th>' for i, r in enumerate(runs))
    head = f'<thead><tr><th scope="col">environment</th>{titles}</tr></thead>' if several else ""
    body = ""
    for key in keys:
        values = [column.get(key, MISSING) for column in columns]
        different = any(value != values[0] for value in values) and key not in ("started", "command")
        cell = '<td class="changed">' if different else "<td>"
        cells = "".join(f"{cell}{text(value)}</td>" for value in values)
        title = _ENVIRONMENT.get(key) or f"{_LOGGED[key]}, from the log"
        body += f'<tr><th scope="row">{text(title)}</th>{cells}</tr>'
    return (
        '<section id="environment"><h2>Environment</h2>\n'
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of environments"><table class="facts">'
        f"{head}<tbody>{body}</tbody></table></div></section>\n"
    )


def _about(run: Run) -> dict[str, str]:
    said = run.part("environment")
    found = {key: setting(said[key]) for key in _ENVIRONMENT if said.get(key) is not None}
    return found | {key: line for key in _LOGGED if (line := run.log.line(key)) and not (key == "on" and found)}
