"""Runnable examples. A package, so that `python -m examples.tiny_video.train` finds these and no other `examples`."""
