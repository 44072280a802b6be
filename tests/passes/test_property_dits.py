"""Random DiTs: the exact grid and text, or dense with a reason; never a wrong grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.graphs import capture, sites_of
from support.random_dit import DitConfig, RandomDit

settings.register_profile("steady", derandomize=True, deadline=None, database=None)
settings.load_profile("steady")
STEPS = ("view", "permute", "cut", "pad", "select", "write", "halves", "batch", "modulate", "shift", "flip")


ATTEND = ("sdpa",) * 12 + ("softmax", "softmax", "mha", "cross", "causal", "cache")
ORDER = ("fhw",) * 12 + ("hwf", "fwh", "whf", "hfw", "tiles", "reversed")


@st.composite
def configs(draw):
    """Any DiT that runs."""

    def pick(*values):
        return draw(st.sampled_from(values))

    layout = pick("bcfhw", "bcfhw", "bfchw", "bfhwc", "bcfhw-list", "frames-in-batch", "packed")
    order = "fhw" if layout == "packed" else pick(*ORDER)
    f, h, w = pick(2, 3, 4, 4, 5, 5, 6), pick(2, 3, 4, 5, 6), pick(2, 3, 4, 5, 6)
    if order == "tiles":
        h, w = h // 2 * 2, w // 2 * 2
    attend = pick(*ATTEND)
    alone = attend in ("cross", "mha", "causal", "cache")
    join = "cat" if alone else pick("cat", "cat", "dual", "buffer", "index")
    rope = pick("none", "meshgrid", "table", "inplace", "ones", "matrix")
    return DitConfig(
        grid=(f, h, w),
        batch=pick(1, 2),
        heads=pick(1, 2),
        layers=pick(1, 2),
        layout=layout,
        patch=pick("conv3d", "conv2d", "linear", "loop"),
        time=1 if layout == "packed" else pick(1, 1, 2),
        order=order,
        flatten=pick("flatten", "two-stage", "reshape", "einops"),
        text=(0, 0) if attend == "cross" else (pick(0, 0, 1, 4, 9), pick(0, 0, 1, 4, 9)),
        join=join,
        history=pick(0, 0, 0, 1, 2) if join == "cat" and order == "fhw" and not alone else 0,
        rope="none" if attend == "mha" or order == "tiles" else rope,
        qkv=pick("separate", "chunk", "unbind", "heads-first"),
        attend=attend,
        steps=tuple(draw(st.lists(st.sampled_from(STEPS), max_size=2))),
        # Without the latent's dimensions in sight (a roll, an index) only the output tells the order of the tokens.
        unpatchify=order != "tiles" and (order != "fhw" or layout == "packed" or pick(True, True, False)),
    )


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


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(configs())
def test_a_random_dit_is_understood_or_left_alone(config):
    understood_or_left_alone(config)


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(configs())
def test_a_hundred_random_dits_are(config):
    understood_or_left_alone(config)


def test_tables_alone_do_not_show_that_frames_come_first():
    """Rows first; an index hides it, and text cut off by another index hides the output's order, too."""
    config = DitConfig(
        grid=(2, 3, 2), heads=1, order="hwf", text=(1, 0), rope="meshgrid", qkv="separate", steps=("select",)
    )
    torch._dynamo.reset()
    model = RandomDit(config).eval()
    (site,) = sites_of(capture(model, **model.inputs()))
    assert site.reason.code == "order_not_shown"


@pytest.mark.parametrize("join", ["cat", "dual"])
def test_rows_written_in_two_pieces_are_those_of_a_table(join):
    config = DitConfig(grid=(4, 3, 5), text=(4, 4), join=join, rope="inplace", steps=("write", "write"))
    assert verdict(config) == "exact"
    config = DitConfig(grid=(4, 3, 5), text=(1, 4), join=join, layout="packed", steps=("write", "write"))
    assert verdict(config) == "exact"


def understood_or_left_alone(config):
    found = verdict(config)
    event(found)
    assert not found.startswith("wrong"), config
    assert found == "exact" or not config.plain(), config
