"""Pictures of one size lie in a sequence as frames do; what tells them apart, and that they stay dense."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, call, drad
from support.tokens import DIM, only
from zoo.models import _m

TEXT = dict(attention_head_dim=32, num_attention_heads=2, joint_attention_dim=16)


def ids(numbers, channels=3, h=6, w=8):
    """Numbers of picture, row and column, [pictures * h * w, channels]."""
    grid = torch.cartesian_prod(torch.tensor(numbers).float(), torch.arange(h).float(), torch.arange(w).float())
    return torch.nn.functional.pad(grid, (0, channels - 3))


def packed(numbers, channels=3):
    positions = ids(numbers, channels)
    return dict(
        hidden_states=torch.randn(1, len(positions), 4),
        encoder_hidden_states=torch.randn(1, 7, 16),
        timestep=torch.tensor([0.5]),
        guidance=torch.ones(1),
        img_ids=positions,
        txt_ids=torch.zeros(7, channels),
        return_dict=False,
    )


def flux(numbers):
    model = _m(
        "FluxTransformer2DModel", in_channels=4, num_layers=1, num_single_layers=1, axes_dims_rope=(8, 12, 12),
        pooled_projection_dim=8, guidance_embeds=True, **TEXT,
    )  # fmt: skip
    return model, {**packed(numbers), "pooled_projections": torch.randn(1, 8)}


def flux2(numbers):
    model = _m(
        "Flux2Transformer2DModel", in_channels=4, num_layers=1, num_single_layers=1, axes_dims_rope=(8, 8, 8, 8),
        timestep_guidance_channels=16, mlp_ratio=2.0, **TEXT,
    )  # fmt: skip
    return model, packed(numbers, 4)


def layers(pictures):
    """Numbers 0, 1, 2, ...; the last, which is the picture to be taken apart, has -1."""
    model = _m(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        axes_dims_rope=(8, 12, 12), use_layer3d_rope=True, use_additional_t_cond=True, **TEXT,
    )  # fmt: skip
    kwargs = packed(range(pictures))
    for name in ("guidance", "img_ids", "txt_ids"):
        del kwargs[name]
    kwargs["additional_t_cond"] = torch.zeros(1, dtype=torch.long)
    mask = torch.ones(1, 7, dtype=torch.bool)
    return model, {**kwargs, "encoder_hidden_states_mask": mask, "img_shapes": [[(1, 6, 8)] * pictures]}


@pytest.mark.parametrize(
    ("build", "numbers", "regional", "code"),
    [
        (flux, (0, 1, 1, 1), False, "pictures"),
        (flux, (0, 1, 2, 3), False, "frames_or_pictures"),
        (flux2, (0, 10, 20, 30), False, "pictures"),
        (flux2, (10, 20, 30), False, "pictures"),
        (layers, 5, True, "pictures"),
    ],
    ids=["kontext", "kontext numbered", "flux2", "flux2 references", "layers"],
)
def test_pictures_stay_dense(build, numbers, regional, code):
    model, kwargs = build(numbers)
    want = call(model, kwargs)
    if regional:
        model.compile_repeated_blocks(backend="dynamicrad", options=OPTIONS)
    compiled = model if regional else torch.compile(model, backend="dynamicrad", options=OPTIONS)
    assert torch.equal(call(compiled, kwargs)[0], want[0])
    sites = drad.report(compiled).sites
    assert {site.code for site in sites} == {code}
    assert "set `grid` if they are a video" in sites[0].advice


def test_a_given_grid_says_that_they_are_frames():
    def how(m, x, positions):
        return m.attend(x * positions.sum(-1)[:, None].cos())

    x, positions = torch.randn(1, 192, DIM), ids((0, 10, 20, 30))
    assert only(how, x, positions).reason.code == "pictures"
    site = only(how, x, positions, grid=(4, 6, 8))
    assert (site.reason, site.grid) == (None, (4, 6, 8))


def test_pictures_in_a_graph_that_was_compiled_for_a_video():
    class Packed(torch.nn.Module):
        def forward(self, x, positions):
            x = x * positions.sum(-1)[:, None].cos()
            return torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])

    model, x = Packed(), torch.randn(1, 240, 16)
    compiled = torch.compile(model, backend="dynamicrad", options={**OPTIONS, "sparsity": 0.6})
    with torch.no_grad():
        video = ids((0, 1, 2, 3, 4))
        assert not torch.allclose(compiled(x, video), model(x, video), atol=1e-3)
        for numbers in ((0, 1, 1, 1, 1), (0, 10, 20, 30, 40), (0, 1, 2, 3, -1)):
            pictures = ids(numbers)
            torch.testing.assert_close(compiled(x, pictures), model(x, pictures), rtol=1e-5, atol=1e-5)
    assert len(drad.report(compiled).graphs) == 1
