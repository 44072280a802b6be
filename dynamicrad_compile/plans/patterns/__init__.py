"""Patterns of plans, one file each."""
