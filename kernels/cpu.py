"""CPU path of block-sparse attention: gather the active blocks of some rows, then two batched GEMMs.

For a group of (head, query block) rows with the same number of active blocks

    S = scale * Q K[ids]^T        baddbmm, fp32
    P = softmax(S)                in place
    O = P V[ids]                  bmm
    lse = max(S) - log(max(P))    because max(P) = exp(max(S) - lse)

Everything is plain eager PyTorch: nothing is compiled, so there is no compiler to look for, no recompilation
when a length changes, and no wait at the first call. Per thread the scores of a group are kept near 1 MB,
which stays in a core's L2 cache; measured on an AVX-512 core, gathering costs 3 to 8 % of the two GEMMs, and
the GEMMs run faster than those inside dense SDPA, which works on smaller tiles.
Half precision inputs are widened to fp32, so the result is as exact as the rounding of the output allows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

SCORE_BYTES_PER_THREAD = 1 << 20  # scores of one group, per thread
GROUP_BYTES = 256 << 20  # all buffers of one group
COPY_BYTES = 16 << 20  # widened or re-laid copies of keys and values held at a time
CHUNK_TOKENS = 4096  # longest key range of one softmax; longer rows are merged by their lse


@dataclass
class _Rows:
    """Active blocks of the rows of some heads, for one sample."""

    ids: torch.Tensor  # int64 [R, W], the row's blocks: full ones first, then partly masked ones
    count: torch.Tensor  # int64 [R], blocks with at least one usable key
    partial: torch.Tensor  # int64 [R], how many of them are partly masked


@dataclass
class _Buffers:
    """Scratch tensors by name that grow when they must, so that groups reuse warm memory."""

    held: dict[str, torch.Tensor] = field(default_factory=dict)

    def get(self, name: str, *shape: int) -> torch.Tensor:
        numel = 1
        for size in shape:
            numel *= size
        buffer = self.held.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self.held[name] = torch.empty(numel, dtype=torch.float32, device="cpu")
        return buffer[:numel].view(shape)


def _to_blocks(x: torch.Tensor, block: int, n_blocks: int, name: str, buffers: _Buffers) -> torch.Tensor:
    """[H, S, D] of any dtype and strides -> contiguous fp32 [H * n_blocks, block, D], padded with zeros.

    A view if `x` is that already.
    """
    heads, length, dim = x.shape
    if n_blocks * block == length and x.dtype == torch.float32 and x.is_contiguous():
        return x.view(heads * n_blocks, block, dim)
    padded = buffers.get(name, heads, n_blocks * block, dim)
    padded[:, :length] = x
    padded[:, length:] = 0
    return padded.view(heads * n_blocks, block, dim)


def _rows(counts: torch.Tensor, indices: torch.Tensor, n_kv: int, usable: torch.Tensor | None) -> _Rows:
    """Rows of counts [h, Mq] and indices [h, Mq, W]; `usable` bool [n_kv, block_kv] or None if all keys are."""
    count = counts.reshape(-1).long().clamp(max=n_kv)
    ids = indices.reshape(count.numel(), -1).long()
    dense = count == n_kv
    if bool(dense.any()):
        ids = torch.nn.functional.pad(ids, (0, n_kv - ids.shape[1]))
        ids = torch.where(dense[:, None], torch.arange(n_kv, device="cpu"), ids)
    partial = torch.zeros_like(count)
    if usable is not None and ids.shape[1] > 0:
        keys = usable.sum(-1)
        rank = torch.where(keys == usable.shape[1], 0, torch.where(keys > 0, 1, 2))
        active = torch.arange(ids.shape[1], device="cpu") < count[:, None]
        rank = torch.where(active, rank[torch.where(active, ids, 0)], 3)
        rank, order = rank.sort(dim=-1, stable=True)
        ids, count, partial = ids.gather(1, order), (rank < 2).sum(-1), (rank == 1).sum(-1)
    return _Rows(ids, count, partial)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    scores: torch.Tensor,
    usable: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [G, M, D] over k, v [G, N, D]; `usable` bool [G, n] speaks of the last n keys."""
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
    if usable is not None:
        scores[..., scores.shape[-1] - usable.shape[-1] :].masked_fill_(~usable[:, None], float("-inf"))
    top = scores.amax(-1)
    torch.softmax(scores, -1, out=scores)
    return torch.bmm(scores, v), top.sub_(scores.amax(-1).log_())


def _merge(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint key sets, from the attention over each."""
    total = torch.logaddexp(lse, new_lse)
    out = out * (lse - total).exp_()[..., None] + new_out * (new_lse - total).exp_()[..., None]
    return out, total


def _group_size(block_q: int, tokens: int, dim: int) -> int:
    """Rows handled together: whole multiples of the thread count, within the two byte budgets."""
    tokens = min(tokens, CHUNK_TOKENS)
    threads = torch.get_num_threads()
    per_thread = max(1, SCORE_BYTES_PER_THREAD // (4 * block_q * tokens))
    return max(1, min(threads * per_thread, GROUP_BYTES // (4 * tokens * (block_q + 2 * dim))))


def _gathered(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ids: torch.Tensor,
    base: torch.Tensor,
    n_partial: int,
    scale: float,
    usable: torch.Tensor | None,
    buffers: _Buffers,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [G, bq, D] over the blocks ids [G, n] of the heads at offset `base` [G] of keys, values [*, bk, D]."""
    group, n_blocks = ids.shape
    block, dim = keys.shape[1:]
    chunk = max(1, CHUNK_TOKENS // block)
    out, lse = q, q  # replaced by the first chunk
    for start in range(0, n_blocks, chunk):
        part = ids[:, start : start + chunk]
        width = part.shape[1]
        flat = (part + base[:, None]).reshape(-1)
        k = torch.index_select(keys, 0, flat, out=buffers.get("k", flat.numel(), block, dim))
        v = torch.index_select(values, 0, flat, out=buffers.get("v", flat.numel(), block, dim))
        # Partly masked blocks come last in a row.
        n_masked = max(0, start + width - (n_blocks - n_partial))
        mask = None
        if usable is not None and n_masked:
            mask = usable[part[:, width - min(n_masked, width) :]].flatten(1)
        k, v = k.view(group, width * block, dim), v.view(group, width * block, dim)
        scores = buffers.get("s", group, q.shape[1], width * block)
        new = _attend(q, k, v, scale, scores, mask)
        out, lse = new if start == 0 else _merge(out, lse, *new)
    return out, lse


def _direct(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, buffers: _Buffers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense rows of one head: q [G, bq, D] over all of keys, values [N, D], which are read in place."""
    group, block, _ = q.shape
    out, lse = q, q  # replaced by the first chunk
    for start in range(0, keys.shape[0], CHUNK_TOKENS):
        k = keys[start : start + CHUNK_TOKENS].expand(group, -1, -1)
        v = values[start : start + CHUNK_TOKENS].expand(group, -1, -1)
        new = _attend(q, k, v, scale, buffers.get("s", group, block, k.shape[1]), None)
        out, lse = new if start == 0 else _merge(out, lse, *new)
    return out, lse


def _heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    buffers: _Buffers,
) -> None:
    """Some heads of one sample: q [h, Sq, D], k and v [hkv, Sk, D], counts [h or 1, Mq], mask [Sk] or None.

    Fills out fp32 [h * Mq, block_q, D] and lse [h * Mq, block_q].
    """
    heads, _, dim = q.shape
    n_q, n_kv, kv_len = counts.shape[-1], -(-k.shape[1] // block_kv), k.shape[1]
    queries = _to_blocks(q, block_q, n_q, "queries", buffers)
    keys, values = (_to_blocks(x, block_kv, n_kv, name, buffers) for x, name in ((k, "keys"), (v, "values")))
    usable = None
    if mask is not None or kv_len % block_kv:
        usable = torch.zeros(n_kv * block_kv, dtype=torch.bool, device="cpu")
        usable[:kv_len] = True if mask is None else mask
        usable = usable.view(n_kv, block_kv)
    rows = _rows(counts, indices, n_kv, usable)

    # One item is one query block of one head; `row` is its line in `rows`, which heads may share.
    item = torch.arange(heads * n_q, device="cpu")
    row = item if counts.shape[0] > 1 else item % n_q
    kv_head = item // n_q // (heads // k.shape[0])
    count = rows.count[row]
    # Longest first: buffers get their final size at once. Dense items must not mix heads in a group.
    order = torch.argsort(count, descending=True, stable=True)
    count_list, head_list = count[order].tolist(), kv_head[order].tolist()
    start = 0
    while start < len(count_list):
        n = count_list[start]
        in_place = n == n_kv and mask is None
        limit = len(count_list) if n == 0 else start + _group_size(block_q, n * block_kv, dim)
        stop = start + 1
        while stop < min(limit, len(count_list)) and count_list[stop] == n:
            if in_place and head_list[stop] != head_list[start]:
                break
            stop += 1
        items = order[start:stop]
        if n == 0:
            out[items], lse[items] = 0.0, float("-inf")
        else:
            group_q = queries.index_select(0, items)
            if in_place:
                first = head_list[start] * n_kv
                all_k = keys[first : first + n_kv].view(-1, dim)[:kv_len]
                all_v = values[first : first + n_kv].view(-1, dim)[:kv_len]
                result = _direct(group_q, all_k, all_v, scale, buffers)
            else:
                line = row[items]
                n_partial = int(rows.partial[line].max())
                ids, base = rows.ids[line, :n], kv_head[items] * n_kv
                result = _gathered(group_q, keys, values, ids, base, n_partial, scale, usable, buffers)
            out.index_copy_(0, items, result[0])
            lse.index_copy_(0, items, result[1])
        start = stop


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_counts: torch.Tensor,
    kv_indices: torch.Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
    kv_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-sparse attention of CPU tensors; arguments as of the op, already validated.

    Memory beyond the output: the copies of some heads (about COPY_BYTES, at least one key/value head) and the
    buffers of a group (GROUP_BYTES at most, or one row).
    """
    batch, heads, q_len, dim = q.shape
    rep = heads // k.shape[1]
    out = torch.empty(batch, heads, q_len, dim, dtype=q.dtype, device="cpu")
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device="cpu")
    step = rep * max(1, COPY_BYTES // (8 * max(1, k.shape[2] * dim)))
    padded = block_q * kv_counts.shape[2]
    in_place = padded == q_len and q.dtype == torch.float32
    buffers = _Buffers()
    # The caller's autocast must not narrow the GEMMs in here.
    with torch.autocast("cpu", enabled=False):
        for b in range(batch):
            b_plan = b if kv_counts.shape[0] > 1 else 0
            mask = None if kv_mask is None else kv_mask[b if kv_mask.shape[0] > 1 else 0]
            for h in range(0, heads, step):
                own, own_kv = slice(h, h + step), slice(h // rep, (h + step) // rep)
                planned = own if kv_counts.shape[1] > 1 else slice(0, 1)
                n = q[b, own].shape[0]
                if in_place:
                    rows_out, rows_lse = out[b, own], lse[b, own]
                else:
                    rows_out, rows_lse = buffers.get("out", n, padded, dim), buffers.get("lse", n, padded)
                _heads(
                    q[b, own],
                    k[b, own_kv],
                    v[b, own_kv],
                    kv_counts[b_plan, planned],
                    kv_indices[b_plan, planned],
                    scale,
                    block_q,
                    block_kv,
                    mask,
                    rows_out.view(-1, block_q, dim),
                    rows_lse.view(-1, block_q),
                    buffers,
                )
                if not in_place:
                    out[b, own], lse[b, own] = rows_out[:, :q_len], rows_lse[:, :q_len]
    return out, lse
