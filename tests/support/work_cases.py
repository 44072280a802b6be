"""The list of a launch's work for cases of block-sparse attention, under Triton's interpreter."""

from __future__ import annotations

import torch

from .attention_cases import case_of
from .gluon_cases import of_case, tile_of, unit_last_strides


def interpret(name: str, tile_kernel: str) -> tuple[torch.Tensor, ...]:
    """int32 [items, WIDTH] of a case, by the kernel."""
    from dynamicrad_compile.kernels.attention_arguments import Means
    from dynamicrad_compile.kernels.blocks import valid_counts
    from dynamicrad_compile.kernels.means import kept_bits
    from dynamicrad_compile.kernels.work_triton import list_work

    case = case_of(name)
    a, means = unit_last_strides(of_case(case)), None
    if a.compensate is not None:
        valid = valid_counts(case.kv_len, case.block_kv, a.kv_mask, a.k.device)
        bits = kept_bits(a.kv_counts, a.kv_indices, a.num_kv_blocks)
        means = Means(a.k, a.v, valid, a.compensate, bits)  # the list reads no mean
    return (list_work(a, means, tile_of(case, tile_kernel)),)
