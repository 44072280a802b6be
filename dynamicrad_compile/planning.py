"""From options and profile to the plan of one site."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from .options import MIN_TOKENS_AUTO, Options
from .plan import BlockPlan
from .plan_op import PlanSpec
from .profiles import load_profile

if TYPE_CHECKING:
    from .passes import Site


class SitePlanner:
    """Decides, for the sites of one graph in order, which plan each gets or why it stays dense.

    Options that are None come from the profile. Raises ProfileError if the profile can't be loaded.
    """

    def __init__(self, options: Options):
        profile = load_profile(options.profile)
        static = profile.regime("mid" if options.regime == "auto" else options.regime).static_ratio
        self.pattern = options.pattern or profile.pattern
        self.block_size = options.block_size or profile.block_size
        self.dense_layers = profile.dense_layers if options.dense_layers is None else options.dense_layers
        min_tokens = profile.min_tokens if options.min_tokens is None else options.min_tokens
        self.min_tokens = MIN_TOKENS_AUTO if min_tokens == "auto" else int(min_tokens)
        sink_frames = static.sink_frames if options.sink_frames is None else options.sink_frames
        decay_factor = static.decay_factor if options.decay_factor is None else options.decay_factor
        if self.pattern == "radial":
            if options.decay_factor is None:
                decay_factor = 1.0
            params: dict[str, Any] = {"decay_factor": decay_factor, "sink_frames": sink_frames}
        else:
            sparsity = static.sparsity if options.sparsity is None else options.sparsity
            params = {"sparsity": sparsity, "decay_factor": decay_factor, "sink_frames": sink_frames}
        self.spec = PlanSpec(self.pattern, self.block_size, tuple(sorted(params.items())))
        self.video_sites = 0
        self.asked: set[int] = set()

    def __call__(self, site: Site) -> BlockPlan | None:
        """The plan of a video self-attention, or None with `site.reason` set."""
        assert site.grid is not None
        number = self.video_sites
        self.video_sites += 1
        site.reason = self._stays_dense(site, number)
        if site.reason:
            return None
        site.plan_spec = self.spec.to_json()
        return self.spec.build(site.grid, *site.text)

    def _stays_dense(self, site: Site, number: int) -> str:
        assert site.grid is not None
        if self.pattern == "dense":
            self.asked.add(id(site))
            return "pattern is 'dense'"
        if self.dense_layers and not re.search(r"\d", site.path):
            return "dense_layers can't be honoured: one compiled block serves all layers; compile the whole model"
        if number < self.dense_layers:
            self.asked.add(id(site))
            return f"one of the first {self.dense_layers} layers (dense_layers)"
        tokens = math.prod(site.grid) + sum(site.text)
        if tokens < self.min_tokens:
            return f"{tokens} tokens are fewer than min_tokens = {self.min_tokens}: sparse attention would not pay"
        return ""
