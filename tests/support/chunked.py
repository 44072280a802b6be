"""Attention under a mask that was divided into chunks, beside dense attention under it and the plans."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from zoo.chunks import allowed_by

from support.graphs import call, compile_sparse, drad, relative_error


@contextmanager
def masked_also(allowed):
    """Inside, attention of so many queries and keys is under this mask, besides its own."""

    class Masked(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if func in (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention):
                named = {**dict(zip(("query", "key"), args, strict=False)), **kwargs}
                if (named["query"].shape[-2], named["key"].shape[-2]) == tuple(allowed.shape):
                    mask = kwargs.pop("attn_mask", None)
                    if mask is not None and mask.dtype != torch.bool:
                        mask = mask > -1e3
                    kwargs["attn_mask"] = allowed if mask is None else mask & allowed
            return func(*args, **kwargs)

    with Masked():
        yield


def check_chunks(model, kwargs, replaced=1, sparsities=(0.0, 0.6), tolerance=1e-5, **options):
    """Compile the model, keeping all blocks and then few; its output is that of dense attention under both masks.

    Returns the last report.
    """
    for sparsity in sparsities:
        torch._dynamo.reset()
        options = {"mode": "static_ratio", "regime": "mid", "compensate": 0.0, **options}
        fast = compile_sparse(model, sparsity=sparsity, **options)
        out, dense = call(fast, kwargs), call(model, kwargs)
        report = drad.report(fast)
        assert len(report.replaced) == replaced, str(report)
        with masked_also(allowed_by(report.replaced[0])):
            assert relative_error(out, call(model, kwargs)) < tolerance
        if sparsity == 0.0:
            assert relative_error(out, dense) < tolerance
        elif any(chunk.plan is not None and chunk.plan.sparsity > 0.2 for chunk in report.replaced[0].chunks):
            assert relative_error(out, dense) > 1e-3
    return report
