"""The function bodies of `dynamicrad::BlockSparseAttention` and `SecondOrderAttention` in standard ONNX operators.

A Scan goes over the query blocks. Each step gathers the key and value blocks that its rows read, so that no matrix of
all queries and all keys ever exists; a dense row takes all blocks. A step's memory is that of

    keys and values   2 x B x H x n block_kv x D      n = blocks of the widest of its rows (over samples and heads)
    scores                B x H x block_q x (n block_kv + Mk)

The last Mk columns are the mean keys of compensation: log(count x weight) on the score of a dropped block, and nothing
for a kept one. Sums are in float32 whatever the dtype of q. A query without a key gives zeros.
With covariances a query's own factor is on the weight of all its means, and its own shift on their values.
"""

from onnxscript import BOOL, FLOAT, INT32, INT64, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

DOMAIN = Opset("dynamicrad", 1)


@script(DOMAIN, default_opset=op)
def AttentionOfRows(
    q: FLOAT,
    k: FLOAT,
    v: FLOAT,
    kv_counts: INT32,
    kv_indices: INT32,
    kv_mask: BOOL,
    compensate: FLOAT,
    log_growth: FLOAT,
    shift: FLOAT,
    scale: float,
    block_q: int,
    block_kv: int,
) -> FLOAT:
    """Block-sparse attention.

    log_growth float [Mq, B, H, block_q, 1], added to the scores of means, and shift float [Mq, B, H, block_q, D], added
    to their values: any of their last four sizes may be 1. The rest, and what is returned, as of the node.
    """
    one = op.Constant(value_ints=[1])
    minus_one = op.Constant(value_ints=[-1])
    nothing = op.Constant(value_float=0.0)
    hidden = op.Constant(value_float=-1.0e30)
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
    end = op.Constant(value_ints=[0])
    length = op.Constant(value_ints=[2])
    q_pads = op.Concat(end, op.Sub(op.Mul(m_q, bq), q_len), axis=0)
    k_pads = op.Concat(end, op.Sub(op.Mul(m_k, bk), kv_len), axis=0)

    # Blocks of queries [Mq, B, H, block_q, D], of keys and values [B Hkv Mk, block_kv, D], padded with zeros.
    queries = op.Mul(op.Cast(q, to=1), op.Constant(value_float=scale))
    queries = op.Pad(queries, q_pads, nothing, length)
    queries = op.Reshape(queries, op.Concat(batch, heads, m_q, bq, dim, axis=0))
    queries = op.Transpose(queries, perm=[2, 0, 1, 3, 4])
    flat = op.Concat(minus_one, bk, dim, axis=0)
    keys = op.Reshape(op.Pad(op.Cast(k, to=1), k_pads, nothing, length), flat)
    values = op.Reshape(op.Pad(op.Cast(v, to=1), k_pads, nothing, length), flat)

    # bias [B Mk + 1, block_kv]: what is added to the score of a key. The last row is for places without a block.
    visible = op.Expand(op.Cast(kv_mask, to=1), op.Concat(batch, kv_len, axis=0))
    visible = op.Reshape(op.Pad(visible, k_pads, nothing, one), op.Concat(minus_one, bk, axis=0))
    absent = op.Expand(hidden, op.Concat(one, bk, axis=0))
    bias = op.Concat(op.Mul(op.Sub(op.Constant(value_float=1.0), visible), hidden), absent, axis=0)
    none = op.Mul(batch, m_k)

    # Mean keys [B, H, D, Mk] and values [B, H, Mk, D] of all blocks, and log(count x weight) [B, 1, Mk].
    rep = op.Div(heads, kv_heads)
    inside = op.Unsqueeze(op.Reshape(visible, op.Concat(batch, minus_one, axis=0)), op.Constant(value_ints=[1]))
    inside = op.Expand(inside, op.Concat(batch, kv_heads, op.Mul(m_k, bk), axis=0))
    inside = op.Reshape(inside, op.Concat(minus_one, bk, one, axis=0))
    count = op.ReduceSum(inside, one, keepdims=1)
    grouped = op.Concat(batch, kv_heads, one, m_k, dim, axis=0)
    repeated = op.Concat(batch, kv_heads, rep, m_k, dim, axis=0)
    per_head = op.Concat(batch, heads, m_k, dim, axis=0)
    divisor = op.Max(count, op.Constant(value_float=1.0))
    mean_k = op.Div(op.ReduceSum(op.Mul(keys, inside), one, keepdims=1), divisor)
    mean_v = op.Div(op.ReduceSum(op.Mul(values, inside), one, keepdims=1), divisor)
    mean_k = op.Cast(op.CastLike(mean_k, q), to=1)
    mean_v = op.Cast(op.CastLike(mean_v, q), to=1)
    mean_k = op.Reshape(op.Expand(op.Reshape(mean_k, grouped), repeated), per_head)
    mean_v = op.Reshape(op.Expand(op.Reshape(mean_v, grouped), repeated), per_head)
    mean_k = op.Transpose(mean_k, perm=[0, 1, 3, 2])
    weight = op.ReduceSum(visible, one, keepdims=0)
    weight = op.Reshape(weight, op.Concat(batch, one, m_k, axis=0))
    weight = op.Mul(weight, op.Reshape(compensate, op.Constant(value_ints=[-1, 1, 1])))
    log_weight = op.Where(op.Greater(weight, nothing), op.Log(weight), hidden)

    # Where the blocks of a sample and head begin among keys and in bias.
    h = op.Range(op.Constant(value_int=0), op.Squeeze(heads), op.Constant(value_int=1))
    b = op.Range(op.Constant(value_int=0), op.Squeeze(batch), op.Constant(value_int=1))
    b = op.Reshape(b, op.Constant(value_ints=[-1, 1, 1]))
    kv_head = op.Reshape(op.Div(h, rep), op.Constant(value_ints=[1, -1, 1]))
    first_key = op.Mul(op.Add(op.Mul(b, kv_heads), kv_head), m_k)
    first_bias = op.Mul(b, m_k)

    # Rows of the plan, [Mq, B, H] and [Mq, B, H, Mk]; a dense row reads 0, 1, 2, ...
    every = op.Range(op.Constant(value_int=0), op.Squeeze(m_k), op.Constant(value_int=1))
    width = op.Shape(kv_indices, start=3, end=4)
    counts = op.Min(op.Cast(kv_counts, to=7), m_k)
    counts = op.Expand(counts, op.Concat(batch, heads, m_q, axis=0))
    counts = op.Transpose(counts, perm=[2, 0, 1])
    pads = op.Concat(end, op.Sub(m_k, width), axis=0)
    indices = op.Pad(op.Cast(kv_indices, to=7), pads, op.Constant(value_int=0), op.Constant(value_ints=[3]))
    indices = op.Transpose(indices, perm=[2, 0, 1, 3])

    @graph()
    def row(query: FLOAT[...], kept: INT64[...], ids: INT64[...], more: FLOAT[...], moved: FLOAT[...]) -> FLOAT[...]:
        kept_at = op.Unsqueeze(kept, op.Constant(value_ints=[-1]))
        own = op.Where(op.Less(kept_at, m_k), ids, every)
        widest = op.Reshape(op.ReduceMax(kept, keepdims=0), op.Constant(value_ints=[1]))
        own = op.Slice(own, op.Constant(value_ints=[0]), widest, op.Constant(value_ints=[2]))
        place = op.Range(op.Constant(value_int=0), op.Squeeze(widest), op.Constant(value_int=1))
        listed = op.Less(place, kept_at)
        read = op.Where(listed, own, op.Constant(value_int=0))
        span = op.Concat(batch, heads, op.Mul(widest, bk), axis=0)
        own_keys = op.Gather(keys, op.Add(read, first_key), axis=0)
        own_keys = op.Reshape(own_keys, op.Concat(span, dim, axis=0), allowzero=1)
        own_values = op.Gather(values, op.Add(read, first_key), axis=0)
        own_values = op.Reshape(own_values, op.Concat(span, dim, axis=0), allowzero=1)
        own_bias = op.Gather(bias, op.Where(listed, op.Add(read, first_bias), none), axis=0)
        own_bias = op.Reshape(
            own_bias, op.Concat(batch, heads, op.Constant(value_ints=[1]), op.Mul(widest, bk), axis=0), allowzero=1
        )
        scores = op.Add(op.MatMul(query, op.Transpose(own_keys, perm=[0, 1, 3, 2])), own_bias)

        zeros = op.Expand(
            op.Constant(value_float=0.0), op.Concat(batch, heads, op.Add(m_k, op.Constant(value_ints=[1])), axis=0)
        )
        where = op.Where(listed, own, m_k)
        ones = op.Expand(op.Constant(value_float=1.0), op.Shape(where))
        dropped = op.ScatterElements(zeros, where, ones, axis=2)
        dropped = op.Slice(dropped, op.Constant(value_ints=[0]), m_k, op.Constant(value_ints=[2]))
        extra = op.Where(op.Greater(dropped, nothing), hidden, log_weight)
        extra = op.Add(op.MatMul(query, mean_k), op.Unsqueeze(extra, op.Constant(value_ints=[2])))
        extra = op.Add(extra, more)

        scores = op.Concat(scores, extra, axis=3)
        top = op.ReduceMax(scores, op.Constant(value_ints=[3]), keepdims=1)
        weights = op.Exp(op.Sub(scores, top))
        weights = op.Where(op.Greater(scores, op.Constant(value_float=-5.0e29)), weights, nothing)
        total = op.ReduceSum(weights, op.Constant(value_ints=[3]), keepdims=1)
        result = op.MatMul(weights, op.Concat(own_values, mean_v, axis=2))
        of_means = op.Slice(weights, op.Mul(widest, bk), op.Shape(scores, start=3, end=4), op.Constant(value_ints=[3]))
        result = op.Add(result, op.Mul(op.ReduceSum(of_means, op.Constant(value_ints=[3]), keepdims=1), moved))
        result = op.Div(result, op.Where(op.Greater(total, nothing), total, op.Constant(value_float=1.0)))
        return result

    out = op.Scan(queries, counts, indices, log_growth, shift, body=row, num_scan_inputs=5)
    out = op.Transpose(out, perm=[1, 2, 0, 3, 4])
    out = op.Reshape(out, op.Concat(batch, heads, op.Mul(m_q, bq), dim, axis=0))
    return op.CastLike(op.Slice(out, end, q_len, length), q)


@script(DOMAIN, default_opset=op)
def BlockSparseAttention(
    q: FLOAT,
    k: FLOAT,
    v: FLOAT,
    kv_counts: INT32,
    kv_indices: INT32,
    kv_mask: BOOL,
    compensate: FLOAT,
    scale: float,
    block_q: int,
    block_kv: int,
) -> FLOAT:
    """Block-sparse attention.

    q float, float16 or bfloat16 [B, H, Sq, D]; k and v [B, Hkv, Sk, D] of the same type, Hkv divides H.
    kv_counts int32 [B or 1, H or 1, Mq], kv_indices int32 [B or 1, H or 1, Mq, W] with Mq = ceil(Sq / block_q).
    kv_mask bool [B or 1, Sk], False where a key is hidden; compensate float [B or 1], 0 for none.
    Returns [B, H, Sq, D] in the type of q.
    """
    rows = op.Concat(op.Shape(kv_counts, start=2, end=3), op.Constant(value_ints=[1, 1, 1, 1]), axis=0)
    zeros = op.Expand(op.Constant(value_float=0.0), rows)
    out = AttentionOfRows(
        q,
        k,
        v,
        kv_counts,
        kv_indices,
        kv_mask,
        compensate,
        zeros,
        zeros,
        scale=scale,
        block_q=block_q,
        block_kv=block_kv,
    )
    return out


@script(DOMAIN, default_opset=op)
def SecondOrderAttention(
    q: FLOAT,
    k: FLOAT,
    v: FLOAT,
    kv_counts: INT32,
    kv_indices: INT32,
    kv_mask: BOOL,
    compensate: FLOAT,
    growth: FLOAT,
    shift: FLOAT,
    scale: float,
    block_q: int,
    block_kv: int,
) -> FLOAT:
    """Block-sparse attention whose dropped blocks have, for each query, `growth` on their mass, `shift` on their value.

    growth float [B, H, Sq, 1], 1 + u; shift float [B, H, Sq, D], t. The rest as of BlockSparseAttention.
    """
    one = op.Constant(value_ints=[1])
    end = op.Constant(value_ints=[0])
    length = op.Constant(value_ints=[2])
    nothing = op.Constant(value_float=0.0)
    bq = op.Reshape(op.Constant(value_int=block_q), one)
    m_q = op.Shape(kv_counts, start=2, end=3)
    pads = op.Concat(end, op.Sub(op.Mul(m_q, bq), op.Shape(q, start=2, end=3)), axis=0)
    shape = op.Concat(op.Shape(q, start=0, end=2), m_q, bq, op.Constant(value_ints=[-1]), axis=0)
    log_growth = op.Reshape(op.Pad(op.Log(growth), pads, nothing, length), shape)
    moved = op.Reshape(op.Pad(shift, pads, nothing, length), shape)
    out = AttentionOfRows(
        q,
        k,
        v,
        kv_counts,
        kv_indices,
        kv_mask,
        compensate,
        op.Transpose(log_growth, perm=[2, 0, 1, 3, 4]),
        op.Transpose(moved, perm=[2, 0, 1, 3, 4]),
        scale=scale,
        block_q=block_q,
        block_kv=block_kv,
    )
    return out
