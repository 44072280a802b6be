"""Frames of PyTorch among the callers of a function."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType

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


def code_of_compilation() -> CodeType | None:
    """The code that Dynamo is compiling; None where it compiles none."""
    frame = frame_of("_compile", "convert_frame.py")
    code = None if frame is None else frame.f_locals.get("code")
    return code if isinstance(code, CodeType) else None
