"""The tiny video model that `dynamicrad eval` evaluates by default: its clips, the model, its checkpoint.

It was trained by examples/tiny_video of the repository.
"""
