"""Training: the run, its loop, EMAs, logging, and the contents of a run folder."""

from fastdiff.training.api import train, train_classifier
from fastdiff.training.ema import EMA
from fastdiff.training.trainer import Trainer

__all__ = ["EMA", "Trainer", "train", "train_classifier"]
