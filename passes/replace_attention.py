"""Replace planned attentions by the block-sparse op.

Before:  %out = scaled_dot_product_attention(%q, %k, %v, attn_mask=%m)
After:   %counts, %indices = get_attr                                 (shared by sites with the same plan)
         %keys = %m[:, 0, 0]                                          (only with a key padding mask)
         %pair = dynamicrad.block_sparse_attention(%q, %k, %v, %counts, %indices, scale, block_q, block_kv, %keys)
         %out = %pair[0], in the memory order that the original had

Sizes on which a plan rests become constants of the graph: another resolution compiles again, it never meets a
plan that was made for a different grid. Batch size and the length of a separate prompt stay dynamic.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._dynamo.source import ConstantSource

from dynamicrad_compile.kernels import block_sparse_attention as _registers_the_op  # noqa: F401
from dynamicrad_compile.plan import BlockPlan

from ._axes import Axis, resolve
from ._graph import hint, specialise, value_of
from ._site import CROSS, PassContext, Site
from .find_attention import read_call


def replace_attention(gm: fx.GraphModule, context: PassContext) -> int:
    """Rewrite the graph; returns the number of replaced sites."""
    planned = [site for site in context.sites if site.plan is not None]
    names: dict[int, str] = {}
    for site in planned:
        assert site.plan is not None
        if id(site.plan) not in names:
            names[id(site.plan)] = _register_plan(gm, site.plan, len(names), site)
        _replace(gm, site, names[id(site.plan)])
        site.replaced = True
    if planned:
        _specialise_sizes(gm, context)
    return len(planned)


def _register_plan(gm: fx.GraphModule, plan: BlockPlan, number: int, site: Site) -> str:
    """Make the plan's tensors buffers of the graph module; AOT autograd lifts them to static inputs."""
    name = f"_dynamicrad_plan_{number}"
    on_device = plan.to(value_of(site.node).device)
    sources = getattr(gm, "_param_name_to_source", None)
    for suffix, tensor in (("counts", on_device.kv_counts), ("indices", on_device.kv_indices)):
        gm.register_buffer(f"{name}_{suffix}", tensor)
        if sources is not None:  # a graph of Dynamo must say where each of its buffers comes from
            sources[f"{name}_{suffix}"] = ConstantSource(source_name=f"{name}_{suffix}")
    return name


def _replace(gm: fx.GraphModule, site: Site, name: str) -> None:
    node, plan = site.node, site.plan
    assert plan is not None
    call = read_call(node)  # afresh: the query may be the output of an attention replaced a moment ago
    graph = gm.graph
    with graph.inserting_before(node):
        counts = graph.get_attr(f"{name}_counts")
        indices = graph.get_attr(f"{name}_indices")
        keys = None
        if call.mask is not None:
            keys = graph.call_function(operator.getitem, (call.mask, (slice(None), 0, 0)))
        pair = graph.call_function(
            torch.ops.dynamicrad.block_sparse_attention.default,
            (
                call.query,
                call.key,
                call.value,
                counts,
                indices,
                call.scale,
                plan.block_q,
                plan.block_kv,
                keys,
            ),
        )
        out = graph.call_function(operator.getitem, (pair, 0))
        order = _memory_order(value_of(node))
        if order != sorted(order):
            back = [order.index(d) for d in range(len(order))]
            out = graph.call_method("permute", (out, order))
            out = graph.call_method("contiguous", (out,))
            out = graph.call_method("permute", (out, back))
    for new in (counts, indices, keys, pair, out):
        if new is not None:
            new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            new.meta["stack_trace"] = node.meta.get("stack_trace")
    out.meta = {**node.meta, **{k: v for k, v in out.meta.items() if v}}
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _memory_order(value: torch.Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest."""
    strides = [hint(s) or 0 for s in value.stride()]
    return sorted(range(value.dim()), key=lambda d: -strides[d])


def _specialise_sizes(gm: fx.GraphModule, context: PassContext) -> None:
    """Make every symbolic input size constant, but for batch sizes and lengths of separate prompts."""
    dynamic: set[Axis] = set()
    for site in context.sites:
        if site.labels is None:
            continue
        if site.replaced:
            dynamic.update(resolve(site.labels[0][0]))
        if site.role == CROSS:
            dynamic.update(resolve(site.labels[1][-2]))
    for site in context.sites:
        if site.replaced and site.labels is not None:
            dynamic.difference_update(resolve(site.labels[0][-2]))
    sizes: list[tuple[torch.SymInt, bool]] = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            sizes.append((value, False))
        elif isinstance(value, torch.Tensor):
            labels = context.placeholder_labels.get(node.name, [()] * value.dim())
            for size, label in zip(value.shape, labels, strict=True):
                if isinstance(size, torch.SymInt):
                    axes = resolve(label)
                    sizes.append((size, bool(axes) and dynamic.issuperset(axes)))
    free = {str(size) for size, is_free in sizes if is_free}
    for size, _ in sizes:
        if str(size) not in free:
            specialise(size)
