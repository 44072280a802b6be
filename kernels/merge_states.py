"""`dynamicrad::merge_states`: attention over the union of two disjoint key sets, from the attention over each.

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

It makes ring and split attention exact (FlashInfer calls it by the same name). Plain ATen operations, so that
autograd differentiates it and Inductor fuses it into one kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamicrad_compile.errors import PlanError

_INF = float("inf")


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    got = f"got {list(out_a.shape)}, {list(lse_a.shape)}, {list(out_b.shape)}, {list(lse_b.shape)}."
    if out_a.dim() < 1 or out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        raise PlanError(f"expected out_a and out_b [..., S, D], lse_a and lse_b [..., S], {got}")
    if out_a.dtype != out_b.dtype or lse_a.dtype != lse_b.dtype:
        raise PlanError(
            "out_a and out_b must share a dtype, and so must lse_a and lse_b, "
            f"got {out_a.dtype}, {out_b.dtype} and {lse_a.dtype}, {lse_b.dtype}."
        )
    if not all(x.is_floating_point() for x in (out_a, lse_a)):
        raise PlanError(f"expected floating point tensors, got out {out_a.dtype} and lse {lse_a.dtype}.")


def merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """What the op computes, in the operations that it is made of."""
    _check(out_a, lse_a, out_b, lse_b)
    exact = torch.promote_types(torch.promote_types(out_a.dtype, lse_a.dtype), torch.float32)
    a, b = lse_a.to(exact), lse_b.to(exact)
    top = torch.maximum(a, b).detach()
    none = top == -_INF  # neither set has a key: out 0, lse -inf, and no gradient
    top = torch.where(none, 0.0, top)
    weight_a, weight_b = torch.exp(a - top), torch.exp(b - top)
    total = torch.where(none, 1.0, weight_a + weight_b)
    # No x[..., None]: while tracing for CUDA it asks for a device, which may be lacking.
    # What stands in a row without a key may be anything, NaN included.
    part_a = torch.where((weight_a == 0.0).unsqueeze(-1), 0.0, out_a.to(exact)) * weight_a.unsqueeze(-1)
    part_b = torch.where((weight_b == 0.0).unsqueeze(-1), 0.0, out_b.to(exact)) * weight_b.unsqueeze(-1)
    out = (part_a + part_b) / total.unsqueeze(-1)
    lse = torch.where(none, -_INF, top + torch.log(total))
    return out.to(out_a.dtype), lse.to(lse_a.dtype)


_LIBRARY = torch.library.Library("dynamicrad", "FRAGMENT")
_LIBRARY.define("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)")
_LIBRARY.impl("merge_states", merged, "CompositeImplicitAutograd")


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over two disjoint sets of keys, from (out_a, lse_a) and (out_b, lse_b).

    out_a and out_b [..., S, D], one dtype; lse_a and lse_b [..., S], natural logarithm, as
    `block_sparse_attention(..., return_lse=True)` gives them. Computed in fp32 or better, returned in the dtypes
    given. Associative up to rounding, so that any number of states can be merged one after another. A state with
    lse = -inf has no key in that row and its out is not used there; two of them give out = 0 and lse = -inf.
    Differentiable in all four. Raises PlanError if shapes or dtypes do not fit together.
    """
    out, lse = torch.ops.dynamicrad.merge_states(out_a, lse_a, out_b, lse_b)
    return out, lse
