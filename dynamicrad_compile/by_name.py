"""The backend as torch.compile loads it by its name: with Dynamo, before anything is captured."""

from __future__ import annotations

from . import backend
from .capturing import captures_data_dependent

dynamicrad = captures_data_dependent(backend.dynamicrad)
