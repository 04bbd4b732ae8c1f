"""Training: a run, its loop, the weight averages, the log, and what goes into a run folder."""

from fastdiff.training.ema import EMA
from fastdiff.training.run import train
from fastdiff.training.trainer import Trainer

__all__ = ["EMA", "Trainer", "train"]
