"""Draws images from a trained model: loops over batches, resumable jobs, and their output files."""

from fastdiff.sampling.api import sample
from fastdiff.sampling.classes import Classes, split_classes
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.files import SampleFiles
from fastdiff.sampling.job import Job, settings_of
from fastdiff.sampling.loop import Loop, generate
from fastdiff.sampling.output import save_grid, save_npz
from fastdiff.sampling.plan import Plan, slerp

__all__ = [
    "Classes",
    "Engine",
    "Job",
    "Loop",
    "Plan",
    "SampleFiles",
    "generate",
    "sample",
    "save_grid",
    "save_npz",
    "settings_of",
    "slerp",
    "split_classes",
]
