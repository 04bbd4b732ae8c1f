"""Benchmarks that anyone can repeat: what is fast, and by how much."""
