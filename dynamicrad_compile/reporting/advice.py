"""What to do about an attention that stays dense, by its role and the reason.

Each reason that a pass or the planner gives matches an entry below; tests/test_advice.py looks for those that don't.
"""

from __future__ import annotations

import re

NOTHING = "nothing to do"

_SET_GRID = "set `grid` to its (frames, height, width) in tokens, if they lie frame by frame and row by row"
_BACKEND = "choose another attention backend, such as model.set_attention_backend('native')"
_MASK = "give the prompt mask as a bool of one row a sample, [B, 1, 1, keys], or leave padding out of the prompt"
_MODEL = "nothing to set: the model computes it in a way that is not supported; please report the model"
_MHA = "build the nn.MultiheadAttention without it, or with need_weights=False"

_BY_ROLE = {
    "cross_attention": f"{NOTHING}: its keys are a prompt or another short sequence, not video",
    "spatial_attention": f"{NOTHING}: attention within one frame has no frames to skip",
    "temporal_attention": f"{NOTHING}: attention across frames at one place is short",
}

_BY_REASON = (
    # what the sequence is
    (r"^windowed attention", f"{NOTHING}: it is sparse already"),
    (r"^no frames x height x width", f"{NOTHING} if these are text or an image; set `grid` if they are a video"),
    (r"^only .* frames: images", "set `grid` if they are a video"),
    (r"axis trace did not reach", "compile with drad.compile(model), so that sizes that depend on data stay traceable"),
    (r"which one is being denoised", _MODEL),
    (r"in a tiled order|in reverse order", "have the model keep its tokens frame by frame, row by row, if it can"),
    (r"aligns an axis|cuts across|another order|comes before|different axes|nothing but a reshape|in place in a way"
     r"|writes rows by an index",
     _SET_GRID),
    (r"more keys are not supported", "run the model without its key cache or context, if it can"),
    (r"come from other processes", "nothing to set yet: under context parallelism it stays dense, and right"),
    # how attention is called
    (r"mask .* is not bool|additive mask|not a key padding mask|mask whose shape|more than one mask|another$", _MASK),
    (r"^its mask (fills|is applied)|scaled after its mask", _MASK),
    (r"^already block-sparse|score_mod|quantised|is not supported$|packed together|more than its output", _BACKEND),
    (r"^causal attention", f"{NOTHING}: video is not causal for a plan; a bidirectional model has none"),
    (r"^attention dropout", "call model.eval()"),
    (r"head_dim|^its scale is|don't fit|differ in batch|dimensions; \[batch|not recorded", _MODEL),
    (r"different dtypes|is not float16", "run the model in bfloat16, float16 or float32 throughout, or under autocast"),
    (r"appends a|projection weights|other widths|given from outside|attention weights are used", _MHA),
    (r"set_fastpath_enabled", "call torch.backends.mha.set_fastpath_enabled(False) before compiling"),
    (r"used elsewhere|between the two products|writes in place while",
     "write it as torch.nn.functional.scaled_dot_product_attention"),
    (r"^it is inside", "call the attention outside of it, or choose the branch in Python"),
    # how the graph is compiled
    (r"axis of its grid is in no shape", "set `grid`, or compile for fixed sizes (dynamic=False)"),
    # what was asked for
    (r"^pattern is 'dense'|\(dense_layers\)$", f"{NOTHING}: the options ask for it"),
    (r"^dense_layers can't", "compile the whole model with torch.compile(model), or set dense_layers=0"),
    (r"too little to pay$", "set `min_tokens=0` to make it sparse all the same; it would be slower by that table"),
    (r"fewer than min_tokens", "lower `min_tokens` to make it sparse all the same; it may be slower"),
)  # fmt: skip

UNKNOWN = "please report it, with this line"


def advice_for(role: str, reason: str) -> str:
    """What a user can do about an attention of this role that stays dense for this reason; '' without a reason."""
    if not reason or role in _BY_ROLE:
        return _BY_ROLE.get(role, "") if reason else ""
    return next((advice for pattern, advice in _BY_REASON if re.search(pattern, reason)), UNKNOWN)
