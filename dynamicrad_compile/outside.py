"""What a compiled call leaves outside its graphs: where Dynamo broke them, and attention that ran in plain Python.

Attention is looked for in the calls in which graphs are made, and only in these: from the first graph on until the
compiled function returns, Python tells of every function of PyTorch that is called (`sys.setprofile`), compilation
apart. Later calls cost nothing. While another profiler of Python is on, nothing is looked for.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from .errors import StrictError
from .frames import TORCH, code_of_compilation, frame_of
from .reporting.reason import OTHER_BACKEND
from .runtime.state import GraphState

log = logging.getLogger(__name__)

_MODULES = os.path.join(TORCH, "nn") + os.sep
_RUN = GraphState.bind.__code__.co_filename
_SDPA = torch.nn.functional.scaled_dot_product_attention
_ADVICE = (
    "Where an offloading or casting hook breaks graphs, do without it or use one around whole blocks; "
    "TORCH_LOGS=graph_breaks tells more."
)


@dataclass
class Call:
    """One call of a compiled function in which graphs are made.

    frame   of PyTorch's wrapper around the function
    notes   of the first graph's report
    strict  an attention outside raises
    breaks  where graphs were broken, and why
    places  lines of code that called attention outside graphs, and how often
    """

    frame: FrameType | None
    notes: list[str]
    strict: bool
    breaks: dict[str, None] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    note: str = ""

    def listen(self) -> None:
        """Go on looking, unless something else profiles this thread."""
        if self.frame is not None and sys.getprofile() is None:
            sys.setprofile(self._event)

    def pause(self) -> None:
        """Look no more."""
        if getattr(sys.getprofile(), "__self__", None) is self:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and arg is _SDPA and _is_users(frame):
            self._found(frame)
        elif event == "return" and frame is self.frame:
            self.frame = None
            self.pause()
            if self.note:
                log.warning(self.note)

    def _found(self, frame: FrameType) -> None:
        place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        self.places[place] = self.places.get(place, 0) + 1
        count, where = sum(self.places.values()), ", ".join(self.places)
        why = "; ".join(self.breaks) or "Dynamo gave up on the code around them"
        text = f"ran outside every graph (at {where}), where nothing can be replaced: {why}. {_ADVICE}"
        if _is_in_graph(frame):
            text = f"ran inside an operation of a graph into which nothing can look (at {where}). {OTHER_BACKEND}"
        if self.strict:
            self.frame = None
            self.pause()
            raise StrictError(f"strict=True, and an attention {text}")
        old, self.note = self.note, f"{count} attention calls {text}"
        if old in self.notes:
            self.notes.remove(old)
        self.notes.append(self.note)


_calls = threading.local()


def graph_made(gm: torch.fx.GraphModule, notes: list[str], strict: bool) -> None:
    """Look for attention in the rest of the call for which a graph was made; what is found is added to `notes`.

    With `strict` the first such attention raises StrictError.
    """
    call = _present(notes, strict)
    if call is None:
        return
    broken = break_of(gm)
    if broken:
        call.breaks[broken] = None
    call.listen()


def continues() -> str:
    """Why a graph that is about to be compiled goes on where another ended; '' if it does not."""
    call = getattr(_calls, "call", None)
    made = call is not None and call.frame is not None and call.frame is _wrapper()
    if not made and not _compiled_code().startswith("torch_dynamo_resume_in"):
        return ""
    breaks = list(call.breaks) if made and call is not None else []
    return breaks[-1] if breaks else "the model is compiled in pieces"


def break_of(gm: torch.fx.GraphModule) -> str:
    """Where and why a graph ends before the model does; '' where it does not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    stack = [line for line in reason.user_stack if not line.filename.startswith(TORCH)] or reason.user_stack
    where = f" at {os.path.basename(stack[-1].filename)}:{stack[-1].lineno}" if stack else ""
    first, *more = reason.reason.strip().splitlines()
    explained = next((line.split(":", 1)[1] for line in more if "Explanation:" in line), "")
    function = re.search(r"<function (\S+) at 0x", explained)
    return f"graph break{where} ({first.strip()}{' ' + function[1] if function else ''})"


def _present(notes: list[str], strict: bool) -> Call | None:
    """The call that is going on in this thread, None outside any."""
    frame = _wrapper()
    known: Call | None = getattr(_calls, "call", None)
    if known is None or known.frame is not frame:
        known = None if frame is None else Call(frame, notes, strict)
        _calls.call = known
        _listen_between_compilations()
    return known


def _wrapper() -> FrameType | None:
    """The frame of PyTorch's wrapper around the compiled function that is being called."""
    return frame_of("compile_wrapper", "eval_frame.py")


def _compiled_code() -> str:
    """Name of the code that Dynamo is compiling."""
    code = code_of_compilation()
    return "" if code is None else code.co_name


def _is_users(frame: FrameType) -> bool:
    """Whether a frame runs code of the user, or a module of PyTorch; not generated code, and no compiler."""
    name = frame.f_code.co_filename
    return not name.startswith("<") and (not name.startswith(TORCH) or name.startswith(_MODULES))


def _is_in_graph(frame: FrameType | None) -> bool:
    """Whether a captured graph is running."""
    while frame is not None and frame.f_code.co_filename != _RUN:
        frame = frame.f_back
    return frame is not None


def _pause(*_: Any) -> None:
    call = getattr(_calls, "call", None)
    if call is not None:
        call.pause()


def _listen(*_: Any) -> None:
    call = getattr(_calls, "call", None)
    if call is not None:
        call.listen()


def _listen_between_compilations() -> None:
    from torch._dynamo.callback import callback_handler, on_compile_end, on_compile_start

    if _pause not in callback_handler.start_callbacks:
        on_compile_start(_pause)
        on_compile_end(_listen)
