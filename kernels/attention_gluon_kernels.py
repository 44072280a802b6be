"""Gluon forward kernels of block-sparse attention for sm_90: a producer warp, and one or two consumer groups.

The sums are those of `attention_triton_kernels`. What differs is who does what, and when:

    program     one a multiprocessor; takes the items of the work (`work_triton`: BLOCK_M queries of a head) in turns.
    program     one a multiprocessor; takes items of the work (`work_triton`: BLOCK_M queries of a head) in turns.
                STAGES tiles each. Waits until consumers have given a place back. There are places for the queries of
                two items, so that at the end of one it fetches what the next one needs.
    consumer    WARPS warps with BLOCK_M / CONSUMERS queries each. Issues S(j + 1) = Q K(j + 1)' and O += P(j) V(j)
                together, waits for S(j + 1) alone, and computes its softmax while O is still being multiplied.

With two consumers each has half of the queries of a row and a turn: it issues its two products, hands the turn on, and
its softmax runs while the products of the other are multiplied (FlashAttention-3, Shah et al. 2024, section 3.1). The
overlap within a consumer is that of its section 3.2.

Barriers of shared memory, each with the number of arrivals that ends its phase: q_full[slot] (1, and the bytes),
q_empty[slot] (1), of two slots a consumer; k_full[stage], v_full[stage] (1, and the bytes), k_empty[stage],
v_empty[stage] (CONSUMERS); turn[consumer] (1). A wait names the parity of the phase whose end it waits for; of a new
barrier the phase before the first counts as ended. Tiles are counted over all items, and so are items that have tiles.

tests/kernels/test_attention_gluon.py runs these functions themselves, in a model of the machine (support/gluon_model).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .attention_gluon_parts import (
    FIRST_QUERY,
    HEAD,
    IDS,
    KEPT,
    MASK,
    MASKED,
    MEANS,
    N_FULL,
    N_LISTED,
    N_MEANS,
    N_TILES,
    PLAIN,
    SAMPLE,
    VALID,
    WEIGHT,
    WIDTH,
    Dropped,
    Launch,
    Listed,
    Rings,
    Sizes,
    _pinned,
    _produce,
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
def _walk(
    b_q, b_max, b_sum, b_acc, begin, end, shift, counted, launch, rings, sizes, KIND: gl.constexpr, I: gl.constexpr
):
    """The tiles [begin, end) of one kind, of which tile 0 is the `shift`-th of all: (max, sum, O) after them."""
    if begin < end:
        b_none = gl.full([sizes.ROWS, sizes.BLOCK_N], 0.0, gl.float32, layout=sizes.S)
        b_s = _scores(b_q, b_none, shift + begin, rings, sizes, I)
        _pass_turn(rings.turn, I, sizes.CONSUMERS)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        mbarrier.arrive(rings.k_empty.index((shift + begin) % sizes.STAGES), count=1)
        b_next, b_max, b_sum, b_factor = _weigh(b_s, b_max, b_sum, begin, counted, launch, sizes, KIND)
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
                b_next, b_max, b_sum, b_factor = _weigh(b_s, b_max, b_sum, i_t, counted, launch, sizes, KIND)
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
def _finish(b_max, b_sum, b_acc, p, launch, sizes, DTYPE: gl.constexpr, I: gl.constexpr):
    """Write out and lse of consumer I's queries of the item at p."""
    S: gl.constexpr = sizes.S
    O: gl.constexpr = sizes.O
    i_bh = (gl.load(p + SAMPLE) * launch.H + gl.load(p + HEAD)).to(gl.int64)
    first = gl.load(p + FIRST_QUERY) + I * sizes.ROWS
    b_sum = gl.where(b_sum == 0.0, 1.0, b_sum)  # no key: out 0, lse -inf
    b_lse = (b_max + gl.log2(b_sum)) * 0.6931471805599453
    o_row = first + gl.arange(0, sizes.ROWS, layout=gl.SliceLayout(1, S))
    gl.store(launch.lse + i_bh * launch.SQ + o_row, b_lse, mask=o_row < launch.SQ)
    b_sum = gl.expand_dims(gl.convert_layout(b_sum, gl.SliceLayout(1, O)), 1)
    o_m = gl.expand_dims(first + gl.arange(0, sizes.ROWS, layout=gl.SliceLayout(1, O)), 1)
    o_d = gl.expand_dims(gl.arange(0, sizes.BLOCK_D, layout=gl.SliceLayout(0, O)), 0)
    p_out = launch.out + i_bh * launch.SQ * sizes.D + (o_m * sizes.D + o_d)
    gl.store(p_out, (b_acc / b_sum).to(DTYPE), mask=(o_m < launch.SQ) & (o_d < sizes.D))


@gluon.jit
def _consume(launch, rings, sizes, I: gl.constexpr):
    """Consumer I: its ROWS queries of each item against all of the item's tiles."""
    done = 0  # tiles of earlier items
    rows = 0  # earlier items that had tiles
    for item in range(launch.first, launch.items, launch.step):
        # What an item needs is loaded where it is needed: registers are what the loops over tiles are short of.
        p = launch.work + item * WIDTH
        n_means, n_tiles = gl.load(p + N_MEANS), gl.load(p + N_TILES)
        b_max = gl.full([sizes.ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, sizes.S))  # powers of 2
        b_sum = gl.full([sizes.ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, sizes.S))
        b_acc = gl.full([sizes.ROWS, sizes.BLOCK_D], 0.0, gl.float32, layout=sizes.O)
        slot = (rows & 1) * sizes.CONSUMERS + I
        b_q = rings.q.index(slot).reshape([sizes.ROWS, sizes.BLOCK_D])
        if n_means + n_tiles > 0:
            mbarrier.wait(rings.q_full.index(slot), (rows >> 1) & 1)
        if sizes.COMPENSATE:
            weight = gl.load(launch.weight + gl.load(p + WEIGHT))
            dropped = Dropped(launch.kept + gl.load(p + KEPT), launch.n_valid + gl.load(p + VALID), weight)
            for i_t in range(n_means):  # one by one: they are few, and biases leave no registers for overlap
                b_max, b_sum, b_acc = _walk(
                    b_q, b_max, b_sum, b_acc, i_t, i_t + 1, done, dropped, launch, rings, sizes, MEANS, I
                )
        done += n_means
        if not sizes.HAS_MASK:
            n_full = gl.load(p + N_FULL)
            b_max, b_sum, b_acc = _walk(
                b_q, b_max, b_sum, b_acc, 0, n_full, done, launch, launch, rings, sizes, PLAIN, I
            )
        if sizes.RAGGED or sizes.HAS_MASK:
            n_full = gl.load(p + N_FULL)
            listed = Listed(
                launch.indices + gl.load(p + IDS), gl.load(p + N_LISTED), launch.key_mask + gl.load(p + MASK)
            )
            b_max, b_sum, b_acc = _walk(
                b_q, b_max, b_sum, b_acc, n_full, n_tiles, done, listed, launch, rings, sizes, MASKED, I
            )
        done += n_tiles
        if n_means + n_tiles > 0:
            mbarrier.arrive(rings.q_empty.index(slot), count=1)
            rows += 1
        _finish(b_max, b_sum, b_acc, p, launch, sizes, b_q.dtype, I)


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
    work,  # int32 [items, 16] of `list_work`
    indices,  # int32 [B', H', Mq, W], last stride 1
    key_mask,  # bool [B'', Sk], last stride 1; not read without HAS_MASK
    out,  # [B, H, Sq, D] contiguous
    lse,  # fp32 [B, H, Sq] contiguous
    scale,
    items,
    H,
    SQ,
    SK,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    RAGGED: gl.constexpr,  # SK is not a multiple of BLOCK_KV
    HAS_MASK: gl.constexpr,
    COMPENSATE: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Programs take the items of the work in turns: BLOCK_M queries of one head of one sample each."""
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    DTYPE: gl.constexpr = k.dtype
    rings = Rings(
        gl.allocate_shared_memory(DTYPE, [2 * CONSUMERS, 1, 1, ROWS, BLOCK_D], q.layout),
        gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k.layout),
        gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v.layout),
        gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(rings.turn.index(i), count=1)
    for i in gl.static_range(2 * CONSUMERS):
        mbarrier.init(rings.q_full.index(i), count=1)
        mbarrier.init(rings.q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(rings.k_full.index(i), count=1)
        mbarrier.init(rings.v_full.index(i), count=1)
        mbarrier.init(rings.k_empty.index(i), count=CONSUMERS)
        mbarrier.init(rings.v_empty.index(i), count=CONSUMERS)

    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    sizes = Sizes(D, BLOCK_D, BLOCK_KV, BLOCK_N, ROWS, RAGGED, HAS_MASK, COMPENSATE, CONSUMERS, STAGES, S, O, P)
    launch = Launch(
        work,
        indices,
        key_mask,
        n_valid,
        kept,
        weight,
        out,
        lse,
        scale * 1.4426950408889634,
        gl.to_tensor(H),  # Triton makes a constant of an argument that is 1
        gl.to_tensor(SQ),
        gl.to_tensor(SK),
        gl.to_tensor(gl.cdiv(SK, BLOCK_KV)),
        gl.program_id(0),
        gl.to_tensor(items),
        gl.num_programs(0),
    )
    # Registers: what two groups of 4 warps that multiply can have at most, beside a producer that needs few.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (launch, rings, sizes, 0)),
                (_produce, (q, k, v, mean_k, mean_v, launch, rings, sizes)),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (launch, rings, sizes, 0)),
                (_consume, (launch, rings, sizes, 1)),
                (_produce, (q, k, v, mean_k, mean_v, launch, rings, sizes)),
            ],
            [num_warps, 1],
            [240, 24],
        )
