"""Mask-aware LoRA: settings, clips, losses, the training loop, what it writes, the command line."""

from .data import Clip, ClipFolder
from .settings import Settings, load_settings
from .trainer import Result, finetune

__all__ = ["Clip", "ClipFolder", "Result", "Settings", "finetune", "load_settings"]
