"""The trace of axes: a dispatch mode that labels every tensor made under it, by the table of operators.

The mode sees the primitive operators of whatever runs under it on fake tensors: views, matrix products, in-place
copies. So a rule is needed per primitive, not per spelling.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..axes.labels import Peers, Source, label_size
from ..axes.shards import Shards
from ..axes.streams import Stream, Streams, get_stream, set_stream, written
from ..axes.tensor_labels import get_base, get_labels, rows_shown, set_base, set_labels, set_range
from .calls import StreamCall
from .entry import Operator
from .names import canonical, operator_name
from .rules.buffers import spoil
from .table import operator_of_call


class AxisMode(TorchDispatchMode):
    """Labels every tensor made under it. `node` names the graph node that is running.

    groups: the processes that collectives of the graph are among.
    """

    def __init__(self, streams: Streams, groups: Iterable[Peers] = ()) -> None:
        super().__init__()
        self.node = "input"
        self.streams = streams
        self.shards = Shards(groups)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        before = get_stream(given[0]) if given else None
        out = func(*args, **kwargs)
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        operator, name = operator_of_call(func), canonical(operator_name(func))
        self._label(operator, out, outs, given, args, kwargs)
        streams = operator.stream(StreamCall(self.streams, name, outs, args, kwargs)) if given else []
        self._follow(func, outs, given, streams)
        if func._schema.is_mutable and given:
            if operator.labels is None:
                spoil(self, given[0], name)
            self._written(given[0], before)
        if isinstance(outs[0], torch.Tensor):
            set_range(outs[0], operator.range(outs[0], args) if operator.range is not None else None)
        return out

    def _label(
        self,
        operator: Operator,
        out: Any,
        outs: list[Any],
        given: list[torch.Tensor],
        args: Any,
        kwargs: dict[str, Any],
    ) -> None:
        """Labels of the outputs: those of the operator's rule, where they fit; else fresh ones."""
        labels = operator.labels(self, out, args, kwargs) if operator.labels is not None else None
        labels = labels if isinstance(out, (tuple, list)) else [labels]
        for i, tensor in enumerate(outs):
            if not isinstance(tensor, torch.Tensor):
                continue
            known = labels[i] if labels is not None and i < len(labels) else None
            if known is not None and [label_size(label) for label in known] == list(tensor.shape):
                set_labels(tensor, known)
            elif not any(tensor is x for x in given):
                get_labels(tensor, self.source())

    def _follow(self, func: Any, outs: list[Any], given: list[torch.Tensor], streams: list[Stream | None]) -> None:
        """Streams of the outputs, and whose memory they show."""
        returns = func._schema.returns
        for i, tensor in enumerate(outs):
            if not isinstance(tensor, torch.Tensor):
                continue
            set_stream(tensor, streams[i] if i < len(streams) else None)
            if given and returns[min(i, len(returns) - 1)].alias_info is not None:
                set_base(tensor, given[0])

    def _written(self, target: torch.Tensor, before: Stream | None) -> None:
        """The memory of a tensor has changed: so has that of which it is a view. `before` is its stream before."""
        base = get_base(target)
        if base is not target:
            rows = rows_shown(target)
            set_stream(base, written(self.streams, get_stream(base), before, get_stream(target), rows))

    def source(self, dim: int = 0, kind: str = "op") -> Source:
        """Source of an axis born in the running node."""
        return Source(self.node, dim, kind)
