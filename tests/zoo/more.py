"""Tiny models of the diffusers 0.42.1 classes that models.py lacks: ZOO_MORE, a dict name -> function like ZOO.

Each function gives (model, kwargs, expected); the keys of `expected` are described in models.py.
"""

from __future__ import annotations

from zoo.more_images import IMAGES
from zoo.more_joint import JOINT
from zoo.more_video import VIDEO
from zoo.more_wan import WAN

ZOO_MORE = {**WAN, **JOINT, **VIDEO, **IMAGES}
