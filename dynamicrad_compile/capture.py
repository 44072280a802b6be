"""explain: what would be replaced in a model, from a capture alone; no code is generated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from .backend import analyse
from .capturing import capturing, keep_sizes_constant
from .options import Options
from .outside import graph_made
from .parallel.expected import expected_on
from .passed_on import passes_on
from .passes.graph import hint, value_of
from .reporting.report import GraphReport, Report


def explain(model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Capture `model(*args, **kwargs)` and report what the backend would do to each attention.

    The model is not run: its graphs return zeros of the right shapes. Only where the code between two graphs
    can't go on with zeros are the graphs run eagerly. Gradients are off. `options` are the backend's.
    Attention calls that ran outside every graph, because Dynamo gave up there, are counted in a note.
    `report.expected` says what speed is expected on the device of the inputs, as far as that can be known.

    Raises OptionsError, ProfileError, RouterError or GridError, or whatever the model itself raises.
    """
    parsed = Options.from_mapping(options)
    target = getattr(model, "_orig_mod", model)
    with capturing(), torch.no_grad():
        try:
            return _capture(target, args, kwargs, parsed, run=False)
        except torch._dynamo.exc.BackendCompilerFailed:
            raise
        except Exception:  # zeros led the model's own Python astray; with real values its errors are its own
            return _capture(target, args, kwargs, parsed, run=True)


def _capture(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, run: bool) -> Report:
    graphs: list[GraphReport] = []
    flops: list[int | None] = []
    devices: list[torch.device] = []

    @passes_on
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        keep_sizes_constant(gm)
        stand_in = gm.forward if run else _returns_zeros(gm)
        # Of a copy: Dynamo looks at the inputs of its graph again, and knows nothing of those that the passes add.
        rewritten = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        graphs.append(analyse(rewritten, example_inputs, options))
        flops.append(_other_flops(rewritten))
        devices.extend(x.device for x in example_inputs if isinstance(x, torch.Tensor))
        graph_made(gm, graphs[-1].notes, options.strict)
        return stand_in

    torch.compile(model, backend=backend)(*args, **kwargs)
    report = Report(graphs)
    if devices:
        counts = [count for count in flops if count is not None]
        rest, unknown = (sum(counts), "") if len(counts) == len(flops) else (None, "its FLOPs can't be counted")
        forced = options.min_tokens not in (None, "auto")
        report.expected = (expected_on(devices[0], report, rest_flops=rest, unknown=unknown, forced=forced),)
    return report


def _other_flops(gm: fx.GraphModule) -> int | None:
    """FLOPs of the products of a rewritten graph without attention, by its fake inputs; None where it can't run so."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    ours = {op: _nothing for op in flop_registry if "dynamicrad" in str(op)}  # they count by values
    inputs = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False, custom_mapping=ours) as counter:
            gm(*tree_map(_zeros_like, inputs))
    except Exception:  # whatever code that was captured raises without values
        return None
    counts = counter.get_flop_counts().get("Global", {})  # empty where nothing was counted
    return sum(count for op, count in counts.items() if "attention" not in str(op))


def _nothing(*_: Any, **__: Any) -> int:
    return 0


def _returns_zeros(gm: fx.GraphModule) -> Callable[..., Any]:
    """A function that returns zeros shaped like the graph's outputs."""
    output = next(node for node in gm.graph.nodes if node.op == "output")
    values = tree_map(lambda x: value_of(x) if isinstance(x, fx.Node) else x, output.args[0])

    return lambda *_: tree_map(_zeros_like, values)


def _zeros_like(value: Any) -> Any:
    """Zeros of the shape, dtype and device of a tensor, of whatever fake mode; the number of a symbolic size."""
    if isinstance(value, torch.Tensor):
        return torch.zeros([hint(size) for size in value.shape], dtype=value.dtype, device=value.device)
    return hint(value) if isinstance(value, torch.SymInt) else value
