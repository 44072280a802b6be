"""Gluon forward kernels of block-sparse attention for sm_90: a producer warp, and one or two consumer groups.

The sums are those of `attention_triton_kernels`. What differs is who does what, and when:

    producer    one warp. Walks the row's blocks, and has the copy engine fetch K(0), then K(j + 1) and V(j) in turn,
                into rings of STAGES tiles each. Waits until consumers have given a place of a ring back.
    consumer    WARPS warps with BLOCK_M / CONSUMERS queries each. Issues S(j + 1) = Q K(j + 1)' and O += P(j) V(j)
                together, waits for S(j + 1) alone, and computes its softmax while O is still being multiplied.

With two consumers each has half of the queries of a row and a turn: it issues its two products, hands the turn on, and
its softmax runs while the products of the other are multiplied (FlashAttention-3, Shah et al. 2024, section 3.1). The
overlap within a consumer is that of its section 3.2.

Barriers of shared memory, each with the number of arrivals that ends its phase: q_full[consumer] (1, and the bytes),
k_full[stage], v_full[stage] (1, and the bytes), k_empty[stage], v_empty[stage] (CONSUMERS), turn[consumer] (1). A wait
names the parity of the phase whose end it waits for; of a new barrier the phase before the first counts as ended.

tests/kernels/test_attention_gluon.py runs these functions themselves, in a model of the machine (support/gluon_model).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .attention_gluon_parts import (
    MASKED,
    MEANS,
    PLAIN,
    Rings,
    Row,
    Sizes,
    _pinned,
    _place_of_program,
    _produce,
    _row_of_plan,
    _weigh,
)


@gluon.jit
def _take_turn(turn, tile, I: gl.constexpr, CONSUMERS: gl.constexpr):
    """Wait for consumer I's turn to issue its products for the `tile`-th time. The first to go is consumer 0."""
    if CONSUMERS > 1:
        mbarrier.wait(turn.index(I), (tile & 1) ^ (1 - I))


@gluon.jit
def _pass_turn(turn, I: gl.constexpr, CONSUMERS: gl.constexpr):
    """Let the other consumer issue its products."""
    if CONSUMERS > 1:
        mbarrier.arrive(turn.index(1 - I), count=1)


@gluon.jit
def _scores(b_q, b_none, tile, rings, sizes, I: gl.constexpr):
    """Issue the product of the queries with the keys of a tile, once it is there."""
    _take_turn(rings.turn, tile, I, sizes.CONSUMERS)
    stage = tile % sizes.STAGES
    mbarrier.wait(rings.k_full.index(stage), (tile // sizes.STAGES) & 1)
    b_k = rings.k.index(stage).reshape([sizes.BLOCK_N, sizes.BLOCK_D])
    return warpgroup_mma(b_q, b_k.permute([1, 0]), b_none, use_acc=False, is_async=True)


@gluon.jit
def _outputs(b_p, b_acc, tile, rings, sizes):
    """Issue the product of probabilities with the values of a tile, once it is there; it adds to b_acc."""
    stage = tile % sizes.STAGES
    mbarrier.wait(rings.v_full.index(stage), (tile // sizes.STAGES) & 1)
    b_v = rings.v.index(stage).reshape([sizes.BLOCK_N, sizes.BLOCK_D])
    return warpgroup_mma(b_p, b_v, b_acc, is_async=True)


@gluon.jit
def _scaled(b_acc, b_factor, sizes):
    """Outputs so far, to the new maximum."""
    return b_acc * gl.expand_dims(gl.convert_layout(b_factor, gl.SliceLayout(1, sizes.O)), 1)


@gluon.jit
def _walk(b_q, b_max, b_sum, b_acc, begin, end, shift, row, rings, sizes, KIND: gl.constexpr, I: gl.constexpr):
    """The tiles [begin, end) of one kind, of which tile 0 is the `shift`-th of all: (max, sum, O) after them."""
    if begin < end:
        b_none = gl.full([sizes.ROWS, sizes.BLOCK_N], 0.0, gl.float32, layout=sizes.S)
        b_s = _scores(b_q, b_none, shift + begin, rings, sizes, I)
        _pass_turn(rings.turn, I, sizes.CONSUMERS)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        mbarrier.arrive(rings.k_empty.index((shift + begin) % sizes.STAGES), count=1)
        b_next, b_max, b_sum, b_factor = _weigh(b_s, b_max, b_sum, begin, row, sizes, KIND)
        b_acc = _scaled(b_acc, b_factor, sizes)
        b_p = gl.convert_layout(b_next.to(b_q.dtype), sizes.P)
        if KIND != MEANS:
            for i_t in range(begin + 1, end):
                tile = shift + i_t
                b_s = _scores(b_q, b_none, tile, rings, sizes, I)
                b_acc = _outputs(b_p, b_acc, tile - 1, rings, sizes)
                _pass_turn(rings.turn, I, sizes.CONSUMERS)
                b_s = warpgroup_mma_wait(1, deps=[b_s])
                mbarrier.arrive(rings.k_empty.index(tile % sizes.STAGES), count=1)
                b_next, b_max, b_sum, b_factor = _weigh(b_s, b_max, b_sum, i_t, row, sizes, KIND)
                b_sum = _pinned(b_sum)
                b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
                mbarrier.arrive(rings.v_empty.index((tile - 1) % sizes.STAGES), count=1)
                b_acc = _scaled(b_acc, b_factor, sizes)
                b_p = gl.convert_layout(b_next.to(b_q.dtype), sizes.P)
        tile = shift + end - 1
        b_acc = _outputs(b_p, b_acc, tile, rings, sizes)
        b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
        mbarrier.arrive(rings.v_empty.index(tile % sizes.STAGES), count=1)
    return b_max, b_sum, b_acc


@gluon.jit
def _consume(p_out, p_lse, row, rings, sizes, I: gl.constexpr):
    """Consumer I: its ROWS queries against all tiles; writes out and lse."""
    S: gl.constexpr = sizes.S
    O: gl.constexpr = sizes.O
    ROWS: gl.constexpr = sizes.ROWS
    b_max = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))  # in units of log2
    b_sum = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, S))
    b_acc = gl.full([ROWS, sizes.BLOCK_D], 0.0, gl.float32, layout=O)
    if row.n_means + row.n_tiles > 0:
        mbarrier.wait(rings.q_full.index(I), 0)
    b_q = rings.q.index(I).reshape([ROWS, sizes.BLOCK_D])
    if sizes.COMPENSATE:
        for i_t in range(row.n_means):  # one by one: they are few, and biases leave no registers for overlap
            b_max, b_sum, b_acc = _walk(b_q, b_max, b_sum, b_acc, i_t, i_t + 1, 0, row, rings, sizes, MEANS, I)
    shift = row.n_means
    if not sizes.HAS_MASK:
        b_max, b_sum, b_acc = _walk(b_q, b_max, b_sum, b_acc, 0, row.n_full, shift, row, rings, sizes, PLAIN, I)
    if sizes.RAGGED or sizes.HAS_MASK:
        b_max, b_sum, b_acc = _walk(
            b_q, b_max, b_sum, b_acc, row.n_full, row.n_tiles, shift, row, rings, sizes, MASKED, I
        )

    b_sum = gl.where(b_sum == 0.0, 1.0, b_sum)  # no key: out 0, lse -inf
    b_lse = (b_max + gl.log2(b_sum)) * 0.6931471805599453
    o_row = row.first_query + I * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    gl.store(p_lse + o_row, b_lse, mask=o_row < row.SQ)
    b_sum = gl.expand_dims(gl.convert_layout(b_sum, gl.SliceLayout(1, O)), 1)
    o_m = gl.expand_dims(row.first_query + I * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, O)), 1)
    o_d = gl.expand_dims(gl.arange(0, sizes.BLOCK_D, layout=gl.SliceLayout(0, O)), 0)
    m_md = (o_m < row.SQ) & (o_d < sizes.D)
    gl.store(p_out + o_m * sizes.D + o_d, (b_acc / b_sum).to(b_q.dtype), mask=m_md)


@gluon.jit
def _block_sparse_forward_gluon(
    q,  # descriptor of [B, H, Sq, D] with blocks [1, 1, BLOCK_M / CONSUMERS, BLOCK_D]
    k,  # descriptor of [B, Hkv, Sk, D] with blocks [1, 1, BLOCK_N, BLOCK_D], as of the next three
    v,
    mean_k,  # of [B, Hkv, Mk, D]; this and the next four are not read without COMPENSATE
    mean_v,
    n_valid,  # int32 [B'', Mk], valid keys of each block
    weight,  # fp32 [B or 1]
    kept,  # int32 [B', H', Mq, ceil(Mk / 32)], a bit per block
    counts,  # int32 [B', H', Mq]
    indices,  # int32 [B', H', Mq, W], last stride 1
    order,  # int32 [Mq + 1] of `heavy_first`; not read without ORDERED
    key_mask,  # bool [B'', Sk], last stride 1; not read without HAS_MASK
    out,  # [B, H, Sq, D] contiguous
    lse,  # fp32 [B, H, Sq] contiguous
    scale,
    H,
    KV_GROUP,  # H / Hkv
    SQ,
    SK,
    W,
    stride_cb,
    stride_ch,
    stride_cm,
    stride_ib,
    stride_ih,
    stride_im,
    stride_mb,
    stride_nb,
    stride_wb,
    stride_eb,
    stride_eh,
    stride_em,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    RAGGED: gl.constexpr,  # SK is not a multiple of BLOCK_KV
    HAS_MASK: gl.constexpr,
    COMPENSATE: gl.constexpr,
    ORDERED: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One program: BLOCK_M queries of one head of one sample."""
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    TILES: gl.constexpr = BLOCK_KV // BLOCK_N
    n_heavy = 0
    if ORDERED:
        n_heavy = gl.load(order)
    TILES_Q: gl.constexpr = BLOCK_Q // BLOCK_M
    i_bh, i_m = _place_of_program(n_heavy, gl.cdiv(SQ, BLOCK_Q), TILES_Q)
    i_row = i_m // TILES_Q
    if ORDERED:
        i_row = gl.load(order + 1 + i_row)
        i_m = i_row * TILES_Q + i_m % TILES_Q
    i_row = i_row.to(gl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    n_blocks = gl.cdiv(SK, BLOCK_KV)
    count, n_listed = _row_of_plan(counts + i_b * stride_cb + i_h * stride_ch + i_row * stride_cm, n_blocks, W)
    p_ids = indices + i_b * stride_ib + i_h * stride_ih + i_row * stride_im

    n_full = 0 if HAS_MASK else count
    if RAGGED and not HAS_MASK:
        first_partial = SK // BLOCK_KV  # the block with keys that do not count
        if n_listed == 0:
            n_full = gl.minimum(count, first_partial)
        else:
            o_w = gl.arange(0, 256, layout=gl.BlockedLayout([2], [32], [num_warps], [0]))
            for start in range(0, n_listed, 256):
                b_ids = gl.load(p_ids + start + o_w, mask=start + o_w < n_listed, other=0)
                m_w = (b_ids >= first_partial) & (start + o_w < n_listed)
                n_full = gl.minimum(n_full, gl.min(gl.where(m_w, start + o_w, n_blocks), 0))
    n_means = 0
    b_weight = 0.0
    if COMPENSATE:
        b_weight = gl.load(weight + i_b * stride_wb)
        n_means = gl.where((count < n_blocks) & (b_weight > 0.0), gl.cdiv(n_blocks, BLOCK_N), 0)

    DTYPE: gl.constexpr = k.dtype
    rings = Rings(
        gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 1, ROWS, BLOCK_D], q.layout),
        gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k.layout),
        gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v.layout),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(rings.q_full.index(i), count=1)
        mbarrier.init(rings.turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(rings.k_full.index(i), count=1)
        mbarrier.init(rings.v_full.index(i), count=1)
        mbarrier.init(rings.k_empty.index(i), count=CONSUMERS)
        mbarrier.init(rings.v_empty.index(i), count=CONSUMERS)

    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    sizes = Sizes(D, BLOCK_D, BLOCK_KV, BLOCK_N, ROWS, RAGGED, HAS_MASK, COMPENSATE, CONSUMERS, STAGES, S, O, P)
    row = Row(
        i_m * BLOCK_M,
        gl.to_tensor(n_means),
        gl.to_tensor(n_full * TILES),
        count * TILES,
        n_listed,
        gl.to_tensor(n_blocks),  # Triton makes a constant of an argument that is 1
        gl.to_tensor(SQ),
        gl.to_tensor(SK),
        scale * 1.4426950408889634,
        gl.to_tensor(b_weight),
        p_ids,
        key_mask + i_b * stride_mb,
        n_valid + i_b * stride_nb,
        kept + i_b * stride_eb + i_h * stride_eh + i_row * stride_em,
    )
    p_out, p_lse = out + i_bh * SQ * D, lse + i_bh * SQ
    i_hkv, i_b, i_h = (i_h // KV_GROUP).to(gl.int32), i_b.to(gl.int32), i_h.to(gl.int32)
    # Registers: what two groups of 4 warps that multiply can have at most, beside a producer that needs few.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (p_out, p_lse, row, rings, sizes, 0)),
                (_produce, (q, k, v, mean_k, mean_v, i_b, i_h, i_hkv, row, rings, sizes)),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (p_out, p_lse, row, rings, sizes, 0)),
                (_consume, (p_out, p_lse, row, rings, sizes, 1)),
                (_produce, (q, k, v, mean_k, mean_v, i_b, i_h, i_hkv, row, rings, sizes)),
            ],
            [num_warps, 1],
            [240, 24],
        )
