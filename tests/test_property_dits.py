"""Random DiTs: the exact grid and text, or dense with a reason; never a wrong grid."""

from __future__ import annotations

import torch
from helpers import capture, sites_of
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from random_dit import DitConfig, RandomDit

settings.register_profile("steady", derandomize=True, deadline=None, database=None, max_examples=120)
STEPS = ("view", "permute", "cut", "pad", "select", "write", "halves", "batch", "modulate", "shift")


@st.composite
def configs(draw):
    """Any DiT that runs."""
    layout = draw(st.sampled_from(("bcfhw", "bcfhw", "bfchw", "bfhwc", "bcfhw-list", "frames-in-batch", "packed")))
    size = st.integers(2, 6)
    order = "fhw" if layout == "packed" else draw(st.sampled_from(("fhw",) * 6 + ("hwf", "fwh", "whf", "hfw", "tiles")))
    grid = (draw(size), draw(size), draw(size))
    if order == "tiles":
        grid = (grid[0], grid[1] // 2 * 2, grid[2] // 2 * 2)
    text = (draw(st.sampled_from((0, 0, 1, 4, 9))), draw(st.sampled_from((0, 0, 1, 4, 9))))
    attend = draw(st.sampled_from(("sdpa",) * 5 + ("softmax", "mha", "cross", "causal", "cache")))
    alone = attend in ("cross", "mha", "causal", "cache")
    join = "cat" if alone else draw(st.sampled_from(("cat", "cat", "dual", "buffer", "index")))
    history = draw(st.sampled_from((0, 0, 0, 1, 2))) if join == "cat" and order == "fhw" and not alone else 0
    rope = draw(st.sampled_from(("none", "meshgrid", "table", "inplace", "ones", "matrix")))
    return DitConfig(
        grid, draw(st.integers(1, 2)), draw(st.sampled_from((1, 2))), draw(st.integers(1, 2)), layout,
        draw(st.sampled_from(("conv3d", "conv2d", "linear"))), 1 if layout == "packed" else draw(st.sampled_from((1, 1, 2))),
        order, draw(st.sampled_from(("flatten", "two-stage", "reshape", "einops"))),
        (0, 0) if attend == "cross" else text, join, history, "none" if attend == "mha" or order == "tiles" else rope,
        draw(st.sampled_from(("separate", "chunk", "unbind", "heads-first"))), attend,
        tuple(draw(st.lists(st.sampled_from(STEPS), max_size=2))),
        draw(st.booleans()) if order != "tiles" and layout != "packed" else layout == "packed",
    )  # fmt: skip


def verdict(config):
    """ "exact", "dense" or "wrong: ..." for the sites of a configuration."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = RandomDit(config).eval()
    sites = sites_of(capture(model, **model.inputs()))
    assert len(sites) == config.layers
    truth = config.truth()
    for site in sites:
        if site.role == "video_self_attention" and not site.reason:
            found = (site.grid, site.text.before, site.text.after)
            if found != truth:
                return f"wrong: {found} instead of {truth}"
        elif not site.reason:
            return f"wrong: {site.role} without a reason"
    return "exact" if not any(site.reason for site in sites) else "dense"


@settings(settings.get_profile("steady"), suppress_health_check=list(HealthCheck))
@given(configs())
def test_a_random_dit_is_understood_or_left_alone(config):
    found = verdict(config)
    event(found)
    assert not found.startswith("wrong"), config
    plain = config.truth() is not None and not config.history and "shift" not in config.steps
    assert found == "exact" or not plain, (config, found)
