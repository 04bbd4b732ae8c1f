"""The files of an evaluation: checked before any work, written at its end."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.evaluation.nll import TERMS, Bound, Int64Array
from fastdiff.evaluation.plot import refuse_plot, save_plot
from fastdiff.runtime.files import refuse_unwritable, replacing

SUMMARY, IMAGES = "nll.json", "images.npz"


@dataclass(frozen=True)
class NllFiles:
    """The folder for the results, and optionally a plot of the terms."""

    out_dir: Path
    plot: Path | None = None
    overwrite: bool = False

    @property
    def terms(self) -> dict[str, Path]:
        """The file of each of TERMS, named as in improved-diffusion."""
        return {name: self.out_dir / f"{name}_terms.npz" for name in TERMS}

    def check(self) -> None:
        """ValueError if results exist already, a file cannot be written, or a plot needs matplotlib."""
        results = [self.out_dir / SUMMARY, self.out_dir / IMAGES, *self.terms.values()]
        if not self.overwrite and any(path.exists() for path in results):
            raise ValueError(f"out_dir {self.out_dir} holds results: name another folder, or use --overwrite")
        refuse_unwritable("out_dir", self.out_dir)
        if self.plot is not None:
            refuse_plot(self.plot, self.overwrite)

    def write(self, bound: Bound, names: Sequence[str], timesteps: Int64Array, about: Mapping[str, Any]) -> None:
        """Write the files; ``names`` are the images' names, ``about`` is added to the figures in the summary.

        Each write is atomic. The summary comes last: if it exists, the other files belong to the same evaluation.
        """
        summary = self.out_dir / SUMMARY
        summary.unlink(missing_ok=True)
        for name, path in self.terms.items():
            _save(path, arr_0=bound.terms[name].astype(np.float32))
        _save(
            self.out_dir / IMAGES, total_bpd=bound.total_bpd, prior_bpd=bound.prior_bpd, names=np.array(names, np.str_)
        )
        figures = bound.figures()
        if self.plot is not None:
            title = f"{figures['bits_per_dim']:.3f} bits/dim over {len(names):,} images"
            save_plot(self.plot, bound, timesteps, title)
        values = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON has no NaN
        with replacing(summary) as temporary:
            temporary.write_text(json.dumps({**values, **about}, indent=2) + "\n", encoding="utf-8")


def _save(path: Path, **arrays: Any) -> None:
    with replacing(path) as temporary:
        np.savez(temporary, **arrays)
