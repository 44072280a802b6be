"""Cases of `second_order_attention` for the tests of its Triton kernels: those of `attention_cases` that compensate.

`interpret` computes a case with the kernels, in a process that imported Triton with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch

from support.attention_cases import build, case_of


def arguments(name: str, dense_head: str = "") -> tuple:
    """Positional arguments of the op; with `dense_head` the first key head's rows are gated to dense ones."""
    q, k, v, counts, *rest = build(case_of(name))
    if dense_head:
        counts[:, : q.shape[1] // k.shape[1]] = -(-k.shape[2] // rest[3])
    return (q, k, v, counts, *rest)


def interpret(name: str, dense_head: str = "") -> tuple[torch.Tensor, ...]:
    """out, in fp32, and lse of a case. What is left uninitialised is NaN."""
    from dynamicrad_compile.kernels import moments_op as _registers_the_ops  # noqa: F401
    from dynamicrad_compile.kernels._launch import INTERPRETED
    from dynamicrad_compile.kernels.attention_arguments import Attention
    from dynamicrad_compile.kernels.moments_triton import launch_second_order

    assert INTERPRETED, "set TRITON_INTERPRET=1"
    case = case_of(name)
    torch.use_deterministic_algorithms(True)
    try:
        out, lse = launch_second_order(Attention(*arguments(name, dense_head)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.is_contiguous()
    assert out.dtype == case.dtype
    return out.float(), lse
