"""Tiny video models that tests and benchmarks share."""
