"""What a run folder says about its run, read so that a damaged or missing file costs only what it held."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastdiff.checkpoint import holds_checkpoint, model_path, read_metadata, run_and_step, saved_steps
from fastdiff.evaluation.report.history import LARGEST, History, read_history
from fastdiff.evaluation.report.log import Log, read_log
from fastdiff.runtime.files import open_regular
from fastdiff.runtime.lease import held
from fastdiff.runtime.words import first_line

CONFIG, PROGRESS, METRICS, BEST = "config.json", "progress.jsonl", "evaluation/metrics.jsonl", "best.json"
_LARGEST = 2**24
"""Bytes of a JSON file that is read at once."""


@dataclass(frozen=True)
class Measured:
    """The figures of one checkpoint's samples, a line of evaluation/metrics.jsonl; ``names`` are their full names.

    ``reference`` is what the samples were compared with, and ``by`` the weights of the extractor.
    """

    step: int
    rate: float
    checkpoint: str
    figures: dict[str, float]
    names: dict[str, str]
    samples: dict[str, Any]
    reference: dict[str, Any] = field(default_factory=dict)
    by: str = ""

    @property
    def against(self) -> str:
        """What must be equal for figures to compare, besides their names."""
        return json.dumps([self.reference, self.by], sort_keys=True)

    def agrees(self, other: "Measured") -> bool:
        """Whether what both measured has the same names, such as the same number of samples."""
        return all(other.names.get(key, name) == name for key, name in self.names.items())


@dataclass(frozen=True)
class Best:
    """The best checkpoint as best.json says."""

    step: int
    rate: float
    checkpoint: str
    metric: str
    name: str
    value: float


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it; ``problems`` are lines about what could not be read.

    ``config`` is config.json as it is, {} if it is unreadable, and ``parameters`` the number of learned values.
    """

    folder: Path
    config: dict[str, Any]
    history: History
    log: Log
    measured: tuple[Measured, ...]
    best: Best | None
    parameters: int | None
    active: bool
    problems: tuple[str, ...]
    name: str = field(default="", compare=False)

    def part(self, name: str) -> dict[str, Any]:
        """A part of the configuration, such as "train"; {} if it is missing or is not one."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def classifies(self) -> bool:
        """Whether the run trains a classifier."""
        return "classifier_width" in self.part("model")

    @cached_property
    def step(self) -> int | None:
        """The last step that the run is known to have reached."""
        known = [int(self.history.last["step"])] if self.history.last else []
        return max(known + saved_steps(self.folder)[-1:], default=None)

    @property
    def steps(self) -> int | None:
        """The steps that the run was to make."""
        steps = self.part("train").get("steps")
        return steps if type(steps) is int and steps > 0 else None

    @property
    def state(self) -> str:
        """The state: running, not started, finished, stopped, or ended where the number of steps is unknown."""
        if self.active:
            return "running"
        if self.step is None:
            return "not started"
        if self.steps is None:
            return "ended"
        return "finished" if self.step >= self.steps else "stopped"

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; () if there are none."""
        names = self.config.get("class_names")
        return tuple(map(str, names)) if isinstance(names, list) else ()

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """The number of images of each class; () if unknown."""
        counts = self.config.get("class_counts")
        if isinstance(counts, list) and all(type(n) is int and 0 <= n < 2**53 for n in counts):
            return tuple(counts)
        return ()

    @property
    def images(self) -> int | None:
        """The number of images in the data."""
        return sum(self.class_counts) or self.log.images


def open_run(place: Path) -> Run:
    """Read the run folder ``place``; ValueError in one line if it is none."""
    if (named := run_and_step(place)) is not None:
        raise ValueError(f"{place} names a step, and a report shows all of them: name the run folder {named[0]}")
    if not place.exists():
        raise ValueError(f"{place} does not exist: name a run folder")
    if not place.is_dir():
        raise ValueError(f"{place} is a file: name a run folder")
    try:
        names = {path.name for path in place.iterdir()}
    except OSError as error:
        raise OSError(f"{place} cannot be read ({error.strerror}): name another run folder") from error
    if not {CONFIG, PROGRESS} & names and not holds_checkpoint(place):
        raise ValueError(f"{place} holds no run: name a folder that fastdiff train wrote")
    problems: list[str] = []
    try:
        next((place / "previews").iterdir(), None)
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"previews cannot be read ({error.strerror})")
    return Run(
        folder=place,
        config=_config(place, problems),
        history=_history(place, problems),
        log=read_log(place / "log.txt"),
        measured=_measured(place / METRICS, problems),
        best=_best(place / BEST, problems),
        parameters=_parameters(place),
        active=held(place),
        problems=tuple(problems),
    )


def _config(folder: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return _object(folder / CONFIG)
    except FileNotFoundError:
        said = f"{CONFIG} is missing"
    except (ValueError, OSError, RecursionError) as error:
        said = f"{CONFIG} is damaged ({first_line(error)})"
    for step in reversed(saved_steps(folder)):
        with suppress(ValueError, OSError, RecursionError):
            found = read_metadata(path := model_path(folder, step)).get("run_config")
            if isinstance(found, dict):
                problems.append(f"{said}: the settings are those of {path.name}")
                return found
    problems.append(f"{said}: the settings are unknown")
    return {}


def _object(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError(f"more than {_LARGEST >> 20} MiB")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no settings")
    return found


def _history(folder: Path, problems: list[str]) -> History:
    try:
        history = read_history(folder / PROGRESS)
    except OSError as error:
        problems.append(f"{PROGRESS} cannot be read ({error.strerror})")
        return History()
    if not history.rows:
        problems.append(f"{PROGRESS} has no rows: there are no curves")
    if history.cut_off:
        problems.append(f"{PROGRESS} ends in half a line, which is left out")
    if history.damaged:
        lines = "line that is not a row" if history.damaged == 1 else "lines that are not rows"
        problems.append(f"{PROGRESS} has {history.damaged:,} {lines}, left out")
    if history.went_back:
        problems.append(f"in {PROGRESS} the steps go back: of rows with the same steps the last ones are shown")
    return history


def _measured(path: Path, problems: list[str]) -> tuple[Measured, ...]:
    """The lines of a metrics.jsonl; figures that were measured again count as they were measured last."""
    found: dict[object, list[Measured]] = {}
    damaged = 0
    try:
        with open_regular(path) as file:
            while line := file.readline(_LARGEST):
                try:
                    row = json.loads(line)
                    # samples of no checkpoint, or an average that is no checkpoint of the run
                    if row.get("step") is None or row.get("ema_length") is not None:
                        continue
                    one = _line_of_metrics(row)
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                    damaged += bool(line.strip())
                    continue
                same = found.setdefault((one.checkpoint, one.step, one.rate, str(one.samples), one.against), [])
                before = next((i for i, other in enumerate(same) if other.agrees(one)), None)
                if before is not None:
                    other = same.pop(before)
                    one = replace(one, figures=other.figures | one.figures, names=other.names | one.names)
                same.append(one)
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"{METRICS} cannot be read ({error.strerror})")
    if damaged:
        problems.append(f"{METRICS} has {damaged:,} damaged {'line' if damaged == 1 else 'lines'}, left out")
    return tuple(one for same in found.values() for one in same)


def _line_of_metrics(row: dict[str, Any]) -> Measured:
    step, rate = row["step"], float(row.get("ema_rate") or 0.0)
    if type(step) is not int or step < 0:
        raise ValueError("no step")
    figures = {str(key): float(value) for key, value in row["figures"].items() if type(value) in (int, float)}
    names = {str(key): str(value) for key, value in (row.get("names") or {}).items()}
    samples, reference, extractor = (
        value if isinstance(value := row.get(part), dict) else {} for part in ("samples", "reference", "extractor")
    )
    return Measured(
        step,
        rate,
        str(row.get("checkpoint") or f"step {step}"),
        {key: value for key, value in figures.items() if abs(value) <= LARGEST},
        names,
        samples,
        reference,
        str(extractor.get("sha256") or ""),
    )


def _best(path: Path, problems: list[str]) -> Best | None:
    try:
        row = _object(path)
        best = Best(
            int(row["step"]),
            float(row["ema_rate"]),
            str(row["checkpoint"]),
            str(row["metric"]),
            str(row.get("name") or row["metric"]),
            float(row["value"]),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError) as error:
        problems.append(f"{BEST} is damaged ({first_line(error)})")
        return None
    return best if abs(best.value) <= LARGEST else None


def _parameters(folder: Path) -> int | None:
    """The number of learned values of the newest checkpoint, whose header alone is read."""
    for step in reversed(saved_steps(folder)):
        with suppress(SafetensorError, OSError), safe_open(model_path(folder, step), framework="np") as file:
            names = file.keys()
            return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return None


def named(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder's, with as many folders above it as tell the runs apart."""
    parts = [run.folder.resolve().parts or ("/",) for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"run {runs[0].folder} is named twice: name each run once")


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, whose figures' names say the reference, too, if there are several references or extractors."""
    distinct = list(dict.fromkeys(one.against for run in runs for one in run.measured))
    if len(distinct) < 2:
        return list(runs)
    labels: dict[str, str] = {}
    for against in distinct:
        reference, _ = json.loads(against)
        count = reference.get("count")
        label = Path(str(reference.get("data") or "unknown")).name + (f" ({count:,})" if type(count) is int else "")
        others = sum(known.partition(" no. ")[0] == label for known in labels.values())
        labels[against] = f"{label} no. {others + 1}" if others else label

    def told(name: str, one: Measured) -> str:
        return f"{name.removesuffix(')')}{'' if name.endswith(')') else ' ('}, against {labels[one.against]})"

    def with_reference(run: Run) -> Run:
        measured = tuple(replace(one, names={k: told(n, one) for k, n in one.names.items()}) for one in run.measured)
        best = run.best
        if best is not None:
            for one in run.measured:
                if (one.checkpoint, one.figures.get(best.metric)) == (best.checkpoint, best.value):
                    best = replace(best, name=told(run.best.name if run.best else "", one))
                    break
        return replace(run, measured=measured, best=best)

    return [with_reference(run) for run in runs]
