"""Attention operators of other libraries, by name, and FlexAttention's higher-order operator.

An operator is known by its name, its arguments by theirs. Every argument that is not query, key, value, mask or
scale must be at a value that changes nothing; else the site stays dense and says which argument speaks against it.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dynamicrad_compile.reporting.reason import NOTHING, OTHER_BACKEND, Reason

from ..graph import value_of
from ..operators.names import op_name, operator_name, tensor_value
from ..site import AttentionCall
from .known_values import integers
from .numbers import number

QUANTISED = Reason(
    "quantised", "it works on quantised queries and keys; choose another attention backend for the model", OTHER_BACKEND
)
ITS_OWN_MASK = f"{NOTHING}: the model has its own blocks; where it can do without them, {OTHER_BACKEND}"
MORE_OUTPUTS = Reason("more_outputs", "more than its output is used (log-sum-exp or the like)", OTHER_BACKEND)


@dataclass(frozen=True)
class Library:
    """Layout of query, key, value and output; place of the output among several; why it can't be rewritten."""

    layout: str
    output: int = 0
    refusal: Reason | None = None


LIBRARIES = {
    "flash_attn*::_flash_attn_forward": Library("bshd"),
    "flashattn*::_flash_attn_forward": Library("bshd"),
    "flash_attn*::_flash_attn_varlen_forward": Library("thd"),
    "flashattn*::_flash_attn_varlen_forward": Library("thd"),
    "flash_attn*::fwd": Library("bshd"),
    "flash_attn*::varlen_fwd": Library("thd"),
    "flash_attn*::flash_attn_func": Library("bshd"),
    "flash_attn*::flash_attn_varlen_func": Library("thd"),
    "_diffusers_flash_attn*::_flash_attn_forward": Library("bshd"),
    "sageattention::qk_int8_*": Library("bshd", refusal=QUANTISED),
    "sageattention::*": Library("bhsd"),
    "xformers::efficient_attention_forward*": Library("bshd"),
    "xformers::memory_efficient_attention*": Library("bshd"),
    "xformers_flash*::flash_fwd": Library("bshd"),
    "aten::_scaled_dot_product_*attention*": Library("bhsd"),
}
"""By `namespace::operator`, first match wins. For a plain function the namespace is its top package."""

_NAMES = {
    "query": ("query", "q"), "key": ("key", "k"), "value": ("value", "v"),
    "mask": ("attn_mask", "attn_bias", "bias"), "scale": ("scale", "softmax_scale", "sm_scale"),
    "is_causal": ("is_causal", "causal"), "dropout_p": ("dropout_p", "p"),
    "cu": ("cu_seqlens_q", "cu_seqlens_k", "seqstart_q", "seqstart_k"), "layout": ("tensor_layout",),
}  # fmt: skip
_MEANING = {name: meaning for meaning, names in _NAMES.items() for name in names}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("window_size_left", "window_size_right", "window_left", "window_right", "window_size"),
                    (-1, None, (-1, -1), [-1, -1])),
    "softcap": (0,), "attention_chunk": (0,), "custom_mask_type": (0,),
}  # fmt: skip
_IGNORED = {
    "return_softmax", "return_softmax_lse", "return_lse", "return_attn_probs", "return_debug_mask", "compute_logsumexp",
    "compute_log_sumexp", "deterministic", "num_splits", "pack_gqa", "sm_margin", "zero_tensors", "scheduler_metadata",
    "is_rotary_interleaved", "max_seqlen_q", "max_seqlen_k", "enable_gqa",
}  # fmt: skip
_LAYOUTS = {"NHD": "bshd", "HND": "bhsd", 0: "bshd", 1: "bhsd"}


def read_library_attention(gm: fx.GraphModule, node: fx.Node) -> AttentionCall | None:
    """The attention that a library's operator computes; None if the node is none of them."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _read_flex(gm, node) if node.target.name() == "flex_attention" else None
    library = _library(node.target)
    arguments = _arguments(node) if library is not None else None
    if library is None or arguments is None:
        return None
    found: dict[str, Any] = {"cu": []}
    refusal = library.refusal
    for name, (value, default) in arguments.items():
        meaning = _MEANING.get(name)
        if meaning == "cu":
            found["cu"] += [value] if value is not None else []
        elif meaning is not None:
            found[meaning] = value
        elif not refusal and name not in _IGNORED and value is not None and value not in _NEUTRAL.get(name, (default,)):
            refusal = Reason("argument", f"its argument {name} = {value} is not supported", OTHER_BACKEND)
    if not all(isinstance(found.get(name), fx.Node) for name in ("query", "key", "value")):
        return None
    return _call(node, library, found, refusal)


def _call(node: fx.Node, library: Library, found: dict[str, Any], refusal: Reason | None) -> AttentionCall:
    layout = _LAYOUTS.get(found.get("layout"), library.layout)
    rank = getattr(tensor_value(found["query"]), "ndim", 4)
    sequences, key_end = None, None
    if found["cu"]:
        sequences = _equal_sequences(node, found) if rank == 3 else None
        one = rank == 3 and not isinstance(found.get("mask"), fx.Node) and all(map(_is_one_sequence, found["cu"]))
        if sequences is None and one:
            sequences, key_end = 1, found["cu"][-1]
        layout = "bshd" if rank == 4 else "shd" if sequences is None else "thd"
        if sequences is None:
            text = "sequences of lengths that the graph doesn't show are packed together (cu_seqlens)"
            refusal = refusal or Reason("packed_sequences", text, OTHER_BACKEND)
    elif rank != 4:
        layout = "bsd" if rank == 3 else "b" * (rank - 4) + layout
    mask = found.get("mask")
    output = None if isinstance(value_of(node), torch.Tensor) else library.output
    if library.refusal is None and _uses_more(node, output):
        refusal = refusal or MORE_OUTPUTS
    return AttentionCall(
        found["query"], found["key"], found["value"], mask if isinstance(mask, fx.Node) else None,
        dropout_p=found.get("dropout_p", 0.0), is_causal=_flag(found.get("is_causal", False)),
        scale=found.get("scale"), layouts=(layout,) * 4, mask_is="bias", output=output, sequences=sequences,
        key_end=key_end, refusal=refusal,
    )  # fmt: skip


def _library(target: Any) -> Library | None:
    """The entry of an operator or a function."""
    package = (getattr(target, "__module__", None) or "").partition(".")[0]
    return _entry(operator_name(target) or f"{package}::{getattr(target, '__name__', '')}")


@functools.lru_cache(maxsize=4096)
def _entry(name: str) -> Library | None:
    if "backward" in name:
        return None
    return next((entry for pattern, entry in LIBRARIES.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _arguments(node: fx.Node) -> dict[str, tuple[Any, Any]] | None:
    """(value, default) of every argument by name; None if they can't be told."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        defaults = {a.name: a.default_value if a.has_default_value() else None for a in schema}
        positional = [a.name for a in schema if not a.kwarg_only]
    else:
        try:
            parameters = inspect.signature(target).parameters
        except (TypeError, ValueError):
            return None
        defaults = {n: None if p.default is p.empty else p.default for n, p in parameters.items()}
        positional = list(parameters)
    given = dict(zip(positional, node.args, strict=False)) | dict(node.kwargs)
    return {name: (given.get(name, default), default) for name, default in defaults.items()}


def _flag(value: Any) -> bool:
    return value is not None and value is not False and value != 0


def _uses_more(node: fx.Node, output: int | None) -> bool:
    if output is None:
        return False
    return any(op_name(user) != "getitem" or (user.args[1] != output and user.users) for user in node.users)


def _equal_sequences(node: fx.Node, found: dict[str, Any]) -> int | None:
    """Number of packed sequences where the graph shows that all have the same length; None where it doesn't."""
    query, key = tensor_value(found["query"]), tensor_value(found["key"])
    if query is None or key is None or not isinstance(query.shape[-3], int) or not isinstance(key.shape[-3], int):
        return None
    counts = set()
    for i, cu in enumerate(found["cu"]):
        tokens = (query if i == 0 else key).shape[-3]
        starts = integers(cu, node)
        count = len(starts) - 1 if starts else 0
        if count < 1 or tokens % count or starts != [j * (tokens // count) for j in range(count + 1)]:
            return None
        counts.add(count)
    return counts.pop() if len(counts) == 1 else None


def _is_one_sequence(starts: Any) -> bool:
    """Whether a tensor of starts has two entries: 0 and the length."""
    value = tensor_value(starts)
    return value is not None and value.dim() == 1 and value.shape[0] == 2


def _read_flex(gm: fx.GraphModule, node: fx.Node) -> AttentionCall | None:
    """FlexAttention: without a mask its block mask is one block of 1 << 30 tokens and lets everything through."""
    query, key, value, score_mod, block_mask, scale = node.args[:6]
    refusal = None
    if not _returns(gm, score_mod, first_input=True):
        refusal = Reason("score_mod", "FlexAttention with a score_mod", OTHER_BACKEND)
    if len(block_mask) < 3 or min(block_mask[-3:-1]) < 1 << 30 or not _returns(gm, block_mask[-1], first_input=False):
        refusal = Reason("block_mask", "already block-sparse (FlexAttention BlockMask)", ITS_OWN_MASK)
    elif _uses_more(node, 0):
        refusal = refusal or MORE_OUTPUTS
    subgraphs = tuple(x for x in (score_mod, block_mask[-1]) if isinstance(x, fx.Node))
    return AttentionCall(query, key, value, scale=scale, output=0, inner=subgraphs, refusal=refusal)


def _returns(gm: fx.GraphModule, node: Any, first_input: bool) -> bool:
    """Whether a subgraph returns its first input, or else a tensor of ones (everything is let through)."""
    graph = getattr(getattr(gm, str(node.target), None), "graph", None) if isinstance(node, fx.Node) else None
    if graph is None:
        return False
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    result = result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result
    if first_input:
        return result is next((n for n in graph.nodes if n.op == "placeholder"), None)
    return number(result) == 1.0
