"""What the Gluon forward kernels consist of: bundles of arguments, the producer, and the softmax of a tile."""

# No postponed annotations: Gluon's aggregates check their fields by them.
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate
from typing_extensions import dataclass_transform

from . import rows_triton, work_triton

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name before Triton 3.9

_block_at = gluon.jit(rows_triton._block_at.fn)

PLAIN, MASKED, MEANS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
"""Kinds of tiles: keys that all count, keys of which some may not, and mean keys."""


SAMPLE, HEAD, KV_HEAD, FIRST_QUERY, N_MEANS, N_FULL, N_TILES, N_LISTED, IDS, KEPT, MASK, VALID, WEIGHT = (
    gl.constexpr(place) for place in range(len(work_triton.FIELDS))
)
"""Where the fields of an item lie."""
WIDTH = gl.constexpr(work_triton.WIDTH)


@dataclass_transform()
def bundle(cls: type) -> Any:
    """A class of annotated fields as one argument of Gluon functions; Triton 3.6 wants the constructor written out."""
    fields = cls.__annotations__

    def init(self: Any, *values: Any) -> None:
        for (name, kind), value in zip(fields.items(), values, strict=True):
            setattr(self, name, gl.constexpr(value) if kind is gl.constexpr and not isinstance(value, kind) else value)

    init.__triton_builtin__ = True  # type: ignore[attr-defined]
    cls.__init__ = init  # type: ignore[misc]
    found = _aggregate(cls)
    found.FIELDS = tuple(fields)
    return found


@bundle
class Sizes:
    """What is known when the kernel is compiled."""

    D: gl.constexpr
    BLOCK_D: gl.constexpr
    BLOCK_KV: gl.constexpr
    BLOCK_N: gl.constexpr
    ROWS: gl.constexpr  # queries of a consumer
    RAGGED: gl.constexpr
    HAS_MASK: gl.constexpr
    COMPENSATE: gl.constexpr
    CONSUMERS: gl.constexpr
    STAGES: gl.constexpr
    S: gl.constexpr  # layout of scores [ROWS, BLOCK_N]
    O: gl.constexpr  # layout of outputs [ROWS, BLOCK_D]
    P: gl.constexpr  # layout of probabilities as an operand


@bundle
class Launch:
    """What all programs read, and which items of the work are this program's: [first, items) by step."""

    work: gl.tensor
    indices: gl.tensor
    key_mask: gl.tensor
    n_valid: gl.tensor
    kept: gl.tensor
    weight: gl.tensor
    out: gl.tensor
    lse: gl.tensor
    scale2: gl.tensor
    H: gl.tensor
    SQ: gl.tensor
    SK: gl.tensor
    n_blocks: gl.tensor
    first: gl.tensor
    items: gl.tensor
    step: gl.tensor


@bundle
class Listed:
    """What says which keys of an item's blocks count."""

    p_ids: gl.tensor
    n_listed: gl.tensor
    p_mask: gl.tensor


@bundle
class Dropped:
    """What says which mean keys of an item count, and how much."""

    p_kept: gl.tensor
    p_valid: gl.tensor
    weight: gl.tensor


@bundle
class Rings:
    """Shared memory: tiles of queries, keys and values, and the barriers between those who write and read them."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor


@gluon.jit
def _request(x, i_b, i_h, first, tile, ring, full, empty, STAGES: gl.constexpr):
    """Fetch rows from `first` on of one head of the descriptor x into `ring`, as its `tile`-th tile."""
    stage = tile % STAGES
    mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), x.block_type.nbytes)
    async_load(x, [i_b, i_h, first, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _produce(q, k, v, mean_k, mean_v, launch, rings, sizes):
    """The producer: fetches an item's queries, then keys and values in the order in which consumers multiply them."""
    N: gl.constexpr = sizes.BLOCK_N
    STAGES: gl.constexpr = sizes.STAGES
    TILES: gl.constexpr = sizes.BLOCK_KV // N
    done = 0  # tiles of earlier items
    rows = 0  # earlier items that had tiles
    for item in range(launch.first, launch.items, launch.step):
        p = launch.work + item * WIDTH
        i_b, i_h, i_hkv, first_query = (
            gl.load(p + SAMPLE),
            gl.load(p + HEAD),
            gl.load(p + KV_HEAD),
            gl.load(p + FIRST_QUERY),
        )
        n_means, n_tiles, n_listed = gl.load(p + N_MEANS), gl.load(p + N_TILES), gl.load(p + N_LISTED)
        p_ids = launch.indices + gl.load(p + IDS)
        if n_means + n_tiles > 0:
            for i in gl.static_range(sizes.CONSUMERS):
                slot = (rows & 1) * sizes.CONSUMERS + i
                mbarrier.wait(rings.q_empty.index(slot), ((rows >> 1) & 1) ^ 1)
                mbarrier.expect(rings.q_full.index(slot), q.block_type.nbytes)
                place = [i_b, i_h, first_query + i * sizes.ROWS, 0]
                async_load(q, place, rings.q_full.index(slot), rings.q.index(slot))
            rows += 1
        for i_t in range(n_means):
            tile = done + i_t
            _request(mean_k, i_b, i_hkv, i_t * N, tile, rings.k, rings.k_full, rings.k_empty, STAGES)
            _request(mean_v, i_b, i_hkv, i_t * N, tile, rings.v, rings.v_full, rings.v_empty, STAGES)
        done += n_means
        before = 0
        i_kv = _block_at(p_ids, 0, n_listed, launch.n_blocks)
        for i_t in range(n_tiles):
            i_next = _block_at(p_ids, (i_t + 1) // TILES, n_listed, launch.n_blocks)
            first = i_kv * sizes.BLOCK_KV + (i_t % TILES) * N
            tile = done + i_t
            _request(k, i_b, i_hkv, first, tile, rings.k, rings.k_full, rings.k_empty, STAGES)
            if i_t > 0:
                _request(v, i_b, i_hkv, before, tile - 1, rings.v, rings.v_full, rings.v_empty, STAGES)
            before = first
            i_kv = i_next
        done += n_tiles
        if n_tiles > 0:
            _request(v, i_b, i_hkv, before, done - 1, rings.v, rings.v_full, rings.v_empty, STAGES)


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
    """One step of the online softmax over scores b_s, times scale2 in units of log2: (P, max, sum, factor of O).

    GUARD where all scores so far may be -inf: -inf - -inf must not become NaN.
    """
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale2)
    b_base = b_new
    if GUARD:
        b_base = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s * scale2 - gl.expand_dims(b_base, 1))
    b_factor = gl.exp2(b_max - b_base)
    return b_p, b_new, b_sum * b_factor + gl.sum(b_p, 1), b_factor


@gluon.jit
def _weigh(b_s, b_max, b_sum, i_t, counted, launch, sizes, KIND: gl.constexpr):
    """`_softmax` of the scores of tile i_t of its kind. counted: `Dropped` for mean keys, `Listed` for masked ones."""
    if KIND == PLAIN:
        return _softmax(b_s, b_max, b_sum, launch.scale2, False)
    elif KIND == MEANS:
        o_j = i_t * sizes.BLOCK_N + gl.arange(0, sizes.BLOCK_N, layout=gl.SliceLayout(0, sizes.S))
        m_j = o_j < launch.n_blocks
        b_n = gl.load(counted.p_valid + o_j, mask=m_j, other=0)
        b_bits = gl.load(counted.p_kept + o_j // 32, mask=m_j, other=-1)
        m_j = (((b_bits >> (o_j % 32)) & 1) == 0) & (b_n > 0)
        b_bias = gl.where(m_j, gl.log2(b_n.to(gl.float32) * counted.weight), float("-inf"))
        b_s = b_s * launch.scale2 + gl.expand_dims(b_bias, 0)
        return _softmax(b_s, b_max, b_sum, 1.0, True)
    else:
        TILES: gl.constexpr = sizes.BLOCK_KV // sizes.BLOCK_N
        i_kv = _block_at(counted.p_ids, i_t // TILES, counted.n_listed, launch.n_blocks)
        first = i_kv * sizes.BLOCK_KV + (i_t % TILES) * sizes.BLOCK_N
        o_key = first + gl.arange(0, sizes.BLOCK_N, layout=gl.SliceLayout(0, sizes.S))
        m_key = o_key < launch.SK
        if sizes.HAS_MASK:
            m_key = gl.load(counted.p_mask + o_key, mask=m_key, other=0) != 0
        b_s = gl.where(gl.expand_dims(m_key, 0), b_s, float("-inf"))
        return _softmax(b_s, b_max, b_sum, launch.scale2, True)
