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

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import rows_triton

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name before Triton 3.9

_row_of_plan = gluon.jit(rows_triton._row_of_plan.fn)
_block_at = gluon.jit(rows_triton._block_at.fn)
_place_of_program = gluon.jit(rows_triton._place_of_program.fn)

PLAIN, MASKED, MEANS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
"""Kinds of tiles: keys that all count, keys of which some may not, and mean keys."""


@gluon.jit
def _request(x, i_b, i_h, first, tile, place, full, empty, STAGES: gl.constexpr):
    """Fetch rows from `first` on of one head of the descriptor x into the ring `place`, as its `tile`-th tile."""
    stage = tile % STAGES
    mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), x.block_type.nbytes)
    async_load(x, [i_b, i_h, first, 0], full.index(stage), place.index(stage))


@gluon.jit
def _produce(
    q,
    k,
    v,
    mean_k,
    mean_v,
    p_ids,
    i_b,
    i_h,
    i_hkv,
    first_query,
    n_means,  # tiles of mean keys
    n_tiles,  # tiles of the row's blocks
    n_listed,
    n_blocks,
    q_ring,
    k_ring,
    v_ring,
    q_full,
    k_full,
    k_empty,
    v_full,
    v_empty,
    BLOCK_KV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer: fetches queries, then keys and values in the order in which consumers multiply them."""
    TILES: gl.constexpr = BLOCK_KV // BLOCK_N
    if n_means + n_tiles > 0:
        for i in gl.static_range(CONSUMERS):
            mbarrier.expect(q_full.index(i), q.block_type.nbytes)
            async_load(q, [i_b, i_h, first_query + i * ROWS, 0], q_full.index(i), q_ring.index(i))
    for i_t in range(n_means):
        _request(mean_k, i_b, i_hkv, i_t * BLOCK_N, i_t, k_ring, k_full, k_empty, STAGES)
        if i_t > 0:
            _request(mean_v, i_b, i_hkv, (i_t - 1) * BLOCK_N, i_t - 1, v_ring, v_full, v_empty, STAGES)
    if n_means > 0:
        _request(mean_v, i_b, i_hkv, (n_means - 1) * BLOCK_N, n_means - 1, v_ring, v_full, v_empty, STAGES)
    before = 0
    i_kv = _block_at(p_ids, 0, n_listed, n_blocks)
    for i_t in range(n_tiles):
        i_next = _block_at(p_ids, (i_t + 1) // TILES, n_listed, n_blocks)
        first = i_kv * BLOCK_KV + (i_t % TILES) * BLOCK_N
        _request(k, i_b, i_hkv, first, n_means + i_t, k_ring, k_full, k_empty, STAGES)
        if i_t > 0:
            _request(v, i_b, i_hkv, before, n_means + i_t - 1, v_ring, v_full, v_empty, STAGES)
        before = first
        i_kv = i_next
    if n_tiles > 0:
        _request(v, i_b, i_hkv, before, n_means + n_tiles - 1, v_ring, v_full, v_empty, STAGES)


@gluon.jit
def _pinned(b_sum):
    """b_sum as it is, computed before whatever waits next.

    ptxas moves the exponentials behind the wait for O, where nothing overlaps with them, unless something before it
    needs their sum and may not be moved: an instruction that never runs, because no sum is negative.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p nanosleep.u32 1; mov.b32 $0, $1; }",
        "=f,f",
        [b_sum],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _softmax(b_s, b_max, b_sum, scale2, GUARD: gl.constexpr):
    """One step of the online softmax over scores b_s, times scale2 in units of log2: (P, max, sum, factor of O)."""
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale2)
    b_base = b_new
    if GUARD:
        b_base = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s * scale2 - gl.expand_dims(b_base, 1))
    b_factor = gl.exp2(b_max - b_base)
    return b_p, b_new, b_sum * b_factor + gl.sum(b_p, 1), b_factor


@gluon.jit
def _weigh(
    b_s,
    b_max,
    b_sum,
    i_t,
    scale2,
    p_ids,
    n_listed,
    n_blocks,
    p_mask,
    p_valid,
    p_kept,
    weight,
    SK,
    KIND: gl.constexpr,
    HAS_MASK: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    S: gl.constexpr,
):
    """`_softmax` of the scores of tile i_t of its kind, with what hides keys."""
    if KIND == PLAIN:
        return _softmax(b_s, b_max, b_sum, scale2, False)
    o_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
    if KIND == MEANS:
        o_j = i_t * BLOCK_N + o_n
        m_j = o_j < n_blocks
        b_n = gl.load(p_valid + o_j, mask=m_j, other=0)
        b_bits = gl.load(p_kept + o_j // 32, mask=m_j, other=-1)
        m_j = (((b_bits >> (o_j % 32)) & 1) == 0) & (b_n > 0)
        b_bias = gl.where(m_j, gl.log2(b_n.to(gl.float32) * weight), float("-inf"))
        b_s = b_s * scale2 + gl.expand_dims(b_bias, 0)
        return _softmax(b_s, b_max, b_sum, 1.0, True)
    TILES: gl.constexpr = BLOCK_KV // BLOCK_N
    i_kv = _block_at(p_ids, i_t // TILES, n_listed, n_blocks)
    o_key = i_kv * BLOCK_KV + (i_t % TILES) * BLOCK_N + o_n
    m_key = o_key < SK
    if HAS_MASK:
        m_key = gl.load(p_mask + o_key, mask=m_key, other=0) != 0
    b_s = gl.where(gl.expand_dims(m_key, 0), b_s, float("-inf"))
    return _softmax(b_s, b_max, b_sum, scale2, True)


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
def _walk(
    b_q,
    b_max,
    b_sum,
    b_acc,
    begin,  # first tile of its kind
    end,
    shift,  # tiles that went through the rings before tile 0 of this kind
    scale2,
    p_ids,
    n_listed,
    n_blocks,
    p_mask,
    p_valid,
    p_kept,
    weight,
    SK,
    k_ring,
    v_ring,
    k_full,
    k_empty,
    v_full,
    v_empty,
    turn,
    KIND: gl.constexpr,
    HAS_MASK: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    I: gl.constexpr,
    CONSUMERS: gl.constexpr,
    S: gl.constexpr,
    O: gl.constexpr,
    P: gl.constexpr,
):
    """The tiles [begin, end) of one kind: (max, sum, O) after them."""
    if begin < end:
        b_none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, layout=S)
        tile = shift + begin
        stage, phase = tile % STAGES, (tile // STAGES) & 1
        _take_turn(turn, tile, I, CONSUMERS)
        mbarrier.wait(k_full.index(stage), phase)
        b_k = k_ring.index(stage).reshape([BLOCK_N, BLOCK_D])
        b_s = warpgroup_mma(b_q, b_k.permute([1, 0]), b_none, use_acc=False, is_async=True)
        _pass_turn(turn, I, CONSUMERS)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        b_p, b_max, b_sum, b_factor = _weigh(
            b_s, b_max, b_sum, begin, scale2, p_ids, n_listed, n_blocks, p_mask, p_valid, p_kept, weight, SK,
            KIND, HAS_MASK, BLOCK_KV, BLOCK_N, S,
        )  # fmt: skip
        b_acc = b_acc * gl.expand_dims(gl.convert_layout(b_factor, gl.SliceLayout(1, O)), 1)
        b_p = gl.convert_layout(b_p.to(b_q.dtype), P)
        if KIND != MEANS:
            for i_t in range(begin + 1, end):
                tile = shift + i_t
                stage, phase = tile % STAGES, (tile // STAGES) & 1
                stage_v, phase_v = (tile - 1) % STAGES, ((tile - 1) // STAGES) & 1
                _take_turn(turn, tile, I, CONSUMERS)
                mbarrier.wait(k_full.index(stage), phase)
                b_k = k_ring.index(stage).reshape([BLOCK_N, BLOCK_D])
                b_s = warpgroup_mma(b_q, b_k.permute([1, 0]), b_none, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage_v), phase_v)
                b_v = v_ring.index(stage_v).reshape([BLOCK_N, BLOCK_D])
                b_acc = warpgroup_mma(b_p, b_v, b_acc, is_async=True)
                _pass_turn(turn, I, CONSUMERS)
                b_s = warpgroup_mma_wait(1, deps=[b_s])
                mbarrier.arrive(k_empty.index(stage), count=1)
                b_next, b_max, b_sum, b_factor = _weigh(
                    b_s, b_max, b_sum, i_t, scale2, p_ids, n_listed, n_blocks, p_mask, p_valid, p_kept, weight, SK,
                    KIND, HAS_MASK, BLOCK_KV, BLOCK_N, S,
                )  # fmt: skip
                b_sum = _pinned(b_sum)
                b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
                mbarrier.arrive(v_empty.index(stage_v), count=1)
                b_acc = b_acc * gl.expand_dims(gl.convert_layout(b_factor, gl.SliceLayout(1, O)), 1)
                b_p = gl.convert_layout(b_next.to(b_q.dtype), P)
        tile = shift + end - 1
        stage, phase = tile % STAGES, (tile // STAGES) & 1
        mbarrier.wait(v_full.index(stage), phase)
        b_v = v_ring.index(stage).reshape([BLOCK_N, BLOCK_D])
        b_acc = warpgroup_mma(b_p, b_v, b_acc, is_async=True)
        b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
        mbarrier.arrive(v_empty.index(stage), count=1)
    return b_max, b_sum, b_acc


@gluon.jit
def _consume(
    p_out,
    p_lse,
    p_ids,
    p_mask,
    p_valid,
    p_kept,
    weight,
    scale2,
    first_query,
    n_means,
    n_full,  # tiles of blocks whose keys all count
    n_tiles,
    n_listed,
    n_blocks,
    SQ,
    SK,
    q_ring,
    k_ring,
    v_ring,
    q_full,
    k_full,
    k_empty,
    v_full,
    v_empty,
    turn,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    RAGGED: gl.constexpr,
    HAS_MASK: gl.constexpr,
    COMPENSATE: gl.constexpr,
    I: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Consumer I: its ROWS queries against all tiles; writes out and lse."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    b_max = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))  # in units of log2
    b_sum = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, S))
    b_acc = gl.full([ROWS, BLOCK_D], 0.0, gl.float32, layout=O)
    if n_means + n_tiles > 0:
        mbarrier.wait(q_full.index(I), 0)
    b_q = q_ring.index(I).reshape([ROWS, BLOCK_D])
    if COMPENSATE:
        for i_t in range(n_means):  # one by one: few, and biases leave no registers for overlap
            b_max, b_sum, b_acc = _walk(
                b_q, b_max, b_sum, b_acc, i_t, i_t + 1, 0, scale2,
                p_ids, n_listed, n_blocks, p_mask, p_valid, p_kept, weight, SK,
                k_ring, v_ring, k_full, k_empty, v_full, v_empty, turn,
                MEANS, HAS_MASK, BLOCK_KV, BLOCK_N, BLOCK_D, ROWS, STAGES, I, CONSUMERS, S, O, P,
            )  # fmt: skip
    if not HAS_MASK:
        b_max, b_sum, b_acc = _walk(
            b_q, b_max, b_sum, b_acc, 0, n_full, n_means, scale2,
            p_ids, n_listed, n_blocks, p_mask, p_valid, p_kept, weight, SK,
            k_ring, v_ring, k_full, k_empty, v_full, v_empty, turn,
            PLAIN, HAS_MASK, BLOCK_KV, BLOCK_N, BLOCK_D, ROWS, STAGES, I, CONSUMERS, S, O, P,
        )  # fmt: skip
    if RAGGED or HAS_MASK:
        b_max, b_sum, b_acc = _walk(
            b_q, b_max, b_sum, b_acc, n_full, n_tiles, n_means, scale2,
            p_ids, n_listed, n_blocks, p_mask, p_valid, p_kept, weight, SK,
            k_ring, v_ring, k_full, k_empty, v_full, v_empty, turn,
            MASKED, HAS_MASK, BLOCK_KV, BLOCK_N, BLOCK_D, ROWS, STAGES, I, CONSUMERS, S, O, P,
        )  # fmt: skip

    b_sum = gl.where(b_sum == 0.0, 1.0, b_sum)  # no key: out 0, lse -inf
    b_lse = (b_max + gl.log2(b_sum)) * 0.6931471805599453
    o_row = first_query + I * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    gl.store(p_lse + o_row, b_lse, mask=o_row < SQ)
    b_sum = gl.expand_dims(gl.convert_layout(b_sum, gl.SliceLayout(1, O)), 1)
    o_m = gl.expand_dims(first_query + I * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, O)), 1)
    o_d = gl.expand_dims(gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, O)), 0)
    gl.store(p_out + o_m * D + o_d, (b_acc / b_sum).to(b_q.dtype), mask=(o_m < SQ) & (o_d < D))


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
    first_query = i_m * BLOCK_M
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
    q_ring = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 1, ROWS, BLOCK_D], q.layout)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)

    i_hkv, i_b32, i_h32 = (i_h // KV_GROUP).to(gl.int32), i_b.to(gl.int32), i_h.to(gl.int32)
    p_out, p_lse = out + i_bh * SQ * D, lse + i_bh * SQ
    p_mask = key_mask + i_b * stride_mb
    p_valid = n_valid + i_b * stride_nb
    p_kept = kept + i_b * stride_eb + i_h * stride_eh + i_row * stride_em
    scale2 = scale * 1.4426950408889634
    n_tiles = count * TILES
    WARPS: gl.constexpr = num_warps
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (
                    p_out, p_lse, p_ids, p_mask, p_valid, p_kept, b_weight, scale2, first_query,
                    n_means, n_full * TILES, n_tiles, n_listed, n_blocks, SQ, SK,
                    q_ring, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty, turn,
                    D, BLOCK_D, BLOCK_KV, BLOCK_N, ROWS, WARPS, RAGGED, HAS_MASK, COMPENSATE, 0, 1, STAGES,
                )),
                (_produce, (
                    q, k, v, mean_k, mean_v, p_ids, i_b32, i_h32, i_hkv, first_query,
                    n_means, n_tiles, n_listed, n_blocks,
                    q_ring, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty,
                    BLOCK_KV, BLOCK_N, ROWS, CONSUMERS, STAGES,
                )),
            ],
            [1],
            [40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    p_out, p_lse, p_ids, p_mask, p_valid, p_kept, b_weight, scale2, first_query,
                    n_means, n_full * TILES, n_tiles, n_listed, n_blocks, SQ, SK,
                    q_ring, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty, turn,
                    D, BLOCK_D, BLOCK_KV, BLOCK_N, ROWS, WARPS, RAGGED, HAS_MASK, COMPENSATE, 0, 2, STAGES,
                )),
                (_consume, (
                    p_out, p_lse, p_ids, p_mask, p_valid, p_kept, b_weight, scale2, first_query,
                    n_means, n_full * TILES, n_tiles, n_listed, n_blocks, SQ, SK,
                    q_ring, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty, turn,
                    D, BLOCK_D, BLOCK_KV, BLOCK_N, ROWS, WARPS, RAGGED, HAS_MASK, COMPENSATE, 1, 2, STAGES,
                )),
                (_produce, (
                    q, k, v, mean_k, mean_v, p_ids, i_b32, i_h32, i_hkv, first_query,
                    n_means, n_tiles, n_listed, n_blocks,
                    q_ring, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty,
                    BLOCK_KV, BLOCK_N, ROWS, CONSUMERS, STAGES,
                )),
            ],
            [WARPS, 1],
            [232, 40],
        )  # fmt: skip
