"""Compares recipes: trains each in a process of its own, measures it, and goes on where it was stopped.

In the mode ``updates`` every contestant makes as many updates, in ``time`` it has as many minutes, compilation included
(``fastdiff train --minutes``, which lets the decay of the rate end with the time). ``undone`` are as many updates of
the recipe auto, once for each of its choices without that one and what depends on it. A contestant's samples are drawn
by the same sampler with the same number of model calls and from the same noise, and the same real images judge them.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from fastdiff.benchmarks.harness import environment
from fastdiff.benchmarks.quality.contestants import UNDONE, Flags, flags_of
from fastdiff.benchmarks.quality.measure import Bench, Figures, Machine
from fastdiff.benchmarks.quality.pictures import SOURCES, read_pictures
from fastdiff.benchmarks.rows import append_rows, read_rows, require_columns
from fastdiff.benchmarks.runs import child, error_in
from fastdiff.checkpoint import Lease, find_checkpoint, load_checkpoint
from fastdiff.config import (
    Contestant,
    Mode,
    PictureSet,
    QualityConfig,
    Recipe,
    RunConfig,
    RuntimeConfig,
    StartConfig,
)
from fastdiff.config.base import differences
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.files import replacing
from fastdiff.training import recipe
from fastdiff.training.run_folder import holds_run

ROWS = "quality.csv"
SAVE_EVERY = 100
"""Updates between the checkpoints of a run, from which a stopped one goes on."""

REAL = "real images"
"""The contestant whose samples are the training images: what a perfect memory would reach."""

_IDENTITY = ("set", "mode", "contestant", "seed", "length", "flags", "recipe", "samples", "sampler", "steps")
"""The columns that say which run a row is of, what it was trained with (digest_of), and how it was drawn."""

_ANY = 1000  # updates: what a run in the mode time decides by their number is compared at this one

_TRAINED = "trained.json"  # in a run's folder once its training has ended


@dataclass(frozen=True)
class Entry:
    """A run of the contest. ``length`` is its updates, or in the mode time its minutes."""

    set: PictureSet
    mode: Mode
    contestant: str
    seed: int
    length: float
    flags: Flags

    @property
    def key(self) -> tuple[str, ...]:
        """What names the run in a row."""
        return (self.set, self.mode, self.contestant, str(self.seed), f"{self.length:g}")

    def folder(self, out_dir: Path, digest: str) -> Path:
        """The folder of the run whose settings have this digest."""
        name = f"{self.contestant.replace(' ', '-')}-{self.seed}-{digest}"
        return out_dir / "runs" / self.set / f"{self.mode}-{self.length:g}" / name

    def settings(self, size: int) -> dict[str, object]:
        """The flags of the training on images of ``size``, without those of data, seed and machine."""
        found: dict[str, object] = {"class_cond": True, "image_size": size, "preview_interval": 0}
        found |= {"save_interval": SAVE_EVERY, "keep_last": 1}
        return found | {"minutes" if self.mode is Mode.TIME else "steps": self.length} | dict(self.flags)


def entries(config: QualityConfig) -> list[Entry]:
    """The runs that ``config`` asks for, in the order in which they are made: seed by seed."""
    found = []
    for pictures in config.set:
        for mode in config.only:
            length: float = config.minutes if mode is Mode.TIME else config.updates
            if mode is Mode.UNDONE:
                seed = config.seeds[0]
                found.append(
                    Entry(pictures, Mode.UPDATES, Contestant.AUTO, seed, length, flags_of(Contestant.AUTO, pictures))
                )
                found += [
                    Entry(pictures, mode, f"auto without {name}", seed, length, flags) for name, flags in UNDONE.items()
                ]
                continue
            for seed in config.seeds:
                for contestant in config.contestants:
                    found.append(Entry(pictures, mode, contestant, seed, length, flags_of(contestant, pictures)))
    return list({entry.key: entry for entry in found}.values())


def command_of(entry: Entry, run_dir: Path, data: Path, size: int, runtime: Runtime) -> list[str]:
    """The command line that trains the entry, or goes on with it."""
    flags: dict[str, object] = {"resume": True, "run_dir": run_dir, "data_dir": data}
    flags |= {f.name: getattr(runtime, f.name) for f in fields(RuntimeConfig)}
    if not holds_run(run_dir):
        flags |= {"seed": entry.seed} | entry.settings(size)
    return [sys.executable, "-m", "fastdiff", "train", *_words(flags)]


def decided(entry: Entry, bench: Bench, runtime: Runtime) -> RunConfig:
    """The settings that a new run of the entry would have, its own flags and the recipe's, but its data and seed."""
    flags = {"steps": _ANY} | entry.settings(bench.source.size)
    config = RunConfig.from_flags(flags)
    if flags.get("recipe", StartConfig.recipe) != Recipe.AUTO:
        return config
    return recipe.decided(config, set(flags), bench.images, runtime.device, 1, timed=False)[0]


def digest_of(config: RunConfig) -> str:
    """A digest of the settings of a training that are not the defaults: another one would train something else."""
    parts = (config.model, config.diffusion, config.data, config.train)
    changed = [differences(type(part)(), part) for part in parts]
    return hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:8]


def _words(flags: Flags) -> list[str]:
    """The flags as words of a command line; numbers as short as they can be."""
    words = []
    for name, value in flags.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return words


class Contest:
    """Trains and measures the runs that ``config`` asks for, in its out_dir; ``quick`` leaves out what Bench does."""

    def __init__(self, config: QualityConfig, machine: Machine, quick: bool) -> None:
        self.config, self._machine, self._quick = config, machine, quick
        self.out_dir = Path(config.out_dir)
        self.path = self.out_dir / ROWS
        self._about = environment(machine.runtime.device)
        self._benches: dict[PictureSet, Bench] = {}
        measured = [f.name for f in fields(Figures)]
        trained = ["updates", "seconds", "parameters"]
        columns = [*_IDENTITY, "measured_with", *trained, *measured, "judge_accuracy", *self._about]
        require_columns(self.path, columns)

    def run(self) -> list[dict[str, str]]:
        """Make every row that is missing; returns those asked for, the real images' first.

        A row is missing if none has the same run, trained as it would be now, and the same samples, measured with all
        that measures them now. SystemExit or KeyboardInterrupt if a signal ends it: what is saved so far is kept.
        ChildProcessError, with the reason, if a training fails.
        """
        found = []
        asked = [*(Entry(name, Mode.UPDATES, REAL, 0, 0, {}) for name in self.config.set), *entries(self.config)]
        for number, entry in enumerate(asked, start=1):
            bench = self._bench(entry.set)
            if (row := self._known(entry, bench)) is None:
                self._machine.display.line(f"{number} of {len(asked)}: {' '.join(entry.key)}")
                append_rows(self.path, [self._made(entry, bench)])
                row = self._known(entry, bench)
                assert row is not None
            found.append(row)
        return found

    def _bench(self, pictures: PictureSet) -> Bench:
        if pictures not in self._benches:
            folder = self.out_dir / "data" / pictures
            self._benches[pictures] = Bench(SOURCES[pictures], folder, self.config, self._machine, self._quick)
        return self._benches[pictures]

    def _known(self, entry: Entry, bench: Bench) -> dict[str, str] | None:
        """The row of the entry, if there is one: that of the most figures."""
        wanted = {name: str(value) for name, value in self._identity(entry, bench).items()}
        rows = read_rows(self.path) if self.path.exists() and self.path.stat().st_size else []
        fits = [
            row
            for row in rows
            if all(row.get(name) == value for name, value in wanted.items())
            and {*bench.measured_with} <= {*row["measured_with"].split()}
        ]
        return max(fits, key=lambda row: len(row["measured_with"].split()), default=None)

    def _identity(self, entry: Entry, bench: Bench) -> dict[str, object]:
        config, flags = self.config, " ".join(_words(entry.flags))
        digest, samples = "", min(config.num_samples, bench.images)
        if entry.contestant != REAL:
            digest, samples = digest_of(decided(entry, bench, self._machine.runtime)), config.num_samples
        values = (*entry.key, flags, digest, samples, config.sampler, config.steps)
        return dict(zip(_IDENTITY, values, strict=True))

    def _made(self, entry: Entry, bench: Bench) -> dict[str, object]:
        """The row of the entry, measured after its training."""
        identity = self._identity(entry, bench)
        trained: dict[str, object] = {"updates": 0, "seconds": math.nan, "parameters": 0}
        if entry.contestant == REAL:
            real = read_pictures(bench.folder / "train")
            order = np.random.default_rng(0).permutation(len(real.images))[: self.config.num_samples]
            figures = bench.figures(real.images[order], real.labels[order])
        else:
            folder = entry.folder(self.out_dir, str(identity["recipe"]))
            trained = self._trained(entry, bench, folder)
            figures = bench.measure(folder)
            self._keep_picture(entry, folder)
        self._machine.display.line(f"  {figures.line()}")
        measured = {name: float(f"{value:.5g}") for name, value in asdict(figures).items()}
        row = {**identity, "measured_with": " ".join(bench.measured_with), **trained, **measured}
        return {**row, "judge_accuracy": round(bench.judge.accuracy, 4), **self._about}

    def _trained(self, entry: Entry, bench: Bench, folder: Path) -> dict[str, object]:
        """Train the entry, or go on with it; what its row says of the training. Its seconds are NaN if it was stopped.

        They are those of the process, with its start and compilation. In the mode time a run that was stopped begins
        again: a resumed one would have other minutes.
        """
        path = folder / _TRAINED
        if not path.exists():
            if entry.mode is Mode.TIME and holds_run(folder):
                with Lease(folder):
                    shutil.rmtree(folder)
            resumed, began = holds_run(folder), time.perf_counter()
            train(command_of(entry, folder, bench.folder / "train", bench.source.size, self._machine.runtime))
            seconds = None if resumed else round(time.perf_counter() - began, 1)
            loaded = load_checkpoint(find_checkpoint(folder))
            parameters = sum(p.numel() for p in loaded.model.parameters())
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({"updates": loaded.step, "seconds": seconds, "parameters": parameters}))
        known = json.loads(path.read_text())
        return {**known, "seconds": math.nan if known["seconds"] is None else known["seconds"]}

    def _keep_picture(self, entry: Entry, folder: Path) -> None:
        """Copy the grid of the first samples, one column per class, to the folder pictures/."""
        newest = max((folder / "evaluation").glob("samples_*.png"), key=lambda path: path.stat().st_mtime)
        target = self.out_dir / "pictures" / entry.set / f"{entry.mode}-{entry.length:g}-{folder.name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(newest, target)


def train(command: Sequence[str]) -> None:
    """Run the command in a process of its own; ChildProcessError with its error message if it fails."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        child(command, said, os.environ) as run,
    ):
        if run.wait():
            raise ChildProcessError(f"{' '.join(command[1:])}: {error_in(said)}")
