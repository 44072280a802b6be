"""What an op costs on a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Work of one call on a GPU: FLOPs, and bytes to and from its memory."""

    flops: int
    bytes: int
