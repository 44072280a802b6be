"""What Torch-TensorRT needs to know of the attention op. Importing this registers it.

A decomposition turns `dynamicrad::block_sparse_attention` into ordinary operations and `dynamicrad::plugin_attention`;
a converter makes a plugin layer of that. So `torch_tensorrt.dynamo.compile` also takes a program with the op as it is.
A graph that was not decomposed has a converter too, for attention without mask and compensation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt.plugin as trtp
import torch
from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor
from torch_tensorrt.dynamo.lowering._decomposition_groups import TORCH_TRT_DECOMPOSITIONS

from ...kernels.attention_arguments import Attention
from .graph import (
    ATTENTION,
    PLUGIN_ATTENTION,
    SECOND_ORDER,
    attention_for_plugin,
    refusal,
    second_order_for_plugin,
)
from .names import INPUTS, MASK_INPUTS, MEANS_INPUTS, NAMESPACE, plugin_name
from .plugin import ATTRIBUTES

TENSORS = INPUTS + MASK_INPUTS + MEANS_INPUTS
SCALARS = ("scale", "block_q", "block_kv")


@dynamo_tensorrt_converter(PLUGIN_ATTENTION, supports_dynamic_shapes=True)
def convert(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Sequence[Any]:
    """A plugin layer with the kernel ahead of time; (out, lse) as tensors of the network."""
    given = dict(zip((*TENSORS, *SCALARS), args, strict=True))
    tensors = {key: given[key] for key in TENSORS if given[key] is not None}
    plugin = getattr(getattr(trtp.op, NAMESPACE), plugin_name("kv_mask" in tensors, "mean_k" in tensors))
    inputs = [get_trt_tensor(ctx, tensor, f"{name}_{key}") for key, tensor in tensors.items()]
    attributes = {key: np.array([given[key]], dtype=kind) for key, kind in ATTRIBUTES.items()}
    layer = ctx.net.add_plugin(plugin(*inputs, **attributes), aot=True)
    if layer is None:
        raise RuntimeError(f"TensorRT did not take the plugin of {name}")
    layer.name = f"[{target}]-[{name}]"
    return layer.get_output(0), layer.get_output(1)


def needs_nothing_else(node: torch.fx.Node, settings: Any = None) -> bool:
    """Whether the op as it is needs nothing computed beside the kernel, so that a plugin alone can take it."""
    a = Attention(*node.args, **node.kwargs)
    values = a._replace(q=a.q.meta["val"], k=a.k.meta["val"])
    return a.kv_mask is None and a.compensate is None and not refusal(values)


@dynamo_tensorrt_converter(ATTENTION, supports_dynamic_shapes=True, capability_validator=needs_nothing_else)
def convert_plain(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Sequence[Any]:
    """The same for the op itself."""
    a = Attention(*args, **kwargs)
    return convert(ctx, target, (*a[:5], *(None,) * 6, a.factor, a.block_q, a.block_kv), {}, name)


TORCH_TRT_DECOMPOSITIONS[ATTENTION] = attention_for_plugin
TORCH_TRT_DECOMPOSITIONS[SECOND_ORDER] = second_order_for_plugin
