"""The Triton forward kernel reads and writes rows through a token order as if they had been permuted by hand."""

from __future__ import annotations

import pytest
import torch
from support.attention_cases import Case, build, case_of, check, check_int8
from support.gather_cases import VARIANTS, run

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels.attention_arguments import Attention
from dynamicrad_compile.kernels.tiles import SHARED_MEMORY, choose_tile

pytest.importorskip("triton")

RUNS = [(variant, name) for variant, names in VARIANTS.items() for name in names]


@pytest.mark.parametrize(("variant", "name"), RUNS)
def test_interpreter_matches_reference(variant: str, name: str, interpreter):
    case = case_of(name)
    out, lse = interpreter("gather_cases", name, variant)
    (check_int8 if variant == "int8" else check)(out, lse, build(case), case.dtype)


GPU_ONLY = [
    Case("gpu_gather_bf16", batch=2, heads=4, kv_heads=2, q_len=1013, kv_len=1013, dim=128, block_q=128, block_kv=128,
         dtype=torch.bfloat16, layout="bshd", compensate=(1.0, 0.3)),
    Case("gpu_gather_fp16", heads=2, q_len=1024, kv_len=1024, dim=64, block_q=128, block_kv=64, dtype=torch.float16),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*map(case_of, VARIANTS[""]), *GPU_ONLY], ids=str)
def test_cuda_matches_reference(case: Case):
    from dynamicrad_compile.kernels.means import means_of

    args = build(case)
    a = Attention(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in args))
    out, lse = run(a, None if a.compensate is None else means_of(a))
    check(out.cpu(), lse.cpu(), args, case.dtype)


@pytest.mark.parametrize(
    ("name", "places", "message"),
    [
        ("cross_lengths", torch.arange(61, dtype=torch.int32), "as many keys as queries, got 203 and 61"),
        ("even", torch.arange(128), r"expected places int32 \[128\] on cpu, got torch.int64 \[128\]"),
        ("even", torch.arange(127, dtype=torch.int32), r"int32 \[128\] on cpu, got torch.int32 \[127\]"),
    ],
    ids=["lengths", "dtype", "shape"],
)
def test_wrong_places(name: str, places: torch.Tensor, message: str):
    from dynamicrad_compile.kernels.attention_triton import launch_forward

    a = Attention(*build(case_of(name)))
    tile = choose_tile((9, 0), False, a.q.shape[3], a.block_q, a.block_kv)
    with pytest.raises(PlanError, match=message):
        launch_forward(a, None, tile, splits=1, places=places)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_compiles_without_spills(arch: int, dim: int, full: bool):
    from dynamicrad_compile.kernels.ahead_of_time import build_forward

    tile = choose_tile(divmod(arch, 10), True, dim, 128, 128)
    built, usual = (
        build_forward(arch, "bf16", dim, tile, masked=full, compensate=full, gather=gather) for gather in (True, False)
    )
    print(f"\nsm_{arch} head_dim {dim} {'full' if full else 'plain'} {tile} {built}")
    assert built.spilled == 0
    assert built.shared <= SHARED_MEMORY[arch]
    # The rows' numbers come a tile ahead: as many tiles of keys and values are under way as without them.
    assert built.shared >= usual.shared
    assert built.instructions["cp_async"] >= usual.instructions["cp_async"]
