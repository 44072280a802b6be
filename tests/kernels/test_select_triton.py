"""The Triton kernel of select_blocks: equal to the reference under the interpreter and on CUDA; no spills.

`pytest -s` prints registers, spilled bytes and shared memory of each build.
"""

from __future__ import annotations

import pytest
import torch
from support.select_cases import CASES, CRITERIA, RANKS, SHORT_LIST, Case, build, check

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels.tiles import SHARED_MEMORY

pytest.importorskip("triton")

from support.builds import build_select

from dynamicrad_compile.kernels import select_op as _registers_the_ops  # noqa: F401
from dynamicrad_compile.kernels import select_triton as triton_select
from dynamicrad_compile.kernels.select_arguments import Selection, with_state

OP = torch.ops.dynamicrad.select_blocks
OP_STATE = torch.ops.dynamicrad.select_blocks_


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("case", "criterion"), SHORT_LIST, ids=str)
def test_interpreter_matches_reference(case: Case, criterion: str, rank: str, interpreter):
    close = check(*interpreter("select_cases", case.name, criterion, rank), build(case, criterion, rank))
    if case.dtype == torch.float32:
        assert close <= 0.02


BUILDS = [
    (arch, dtype, dim, width, criterion, refresh, rank)
    for arch in (80, 90)
    for rank in RANKS
    for dtype, dim, width, criterion, refresh in (
        ("bf16", 128, 100, "threshold", False),
        ("bf16", 128, 256, "mass", True),
        ("bf16", 64, 1110, "mass", False),
        ("fp16", 80, 300, "ratio", False),
        ("fp32", 128, 256, "ratio", True),
        ("fp32", 128, 4096, "mass", False),
    )
]


@pytest.mark.parametrize(
    "options", BUILDS, ids=[f"sm_{x[0]}-{'-'.join(map(str, x[1:5]))}{'-refresh' * x[5]}-by_{x[6]}" for x in BUILDS]
)
def test_compiles_without_spills(options: tuple):
    built = build_select(*options)
    print(f"\nsm_{options[0]} {options[1:]} {built}")
    assert built.spilled == 0
    assert built.shared <= SHARED_MEMORY[options[0]]


def test_too_many_candidates_are_an_error():
    x, wide = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 4097, dtype=torch.int32)
    count = wide[..., 0]
    s = Selection(x, x, count, wide, count, count, torch.zeros(1, 2), 1.0, 16, 16, "mass")
    with pytest.raises(PlanError, match="at most 4096 candidates on CUDA, got 4097"):
        triton_select.launch_select(s, x, x, count[0], count, wide)


# ---- with a GPU


def on_cuda(args: tuple) -> list:
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]


GPU_ONLY = [
    Case("gpu_bf16", batch=2, heads=4, kv_heads=2, q_len=8123, kv_len=9001, dim=128, block_q=128, block_kv=64,
         dtype=torch.bfloat16, mask="padding", layout="bshd"),
    Case("gpu_wide", heads=1, kv_heads=1, q_len=600, kv_len=30000, dim=64, block_q=128, block_kv=16),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("case", CASES + GPU_ONLY, ids=str)
def test_cuda_matches_reference(case: Case, criterion: str, rank: str):
    args = build(case, criterion, rank)
    out = OP(*on_cuda(args))
    check(*(x.cpu() for x in out), args)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", RANKS)
def test_cuda_graph_follows_thresholds_and_refresh(rank: str):
    """A captured graph of both ops replays with other thresholds and another refresh, without the host."""
    args = on_cuda(build(CASES[0], "mass", rank))
    fresh = OP(*args)
    state = [torch.full_like(x, 7) for x in fresh]
    refresh = torch.tensor([True], device="cuda")

    def both() -> tuple[torch.Tensor, ...]:
        OP_STATE(*with_state(tuple(args), (*state, refresh)))
        return OP(*args)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts, indices = both()
    for flag, threshold in ((True, 0.9), (False, 0.2), (True, 0.1)):
        before = [x.clone() for x in state]
        refresh.fill_(flag)
        args[6].fill_(threshold)
        graph.replay()
        expected = OP(*args)
        assert torch.equal(counts, expected[0])
        assert torch.equal(indices, expected[1])
        for got, want in zip(state, expected if flag else before, strict=True):
            assert torch.equal(got, want)
