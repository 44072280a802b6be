"""The table of operators: one entry is all that a new operator needs, and every entry is of something that exists."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from support import comfy  # noqa: F401  (registers the operators of a library that may not be installed)
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dynamicrad_compile.passes.axes.streams import Stream, Streams, get_stream, set_stream
from dynamicrad_compile.passes.axes.tensor_labels import get_labels
from dynamicrad_compile.passes.operators import names, table
from dynamicrad_compile.passes.operators.entry import Operator
from dynamicrad_compile.passes.operators.mode import AxisMode
from dynamicrad_compile.passes.operators.rules import masks, pointwise, streams
from dynamicrad_compile.passes.reading.hiding import shows_hiding
from dynamicrad_compile.passes.reading.masks import mask_labels
from dynamicrad_compile.passes.reading.writes import is_rewritten


@torch.library.custom_op("drad_test::polish", mutates_args=())
def polish(x: torch.Tensor) -> torch.Tensor:
    """An operator that no table knows: its result is what came in."""
    return x.clone()


@polish.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


POLISH = torch.ops.drad_test.polish.default


@pytest.fixture
def entry(monkeypatch):
    monkeypatch.setitem(
        table.OPERATORS,
        "drad_test::polish",
        Operator(labels=pointwise.like_first, stream=streams.of_first, mask=masks.same, view=True),
    )


def traced():
    """Whether the operator keeps the axes, and the tokens, of a tensor."""
    with FakeTensorMode(), AxisMode(Streams()), torch.no_grad():
        x = torch.empty(2, 6)
        set_stream(x, Stream(7, True))
        y = POLISH(x)
        return get_labels(y) == get_labels(x), get_stream(y) == get_stream(x)


def polished_mask():
    """Nodes of a mask that is repeated, polished, and made a bias."""
    graph = fx.Graph()
    keys = graph.placeholder("keys")
    repeated = graph.call_method("expand", (keys, 2, 1, 6, 6))
    polished = graph.call_function(POLISH, (repeated,))
    zeros = graph.call_function(torch.zeros, (2, 1, 6, 6))
    filled = graph.call_method("masked_fill", (zeros, polished, float("-inf")))
    bias = graph.call_function(POLISH, (filled,))
    small = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    keys.meta["val"] = small
    repeated.meta["val"] = small.expand(2, 1, 6, 6)
    polished.meta["val"] = repeated.meta["val"].clone()
    for node in (zeros, filled, bias):
        node.meta["val"] = torch.zeros(2, 1, 6, 6)
    return repeated, polished, bias


def repeats_over_queries(node):
    return [axis.source.kind for axis in mask_labels(node)[2]] == [masks.COPY]


def test_an_unknown_operator_ends_every_walk():
    assert traced() == (False, True)  # without an entry a result is of the tokens of its first operand
    _, polished, bias = polished_mask()
    assert not repeats_over_queries(polished)
    assert not shows_hiding(bias)


def test_one_entry_serves_axes_streams_and_masks(entry):
    assert traced() == (True, True)
    repeated, polished, bias = polished_mask()
    assert repeats_over_queries(polished)
    assert shows_hiding(bias)
    polished.graph.call_method("zero_", (polished,))
    assert is_rewritten(repeated)  # through the view that the entry says it is


def test_its_stream_is_the_rule_of_the_entry(monkeypatch):
    monkeypatch.setitem(
        table.OPERATORS, "drad_test::polish", Operator(labels=pointwise.like_first, stream=lambda call: [None])
    )
    assert traced() == (True, False)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_bias_is_not_followed_through_other_dtypes(dtype):
    """0 and -inf cast to bool and back are 0 and 1: that hides nothing."""
    _, polished, _ = polished_mask()
    graph = polished.graph
    filled = graph.call_method("masked_fill", (graph.call_function(torch.zeros, (2, 1, 6, 6)), polished, -1e9))
    other = graph.call_method("to", (filled, dtype))
    back = graph.call_method("to", (other, torch.float32))
    for node in (filled.args[0], filled, back):
        node.meta["val"] = torch.zeros(2, 1, 6, 6)
    other.meta["val"] = torch.zeros(2, 1, 6, 6, dtype=dtype)
    assert shows_hiding(filled)
    assert not shows_hiding(back)


def _exists(name: str) -> bool:
    if "::" in name:
        return name in torch._C._dispatch_get_all_op_names()
    spaces = (operator, torch, F, torch._C._nn, torch.Tensor, torch.ops.aten)
    return any(hasattr(space, name) or hasattr(space, f"{name}_") for space in spaces)


def test_every_entry_is_of_something_that_exists():
    spellings = {name: {name} for name in table.OPERATORS}
    for spelling, name in names._ALIASES.items():
        spellings.setdefault(name, set()).add(spelling)
    unknown = [name for name in table.OPERATORS if not any(map(_exists, spellings[name]))]
    assert not unknown


def test_no_entry_has_a_name_that_is_a_spelling_of_another():
    assert [name for name in table.OPERATORS if names.canonical(name) != name] == []
    assert len(table.OPERATORS) == sum(len(group.split()) for group, _ in table._GROUPS)


def _aten(name: str):
    packet = getattr(torch.ops.aten, name, None)
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]


@pytest.mark.parametrize("name", [n for n in table.OPERATORS if _aten(n)])
def test_entries_agree_with_what_torch_says(name):
    """Views are views, and what torch calls elementwise has labels."""
    entry = table.OPERATORS[name]
    for func in _aten(name):
        aliases = any(out.alias_info is not None for out in func._schema.returns) and not func._schema.is_mutable
        assert entry.view or not aliases, f"{func} gives a view"
        assert entry.labels is not None or torch.Tag.pointwise not in func.tags, f"{func} is elementwise"


@pytest.mark.parametrize(
    ("spell", "name"),
    [
        (lambda g, x: g.call_function(operator.matmul, (x, x)), "matmul"),
        (lambda g, x: g.call_method("__matmul__", (x, x)), "matmul"),
        (lambda g, x: g.call_function(torch.ops.aten._to_copy.default, (x,)), "cast"),
        (lambda g, x: g.call_method("type_as", (x, x)), "cast"),
        (lambda g, x: g.call_function(operator.and_, (x, x)), "logical_and"),
        (lambda g, x: g.call_method("masked_fill_", (x, x, 0)), "masked_fill"),
        (lambda g, x: g.call_function(torch.ops.aten._unsafe_view.default, (x, [1])), "reshape"),
        (lambda g, x: g.call_function(getattr, (x, "mH")), "mT"),
        (lambda g, x: g.call_function(POLISH, (x,)), "drad_test::polish"),
        (lambda g, x: g.call_function(len, (x,)), ""),
    ],
)
def test_one_name_for_all_spellings(spell, name):
    graph = fx.Graph()
    assert names.op_name(spell(graph, graph.placeholder("x"))) == name
