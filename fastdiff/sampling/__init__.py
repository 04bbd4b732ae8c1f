"""Draws images from a trained model: loops over batches, resumable jobs, and their output files."""

from fastdiff.sampling.api import sample
from fastdiff.sampling.base_samples import BaseSamples, load_base_samples
from fastdiff.sampling.classes import split_classes
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.files import SampleFiles
from fastdiff.sampling.job import Job
from fastdiff.sampling.loop import Loop, generate
from fastdiff.sampling.output import make_grid, save_grid, save_npz, save_pngs
from fastdiff.sampling.plan import Plan, slerp
from fastdiff.sampling.settings import settings_of

__all__ = [
    "BaseSamples",
    "Engine",
    "Job",
    "Loop",
    "Plan",
    "SampleFiles",
    "generate",
    "load_base_samples",
    "make_grid",
    "sample",
    "save_grid",
    "save_npz",
    "save_pngs",
    "settings_of",
    "slerp",
    "split_classes",
]
