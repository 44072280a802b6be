"""Find what conditions a call: the timestep, the prompt embedding and its mask, among the graph's inputs.

Before:  sites with roles and axes
After:   context.conditions

prompt    the input [B, L, C] whose dim 1 is the keys of the cross-attentions, or the text in the sequence of the video
          self-attentions
mask      the input [B, L] that goes with it
timestep  an input of few elements that goes through sines and cosines into a projection; position tables go through
          them too, but not into a projection

Names are read only to choose between several inputs that fit.
"""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import fx

from .axes.concatenation import parts_of
from .axes.labels import Label, resolve
from .context import Conditions, PassContext
from .graph import shape_hint, value_of
from .operators.names import op_name
from .operators.table import operator_of
from .site import CROSS, VIDEO

_NO_PROMPT = re.compile(r"image|img|vision|clip|audio|byt5|pooled|face|pose|camera|speech|motion", re.I)
_PROMPT = re.compile(r"encoder_hidden_states|prompt|text|txt|context|caption|cond", re.I)
_NO_TIMESTEP = re.compile(r"guidance|cfg|ofs|fps|r_timestep|size|aspect|mask|pos|coord", re.I)
_TIMESTEP = re.compile(r"timestep|time_step|(^|_)t(_|$)|sigma|noise", re.I)
_STATE = re.compile(r"l_self_|p_|b_|c_", re.I)  # names that Dynamo and torch.export give to what a module holds


def find_conditions(gm: fx.GraphModule, context: PassContext) -> int:
    """Fill `context.conditions`; returns how many of the three were found."""
    inputs = [node for node in gm.graph.find_nodes(op="placeholder") if _is_data(node)]
    prompt = _prompt(inputs, context)
    context.conditions = found = Conditions(_timestep(gm, inputs), prompt, _mask(inputs, prompt))
    return sum(node is not None for node in (found.timestep, found.prompt, found.mask))


def _is_data(node: fx.Node) -> bool:
    """Whether an input is a tensor that the caller gives, no weight and nothing else that a module holds."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return False
    return not re.search(r"(^|_)(parameters|buffers)_", node.name) and not _STATE.match(node.name)


def _prompt(inputs: list[fx.Node], context: PassContext) -> fx.Node | None:
    fitting = [n for n in inputs if len(shape_hint(n) or ()) == 3 and value_of(n).is_floating_point()]
    by_name = {node.name: node for node in fitting}
    votes: Counter[str] = Counter()
    for site in context.sites:
        if site.trace is not None and site.role == CROSS:
            votes.update(_origins(site.trace.key[-2]))
        elif site.trace is not None and site.role == VIDEO:
            grid = set(resolve(site.grid_axes))
            for part in parts_of(site.trace.query[-2]):
                if grid and not grid & set(resolve(part.label)):
                    votes.update(_origins(part.label))
    named = [by_name[name] for name, _ in votes.most_common() if name in by_name]
    found = [node for node in named if not _NO_PROMPT.search(node.name)]
    if not found:  # its tokens were picked by a mask, so axes don't lead back to it
        found = [n for n in fitting if _PROMPT.search(n.name) and not _NO_PROMPT.search(n.name)]
        if len(found) != 1:
            return None
    return next((node for node in found if _PROMPT.search(node.name)), found[0])


def _origins(label: Label) -> set[str]:
    """Names of the inputs whose dim 1 a label's rows are."""
    axes = {axis for part in parts_of(label) for axis in resolve(part.label)}
    kin = {one for axis in axes for one in (axis, *axis.kin)}
    return {axis.source.node for axis in kin if axis.source.kind == "input" and axis.source.dim == 1}


def _mask(inputs: list[fx.Node], prompt: fx.Node | None) -> fx.Node | None:
    shape = shape_hint(prompt) if prompt is not None else None
    if shape is None or prompt is None:
        return None
    fitting = [n for n in inputs if shape_hint(n) == shape[:2] and not _TIMESTEP.search(n.name)]
    named = [node for node in fitting if "mask" in node.name]
    return (named or fitting)[0] if len(named or fitting) == 1 else None


def _timestep(gm: fx.GraphModule, inputs: list[fx.Node]) -> fx.Node | None:
    data = set(inputs)
    found = [node for node in inputs if _is_small(node) and _is_embedded(gm, node, data)]
    found = [node for node in found if not _NO_TIMESTEP.search(node.name)] or found
    named = [node for node in found if _TIMESTEP.search(node.name)] or found
    return named[0] if len(named) == 1 else None


def _is_small(node: fx.Node) -> bool:
    """Whether an input has at most two dimensions that are larger than 1, as [B], [B, frames] or [B, tokens]."""
    shape = shape_hint(node)
    return shape is not None and sum(size > 1 for size in shape) <= 2


def _is_embedded(gm: fx.GraphModule, start: fx.Node, data: set[fx.Node]) -> bool:
    """Whether an input goes through sines or cosines into a projection before it meets any other input."""
    free: set[fx.Node] = set()  # from weights and constants alone
    pure: dict[fx.Node, bool] = {start: False}  # from `start` and those; whether through sines
    for node in gm.graph.nodes:
        if node is start or node in data:
            continue
        inputs = node.all_input_nodes[: 1 if op_name(node) == "cast" else None]  # `type_as` has a second operand
        if all(one in free for one in inputs):
            free.add(node)
        elif all(one in free or one in pure for one in inputs):
            waved = op_name(node) in ("sin", "cos") or any(pure.get(one, False) for one in inputs)
            if waved and operator_of(node).projects:
                return True
            pure[node] = waved
    return False
