"""Why an attention stays dense and what to do about it, as one value that is made where the reason arises.

docs/reasons.md lists every code with its text and advice; it is written from the source.
"""

from __future__ import annotations

from dataclasses import dataclass

NOTHING = "nothing to do"
SET_GRID = "set `grid` to its (frames, height, width) in tokens, if they lie frame by frame and row by row"
KEEP_ORDER = (
    "have the model keep its tokens frame by frame, row by row, if it can; "
    "if they do lie so, set `grid` and `override_grid`"
)
IF_VIDEO = "set `grid` if they are a video and nothing else"
OTHER_BACKEND = "choose another attention backend of the model (in diffusers model.set_attention_backend('native'))"
IF_PADDING = (
    "if it hides padding of the prompt, give it as a bool of one row a sample, [B, 1, 1, keys], or leave padding out"
)
PROMPT_MASK = f"{IF_PADDING}; {NOTHING} if it is a mask of the model itself (causal, windows, a bias)"
QUERY_MASK = (
    f"{IF_PADDING}; "
    "if it is one of chunks or windows of frames, compile the whole model and let it make the mask of sizes alone; "
    f"{NOTHING} if it is a bias"
)
REPORT_MODEL = "nothing to set: the model computes it in a way that is not supported; please report the model"
REBUILD_MHA = "build the nn.MultiheadAttention without it, or with need_weights=False"
CALL_SDPA = "write it as torch.nn.functional.scaled_dot_product_attention"
FIX_SIZES = "export for fixed frames, heights and widths; if the option `plan` is set, leave it out"
FIX_LENGTH = (
    "give the model inputs of a fixed length, if it can; or take pattern 'dynamicrad', without the option `plan`"
)


@dataclass(frozen=True)
class Reason:
    """Why an attention stays dense.

    code    short name of the kind of reason; programs and tests go by it
    text    what speaks against replacing this attention, with its sizes and names
    advice  what a user can do about it
    """

    code: str
    text: str
    advice: str

    def __str__(self) -> str:
        return self.text
