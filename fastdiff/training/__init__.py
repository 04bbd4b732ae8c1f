"""Training: the run, its loop, EMAs, logging, and the contents of a run folder."""

from fastdiff.training.ema import EMA
from fastdiff.training.run import train
from fastdiff.training.trainer import Trainer

__all__ = ["EMA", "Trainer", "train"]
