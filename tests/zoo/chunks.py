"""What each query reads in an attention that was divided into chunks, from the report."""

from __future__ import annotations

import torch


def allowed_by(site):
    """bool [queries, keys] of a SiteReport with chunks: the keys that each query reads."""
    allowed = torch.zeros(site.shape[-2], site.kv_length, dtype=torch.bool)
    for chunk in site.chunks:
        keys = torch.cat([torch.arange(*span) for span in chunk.reads])
        block = torch.ones(chunk.shape[-2], len(keys), dtype=torch.bool)
        if chunk.plan is not None:
            plan = chunk.plan
            rows, columns = _places(plan.query_order, plan.q_len), _places(plan.order, plan.kv_len)
            block = plan.block_mask()[0, 0][rows // plan.block_q][:, columns // plan.block_kv]
        allowed[slice(*chunk.asks), keys] = block
    return allowed


def _places(order, length):
    return torch.arange(length) if order is None else order[0].argsort()
