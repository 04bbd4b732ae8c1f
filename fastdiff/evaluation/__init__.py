"""Measures how good a trained model and its samples are."""
