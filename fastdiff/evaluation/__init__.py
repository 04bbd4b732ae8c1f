"""Measures how good a trained model is."""
