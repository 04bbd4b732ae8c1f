"""From a trained model to images: the loops over batches, and the files that they fill."""

from fastdiff.sampling.generate import generate
from fastdiff.sampling.output import make_grid, save_grid, save_npz, save_pngs

__all__ = ["generate", "make_grid", "save_grid", "save_npz", "save_pngs"]
