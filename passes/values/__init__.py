"""Tensors that a graph makes of numbers alone, computed at compile time."""
