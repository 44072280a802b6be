"""Heads that processes share, dealt in another order: equal to one process, and left alone where the way is another."""

from __future__ import annotations

import pytest
import torch
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from support.exchanges import fake_group, run_together
from support.graphs import plan_each, relative_error
from torch import nn

import dynamicrad_compile as drad
from dynamicrad_compile.passes import Decisions, PassContext, PlannedSite, run_passes
from dynamicrad_compile.plans.shares import heads_of
from dynamicrad_compile.plans.table import PlanTable

HEADS, DIM, BLOCK, TOKENS = 4, 8, 16, 96  # of a video of 4 x 4 x 6
ORDER = (2, 0, 3, 1)


def exchanged(x, number):
    splits = [x.shape[0] // number] * number
    return functional.wait_tensor(functional.all_to_all_single(x, splits, splits, "0"))


def flat(x, number):
    return exchanged(x.flatten(), number).reshape(x.shape)


class Diffusers:
    """The exchange of diffusers' TemplatedUlyssesAttention."""

    def __init__(self, number):
        self.number = number

    def there(self, x):  # [B, S / n, H, D]
        b, s, h, d = x.shape
        sent = x.reshape(b, s, self.number, h // self.number, d).permute(2, 1, 0, 3, 4).contiguous()
        return flat(sent, self.number).flatten(0, 1).permute(1, 0, 2, 3).contiguous().permute(0, 2, 1, 3)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def back(self, out):  # [B, H / n, S, D]
        b, h, s, d = out.shape
        sent = out.permute(0, 2, 1, 3).reshape(b, self.number, s // self.number, h, d).permute(1, 3, 0, 2, 4)
        return flat(sent.contiguous(), self.number).flatten(0, 1).permute(1, 2, 0, 3).contiguous()

    def __call__(self, q, k, v):
        return self.back(self.attend(self.there(q), self.there(k), self.there(v)))


class Rows(Diffusers):
    """The exchange of rows, as where processes may have unequal ones."""

    def there(self, x):
        b, s, h, d = x.shape
        sent = x.reshape(b, s, self.number, h // self.number, d).permute(2, 1, 0, 3, 4).contiguous().flatten(0, 1)
        return exchanged(sent, self.number).reshape(self.number, s, b, -1, d).flatten(0, 1).permute(1, 2, 0, 3)

    def back(self, out):
        b, h, _, d = out.shape
        heard = exchanged(out.permute(2, 0, 1, 3).contiguous(), self.number)
        return heard.reshape(self.number, -1, b, h, d).permute(2, 1, 0, 3, 4).reshape(b, -1, self.number * h, d)


class SwappedDimensions(Diffusers):
    """The exchange of diffusers' SeqAllToAllDim."""

    def there(self, x):
        b, s, h, d = x.shape
        sent = x.reshape(b, s, self.number, h // self.number, d).transpose(0, 2).contiguous()
        heard = flat(sent, self.number).reshape(s * self.number, b, -1, d).permute(1, 0, 2, 3).contiguous()
        return heard.transpose(1, 2)

    def back(self, out):
        b, h, _, d = out.shape
        sent = out.transpose(1, 2).reshape(b, self.number, -1, h, d).permute(1, 3, 2, 0, 4)
        sent = sent.reshape(self.number, h, -1, b, d)
        return flat(sent, self.number).reshape(h * self.number, -1, b, d).transpose(0, 2).contiguous()


class ReadTwice(Diffusers):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v) + 0 * k.mean()


class Scaled(Diffusers):
    def __call__(self, q, k, v):
        return self.back(self.attend(self.there(q), self.there(k) * 1.0, self.there(v)))


class Gated(Diffusers):
    def attend(self, q, k, v):
        return super().attend(q, k, v) * 1.0


class FewerKeys(Diffusers):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def __call__(self, q, k, v):
        return super().__call__(q, k[:, :, ::2], v[:, :, ::2])


class Ulysses(nn.Module):
    """One attention over a patch embedding whose tokens are sharded."""

    def __init__(self, exchange, rank, number):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(3, HEADS * DIM, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.exchange, self.rank, self.number = exchange, rank, number

    def operands(self, latents):
        tokens = self.patch(latents).flatten(2).transpose(1, 2)
        local = tokens.chunk(self.number, 1)[self.rank]
        return [x.unflatten(-1, (HEADS, DIM)) for x in self.qkv(local).chunk(3, -1)]

    def forward(self, latents):
        return self.exchange(*self.operands(latents)).flatten(2)


def latents():
    return torch.randn(2, 3, 4, 8, 12, generator=torch.Generator().manual_seed(1))


def mask_of_heads():
    blocks = TOKENS // BLOCK
    kept = torch.rand(HEADS, blocks, blocks, generator=torch.Generator().manual_seed(2)) < 0.4
    return kept | torch.eye(blocks, dtype=torch.bool)


def dealt(video):
    """A process's share of a plan whose heads are dealt in ORDER."""
    plan = drad.BlockPlan.from_mask(mask_of_heads(), block_q=BLOCK, block_kv=BLOCK, q_len=TOKENS, kv_len=TOKENS)
    own = ORDER[slice(*video.heads)]
    return PlannedSite(video, PlanTable.of(heads_of(plan, own)), head_order=ORDER)


def on_rank(form, rank, number, policy):
    """(context, graph module, inputs) of one process."""
    found = []

    def backend(gm, inputs):
        context = PassContext(policy, example_inputs=inputs)
        run_passes(gm, context)
        found.append((context, gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    with fake_group(rank, number), torch.no_grad():
        torch.compile(Ulysses(form(number), rank, number), backend=backend, fullgraph=True)(latents())
    return found[0]


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("form", [Diffusers, Rows, SwappedDimensions])
def test_as_one_process(form, number):
    policy = lambda videos, conditions: Decisions([dealt(video) for video in videos])  # noqa: E731
    ranks = [on_rank(form, rank, number, policy) for rank in range(number)]
    for context, gm, _ in ranks:
        assert [site.replaced for site in context.sites] == [True]

        assert sum(node.target is torch.index_select for node in gm.graph.nodes) == 4
    q, k, v = (x.transpose(1, 2) for x in Ulysses(form(1), 0, 1).operands(latents()))
    allowed = mask_of_heads().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2)
    got = torch.cat(run_together([(gm, inputs) for _, gm, inputs in ranks]), 1)
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("form", [ReadTwice, Scaled, Gated, FewerKeys])
def test_no_other_way_is_taken(form):
    context, gm, _ = on_rank(form, 1, 2, plan_each(lambda video: None))
    (video,) = context.videos
    assert video.exchange is None
    assert video.all_heads == HEADS
    assert not any(node.target is torch.index_select for node in gm.graph.nodes)
