"""Attention over several ranks, on paper: how even their work is, and what a step is expected to cost."""
