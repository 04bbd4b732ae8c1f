"""Measures how good a trained model and its samples are."""

from fastdiff.evaluation.api import sample_metrics

__all__ = ["sample_metrics"]
