"""More diffusers classes, and models as the original repositories write them: exact, or dense with a reason."""

from __future__ import annotations

import pytest
from support.conditioned import check_conditions
from support.graphs import capture, sites_of
from support.marks import fast
from zoo.more import ZOO_MORE
from zoo.original import ZOO_ORIGINAL

from dynamicrad_compile.capturing import capturing

# Masks or caches that a plan can't express yet, tiled token orders, grids lost at graph breaks or in packed buffers.
DENSE = {
    "anyflow_far_train",
    "wan_animate2_extract",
    "wan_animate2_cached",
    "wan_disabled",
    "wan_disabled_padded",
    "wan_wrapper",
    "kandinsky5_nabla",
    "kandinsky6_sr",
}
CASES = {**ZOO_MORE, **ZOO_ORIGINAL}
# Graphs that take seconds to capture, and whose kind of sequence a smaller model here or in the other zoo has too.
LARGE = {
    "anyflow_far_train",
    "chronoedit",
    "consisid",
    "hunyuan_framepack",
    "hunyuan_framepack_b2",
    "kandinsky5_nabla",
    "kandinsky6_sr",
    "motif_video_decoder",
    "opensora_stdit",
    "sana_wm",
    "wan_animate2_extract",
    "wan_animate2_cached",
    "kandinsky6",
    "neg_hunyuan_image",
    "joyimage_edit_plus",
    "sana_wm_cam",
    "ltx2_pipeline",
}


@pytest.mark.parametrize("name", fast(CASES, CASES.keys() - LARGE))
def test_exact_or_dense_with_a_reason(name):
    model, kwargs, expected = CASES[name]()
    with capturing():
        captured = capture(model, **kwargs)
    sites = sites_of(captured)
    assert sites
    planned = [site for site in sites if site.role == "video_self_attention" and not site.reason]
    for site in planned:
        assert site.grid == expected["grid"]
        if not site.data_dependent:
            assert tuple(site.asked_text) == (expected["n_text_before"], expected["n_text_after"])
    wanted = 0 if name in DENSE else expected["n_video_self_attn_nodes"]
    assert len(planned) == wanted
    assert all(site.reason for site in sites if site not in planned)
    check_conditions(name, captured)


@pytest.mark.parametrize("sizes", [(5, 8, 6), (9, 6, 8), (6, 6, 8), (6, 8, 6), (6, 6, 6)], ids=str)
def test_rows_of_one_table_are_those_of_frames_rows_and_columns(sizes):
    model, kwargs, _ = CASES["wan_loop"](*sizes)
    sites = [site for site in sites_of(capture(model, **kwargs)) if site.role != "cross_attention"]
    assert {(site.grid, site.reason) for site in sites} == {(sizes, None)}
