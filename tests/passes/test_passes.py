"""Each pass on small graphs: what it does, and the near misses that it must leave alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import capture, plan_each, relative_error, sites_of, targets
from torch import nn

import dynamicrad_compile as drad

OP = "dynamicrad.block_sparse_attention.default"


def plan_everything(site):
    return drad.make_plan("dense", site.grid, 16, *site.text)


class TinyDiT(nn.Module):
    """Patch embedding, one attention, and switches for what may surround them."""

    def __init__(self, heads=2, dim=16, **how):
        super().__init__()
        self.heads, self.how = heads, how
        self.patch = nn.Conv3d(3, heads * dim, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(heads * dim, 3 * heads * dim)

    def forward(self, latents, text=None):
        x = self.patch(latents)
        if self.how.get("order") == "hwf":
            x = x.permute(0, 1, 3, 4, 2)
        x = x.flatten(2).transpose(1, 2)
        if text is not None:
            x = torch.cat([text, x], 1) if self.how.get("text_first") else torch.cat([x, text], 1)
        if self.how.get("flip"):
            x = x.flip(1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        how = dict(self.how.get("sdpa", {}))
        if "mask" in self.how:
            how["attn_mask"] = self.how["mask"](x.shape[1])
        return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2)


LATENTS = torch.randn(1, 3, 4, 6, 10)  # 4 x 3 x 5 = 60 tokens


def only_site(model, *args, **kwargs):
    (site,) = sites_of(capture(model, *args, **kwargs))
    return site


@pytest.mark.parametrize(
    "spelling",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(query=q, value=v, key=k, attn_mask=None, scale=0.3),
    ],
    ids=["functional", "c-nn", "aten", "keywords"],
)
def test_find_attention_reads_every_spelling(spelling):
    q, k, v = torch.randn(3, 1, 2, 10, 8)
    site = only_site(spelling, q, k, v)
    names = [node.name.strip("l_") for node in (site.call.query, site.call.key, site.call.value)]
    assert names == ["q", "k", "v"]
    assert (site.q_shape, site.kv_length) == ((1, 2, 10, 8), 10)
    assert site.call.mask is None


def test_find_attention_leaves_linear_attention():
    captured = capture(lambda q, k, v: q @ (k.transpose(-1, -2) @ v), *torch.randn(3, 1, 2, 10, 8))
    assert not sites_of(captured)


def test_trace_grid_of_a_patch_embedding():
    site = only_site(TinyDiT(), LATENTS)
    assert (site.role, site.grid, tuple(site.text), site.reason) == (
        "video_self_attention",
        (4, 3, 5),
        (0, 0),
        None,
    )


@pytest.mark.parametrize("text_first", [True, False])
def test_trace_grid_with_text(text_first):
    site = only_site(TinyDiT(text_first=text_first), LATENTS, torch.randn(1, 7, 32))
    assert (site.grid, tuple(site.text)) == ((4, 3, 5), (7, 0) if text_first else (0, 7))


def test_trace_grid_through_in_place_writes_and_windows_of_a_buffer():
    def rope_in_place(latents, weight):
        x = F.conv3d(latents, weight, stride=(1, 2, 2)).flatten(2).transpose(1, 2)[:, None]
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * 2
        out[..., 1::2] = x[..., 1::2] * 3
        return F.scaled_dot_product_attention(out, out, x)

    site = only_site(rope_in_place, LATENTS, torch.randn(8, 3, 1, 2, 2))
    assert site.grid == (4, 3, 5)


def test_trace_grid_of_packed_latents_by_the_rope_table():
    def packed(tokens, f, h, w):
        grid = torch.stack(torch.meshgrid(torch.arange(f), torch.arange(h), torch.arange(w), indexing="ij"))
        table = grid.flatten(1).sum(0).float().cos()[None, :, None]
        q = (tokens * table)[:, None]
        return F.scaled_dot_product_attention(q, q, tokens[:, None])

    site = only_site(packed, torch.randn(1, 60, 8), 4, 3, 5)
    assert site.grid == (4, 3, 5)


def test_trace_grid_survives_operations_it_does_not_know():
    class Odd(TinyDiT):
        def forward(self, latents):
            return super().forward(latents + torch.linalg.svdvals(latents[0, 0, 0])[0])

    assert only_site(Odd(), LATENTS).grid == (4, 3, 5)


@pytest.mark.parametrize(
    ("model", "args", "code"),
    [
        (TinyDiT(order="hwf"), (LATENTS,), "axes_swapped"),
        (TinyDiT(flip=True), (LATENTS,), "reversed_order"),
        (TinyDiT(), (torch.randn(1, 3, 1, 6, 10),), "no_grid"),
        (TinyDiT(sdpa=dict(is_causal=True)), (LATENTS,), "causal"),
        (TinyDiT(sdpa=dict(dropout_p=0.5)), (LATENTS,), "dropout"),
        (TinyDiT(mask=lambda n: torch.ones(n, n, dtype=torch.bool).tril()), (LATENTS,), "mask_groups"),
        (TinyDiT(mask=lambda n: torch.zeros(1, 1, 1, n)), (LATENTS,), "additive_mask"),
        (TinyDiT(heads=1, dim=320), (LATENTS,), "head_dim"),
    ],
    ids=["order", "flip", "image", "causal", "dropout", "dense-mask", "additive-mask", "head-dim"],
)
def test_classify_sites_leaves_near_misses_dense(model, args, code):
    ((context, gm),) = capture(model, *args, build_plan=plan_everything)
    assert context.sites[0].reason.code == code
    assert not context.sites[0].replaced
    assert OP not in targets(gm)


def test_classify_sites_tells_cross_attention():
    def cross(latents, weight, text):
        q = F.conv3d(latents, weight, stride=(1, 2, 2)).flatten(2).transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(q, text, text)

    site = only_site(cross, LATENTS, torch.randn(8, 3, 1, 2, 2), torch.randn(1, 1, 60, 8))
    assert site.role == "cross_attention"


def test_classify_sites_finds_queries_among_more_keys():
    def cached(latents, weight, cache):
        x = F.conv3d(latents, weight, stride=(1, 2, 2)).flatten(2).transpose(1, 2)[:, None]
        keys = torch.cat([cache, x], 2)
        return F.scaled_dot_product_attention(x, keys, keys)

    site = only_site(cached, LATENTS, torch.randn(8, 3, 1, 2, 2), torch.randn(1, 1, 9, 8))
    tokens = site.q_shape[2]
    assert (site.role, site.reason) == ("video_self_attention", None)
    assert (site.queries, tuple(site.text), tuple(site.asked_text)) == ((9, 9 + tokens), (9, 0), (0, 0))


def test_classify_sites_leaves_other_tokens_in_the_same_places():
    def other(latents, others, weight, cache):
        x = F.conv3d(latents, weight, stride=(1, 2, 2)).flatten(2).transpose(1, 2)[:, None]
        y = F.conv3d(others, weight, stride=(1, 2, 2)).flatten(2).transpose(1, 2)[:, None] + 0 * x
        keys = torch.cat([cache, y], 2)
        return F.scaled_dot_product_attention(x, keys, keys)

    site = only_site(other, LATENTS, LATENTS.flip(1), torch.randn(8, 3, 1, 2, 2), torch.randn(1, 1, 9, 8))
    assert (site.role, site.reason.code, site.queries) == ("video_self_attention", "more_keys", None)


@pytest.mark.parametrize(
    "mask", [None, lambda n: (torch.arange(n) < n - 4)[None, None, None]], ids=["plain", "padding"]
)
def test_replace_attention_keeps_the_result(mask):
    model = TinyDiT(**({"mask": mask} if mask else {}), text_first=False)
    text = torch.randn(1, 7, 32)
    ((context, gm),) = capture(model, LATENTS, text, build_plan=plan_everything)
    assert context.sites[0].replaced
    assert targets(gm).count(OP) == 1
    assert not any("scaled_dot" in target for target in targets(gm))
    with torch.no_grad():
        sparse = torch.compile(
            model, backend="dynamicrad",
            options=dict(sparsity=0.0, block_size=16, min_tokens=0, inner="eager"),
        )(LATENTS, text)  # fmt: skip
        assert relative_error(sparse, model(LATENTS, text)) < 1e-5


def test_replace_attention_shares_one_plan_and_is_done_once():
    class Two(TinyDiT):
        def forward(self, latents):
            q = self.patch(latents).flatten(2).transpose(1, 2)[:, None]
            q = F.scaled_dot_product_attention(q, q, q)
            return F.scaled_dot_product_attention(q, q, q)

    plan = drad.make_plan("dense", (4, 3, 5), 16)
    ((context, gm),) = capture(Two(), LATENTS, build_plan=lambda site: plan)
    assert sum(site.replaced for site in context.sites) == 2
    assert len([name for name, _ in gm.named_buffers() if "dynamicrad_plan" in name]) == 2
    from dynamicrad_compile.passes import PassContext, run_passes

    again = PassContext(plan_each(lambda site: plan))
    assert run_passes(gm, again) == 0
    assert not again.sites


def test_replaced_output_keeps_its_memory_order():
    """SDPA's output lies as [B, S, H, D] where the query does; a later `view` relies on it."""

    class Viewed(TinyDiT):
        def forward(self, latents):
            x = self.patch(latents).flatten(2).transpose(1, 2)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return out.view(1, -1, x.shape[-1])

    ((context, _),) = capture(Viewed(), LATENTS, build_plan=plan_everything)
    assert context.sites[0].replaced
