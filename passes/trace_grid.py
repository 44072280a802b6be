"""Trace axes through a graph, so that each attention knows what its sequence is made of.

Before:  %q : [1, 2, 240, 24]
After:   the same graph; `site.trace` says that the 240 are dim 2 x half of dim 3 x half of dim 4 of %latents

The graph is run once on fake tensors of the hinted sizes under `AxisMode`. No guard is added and no memory is
taken. A node that can't be run that way gets unknown axes and a line in `context.notes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_map

from .axes.concatenation import same
from .axes.labels import Label, Source, fresh, label_size, mixed
from .axes.streams import Stream, attended, get_stream, packed, set_stream
from .axes.tensor_labels import get_labels, range_of_values, set_labels, set_range
from .context import Earlier, PassContext
from .graph import depends_on_data, hint, value_of
from .operators.mode import AxisMode
from .operators.process_groups import groups_of
from .reading.layout import output_labels, plain_labels
from .reading.transforms import inside_transforms
from .site import Site, Trace


class _Unknown:
    """Stands for a value that could not be computed on fake tensors."""


UNKNOWN_VALUE = _Unknown()


def trace_grid(gm: fx.GraphModule, context: PassContext) -> int:
    """Fill `site.trace`; returns the number of sites that were reached."""
    if not context.sites and context.earlier is None:
        return 0
    earlier = context.earlier or Earlier()
    fake_mode, axis_mode = FakeTensorMode(allow_non_fake_inputs=True), AxisMode(earlier.streams, groups_of(gm.graph))
    with fake_mode, axis_mode, torch.no_grad():
        tracer = _Tracer(gm, context, fake_mode, axis_mode)
        tracer.run()
    return sum(site.trace is not None for site in context.sites)


class _Tracer(fx.Interpreter):
    """Runs a graph node by node on fake tensors and reads labels off the attention calls."""

    def __init__(self, gm: fx.GraphModule, context: PassContext, fake_mode: FakeTensorMode, axis_mode: AxisMode):
        super().__init__(gm, garbage_collect_values=True)
        self.context = context
        self.fake_mode = fake_mode
        self.axis_mode = axis_mode
        self.sites: dict[fx.Node, Site] = {site.node: site for site in context.sites}
        self.streams: dict[fx.Node, Stream | None] = {}
        self.inside = inside_transforms(gm.graph)
        self.inputs = 0
        self.data_dependent_graph = any(depends_on_data(value_of(n)) for n in gm.graph.nodes)

    def run_node(self, n: fx.Node) -> Any:
        self.axis_mode.node = n.name
        if n.op == "placeholder":
            return self._note(n, self._known_before(self._recorded(n, kind="input")))
        if n.op == "output":
            self._keep(n.args[0])
            return None
        if n in self.sites and n not in self.inside:
            self.context.node_labels[n] = []  # several outputs: no dimensions, but a place in the order
            return self._note(n, self._run_attention(n))
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n in self.inside or any(leaf is UNKNOWN_VALUE for leaf in _leaves((args, kwargs))):
            return self._recorded(n)
        if "assert" in n.name or "_check" in n.name or n.name == "_guards_fn":  # they judge stand-ins
            return None
        try:
            value = getattr(self, n.op)(n.target, args, kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            return self._recorded(n)
        except Exception as error:  # any operation of any library may refuse fake tensors; it is reported
            if not self.data_dependent_graph:  # stand-ins for unknown sizes may contradict each other
                self.context.notes.append(f"{n.name} ({n.target}) can't be traced: {type(error).__name__}: {error}")
            return self._recorded(n)
        return self._note(n, tree_map(self._fake, value))

    def _note(self, n: fx.Node, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self.context.node_labels[n] = get_labels(value)
            self.streams[n] = get_stream(value)
        return value

    def _known_before(self, value: Any) -> Any:
        """The next input, with what graphs before this one know of it."""
        earlier, place = self.context.earlier, self.inputs
        self.inputs += 1
        if earlier is None or not isinstance(value, torch.Tensor):
            return value
        labels, stream = earlier.known(place)
        if labels and [label_size(label) for label in labels] == list(value.shape):
            set_labels(value, labels)
            set_stream(value, stream)
        elif place < len(earlier.inputs):
            earlier.values[earlier.inputs[place]] = get_labels(value), get_stream(value)
        return value

    def _keep(self, outputs: Any) -> None:
        """Tell the graphs behind this one what is known of its outputs."""
        earlier = self.context.earlier
        if earlier is None:
            return
        for place, n in enumerate(outputs if isinstance(outputs, (tuple, list)) else [outputs]):
            if isinstance(n, fx.Node) and place in earlier.outputs and n in self.context.node_labels:
                labels = self.context.node_labels[n]
                earlier.values[earlier.outputs[place]] = labels, self.streams.get(n)

    def _run_attention(self, n: fx.Node) -> Any:
        site, call = self.sites[n], self.sites[n].call
        query, key, value = (self._labels_of(x) for x in (call.query, call.key, call.value))
        ranks = [len(labels) if labels is not None else -1 for labels in (query, key, value)]
        if query is None or key is None or value is None or ranks != [len(layout) for layout in call.layouts[:3]]:
            return self._recorded(n)
        plain_query, plain_key = plain_labels(call, 0, query), plain_labels(call, 1, key)
        streams = [self._stream_of(x) for x in (call.query, call.key, call.value)]
        same_tokens = (streams[0] and streams[0].term) == (streams[1] and streams[1].term) or (
            packed(self.axis_mode.streams, streams) and same(plain_query[0], plain_key[0])
        )
        given = all(stream is not None and not stream.projected for stream in streams[:2])
        if not self.context.continues:  # rows of one input are known to be other rows
            given = given and not any(stream and self.axis_mode.streams.slice_of(stream.term) for stream in streams[:2])
        starts = self._starts(plain_query, plain_key, streams)
        overlap = same_tokens or (
            streams[0] is not None
            and streams[1] is not None
            and self.axis_mode.streams.overlap(streams[0].term, streams[1].term)
        )
        site.trace = Trace(plain_query, plain_key, same_tokens, given, starts, overlap)
        stream = attended(self.axis_mode.streams, streams[0], None if same_tokens else streams[1])
        operands = (call.query, call.key) if site.trace.starts else (call.query,)
        sizes = [size for n in operands for size in getattr(value_of(n), "shape", ())]
        site.data_dependent = any(map(depends_on_data, sizes))
        result = self._recorded(n)
        if result is UNKNOWN_VALUE:
            return result
        out = result if call.output is None else result[call.output]
        set_stream(out, stream)
        labels = output_labels(call, query, value)
        if labels is None:
            return result
        labels = [_freed(label, Source(n.name, d, "op")) if mixed(label) else label for d, label in enumerate(labels)]
        sizes = [label_size(label) for label in labels]
        if sizes != list(out.shape):  # the recorded sizes are stand-ins
            if call.output is not None:
                return result
            with self.fake_mode:
                result = out = torch.empty(sizes, dtype=out.dtype, device=out.device)
            set_stream(out, stream)
        set_labels(out, labels)
        return result

    def _starts(self, query: list[Label], key: list[Label], streams: Sequence[Stream | None]) -> tuple[int, ...]:
        """Where among more keys than queries the queries' tokens begin."""
        asked, read = label_size(query[-2]), label_size(key[-2])
        if asked >= read or streams[0] is None or streams[1] is None:
            return ()
        return self.axis_mode.streams.starts(streams[0].term, asked, streams[1].term, read)

    def _labels_of(self, n: fx.Node) -> list[Label] | None:
        value = self.env.get(n)
        return list(get_labels(value)) if isinstance(value, torch.Tensor) else self.context.node_labels.get(n)

    def _stream_of(self, n: fx.Node) -> Stream | None:
        value = self.env.get(n)
        return get_stream(value) if isinstance(value, torch.Tensor) else self.streams.get(n)

    def _fake(self, value: Any) -> Any:
        """Real tensors (constants of the graph) become fake ones."""
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            fake = self.fake_mode.from_tensor(value, static_shapes=True)
            set_range(fake, range_of_values(value))
            return fake
        return value

    def _recorded(self, n: fx.Node, kind: str = "op") -> Any:
        """The node's recorded value with fresh axes; tokens of their own, unless it is a weight."""

        def convert(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                tensor = self._like(leaf)
                rank = tensor.dim()
                term = self.axis_mode.streams.term(kind, n.name, id(leaf))
                set_stream(tensor, None if isinstance(leaf, torch.nn.Parameter) else Stream(term, False))
                set_labels(tensor, [fresh(size, Source(n.name, d, kind, rank)) for d, size in enumerate(tensor.shape)])
                return tensor
            if isinstance(leaf, torch.SymInt):
                return hint(leaf)
            if isinstance(leaf, (torch.SymFloat, torch.SymBool)):
                return leaf.node.hint if leaf.node.has_hint() else UNKNOWN_VALUE
            return leaf

        value = value_of(n)
        return UNKNOWN_VALUE if value is None else tree_map(convert, value)

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the hinted sizes and strides."""
        sizes, strides = [hint(s) for s in tensor.shape], [hint(s) for s in tensor.stride()]
        with self.fake_mode:
            return torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)


def _freed(label: Label, source: Source) -> Label:
    """What an attention gives for tokens in two orders: nothing is known of its rows."""
    new = fresh(label_size(label), source)
    for axis in new:
        axis.free = True
    return new


def _leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)
