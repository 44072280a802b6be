"""Nodes that the passes write: plans, control, selection, operands."""
