"""What is checked of a plan's numbers: once, on the host, where somebody gives them.

Kernels can't look at counts and ids without waiting for the device; what is out of range there is clamped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PlanError

MEND = "BlockPlan.from_mask makes a plan of a bool mask."


def can_be_read(*tensors: Tensor) -> bool:
    """Whether there are values to look at: not in a graph that is traced or captured, nor on fake or meta tensors."""
    if torch.compiler.is_compiling() or torch._guards.active_fake_mode() is not None:
        return False
    if any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or torch._is_functional_tensor(x) for x in tensors):
        return False
    return not (any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing())


def check_plan(kv_counts: Tensor, kv_indices: Tensor, blocks: int) -> None:
    """Raise PlanError, with row and value, unless each row lists different ids in 0..blocks - 1, or reads all blocks.

    kv_counts int32 [P, H', Mq], kv_indices int32 [P, H', Mq, W].
    """
    shape = kv_counts.shape
    counts, indices = kv_counts.detach().cpu(), kv_indices.detach().cpu()
    for p in range(shape[0]):
        for h in range(shape[1]):
            where = (f" of head {h}" if shape[1] > 1 else "") + (f" in regime {p}" if shape[0] > 1 else "")
            _check_rows(counts[p, h], indices[p, h], blocks, where)


def _check_rows(counts: Tensor, indices: Tensor, blocks: int, where: str) -> None:
    """`check_plan` of counts [Mq] and indices [Mq, W]; `where` says of which head."""
    width = indices.shape[1]
    wrong = (counts < 0) | (counts > blocks) | (counts > width) & (counts < blocks)
    for (row,) in wrong.nonzero()[:1].tolist():
        raise PlanError(
            f"kv_counts of query block {row}{where} is {counts[row]}; expected 0..{min(width, blocks)}, the ids that a "
            f"row of kv_indices has room for, or {blocks}, all blocks. {MEND}"
        )
    # The ids of a dense row are not read.
    listed = torch.arange(width, device="cpu") < torch.where(counts < blocks, counts, 0)[:, None]
    outside = listed & ((indices < 0) | (indices >= blocks))
    for row, place in outside.nonzero()[:1].tolist():
        raise PlanError(
            f"kv_indices of query block {row}{where} lists block {indices[row, place]} at place {place}; expected ids "
            f"in 0..{blocks - 1}. {MEND}"
        )
    if bool((listed[:, 1:] & (indices[:, 1:] <= indices[:, :-1])).any()):
        ids = torch.where(listed, indices, blocks + torch.arange(width, device="cpu")).sort(-1).values
        for row, place in (ids[:, 1:] == ids[:, :-1]).nonzero()[:1].tolist():
            raise PlanError(
                f"kv_indices of query block {row}{where} lists block {ids[row, place]} twice; expected different ids "
                f"in a row. {MEND}"
            )


def check_order(name: str, order: Tensor | None) -> None:
    """Raise PlanError, with regime and token, unless each row of an order int64 [P, S] lists every token once."""
    if order is None:
        return
    rows = order.detach().cpu()
    for p, row in enumerate(rows):
        counts = row.clamp(0, len(row) - 1).bincount(minlength=len(row))
        for (token,) in (counts != 1).nonzero()[:1].tolist():
            raise PlanError(
                f"{name} of regime {p} lists token {token} {counts[token]} times; expected a permutation of "
                f"0..{len(row) - 1}, each token once."
            )


def check_classes(kv_counts: Tensor, kv_forced: Tensor, kv_near: Tensor) -> None:
    """Raise PlanError, with row and values, unless 0 <= kv_forced <= kv_near <= kv_counts; all int32 [P, H', Mq]."""
    counts, forced, near = (x.detach().cpu() for x in (kv_counts, kv_forced, kv_near))
    wrong = (forced < 0) | (forced > near) | (near > counts)
    for at in wrong.nonzero()[:1].tolist():
        found = ", ".join(f"{name} {x[tuple(at)]}" for name, x in (("kv_forced", forced), ("kv_near", near)))
        raise PlanError(
            f"row {at} (regime, head, query block) of the candidates has {found} and kv_counts {counts[tuple(at)]}; "
            "expected 0 <= kv_forced <= kv_near <= kv_counts."
        )
