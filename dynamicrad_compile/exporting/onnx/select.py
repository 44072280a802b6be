"""The function bodies of `dynamicrad::SelectBlocksBy...` in standard ONNX operators, one for each criterion.

They follow `kernels.select_cpu` step by step; see `kernels.select_op` for the formulas. Scores are those of pooled
queries and keys, [B, H, Mq, Mk], so their memory is 1 / (block_q block_kv) of that of a dense score matrix.
"""

from onnxscript import BOOL, FLOAT, INT32, INT64, script
from onnxscript import opset18 as op

from .attention import DOMAIN


@script(DOMAIN, default_opset=op)
def CandidateScores(
    q: FLOAT,
    k: FLOAT,
    kv_counts: INT32,
    kv_indices: INT32,
    kv_mask: BOOL,
    scale: float,
    block_q: int,
    block_kv: int,
    by_error: int,
) -> tuple[FLOAT, INT64, BOOL, BOOL]:
    """Scores of a row's candidates, ids, which places hold one (all [B, H, Mq, W]), and dense rows [.., Mq, 1].

    Scores are -inf where there is no candidate and where a block has no valid key.
    """
    one = op.Constant(value_ints=[1])
    three = op.Constant(value_ints=[3])
    minus_one = op.Constant(value_ints=[-1])
    end = op.Constant(value_ints=[0])
    length = op.Constant(value_ints=[2])
    nothing = op.Constant(value_float=0.0)
    lowest = op.Constant(value_float=float("-inf"))
    highest = op.Constant(value_float=3.0e38)
    batch = op.Shape(q, start=0, end=1)
    heads = op.Shape(q, start=1, end=2)
    q_len = op.Shape(q, start=2, end=3)
    dim = op.Shape(q, start=3, end=4)
    kv_heads = op.Shape(k, start=1, end=2)
    kv_len = op.Shape(k, start=2, end=3)
    bq = op.Reshape(op.Constant(value_int=block_q), one)
    bk = op.Reshape(op.Constant(value_int=block_kv), one)
    m_q = op.Div(op.Sub(op.Add(q_len, bq), one), bq)
    m_k = op.Div(op.Sub(op.Add(kv_len, bk), one), bk)
    q_pads = op.Concat(end, op.Sub(op.Mul(m_q, bq), q_len), axis=0)
    k_pads = op.Concat(end, op.Sub(op.Mul(m_k, bk), kv_len), axis=0)

    # Mean query of each block; the last one may be partial.
    q_count = op.Expand(op.Constant(value_float=1.0), q_len)
    q_count = op.Reshape(op.Pad(q_count, q_pads, nothing), op.Concat(minus_one, bq, axis=0))
    q_count = op.ReduceSum(q_count, one, keepdims=1)
    q_mean = op.Pad(op.Cast(q, to=1), q_pads, nothing, length)
    q_mean = op.Reshape(q_mean, op.Concat(batch, heads, m_q, bq, dim, axis=0))
    q_mean = op.Div(op.ReduceSum(q_mean, three, keepdims=0), q_count)
    q_mean = op.Cast(op.CastLike(q_mean, q), to=1)

    # Mean of the valid keys of each block, and log of their number.
    visible = op.Expand(op.Cast(kv_mask, to=1), op.Concat(batch, kv_len, axis=0))
    visible = op.Pad(visible, k_pads, nothing, one)
    visible = op.Reshape(visible, op.Concat(batch, one, m_k, bk, one, axis=0))
    count = op.ReduceSum(visible, three, keepdims=0)
    k_mean = op.Pad(op.Cast(k, to=1), k_pads, nothing, length)
    k_mean = op.Reshape(k_mean, op.Concat(batch, kv_heads, m_k, bk, dim, axis=0))
    k_mean = op.ReduceSum(op.Mul(k_mean, visible), three, keepdims=0)
    k_mean = op.Div(k_mean, op.Max(count, op.Constant(value_float=1.0)))
    k_mean = op.Cast(op.CastLike(k_mean, k), to=1)
    log_count = op.Reshape(op.Log(count), op.Concat(batch, one, one, m_k, axis=0))

    queries = op.Reshape(q_mean, op.Concat(batch, kv_heads, minus_one, dim, axis=0))
    scores = op.MatMul(queries, op.Transpose(k_mean, perm=[0, 1, 3, 2]))
    scores = op.Reshape(scores, op.Concat(batch, heads, m_q, m_k, axis=0))
    scores = op.Add(op.Mul(scores, op.Constant(value_float=scale)), log_count)
    if op.Cast(op.Constant(value_int=by_error), to=9):
        squares = op.Pad(op.Cast(q, to=1), q_pads, nothing, length)
        squares = op.Reshape(op.Mul(squares, squares), op.Concat(batch, heads, m_q, bq, dim, axis=0))
        squares = op.Min(op.Div(op.ReduceSum(squares, three, keepdims=0), q_count), highest)
        squares = op.Reshape(squares, op.Concat(batch, kv_heads, minus_one, dim, axis=0))
        # Deviations from the first visible key, as in kernels.pool_cpu.
        keys = op.Pad(op.Cast(k, to=1), k_pads, nothing, length)
        keys = op.Reshape(keys, op.Concat(batch, kv_heads, m_k, bk, dim, axis=0))
        number = op.CumSum(visible, op.Constant(value_int=3))
        is_first = op.Mul(visible, op.Cast(op.Equal(number, op.Constant(value_float=1.0)), to=1))
        first = op.ReduceSum(op.Mul(keys, is_first), three, keepdims=1)
        apart = op.Mul(op.Sub(keys, first), visible)
        keys_seen = op.Max(count, op.Constant(value_float=1.0))
        shift = op.Div(op.ReduceSum(apart, three, keepdims=0), keys_seen)
        variance = op.Div(op.ReduceSum(op.Mul(apart, apart), three, keepdims=0), keys_seen)
        variance = op.Where(op.IsInf(variance), variance, op.Max(op.Sub(variance, op.Mul(shift, shift)), nothing))
        error = op.MatMul(squares, op.Transpose(op.Min(variance, highest), perm=[0, 1, 3, 2]))
        error = op.Reshape(error, op.Concat(batch, heads, m_q, m_k, axis=0))
        none = op.And(op.Less(error, op.Constant(value_float=1.2e-38)), op.Not(op.IsNaN(scores)))
        with_error = op.Max(op.Add(scores, op.Log(op.Min(error, highest))), op.Constant(value_float=-2.0e37))
        ranked = op.Where(none, op.Constant(value_float=-3.0e37), with_error)
        ranked = op.Where(op.Equal(log_count, lowest), lowest, ranked)
    else:
        ranked = op.Identity(scores)
    scores = ranked

    width = op.Shape(kv_indices, start=3, end=4)
    place = op.Range(op.Constant(value_int=0), op.Squeeze(width), op.Constant(value_int=1))
    counts = op.Unsqueeze(op.Cast(kv_counts, to=7), minus_one)
    dense = op.GreaterOrEqual(counts, m_k)
    rows = op.Concat(batch, heads, m_q, width, axis=0)
    listed = op.Expand(op.And(op.Less(place, counts), op.Not(dense)), rows)
    ids = op.Where(listed, op.Cast(kv_indices, to=7), op.Constant(value_int=0))
    ids = op.Max(op.Min(ids, op.Sub(m_k, one)), end)  # as the kernels do with what is out of range
    scores = op.GatherElements(scores, ids, axis=3)
    scores = op.Where(op.And(listed, op.Not(op.IsNaN(scores))), scores, lowest)
    return op.Min(scores, highest), ids, listed, dense


@script(DOMAIN, default_opset=op)
def KeptBlocks(
    chosen: BOOL, scores: FLOAT, ids: INT64, listed: BOOL, dense: BOOL, kv_mask: BOOL, block_kv: int
) -> tuple[INT32, INT32]:
    """Counts [B, H, Mq] and indices [B, H, Mq, W] of the chosen candidates, of the best one where none was chosen."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[3])
    width = op.Shape(ids, start=3, end=4)
    place = op.Range(op.Constant(value_int=0), op.Squeeze(width), op.Constant(value_int=1))
    some = op.Greater(op.ReduceSum(op.Cast(chosen, to=7), last, keepdims=1), zero)
    best = op.Equal(place, op.ArgMax(scores, axis=3, keepdims=1))
    kept = op.Or(chosen, op.And(op.And(listed, best), op.Not(some)))
    number = op.Cast(kept, to=7)
    # What is dropped goes to an extra column, which is cut off.
    target = op.Where(kept, op.Sub(op.CumSum(number, op.Constant(value_int=3)), one), width)
    blank = op.Pad(op.Mul(ids, zero), op.Concat(zero, one, axis=0), op.Constant(value_int=0), last)
    indices = op.Slice(op.ScatterElements(blank, target, ids, axis=3), zero, width, last)
    bk = op.Reshape(op.Constant(value_int=block_kv), one)
    m_k = op.Div(op.Sub(op.Add(op.Shape(kv_mask, start=1, end=2), bk), one), bk)
    counts = op.Where(dense, m_k, op.ReduceSum(number, last, keepdims=1))
    return op.Cast(op.Squeeze(counts, last), to=6), op.Cast(indices, to=6)


@script(DOMAIN, default_opset=op)
def BestOfGroup(scores: FLOAT, order: INT64, group: BOOL, threshold: FLOAT, by_mass: int) -> BOOL:
    """The members of a group that are kept by "mass" or by "ratio", in the order of their scores; all [B, H, Mq, W]."""
    last = op.Constant(value_ints=[3])
    nothing = op.Constant(value_float=0.0)
    lowest = op.Constant(value_float=float("-inf"))
    mass = op.Equal(op.Constant(value_int=by_mass), op.Constant(value_int=1))
    member = op.GatherElements(op.Cast(group, to=1), order, axis=3)
    own = op.Where(group, scores, lowest)
    top = op.ReduceMax(own, last, keepdims=1)
    share = op.Exp(op.Sub(own, op.Where(op.Equal(top, lowest), nothing, top)))
    weight = op.Where(mass, op.GatherElements(share, order, axis=3), member)
    before = op.Sub(op.CumSum(weight, op.Constant(value_int=3)), weight)
    target = op.Mul(op.ReduceSum(weight, last, keepdims=1), threshold)
    target = op.Where(mass, target, op.Ceil(target))
    enough = op.Or(op.Less(before, target), op.GreaterOrEqual(threshold, op.Constant(value_float=1.0)))
    return op.And(op.Greater(member, nothing), enough)


@script(DOMAIN, default_opset=op)
def SelectBlocksByThreshold(
    q: FLOAT,
    k: FLOAT,
    kv_counts: INT32,
    kv_indices: INT32,
    kv_forced: INT32,
    kv_near: INT32,
    thresholds: FLOAT,
    kv_mask: BOOL,
    scale: float,
    block_q: int,
    block_kv: int,
    by_error: int,
) -> tuple[INT32, INT32]:
    """Counts and indices of the candidates with log(N p) >= threshold, and of the forced ones."""
    last = op.Constant(value_ints=[3])
    nothing = op.Constant(value_float=0.0)
    lowest = op.Constant(value_float=float("-inf"))
    scores, ids, listed, dense = CandidateScores(
        q, k, kv_counts, kv_indices, kv_mask, scale=scale, block_q=block_q, block_kv=block_kv, by_error=by_error
    )
    place = op.Range(
        op.Constant(value_int=0), op.Squeeze(op.Shape(kv_indices, start=3, end=4)), op.Constant(value_int=1)
    )
    forced = op.And(listed, op.Less(place, op.Unsqueeze(op.Cast(kv_forced, to=7), last)))
    near = op.Less(place, op.Unsqueeze(op.Cast(kv_near, to=7), last))
    top = op.ReduceMax(scores, last, keepdims=1)
    below = op.Sub(scores, op.Where(op.Equal(top, lowest), nothing, top))
    total = op.ReduceSum(op.Exp(below), last, keepdims=1)
    total = op.Where(op.Greater(total, nothing), total, op.Constant(value_float=1.0))
    number = op.ReduceSum(op.Cast(listed, to=1), last, keepdims=1)
    log_share = op.Sub(below, op.Sub(op.Log(total), op.Log(number)))
    limits = op.Unsqueeze(thresholds, op.Constant(value_ints=[2, 3]))
    near_limit, far_limit = op.Split(limits, num_outputs=2, axis=1)
    limit = op.Where(near, near_limit, far_limit)
    chosen = op.Or(forced, op.And(listed, op.GreaterOrEqual(log_share, limit)))
    counts, indices = KeptBlocks(chosen, scores, ids, listed, dense, kv_mask, block_kv=block_kv)
    return counts, indices


@script(DOMAIN, default_opset=op)
def SelectBlocksByOrder(
    q: FLOAT,
    k: FLOAT,
    kv_counts: INT32,
    kv_indices: INT32,
    kv_forced: INT32,
    kv_near: INT32,
    thresholds: FLOAT,
    kv_mask: BOOL,
    scale: float,
    block_q: int,
    block_kv: int,
    by_error: int,
    by_mass: int,
) -> tuple[INT32, INT32]:
    """Counts and indices of the best candidates of each group, by its mass or by its size, and of the forced ones."""
    last = op.Constant(value_ints=[3])
    scores, ids, listed, dense = CandidateScores(
        q, k, kv_counts, kv_indices, kv_mask, scale=scale, block_q=block_q, block_kv=block_kv, by_error=by_error
    )
    width = op.Shape(kv_indices, start=3, end=4)
    place = op.Range(op.Constant(value_int=0), op.Squeeze(width), op.Constant(value_int=1))
    forced = op.And(listed, op.Less(place, op.Unsqueeze(op.Cast(kv_forced, to=7), last)))
    near = op.Less(place, op.Unsqueeze(op.Cast(kv_near, to=7), last))
    free = op.And(listed, op.Not(forced))
    _, order = op.TopK(scores, width, axis=3, largest=1, sorted=1)
    limits = op.Unsqueeze(thresholds, op.Constant(value_ints=[2, 3]))
    near_limit, far_limit = op.Split(limits, num_outputs=2, axis=1)
    best_near = BestOfGroup(scores, order, op.And(free, near), near_limit, by_mass=by_mass)
    best_far = BestOfGroup(scores, order, op.And(free, op.Not(near)), far_limit, by_mass=by_mass)
    best = op.Cast(op.Or(best_near, best_far), to=1)
    chosen = op.Greater(op.ScatterElements(best, order, best, axis=3), op.Constant(value_float=0.0))
    chosen = op.Or(forced, chosen)
    counts, indices = KeptBlocks(chosen, scores, ids, listed, dense, kv_mask, block_kv=block_kv)
    return counts, indices
