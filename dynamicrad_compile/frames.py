"""Frames of PyTorch among the callers of a function."""

from __future__ import annotations

import os
import sys
from types import FrameType

import torch

TORCH = os.path.dirname(torch.__file__) + os.sep


def frame_of(function: str, file: str) -> FrameType | None:
    """The nearest caller of that name in that file of PyTorch; None where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == function and code.co_filename.startswith(TORCH) and code.co_filename.endswith(file):
            return frame
        frame = frame.f_back
    return None
