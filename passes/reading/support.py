"""What block-sparse attention can't do: shapes, arguments and dtypes of a call that stays dense for them."""

from __future__ import annotations

import math

from dynamicrad_compile.kernels.checks import DTYPES, MAX_HEAD_DIM
from dynamicrad_compile.reporting.reason import NOTHING, REPORT_MODEL, Reason

from ..graph import value_of
from ..site import AttentionCall, Site
from .layout import plain_shape

UNRECORDED = Reason("shapes_unknown", "the shapes of its operands are not recorded", REPORT_MODEL)
SAME_DTYPE = "run the model in bfloat16, float16 or float32 throughout, or under autocast"

Shape = tuple[int, ...]


def few_frames(frames: int) -> Reason:
    """Why so few frames are no video."""
    text = f"only {frames} frame{'s' * (frames != 1)}: an image, images to be edited or part of a video"
    return Reason("few_frames", text, f"{NOTHING}: so few frames have no motion for a plan to follow")


def unsupported(site: Site) -> Reason | None:
    """Why a video self-attention can't be replaced, whatever its mask; None if it can."""
    call = site.call
    value_shape, key_shape = plain_shape(call, 2), plain_shape(call, 1)
    if call.refusal:
        return call.refusal
    if site.q_shape is None or value_shape is None or key_shape is None:
        return UNRECORDED
    return _misfit(call, site.q_shape, key_shape, value_shape) or _unsupported_argument(call)


def _misfit(call: AttentionCall, query: Shape, key: Shape, value: Shape) -> Reason | None:
    """What in the shapes of query, key and value, each [batch, heads, tokens, head_dim], is not supported."""
    if any(layout.count("b") > 1 for layout in call.layouts):
        text = f"the query has {len(call.layouts[0])} dimensions; [batch, heads, tokens, head_dim] expected"
        return Reason("dimensions", text, REPORT_MODEL)
    if query[-1] > MAX_HEAD_DIM:
        return Reason("head_dim", f"head_dim {query[-1]} is larger than {MAX_HEAD_DIM}", REPORT_MODEL)
    if value[-1] != query[-1]:
        text = f"values have another head_dim ({value}) than queries ({query})"
        return Reason("value_head_dim", text, REPORT_MODEL)
    if not query[0] == key[0] == value[0]:
        text = f"queries, keys and values differ in batch ({query[0]}, {key[0]}, {value[0]})"
        return Reason("batch", text, REPORT_MODEL)
    if key[1] != value[1] or query[1] % key[1]:
        text = f"{query[1]} heads of queries, {key[1]} of keys and {value[1]} of values don't fit"
        return Reason("heads", text, REPORT_MODEL)
    return None


def _unsupported_argument(call: AttentionCall) -> Reason | None:
    """What in the arguments and dtypes of a call, but for its mask, is not supported."""
    if call.is_causal is not False:
        advice = f"{NOTHING}: video is not causal for a plan; a bidirectional model has none"
        return Reason("causal", "causal attention", advice)
    if call.dropout_p not in (0, 0.0):
        return Reason("dropout", f"attention dropout ({call.dropout_p})", "call model.eval()")
    if call.scale is not None and not (isinstance(call.scale, (int, float)) and 0 < call.scale < math.inf):
        return Reason("scale", f"its scale is {call.scale}; a positive number is needed", REPORT_MODEL)
    dtypes = {value_of(node).dtype for node in (call.query, call.key, call.value)}
    if call.dtype is None and len(dtypes) > 1:
        text = f"queries, keys and values have different dtypes: {', '.join(sorted(map(str, dtypes)))}"
        return Reason("several_dtypes", text, SAME_DTYPE)
    dtype = call.dtype or value_of(call.query).dtype
    if dtype not in DTYPES:
        return Reason("dtype", f"{dtype} is not float16, bfloat16 or float32", SAME_DTYPE)
    return None
