"""The table of operators: what the passes know of each, one entry for each canonical name (see names.py).

A new operator is one entry here. One that has none, and is not elementwise, gives tensors with axes of their own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from .entry import Operator
from .names import canonical, op_name, operator_name
from .rules import (
    buffers,
    collectives,
    hiding,
    masks,
    numbers,
    orders,
    patches,
    pieces,
    pointwise,
    products,
    ranges,
    streams,
    views,
)

UNKNOWN = Operator()
ELEMENTWISE = Operator(labels=pointwise.broadcast, stream=streams.elementwise)

_LIKE_FIRST = Operator(labels=pointwise.like_first)
_SAME = Operator(labels=pointwise.like_first, range=ranges.kept, mask=masks.same, number=numbers.kept, view=True)
_REGROUP = Operator(labels=views.view, range=ranges.view, mask=masks.regroup, view=True)
_BUFFER = Operator(labels=buffers.new_buffer, new=True)
_SPLIT = Operator(labels=pieces.split, stream=streams.rows(dim_at=2), view=True)
_CONVOLUTION = Operator(labels=patches.convolution, stream=streams.projection)
_VIEW = Operator(view=True)

_GROUPS: list[tuple[str, Operator]] = [
    # the same elements in the same places
    ("same", _SAME),
    ("clone", dataclasses.replace(_SAME, new=True)),
    ("cast", dataclasses.replace(_SAME, number=numbers.cast)),
    ("resolve_conj resolve_neg _conj", dataclasses.replace(_LIKE_FIRST, view=True)),
    # elementwise; without an entry, those that torch says are elementwise are ELEMENTWISE
    ("polar complex", ELEMENTWISE),
    ("add", dataclasses.replace(ELEMENTWISE, range=ranges.shifted(1), hides=hiding.combined)),
    ("sub", dataclasses.replace(ELEMENTWISE, range=ranges.shifted(-1))),
    ("mul", dataclasses.replace(ELEMENTWISE, hides=hiding.scaled)),
    ("minimum", dataclasses.replace(ELEMENTWISE, hides=hiding.combined)),
    ("where", dataclasses.replace(ELEMENTWISE, hides=hiding.where)),
    ("masked_fill", dataclasses.replace(ELEMENTWISE, hides=hiding.masked_fill)),
    ("logical_not", dataclasses.replace(ELEMENTWISE, mask=masks.same, negates=True)),
    ("sqrt", dataclasses.replace(ELEMENTWISE, number=numbers.function(math.sqrt))),
    ("rsqrt", dataclasses.replace(ELEMENTWISE, number=numbers.function(lambda x: x**-0.5))),
    ("pow", dataclasses.replace(ELEMENTWISE, number=numbers.function(pow))),
    # elements depend on their neighbours, or on chance, and stay where they are
    ("softmax _log_softmax cumsum native_dropout triu tril rand_like randn_like index_fill zero "
     "normal uniform bernoulli random exponential", _LIKE_FIRST),
    ("fill _conj_physical", dataclasses.replace(_LIKE_FIRST, stream=streams.elementwise)),
    ("view_as_complex view_as_real", Operator(labels=pointwise.keep_sizes, view=True)),
    ("native_layer_norm native_group_norm _fused_rms_norm rms_norm native_batch_norm _native_batch_norm_legit "
     "cudnn_batch_norm glu", Operator(labels=pointwise.keep_sizes)),
    ("sum mean amax amin any all var std max min prod logsumexp argmax argmin var_mean std_mean",
     Operator(labels=pointwise.reduce)),
    ("linalg_vector_norm norm", Operator(labels=pointwise.norm)),
    # views: the same elements regrouped, transposed or repeated
    ("reshape", _REGROUP),
    ("view", dataclasses.replace(_REGROUP, labels=views.view_dtype)),
    ("permute", Operator(labels=views.permute, order=orders.permute, view=True)),
    ("transpose", Operator(labels=views.transpose, order=orders.transpose, view=True)),
    ("t", Operator(labels=views.t, order=orders.matrix, view=True)),
    ("mT", Operator(order=orders.matrix, view=True)),
    ("unsqueeze", Operator(labels=views.unsqueeze, range=ranges.unsqueeze, mask=masks.regroup, view=True)),
    ("squeeze", Operator(labels=views.squeeze, mask=masks.regroup, view=True)),
    ("expand", Operator(labels=views.expand, range=ranges.expand, mask=masks.repeat, view=True)),
    ("repeat", Operator(labels=views.repeat, mask=masks.repeat)),
    ("repeat_interleave", Operator(mask=masks.repeat_interleave)),
    ("flip", Operator(labels=views.flip)),
    ("movedim moveaxis diagonal unfold as_strided real imag T data", _VIEW),
    # pieces of a dimension, and dimensions made of pieces
    ("slice", Operator(
        labels=pieces.slice_, stream=streams.rows(dim_at=1, start_at=2), range=ranges.slice_, mask=masks.whole,
        view=True,
    )),
    ("select", Operator(labels=pieces.select, stream=streams.rows(dim_at=1, start_at=2), view=True)),
    ("unbind", Operator(labels=pieces.unbind, stream=streams.rows(dim_at=1), view=True)),
    ("split split_with_sizes", _SPLIT),
    ("unsafe_split unsafe_split_with_sizes", dataclasses.replace(_SPLIT, view=False)),
    ("getitem", Operator(mask=masks.getitem, view=True)),
    ("narrow chunk tensor_split hsplit vsplit dsplit", _VIEW),
    ("cat", Operator(labels=pieces.cat, stream=streams.cat)),
    ("stack", Operator(labels=pieces.stack, stream=streams.stack)),
    ("constant_pad_nd", Operator(labels=pieces.pad, stream=streams.padded)),
    # new tensors
    ("empty empty_like empty_strided new_empty new_empty_strided", _BUFFER),
    ("zeros zeros_like new_zeros", dataclasses.replace(_BUFFER, number=numbers.always(0.0))),
    ("ones ones_like new_ones", dataclasses.replace(_BUFFER, number=numbers.always(1.0))),
    ("full full_like", dataclasses.replace(_BUFFER, number=numbers.fill(1))),
    ("new_full", dataclasses.replace(_BUFFER, number=numbers.fill(2))),
    ("tensor scalar_tensor", Operator(number=numbers.kept)),
    ("arange", Operator(range=ranges.arange)),
    # rows written
    ("copy", Operator(labels=buffers.write, stream=streams.copied)),
    ("index_put", Operator(labels=buffers.index_put, stream=streams.row_write)),
    ("index_copy", Operator(labels=buffers.index_copy, stream=streams.row_write)),
    ("scatter", Operator(labels=buffers.scatter, stream=streams.row_write)),
    ("scatter_add index_add", Operator(labels=buffers.scatter_add, stream=streams.row_write)),
    ("slice_scatter", Operator(labels=buffers.slice_scatter, stream=streams.row_write)),
    ("select_scatter", Operator(labels=buffers.select_scatter, stream=streams.row_write)),
    ("masked_scatter", Operator(stream=streams.row_write)),
    # rows picked
    ("embedding", Operator(labels=products.embedding, stream=streams.of_last)),
    ("index_select", Operator(labels=products.index_select, stream=streams.picked)),
    ("index", Operator(labels=products.index, stream=streams.picked)),
    ("gather", Operator(stream=streams.picked)),
    # ComfyUI's kernel library: queries, keys or both turned by a table of RoPE
    ("comfy_kitchen::apply_rope comfy_kitchen::apply_rope1 comfy_kitchen::apply_rope_split_half "
     "comfy_kitchen::apply_rope_split_half1", Operator(labels=pointwise.like_each, stream=streams.of_each)),
    # what processes exchange
    ("_c10d_functional::wait_tensor", _SAME),
    ("_c10d_functional::all_to_all_single _c10d_functional_autograd::all_to_all_single",
     Operator(labels=collectives.all_to_all)),
    ("_c10d_functional::all_gather_into_tensor _c10d_functional_autograd::all_gather_into_tensor",
     Operator(labels=collectives.all_gather, stream=collectives.gathered)),
    # products and patches
    ("mm", Operator(labels=products.mm, stream=streams.projection, projects=True)),
    ("bmm", Operator(labels=products.bmm, stream=streams.projection)),
    ("addmm", Operator(labels=products.addmm, stream=streams.biased_projection, projects=True)),
    ("baddbmm", Operator(labels=products.baddbmm, stream=streams.biased_projection, projects=True)),
    ("linear", Operator(labels=products.linear, stream=streams.projection, projects=True)),
    ("matmul", Operator(projects=True)),
    ("convolution _convolution", _CONVOLUTION),
    ("avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices", Operator(labels=patches.pool)),
    ("im2col", Operator(labels=patches.im2col)),
    ("pixel_unshuffle", Operator(labels=patches.pixel_unshuffle)),
    ("pixel_shuffle", Operator(labels=patches.pixel_shuffle)),
    ("scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
     "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
     "_scaled_dot_product_attention_math", Operator(labels=products.attention)),
]  # fmt: skip

OPERATORS: dict[str, Operator] = {name: entry for names, entry in _GROUPS for name in names.split()}
"""Canonical name -> entry. The name of an operator outside `aten` is its qualified one: `library::operator`."""


def operator_of(node: Any) -> Operator:
    """Entry of the operation that a node performs; UNKNOWN for anything else."""
    return OPERATORS.get(op_name(node), UNKNOWN)


def operator_of_call(func: torch._ops.OpOverload) -> Operator:
    """Entry of an operator that is called on tensors; UNKNOWN where it turns a tensor into a view of itself."""
    if torch.Tag.inplace_view in func.tags:
        return UNKNOWN
    found = OPERATORS.get(canonical(operator_name(func)))
    if found is None:
        return ELEMENTWISE if torch.Tag.pointwise in func.tags else UNKNOWN
    return found


def permutation(node: fx.Node, rank: int) -> list[int] | None:
    """Order in which a transposing node takes the `rank` dimensions of its operand; None for any other node."""
    order = operator_of(node).order
    return None if order is None else order(node, rank)
