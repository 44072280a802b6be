"""Rings: what is one attention of the local queries over all keys, and what only looks so. One process of a fake
group of four."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from support.graphs import capture, plan_each, sites_of, targets
from torch.testing._internal.distributed.fake_pg import FakeStore

from dynamicrad_compile import make_plan
from dynamicrad_compile.passes import Decisions, PassContext, PlannedSite, run_passes
from dynamicrad_compile.plans.shares import rows_of, whole_blocks
from dynamicrad_compile.plans.table import PlanTable

WORLD, RANK = 4, 2
GRID = (5, 4, 6)  # 120 tokens, 30 a process: shards begin within blocks of 16
LOCAL = 30


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    yield
    dist.destroy_process_group()


class Ring(torch.nn.Module):
    """Latents [B, C, f, h, w], cut after patching; attention as rings unroll it. `change` spoils it in one way."""

    def __init__(self, change="", text=0):
        super().__init__()
        self.change, self.text = change, text
        self.embed = torch.nn.Linear(4, 32)
        self.qkv = torch.nn.Linear(32, 96)

    def attend(self, q, k, v, scale=None):
        q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
        causal = self.change == "causal"
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out.permute(0, 2, 1, 3).float(), lse.permute(0, 2, 1).float().unsqueeze(-1)

    def forward(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2))
        if self.text:
            x = torch.cat([x.new_ones(len(x), self.text, x.shape[-1]).cumsum(1), x], 1)
        rank = dist.get_rank()
        x = x.chunk(WORLD, 1)[rank]
        q, k, v = (y.unflatten(2, (2, 16)) for y in self.qkv(x).chunk(3, -1))
        pair = (v, k) if self.change == "values first" else (k, v)
        sent = torch.cat([pair[0].flatten(), pair[1].flatten()]).contiguous()
        heard = funcol.all_gather_tensor(sent, gather_dim=0, group=dist.group.WORLD).chunk(WORLD)
        order = [(rank + i) % WORLD for i in range(1, WORLD)]
        if self.change == "one twice":
            order[1] = order[0]
        if self.change == "not all":
            order.pop()
        out, lse = self.attend(q, k, v)
        for i, other in enumerate(order):
            n = k.numel()
            key, value = heard[other][:n].reshape_as(k), heard[other][n:].reshape_as(v)
            scale = 0.5 if self.change == "scale" and i == 1 else None
            asked = q + 1 if self.change == "query" and i == 1 else q
            more, its = self.attend(asked, key, value, scale)
            if self.change == "double":
                more = torch.sub(more, out, alpha=0.5)
            gate = torch.sigmoid(its - lse) if self.change != "gate" else torch.sigmoid(lse - its)
            out = out - gate * (out - more)
            lse = lse - torch.nn.functional.logsigmoid(lse - its)
        out = out.to(q.dtype).flatten(2)
        return (out, lse) if self.change == "lse" else out


def captured(change="", **kwargs):
    torch.manual_seed(0)
    return capture(Ring(change), torch.randn(2, 4, *GRID), **kwargs)


def test_a_ring_is_one_attention_over_all_keys():
    ((context, gm),) = captured()
    (site,) = context.sites
    assert (site.role, site.grid, site.queries) == ("video_self_attention", GRID, (RANK * LOCAL, RANK * LOCAL + LOCAL))
    assert not site.replaced  # no plan: the ring is as it was, but for its collective
    assert sum("flash_attention_for_cpu" in name for name in targets(gm)) == WORLD
    assert sum("all_gather_into_tensor" in name for name in targets(gm)) == 2
    assert not any("scaled_dot_product_attention" in name for name in targets(gm))


@pytest.mark.parametrize(
    "change", ["values first", "one twice", "not all", "scale", "query", "gate", "causal", "double"]
)
def test_what_is_no_ring_stays_as_it_is(change):
    ((context, gm),) = captured(change, build_plan=lambda video: None)
    assert not context.rings
    assert not any(site.replaced for site in context.sites)
    assert sum("flash_attention_for_cpu" in name for name in targets(gm)) == WORLD - (change == "not all")


def flash(q, k, v, scale):
    """As diffusers' backend "_native_flash" calls it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, False, return_debug_mask=False, scale=scale
    )
    return found[0].transpose(1, 2), found[1].transpose(1, 2)


def cudnn(q, k, v, scale):
    """As diffusers' backend "_native_cudnn" calls it."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query=q, key=k, value=v, attn_bias=None, compute_log_sumexp=True, dropout_p=0.0, is_causal=False,
        return_debug_mask=False, scale=scale,
    )  # fmt: skip
    lse = lse.squeeze(-1) if lse.ndim == 4 else lse
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


@pytest.mark.parametrize("attention", [flash, cudnn])
@pytest.mark.parametrize("in_fp32", [True, False])
def test_rings_of_attention_that_gpus_have(attention, in_fp32):
    """Captured, and not run."""

    class OnGpus(Ring):
        def attend(self, q, k, v, scale=None):
            out, lse = attention(q, k, v, scale)
            lse = lse.unsqueeze(-1)
            return (out.float(), lse.float()) if in_fp32 else (out, lse)

    contexts = []

    def backend(gm, example_inputs):
        contexts.append(PassContext(plan_each(lambda video: None), None, False, example_inputs))
        run_passes(gm, contexts[0])
        return lambda *_: (torch.zeros(2, LOCAL, 32),)

    with torch.no_grad():
        torch.compile(OnGpus().bfloat16(), backend=backend)(torch.randn(2, 4, *GRID).bfloat16())
    ((site,),) = (context.sites for context in contexts)
    assert (site.role, site.grid, site.queries) == ("video_self_attention", GRID, (RANK * LOCAL, RANK * LOCAL + LOCAL))


def test_a_log_sum_exp_that_is_needed_keeps_the_ring():
    """Sparse attention gives another one."""
    ((context, _),) = captured("lse")
    assert not context.rings


@pytest.mark.parametrize("text", [40, 24, 80, 360])
@pytest.mark.parametrize("rank", range(WORLD))
def test_all_processes_say_the_same(text, rank):
    """Also one that has the prompt and nothing else: it asks with that, and all have the plan of all."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    whole = make_plan("radial", GRID, block_size=16, text_before=text).block_mask()
    ((context, _),) = capture(Ring(text=text), torch.randn(2, 4, *GRID))
    (site,) = context.sites
    n = (120 + text) // WORLD
    assert (site.role, site.grid, tuple(site.text)) == ("video_self_attention", GRID, (text, 0))
    assert site.queries == (rank * n, rank * n + n)
    video = context.videos[0]
    start, stop = (place // 16 for place in (video.queries[0], video.queries[1] + 15))
    assert torch.equal(planned(video).table.plan.block_mask(), whole[:, :, start:stop])


def planned(video):
    """The rows of a radial plan for the queries of this process."""
    asked = whole_blocks(video.queries, 16, video.keys)
    whole = make_plan("radial", GRID, block_size=16, text_before=video.text.before)
    return PlannedSite(video, rows_of(PlanTable.of(whole), asked), asked=asked)


def test_a_ring_that_is_replaced_goes_with_its_collective():
    graphs = []

    def decide(videos, conditions):
        return Decisions([planned(video) for video in videos])

    def backend(gm, example_inputs):
        context = PassContext(decide, None, False, example_inputs)
        run_passes(gm, context)
        graphs.append((context, gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(Ring(), backend=backend)(torch.randn(2, 4, *GRID))
    ((_, gm),) = graphs
    (site,) = sites_of(graphs)
    assert site.replaced
    names = targets(gm)
    assert not any("flash_attention_for_cpu" in name or "logsigmoid" in name for name in names)
    assert sum("all_gather_into_tensor" in name for name in names) == 2  # keys, and values
    rows = site.replacement.plan
    assert (rows.q_len, rows.kv_len, rows.num_q_blocks) == (48, 120, 3)  # tokens 60..90 lie in blocks 48..96
    whole = make_plan("radial", GRID, block_size=16).block_mask()
    assert torch.equal(rows.block_mask(), whole[:, :, 3:6])
