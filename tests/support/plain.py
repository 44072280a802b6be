"""A profile whose plans are plain masks: blocks by place in raster order, nothing stands for dropped ones."""

from __future__ import annotations

from pathlib import Path

PLAIN = str(Path(__file__).with_name("plain.toml"))
