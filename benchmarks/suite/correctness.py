"""Every kernel on the device against slow float64 references on the CPU, at small odd sizes, before anything is timed.

The error is ||result - reference|| / ||reference||; a row fails above its bound. Bounds are those of the roundings: the
output's, and for half precision that of the probabilities before the second product (2^-11 for fp16, 2^-8 for bf16).
On CUDA the memory an output will take is filled with NaN first, so that an element that nobody writes is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dynamicrad_compile as drad
from dynamicrad_compile.kernels.attention_backward_reference import block_sparse_attention_backward_reference
from dynamicrad_compile.kernels.attention_reference import block_sparse_attention_reference
from dynamicrad_compile.kernels.blocks import block_mask, cdiv
from dynamicrad_compile.kernels.search_reference import search_blocks_reference
from dynamicrad_compile.kernels.select_arguments import Selection
from dynamicrad_compile.kernels.select_criteria import RANKS
from dynamicrad_compile.kernels.select_reference import candidate_rows, choose
from dynamicrad_compile.plans.plan import BlockPlan, Candidates
from dynamicrad_compile.plans.selection import select_blocks

from .runner import Row, Values

FORWARD_BOUND = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
BACKWARD_BOUND = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
LSE_BOUND = 1e-4  # absolute; scores are summed in fp32 whatever the dtype
SELECT_BOUND = 0.02  # share of rows whose choice may differ, by a candidate at the cut; of pairs that a search keeps
CRITERIA = {"threshold": (0.1, -0.2), "mass": (0.8, 0.6), "ratio": (0.5, 0.3)}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Forward = Callable[..., tuple[Tensor, Tensor]]  # of the arguments of `_attention`
Gradients = Callable[..., Sequence[Tensor]]  # of the arguments of `_gradients`


@dataclass(frozen=True)
class Case:
    """Sizes of one check; `mask` hides keys, `compensate` is the weight of each sample's mean keys."""

    name: str
    dtype: torch.dtype = BF16
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 512
    kv_len: int = 512
    dim: int = 128
    block_q: int = 128
    block_kv: int = 128
    plan_heads: int = 1
    mask: bool = False
    compensate: tuple[float, ...] | None = None


FORWARD = (
    Case("even"),
    Case("head_dim_64", dim=64),
    Case("fp16", dtype=FP16, dim=64),
    Case("fp32", dtype=FP32),
    Case("fp32_head_dim_64", dtype=FP32, dim=64, q_len=451, kv_len=451),
    Case("ragged", q_len=701, kv_len=835),
    Case("blocks_of_64", block_q=64, block_kv=64, q_len=451, kv_len=451),
    Case("mixed_blocks", block_q=128, block_kv=64, q_len=701, kv_len=701),
    Case("small_blocks", block_q=16, block_kv=32, q_len=333, kv_len=333, dim=64),
    Case("odd_head_dim", dim=40, q_len=451, kv_len=451),
    Case("head_dim_256", dim=256, q_len=451, kv_len=451),
    Case("gqa", heads=6, kv_heads=2, plan_heads=6, q_len=451, kv_len=451),
    Case("key_mask", batch=2, mask=True, q_len=451, kv_len=451),
    Case("compensation", batch=2, compensate=(1.0, 0.4), q_len=701, kv_len=701),
    Case("compensation_mask_64", batch=2, mask=True, compensate=(1.0,), dim=64, q_len=451, kv_len=451),
)
BACKWARD = (
    Case("even"),
    Case("fp32_ragged", dtype=FP32, dim=64, q_len=451, kv_len=451),
    Case("gqa_mask", heads=4, kv_heads=2, batch=2, mask=True, q_len=451, kv_len=451),
    Case("compensation", compensate=(1.0,), dim=64, q_len=701, kv_len=701),
)
REDUCED = {"even", "ragged", "gqa", "key_mask", "compensation", "gqa_mask"}


def rows(device: str, reduced: bool) -> Iterator[Row]:
    """The checks; `reduced` leaves out most shapes."""
    for case in FORWARD:
        if not reduced or case.name in REDUCED:
            yield _row("forward", case.name, lambda c=case: check_forward(c, device))
    for rank in RANKS:
        for criterion in CRITERIA:
            yield _row("select", f"{criterion}/by_{rank}", lambda c=criterion, r=rank: check_select(c, r, device))
        yield _row("search", f"by_{rank}", lambda r=rank: check_search(r, device))
    for case in BACKWARD:
        if not reduced or case.name in REDUCED:
            yield _row("backward", case.name, lambda c=case: check_backward(c, device))
    yield _row("merge_states", "two_halves", lambda: check_merge(device))
    yield _row("covariance", "against_cpu", lambda: check_covariance(device))


def _row(kernel: str, name: str, run: Any) -> Row:
    return Row(f"correct/{kernel}/{name}", "correctness", run, seconds=4.0, facts={"kernel": kernel, "case": name})


def make(case: Case) -> tuple[Tensor, Tensor, Tensor, BlockPlan, Tensor | None, Tensor | None]:
    """q, k, v, plan, key mask and compensation of a case, on the CPU.

    The plan has an empty row, a dense row whose ids are wrong (they are not to be read) and a row in descending order.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def tensor(heads: int, length: int) -> Tensor:
        x = torch.randn(case.batch, length, heads, case.dim, generator=generator)
        return x.transpose(1, 2).to(case.dtype)  # as a model has them: permuted from [B, S, H, D]

    m_q, m_k = cdiv(case.q_len, case.block_q), cdiv(case.kv_len, case.block_kv)
    kept = torch.rand(1, case.plan_heads, m_q, m_k, generator=generator) < 0.5
    kept[..., -1, -1] = True
    kept[..., 0, :] = False
    kept[..., 0] &= ~kept.all(-1)
    sizes = {"block_q": case.block_q, "block_kv": case.block_kv, "q_len": case.q_len, "kv_len": case.kv_len}
    plan = BlockPlan.from_mask(kept, **sizes)
    if m_q > 3:
        plan.kv_counts[..., 1] = m_k
        plan.kv_indices[..., 1, :] = 0
        count = int(plan.kv_counts[0, 0, 2])
        plan.kv_indices[0, 0, 2, :count] = plan.kv_indices[0, 0, 2, :count].flip(0)
    mask = torch.rand(case.batch, case.kv_len, generator=generator) < 0.7 if case.mask else None
    weights = None if case.compensate is None else torch.tensor(case.compensate)
    q, k, v = (tensor(h, n) for h, n in ((case.heads, case.q_len), *[(case.kv_heads, case.kv_len)] * 2))
    return q, k, v, plan, mask, weights


def check_forward(case: Case, device: str, forward: Forward | None = None) -> Values:
    """Output and lse of the op, or of `forward`, against the reference."""
    q, k, v, plan, mask, weights = make(case)
    _poison(q, device)
    out, lse = (forward or _attention)(q, k, v, plan, mask, weights, device)
    blocks = (plan.kv_counts, plan.kv_indices, None, plan.block_q, plan.block_kv)
    expected, expected_lse = block_sparse_attention_reference(q, k, v, *blocks, mask, weights)
    finite = expected_lse.isfinite()
    lse_error = float((lse.cpu().double() - expected_lse)[finite].abs().max())
    if not torch.equal(lse.cpu().isfinite(), finite) or not lse_error <= LSE_BOUND:
        raise AssertionError(f"lse is off by {lse_error:.2g}, at most {LSE_BOUND:g} is rounding")
    return {**_within(out, expected, FORWARD_BOUND[case.dtype]), "lse_error": lse_error}


def check_backward(case: Case, device: str, gradients: Gradients | None = None) -> Values:
    """Gradients of q, k and v by the op, or by `gradients`, against the reference, and the same bits once more."""
    q, k, v, plan, mask, weights = make(case)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    found = [(gradients or _gradients)(q, k, v, plan, mask, weights, grad, device) for _ in range(2)]
    if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
        raise AssertionError("two runs gave different bits")
    blocks = (plan.kv_counts, plan.kv_indices, None, plan.block_q, plan.block_kv)
    no_lse = torch.zeros(q.shape[:3])
    expected = block_sparse_attention_backward_reference(q, k, v, grad, no_lse, *blocks, mask, weights)
    checks = [_within(x, y, BACKWARD_BOUND[case.dtype]) for x, y in zip(found[0], expected, strict=True)]
    return max(checks, key=lambda values: values["error"])


def check_select(criterion: str, rank: str, device: str) -> Values:
    """Chosen blocks against the reference: equal but for candidates at the cut."""
    generator = torch.Generator().manual_seed(7)
    block, dim, heads, length = 64, 64, 2, 64 * 20 + 17
    n = cdiv(length, block)
    means = torch.randn(2, 1, heads, n, dim, generator=generator).repeat_interleave(block, 3)[..., :length, :]
    q, k = means + torch.randn(2, 1, heads, length, dim, generator=generator)
    indices = torch.rand(1, 1, n, n, generator=generator).argsort(-1).int()
    counts = torch.randint(8, n, (1, 1, n), generator=generator).int()
    counts[..., 1] = n  # a dense row stays dense
    forced, near = torch.full_like(counts, 2), torch.full_like(counts, 6)
    candidates = Candidates(BlockPlan(counts, indices, block, block, length, length), forced, near)
    thresholds = torch.tensor([CRITERIA[criterion]])
    given = (candidates.to(device), thresholds.to(device), criterion)
    plan = select_blocks(q.to(device), k.to(device), *given, rank=rank)
    counts_got, ids_got = plan.kv_counts.cpu(), plan.kv_indices.cpu()
    different = total = 0
    tables = (counts, indices, forced, near, thresholds)
    for row in candidate_rows(Selection(q, k, *tables, None, block, block, criterion, None, rank)):
        got = set(ids_got[row.where][: int(counts_got[row.where])].tolist())
        if row.dense:
            if int(counts_got[row.where]) != n:
                raise AssertionError("a dense row was thinned")
            continue
        wanted = {row.ids[j] for j in choose(row, CRITERIA[criterion], criterion)}
        total += 1
        different += got != wanted
        if len(got ^ wanted) > 2:
            raise AssertionError(f"row {row.where} keeps {sorted(got)}, the reference {sorted(wanted)}")
    return _bounded(different / total, SELECT_BOUND)


def check_search(rank: str, device: str) -> Values:
    """Searched blocks and their recall against the reference: equal but for pairs of blocks at the cut."""
    generator = torch.Generator().manual_seed(8)
    block, dim, heads, length = 64, 64, 2, 64 * 9 + 17
    q, k = (torch.randn(1, heads, length, dim, generator=generator).to(BF16) for _ in range(2))
    lse = (q.double() @ k.double().mT * dim**-0.5).logsumexp(-1).float()
    n = cdiv(length, block)
    counts = torch.ones(1, 1, n, dtype=torch.int32)
    counts[..., 1] = n  # a dense row stays dense
    own = torch.arange(n, dtype=torch.int32)[None, None, :, None]
    settings = (0.7, 1.0, None, block, block, None, rank)
    given = [x.to(device) for x in (q, k, lse, counts, own)]
    got_counts, got_ids, recall = (x.cpu() for x in torch.ops.dynamicrad.search_blocks(*given, *settings))
    wanted_counts, wanted_ids, wanted_recall = search_blocks_reference(q, k, lse, counts, own, *settings)
    if not torch.equal(got_counts.sum(-1), wanted_counts.sum(-1)):
        raise AssertionError("a head keeps more or fewer blocks than the reference")
    if not _max_error(recall, wanted_recall) <= 1e-3:
        raise AssertionError(f"recall is off by {_max_error(recall, wanted_recall):.2g}")
    got, wanted = (block_mask(*x, n) for x in ((got_counts, got_ids), (wanted_counts, wanted_ids)))
    return _bounded(float((got != wanted).double().mean()), SELECT_BOUND)


def check_merge(device: str) -> Values:
    """Attention over two halves of the keys, merged, against attention over all of them."""
    q, k, v, plan, _, _ = make(Case("merge", dim=64, q_len=512, kv_len=512))
    whole = drad.make_plan("dense", (1, 1, plan.q_len), 128)
    halves = []
    for first in (True, False):
        kept = torch.zeros(4, 4, dtype=torch.bool)
        kept[:, slice(0, 2) if first else slice(2, 4)] = True
        halves.append(BlockPlan.from_mask(kept, block_q=128, block_kv=128, q_len=512, kv_len=512))
    parts = [_attention(q, k, v, half, None, None, device) for half in halves]
    out, lse = drad.merge_states(*parts[0], *parts[1])
    expected, expected_lse = block_sparse_attention_reference(
        q, k, v, whole.kv_counts, whole.kv_indices, None, 128, 128
    )
    return {**_within(out, expected, FORWARD_BOUND[q.dtype]), "lse_error": _max_error(lse, expected_lse)}


def check_covariance(device: str) -> Values:
    """Compensation by covariances against the CPU in fp32, which the tests hold against the formula written out."""
    q, k, v, plan, mask, weights = make(Case("covariance", batch=2, mask=True, compensate=(1.0, 0.4), kv_len=835))
    given: dict[str, Any] = {"covariance": True, "return_lse": True}
    expected, expected_lse = drad.block_sparse_attention(
        *(x.float() for x in (q, k, v)), plan, kv_mask=mask, compensate=weights, **given
    )
    moved = [x.to(device) for x in (mask, weights)]
    out, lse = drad.block_sparse_attention(
        *(x.to(device) for x in (q, k, v)), plan.to(device), kv_mask=moved[0], compensate=moved[1], **given
    )
    return {**_within(out, expected, FORWARD_BOUND[q.dtype]), "lse_error": _max_error(lse, expected_lse)}


def _attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, mask: Tensor | None, weights: Tensor | None, device: str
) -> tuple[Tensor, Tensor]:
    moved = [None if x is None else x.to(device) for x in (mask, weights)]
    return drad.block_sparse_attention(
        *(x.to(device) for x in (q, k, v)), plan.to(device), kv_mask=moved[0], compensate=moved[1], return_lse=True
    )


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, mask: Any, weights: Any, grad: Tensor, device: str
) -> list[Tensor]:
    inputs = [x.to(device).detach().requires_grad_() for x in (q, k, v)]
    out, _ = _attention(*inputs, plan, mask, weights, device)
    return list(torch.autograd.grad(out, inputs, grad.to(device)))


def _poison(like: Tensor, device: str) -> None:
    """Leave NaN in the memory that PyTorch's allocator will hand out next for tensors of this size."""
    if device != "cpu":
        held = [torch.full_like(like, float("nan"), device=device) for _ in range(4)]
        del held


def _within(result: Tensor, expected: Tensor, bound: float) -> Values:
    error = float((result.cpu().double() - expected).norm() / expected.norm())
    return _bounded(error, bound)


def _bounded(error: float, bound: float) -> Values:
    if not error <= bound:  # nor NaN
        raise AssertionError(f"error {error:.3g} is above {bound:g}")
    return {"error": error, "bound_of_error": bound}


def _max_error(x: Tensor, y: Tensor) -> float:
    return float((x.cpu().double() - y).abs().max())
