"""The attention op in the form that a TensorRT plugin can take, and the rewrite of a graph to it.

Before:  dynamicrad.block_sparse_attention(q, k, v, counts, indices, scale, block_q, block_kv, mask, weights)
After:   mean keys and values, kept blocks                                ordinary operations; only with weights
         dynamicrad.plugin_attention(q, k, v, counts, indices, mask, means..., scale, block_q, block_kv)

A plugin is one kernel, so what compensation computes beside the kernel becomes part of the graph, in operations that
TensorRT has: it has no scatter that adds, and no bit shifts. All of this needs no TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from ...kernels import moments_op as _registers_the_ops  # noqa: F401
from ...kernels.attention_arguments import Attention
from ...kernels.blocks import cdiv, valid_counts
from ...kernels.checks import DTYPES, MAX_HEAD_DIM
from ...kernels.means import Means
from ...kernels.merge_states import merged
from ...kernels.moments import growth_and_shift, moments_of
from ...runtime.account import record

ATTENTION = torch.ops.dynamicrad.block_sparse_attention.default
SECOND_ORDER = torch.ops.dynamicrad.second_order_attention.default


@torch.library.custom_op("dynamicrad::plugin_attention", mutates_args=())
def plugin_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    kv_mask: Tensor | None,
    mean_k: Tensor | None,
    mean_v: Tensor | None,
    n_valid: Tensor | None,
    weight: Tensor | None,
    kept: Tensor | None,
    scale: float,
    block_q: int,
    block_kv: int,
) -> tuple[Tensor, Tensor]:
    """The attention op with all that compensation needs given to it.

    q, k, v, kv_counts, kv_indices as of block_sparse_attention; kv_mask int32 [B or 1, Sk], 0 for a hidden key.
    mean_k, mean_v [B, Hkv, Mk, D] in the dtype of k, n_valid int32 [B or 1, Mk], weight fp32 [B or 1] and kept
    int32 [P, H', Mq, ceil(Mk / 32)] (see kernels.means): all or none. Rows need not read what `kept` says they keep.
    Returns out [B, H, Sq, D] in the dtype of q and lse fp32 [B, H, Sq].
    """
    mask = None if kv_mask is None else kv_mask != 0
    if q.device.type == "cpu":
        out, lse = ATTENTION(q, k, v, kv_counts, kv_indices, scale, block_q, block_kv, mask)
        if kept is None:
            return out, lse
        held = ((kept.unsqueeze(-1) >> torch.arange(32, device=q.device)) & 1).flatten(3)
        held = held.narrow(-1, 0, cdiv(k.shape[2], block_kv))
        tables = held.sum(-1, dtype=torch.int32), held.argsort(-1, descending=True).int()
        means = torch.ops.dynamicrad.means_attention(q, k, v, *tables, scale, block_q, block_kv, mask, weight)
        return merged(out, lse, *means)
    from ...kernels.attention_triton import launch_forward

    means = None
    if mean_k is not None and mean_v is not None and n_valid is not None and weight is not None and kept is not None:
        means = Means(mean_k.contiguous(), mean_v.contiguous(), n_valid.contiguous(), weight, kept.contiguous())
    return launch_forward(Attention(q, k, v, kv_counts, kv_indices, scale, block_q, block_kv, mask), means)


@plugin_attention.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


PLUGIN_ATTENTION = torch.ops.dynamicrad.plugin_attention.default

_FILLED = {torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default, torch.empty_like: torch.zeros_like}
"""Torch-TensorRT has no empty tensors of open sizes; a rotary embedding that is written in place begins with one."""


def attention_for_plugin(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """block_sparse_attention through `plugin_attention` if that can take it; arguments and results of the op."""
    a = Attention(*args, **kwargs)
    if refusal(a):
        out, lse = ATTENTION(*a)
    else:
        out, lse = PLUGIN_ATTENTION(*plugin_inputs(a), a.factor, a.block_q, a.block_kv)
    return out, lse


def second_order_for_plugin(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """second_order_attention through `plugin_attention` if that can take it; arguments and results of the op.

    Two plugins, for the kept blocks and for the means of the dropped ones; what is between them is TensorRT's own.
    """
    a = Attention(*args, **kwargs)
    if refusal(a):
        out, lse = SECOND_ORDER(*a)
        return out, lse
    kept, kept_lse = attention_for_plugin(*a._replace(compensate=None))
    return with_second_order(a, kept, kept_lse, PLUGIN_ATTENTION)


def with_second_order(
    a: Attention, kept: Tensor, kept_lse: Tensor, plugin: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """(out, lse) of second_order_attention from those of its kept blocks; plugin: `plugin_attention`, for means."""
    inputs = list(plugin_inputs(a))
    inputs[3] = torch.zeros_like(a.kv_counts)  # reads no block
    dropped, dropped_lse = plugin(*inputs, a.factor, a.block_q, a.block_kv)
    growth, shift = growth_and_shift(a, moments_of(a, kept_flags(a.kv_counts, a.kv_indices, a.num_kv_blocks) > 0))
    dropped = (dropped.float() + shift).to(a.q.dtype)
    return merged(kept, kept_lse, dropped, dropped_lse + growth.log().squeeze(-1))


def plugin_inputs(a: Attention) -> tuple[Tensor | None, ...]:
    """The eleven tensors of `plugin_attention`."""
    mask = None if a.kv_mask is None else a.kv_mask.to(torch.int32)
    means: tuple[Tensor | None, ...] = (None,) * 5
    if a.compensate is not None:
        n_valid = valid_counts(a.k.shape[2], a.block_kv, a.kv_mask, a.k.device)
        keys, values = (block_means(x, a.block_kv, n_valid, a.kv_mask) for x in (a.k, a.v))
        means = (keys, values, n_valid, a.compensate, kept_bits(a.kv_counts, a.kv_indices, a.num_kv_blocks))
    return a.q, a.k, a.v, a.kv_counts, a.kv_indices, mask, *means


def block_means(x: Tensor, block: int, n_valid: Tensor, kv_mask: Tensor | None) -> Tensor:
    """Mean of each block of x [B, H, S, D] over its valid tokens, [B, H, M, D]; what pool_blocks returns.

    n_valid: int32 [B or 1, M] of valid_counts; kv_mask: bool [B or 1, S] or None.
    """
    batch, heads, length, dim = x.shape
    n_blocks = cdiv(length, block)
    if kv_mask is not None:
        x = torch.where(kv_mask.unsqueeze(1).unsqueeze(-1), x, 0)
    x = pad(x, (0, 0, 0, n_blocks * block - length)).reshape(batch, heads, n_blocks, block, dim)
    count = n_valid.clamp(min=1).to(torch.float32).unsqueeze(1).unsqueeze(-1)
    return (x.to(torch.float32).sum(3) / count).to(x.dtype)


def kept_flags(kv_counts: Tensor, kv_indices: Tensor, m_k: int) -> Tensor:
    """int32 [P, H', Mq, Mk] of counts [P, H', Mq] and indices [P, H', Mq, W]: 1 where a block is read, else 0."""
    active = torch.arange(kv_indices.shape[-1], device=kv_indices.device) < kv_counts.unsqueeze(-1)
    ids = torch.where(active, kv_indices, m_k).to(torch.int64)  # unused places go to a column behind the last block
    flags = torch.zeros(*kv_counts.shape, m_k + 1, dtype=torch.int32, device=kv_counts.device)
    flags = flags.scatter(-1, ids, 1).narrow(-1, 0, m_k)
    return torch.where((kv_counts >= m_k).unsqueeze(-1), 1, flags)


def kept_bits(kv_counts: Tensor, kv_indices: Tensor, m_k: int) -> Tensor:
    """What kernels.means.kept_bits returns, without a scatter that adds and without shifts.

    int32 [P, H', Mq, ceil(Mk / 32)] of counts [P, H', Mq] and indices [P, H', Mq, W]; bits behind the last block
    are 0 here.
    """
    words = cdiv(m_k, 32)
    packed = pad(kept_flags(kv_counts, kv_indices, m_k), (0, 32 * words - m_k)).reshape(*kv_counts.shape, words, 32)
    for width in (1, 2, 4, 8, 16):  # words of `width` bits become words of twice as many
        low, high = packed.unflatten(-1, (-1, 2)).unbind(-1)
        if width == 16:
            high = torch.where(high >= 1 << 15, high - (1 << 16), high)  # the sign bit, without an overflow
        packed = low + high * (1 << width)
    return packed.squeeze(-1)


def refusal(a: Attention) -> str:
    """Why a plugin can't take an attention; empty if it can."""
    if a.qk_int8:
        return "the plugin has no int8 products"
    if a.q.dtype not in DTYPES:
        return f"dtype {a.q.dtype} is none of float16, bfloat16 and float32"
    for name, block in (("query", a.block_q), ("key", a.block_kv)):
        if block % 16 or not 16 <= block <= 256:
            return f"{name} blocks of {block} tokens: the kernel takes multiples of 16 up to 256"
    for name, size in (("heads", a.q.shape[1]), ("key heads", a.k.shape[1]), ("head_dim", a.q.shape[3])):
        if not isinstance(size, int):
            return f"the number of {name} is not fixed: {size}"
    if a.q.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {a.q.shape[3]} is above {MAX_HEAD_DIM}"
    return ""


def lower(
    gm: fx.GraphModule,
    attention: Callable[..., Any] = attention_for_plugin,
    second_order: Callable[..., Any] = second_order_for_plugin,
) -> int:
    """Give each attention of a rewritten graph the form that a plugin takes, in place; returns their number.

    attention, second_order: what stands in the graph for the ops, with their arguments.
    What only counts calls for the report is taken out: an engine keeps no account of them.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is record:
            gm.graph.erase_node(node)
        elif node.op == "call_function" and node.target in (ATTENTION, SECOND_ORDER):
            node.target = attention if node.target is ATTENTION else second_order
            count += 1
        elif node.op == "call_function" and node.target in _FILLED:
            node.target = _FILLED[node.target]
    gm.graph.lint()
    gm.recompile()
    return count


def has_state(gm: fx.GraphModule) -> bool:
    """Whether the graph changes inputs that we added to it (see `passes/writing/buffers.py`)."""
    added = [n for n in gm.graph.find_nodes(op="placeholder") if str(n.target).startswith("dynamicrad_")]
    return any(node.users for node in added)
