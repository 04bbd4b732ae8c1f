"""Averages of any length after training (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3 and appendix C).

A power-function average after t updates weighs the weights of update s by s^(g+1) - (s-1)^(g+1), over t^(g+1). Its
length sigma_rel is the standard deviation of this profile, relative to t. An average of another length is a combination
of the averages that a checkpoint holds, those of earlier checkpoints and those of the run's snapshots.

The paper fits the profile by least squares. Here the coefficients sum to 1, and what is fitted is the integral of the
profile: the error of the weights is then the smallest that can be expected if the updates are independent.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.checkpoint.files import read_metadata, read_tensors, write_tensors
from fastdiff.checkpoint.steps import average_path, averages_of, saved_steps, verify_file

TOLERANCE = 1e-3
"""Largest relative error that is expected of a reconstructed average."""

_ROUNDING = {False: 1e-7, True: 3e-4}  # of fp32 and of the snapshots' fp16
_FOLDER = "averages"
_SAFETY = 2.0  # updates are neither independent nor of equal size
_OF_ANOTHER = {"ema_updates", "ema_since", "ema_length", "time_grids"}  # metadata of one average alone
_APART = 1.1  # earlier checkpoints whose steps differ by a smaller factor say the same
_EARLIER = 4
_LENGTHS = np.geomspace(0.005, 0.285, 200)

Float64Array = NDArray[np.float64]


def exponent_of(length: float) -> float:
    """The exponent gamma of the average of this length sigma_rel, the root of (g+1) = sigma_rel^2 (g+2)^2 (g+3)."""
    t = length**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def snapshot_path(run_dir: Path, step: int) -> Path:
    """The path of a snapshot of the averages: in 16 bits, the tensors of each in a row, in the order of their names."""
    return run_dir / _FOLDER / f"{step:06d}.safetensors"


def snapshots(run_dir: Path) -> list[int]:
    """The steps of the run's snapshots, oldest first."""
    names = ((path, path.name.partition(".")[0]) for path in (run_dir / _FOLDER).glob("*.safetensors"))
    return sorted(int(step) for path, step in names if step.isdecimal() and path == snapshot_path(run_dir, int(step)))


def keep_snapshots(run_dir: Path, upto: int, count: int) -> None:
    """Delete all snapshots but the ``count`` newest of the steps ``upto`` this one."""
    there = snapshots(run_dir)
    kept = [step for step in there if step <= upto]
    for step in set(there) - set(kept[max(len(kept) - count, 0) :]):
        snapshot_path(run_dir, step).unlink(missing_ok=True)


@dataclass(frozen=True)
class Average:
    """A power-function average on the disk, of a ``length`` and a ``step``, in a file of its own or a snapshot."""

    path: Path
    length: float
    step: int
    snapshot: bool

    def tensors(self, like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors by name, of the shapes of the state dict ``like``; ValueError if they are another model's."""
        if not self.snapshot:
            yield from read_tensors(self.path, _kind(self.path), verified=verify_file(self.path))[0].items()
            return
        flat = read_tensors(self.path, "averages")[0][str(self.length)]
        if flat.numel() != sum(tensor.numel() for tensor in like.values()):
            raise ValueError(f"{self.path} is of another model: delete it")
        names = sorted(like)
        for name, values in zip(names, flat.split([like[name].numel() for name in names]), strict=True):
            yield name, values.view(like[name].shape)


def _kind(path: Path) -> str:
    return str(read_metadata(path)["kind"])


def averages_at(run_dir: Path, step: int) -> list[Average]:
    """The averages that training kept up to a step: the step's own, those of earlier steps, and the snapshots'."""
    found, last = _saved(run_dir, step), float(step)
    for earlier in reversed([one for one in saved_steps(run_dir) if step / 4 <= one < step]):
        if len(found) and earlier <= last / _APART and len({one.step for one in found}) <= _EARLIER:
            found += _saved(run_dir, earlier)
            last = earlier
    for earlier in (one for one in snapshots(run_dir) if found and one < step):
        path = snapshot_path(run_dir, earlier)
        about = read_metadata(path, "averages")
        since = about.get("ema_since", [0] * len(about["ema_lengths"]))
        for length, began in zip(about["ema_lengths"], since, strict=True):
            if _is_whole(length, earlier, began):
                found.append(Average(path, length, earlier, snapshot=True))
    return found


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5)


def _saved(run_dir: Path, step: int) -> list[Average]:
    found = []
    for length, path in averages_of(run_dir, step).items():
        about = read_metadata(path)  # a reconstructed one has ema_error instead of ema_updates
        if "ema_updates" in about and _is_whole(length, step, about.get("ema_since", 0)):
            found.append(Average(path, length, step, snapshot=False))
    return found


def _is_whole(length: float, step: int, since: int) -> bool:
    """Whether hardly anything is left in an average of the weights that it began with, after ``since`` updates."""
    return (since / step) ** (exponent_of(length) + 1) <= TOLERANCE


def inner_products(
    steps: Float64Array, exponents: Float64Array, other_steps: Float64Array, other_exponents: Float64Array
) -> Float64Array:
    """Of the integrals of two profiles each, those that are subtracted from 1: (n,), (n,), (m,), (m,) to (n, m).

    1 - (s/t)^(g+1) for s up to t, and 0 after, is the share of an average that update s moves.
    """
    first = steps[:, None] <= other_steps
    t, u = np.where(first, steps[:, None], other_steps), np.where(first, other_steps, steps[:, None])
    a = np.where(first, exponents[:, None], other_exponents)
    b = np.where(first, other_exponents, exponents[:, None])
    ratio = (t / u) ** (b + 1)
    return np.asarray(t * (1 - 1 / (a + 2) - ratio / (b + 2) + ratio / (a + b + 3)))


@dataclass(frozen=True, eq=False)
class Fit:
    """Fits averages of a ``step`` to those on the disk.

    ``drift`` says how far training moves the weights: the norm of the sum of all updates up to the step, relative to
    the weights', if they were independent and of equal size.
    """

    averages: tuple[Average, ...]
    step: int
    drift: float

    @staticmethod
    def of(run_dir: Path, step: int) -> "Fit":
        """Read the averages of a run up to a step; ValueError if the step has none."""
        found = averages_at(run_dir, step)
        if not found:
            raise ValueError(
                f"{run_dir} has no averages at step {step} from which others follow, begun well before: train with "
                "--ema-lengths 0.05,0.1"
            )
        fit, drift, ours = Fit(tuple(found), step, 0.0), 0.0, dict(found[0].tensors({}))
        # how far the narrowest average of the step is from the widest one, and from the oldest average
        widest = max(i for i, one in enumerate(found) if one.step == step)
        for i in {widest, min(range(len(found)), key=lambda i: found[i].step)} - {0}:
            theirs = dict(found[i].tensors(ours))
            apart = _norm(ours[name].double() - theirs[name].double() for name in ours)
            told = fit._unlikeness(np.eye(len(found))[0] - np.eye(len(found))[i])
            drift = max(drift, apart / max(_norm(ours.values()), 1e-30) / told)
        return Fit(fit.averages, step, drift)

    def _profiles(self) -> tuple[Float64Array, Float64Array]:
        steps = np.array([one.step / self.step for one in self.averages])
        return steps, np.array([exponent_of(one.length) for one in self.averages])

    def _unlikeness(self, coefficients: Float64Array, length: float | None = None) -> float:
        """The norm of the integral of a combination of the profiles, less that of a length."""
        steps, exponents = self._profiles()
        if length is not None:
            steps, exponents = np.append(steps, 1.0), np.append(exponents, exponent_of(length))
            coefficients = np.append(coefficients, -1.0)
        squared = float(coefficients @ inner_products(steps, exponents, steps, exponents) @ coefficients)
        return max(squared, 0.0) ** 0.5

    def coefficients(self, length: float) -> tuple[Float64Array, float]:
        """The coefficients (n,) of the averages, which sum to 1, and the relative error that is expected of the sum."""
        steps, exponents = self._profiles()
        rounding = np.array([_ROUNDING[one.snapshot] for one in self.averages])
        count, weight = len(steps), max(self.drift, 1e-12) ** 2
        system = np.zeros((count + 1, count + 1))
        system[:count, :count] = inner_products(steps, exponents, steps, exponents) + np.diag(rounding**2 / weight)
        system[count, :count] = system[:count, count] = 1
        wanted = inner_products(steps, exponents, np.ones(1), np.array([exponent_of(length)]))[:, 0]
        found = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=None)[0][:count]
        error = _SAFETY * float(
            np.hypot(self.drift * self._unlikeness(found, length), np.linalg.norm(found * rounding))
        )
        return found, error if count > 1 else (0.0 if length == self.averages[0].length else np.inf)

    def reaches(self, length: float) -> bool:
        """Whether the average of this length can be reconstructed."""
        return self.coefficients(length)[1] <= TOLERANCE

    def reach(self) -> str:
        """The lengths that can be reconstructed, as ranges in words."""
        fine = [self.reaches(length) for length in _LENGTHS]
        edges = np.flatnonzero(np.diff(np.array([False, *fine, False]).astype(int)))
        ranges = [(_LENGTHS[low], _LENGTHS[high - 1]) for low, high in zip(edges[::2], edges[1::2], strict=True)]
        words = [f"{low:.3g} to {high:.3g}" for low, high in ranges if low < high]
        return ", ".join(words or [f"{one.length:g}" for one in self.averages if one.step == self.step])


def refuse_length(length: float) -> None:
    """ValueError unless a power-function average of falling weights has this length: at most 1 / sqrt(12)."""
    if not 0 < length < 12**-0.5:
        raise ValueError(f"ema_length must be above 0 and below 0.2887, the length of a uniform average, not {length}")


def reconstructed(run_dir: Path, step: int, length: float) -> Path:
    """The file with the average of this length at a saved step of a run; it is written unless it is there.

    ValueError if the run keeps no averages, or if the relative error to be expected is above TOLERANCE.
    """
    refuse_length(length)
    path = average_path(run_dir, length, step)
    if path.exists():
        return path
    fit = Fit.of(run_dir, step)
    found, error = fit.coefficients(length)
    if error > TOLERANCE:
        raise ValueError(
            f"ema_length {length:g} cannot be reconstructed at step {step} of {run_dir}, only {fit.reach()}: choose "
            "one of these, or train with more --ema-lengths or --ema-snapshots"
        )
    described: dict[str, Any] = read_metadata(fit.averages[0].path)
    described = {key: value for key, value in described.items() if key not in _OF_ANOTHER}
    like = dict(fit.averages[0].tensors({}))
    total = {name: tensor.double() * found[0] for name, tensor in like.items()}
    for average, coefficient in zip(fit.averages[1:], found[1:], strict=True):
        for name, tensor in average.tensors(like):
            total[name] += tensor.double() * coefficient
    state = {name: tensor.float() for name, tensor in total.items()}
    try:
        return write_tensors(path, state, described | {"ema_length": length, "ema_error": error})
    except OSError as failure:
        raise ValueError(f"{path} cannot be written ({failure}): copy the run to a folder of yours") from failure
