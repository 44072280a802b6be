"""Tiny transformers as the original repositories write them, from knowledge of the architectures.

ZOO_ORIGINAL: dict name -> function giving (model, kwargs, expected), as in models.py. What they have that diffusers has
not: RoPE with complex numbers in a loop over grid sizes, padding to a fixed length, einops, attention helpers on
[B, S, H * D], frames folded into the batch and out again, attention modules of vision transformers.
"""

from __future__ import annotations

from zoo.original_blocks import BLOCKS
from zoo.original_breaks import BREAKS
from zoo.original_causal import CAUSAL
from zoo.original_cross import CROSS
from zoo.original_joint import JOINT
from zoo.original_references import REFERENCES

ZOO_ORIGINAL = {**BLOCKS, **BREAKS, **CROSS, **JOINT, **REFERENCES, **CAUSAL}
