"""How each ATen operation moves axes. One rule per family of operations; unknown operations give fresh axes.

Rules are applied by `AxisMode`, a dispatch mode that sees the primitive operations of whatever runs under it on
fake tensors: views, matrix products, in-place copies. So a rule is needed per primitive, not per spelling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import buffer_rules as buffers
from . import product_rules as products
from . import view_rules as views
from .labels import Source, label_size
from .streams import Streams, get_stream, set_stream, streams_of, written
from .tensor_labels import Range, get_base, get_labels, get_range, set_base, set_labels, set_range

aten = torch.ops.aten


class AxisMode(TorchDispatchMode):
    """Labels every tensor made under it. `node` names the graph node that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.node = "input"
        self.streams = Streams()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        before = [get_stream(x) for x in given]
        out = func(*args, **kwargs)
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        labels = self._labels(func, out, args, kwargs)
        for i, tensor in enumerate(outs):
            if not isinstance(tensor, torch.Tensor):
                continue
            known = labels[i] if labels is not None and i < len(labels) else None
            if known is not None and [label_size(label) for label in known] == list(tensor.shape):
                set_labels(tensor, known)
            elif not any(tensor is x for x in given):
                get_labels(tensor, self.source())
        new_streams = streams_of(self.streams, func, out, args, kwargs)
        for i, tensor in enumerate(outs):
            if not isinstance(tensor, torch.Tensor):
                continue
            set_stream(tensor, new_streams[i] if i < len(new_streams) else None)
            if given and func._schema.returns[min(i, len(func._schema.returns) - 1)].alias_info is not None:
                set_base(tensor, given[0])
        if func._schema.is_mutable and given:
            self._written(func, given[0], before[0])
        set_range(outs[0], _range(func, outs[0], args)) if isinstance(outs[0], torch.Tensor) else None
        return out

    def _labels(self, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """Labels of each output; None where they are not known."""
        rule = RULES.get(func.overloadpacket)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = views.pointwise
        labels = rule(self, out, args, kwargs) if rule else None
        return labels if isinstance(out, (tuple, list)) else [labels]

    def _written(self, func: Any, target: torch.Tensor, before: Any) -> None:
        """The memory of a tensor has changed: so have the tensors that share it."""
        name = func.overloadpacket.__name__
        if RULES.get(func.overloadpacket) is None and torch.Tag.pointwise not in func.tags and name not in _NOISE:
            buffers.spoil(self, target, name)
        base, view = get_base(target), before
        if base is not target:
            set_stream(base, written(self.streams, get_stream(base), view, get_stream(target)))

    def source(self, dim: int = 0, kind: str = "op") -> Source:
        """Source of an axis born in the running node."""
        return Source(self.node, dim, kind)


_NOISE = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_")


def _range(func: Any, out: torch.Tensor, args: tuple[Any, ...]) -> Range | None:
    """Consecutive integers in an index, as far as its making shows them."""
    name = func.overloadpacket.__name__
    if name == "arange":
        if out.is_floating_point() or (len(args) > 2 and args[2] != 1):
            return None
        return Range(0, int(args[0]) if len(args) > 1 else 0)
    found = get_range(args[0]) if args else None
    if found is None:
        return None
    if name in ("clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "_to_copy"):
        return None if out.is_floating_point() else found
    if name in ("add", "sub") and len(args) == 2 and isinstance(args[1], int):
        return Range(found.dim, found.start + (args[1] if name == "add" else -args[1]))
    if name == "slice" and out.dim() == 1 and (len(args) < 5 or args[4] == 1):
        start = (args[2] if len(args) > 2 else 0) or 0
        return Range(0, found.start + (start if start >= 0 else start + args[0].shape[0]))
    if name == "unsqueeze":
        return Range(found.dim + (args[1] % out.dim() <= found.dim), found.start)
    if name == "expand":
        return Range(found.dim + out.dim() - args[0].dim(), found.start)
    if name in ("view", "_unsafe_view", "reshape") and args[0].numel() == args[0].shape[found.dim] == max(out.shape):
        return Range(list(out.shape).index(max(out.shape)), found.start)
    return None


def _table() -> dict[Any, Callable[..., Any]]:
    groups: list[tuple[Callable[..., Any], str]] = [
        (views.like_first, "clone alias detach lift_fresh lift_fresh_copy lift contiguous _to_copy _conj "
         "fill_ zero_ softmax _softmax _log_softmax cumsum native_dropout _conj_physical resolve_conj resolve_neg "
         "triu tril rand_like randn_like index_fill index_fill_"),
        (buffers.new_buffer, "empty zeros ones full empty_strided new_empty new_zeros new_ones new_full "
         "new_empty_strided empty_like zeros_like ones_like full_like"),
        (views.keep_sizes, "view_as_complex view_as_real native_layer_norm native_group_norm _fused_rms_norm rms_norm "
         "native_batch_norm _native_batch_norm_legit cudnn_batch_norm glu"),
        (views.pointwise, "polar complex where silu gelu mish"),
        (views.view, "_unsafe_view reshape _reshape_copy _reshape_alias"),
        (views.view_dtype, "view"),
        (views.permute, "permute"),
        (views.transpose, "transpose"),
        (views.t, "t"),
        (views.unsqueeze, "unsqueeze"),
        (views.squeeze, "squeeze"),
        (views.expand, "expand"),
        (views.repeat, "repeat"),
        (views.slice_, "slice"),
        (views.select, "select"),
        (views.unbind, "unbind"),
        (views.split_, "split split_with_sizes unsafe_split unsafe_split_with_sizes"),
        (views.cat, "cat concat"),
        (views.stack, "stack"),
        (views.pad, "constant_pad_nd"),
        (views.flip, "flip"),
        (buffers.write, "copy_"),
        (buffers.index_put, "index_put index_put_"),
        (buffers.index_copy, "index_copy index_copy_"),
        (buffers.scatter, "scatter scatter_"),
        (buffers.scatter_add, "scatter_add scatter_add_ index_add index_add_"),
        (buffers.slice_scatter, "slice_scatter"),
        (buffers.select_scatter, "select_scatter"),
        (products.reduce, "sum mean amax amin any all var std max min prod logsumexp argmax argmin var_mean std_mean"),
        (products.norm, "linalg_vector_norm norm"),
        (products.mm, "mm"),
        (products.addmm, "addmm"),
        (products.bmm, "bmm"),
        (products.baddbmm, "baddbmm"),
        (products.linear, "linear"),
        (products.embedding, "embedding"),
        (products.index_select, "index_select"),
        (products.index, "index"),
        (products.convolution, "convolution _convolution"),
        (products.pool, "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices"),
        (products.im2col, "im2col"),
        (products.pixel_unshuffle, "pixel_unshuffle"),
        (products.pixel_shuffle, "pixel_shuffle"),
        (products.attention, "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
         "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
         "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math"),
    ]  # fmt: skip
    return {getattr(aten, name): rule for rule, names in groups for name in names.split() if hasattr(aten, name)}


RULES = _table()
