"""The Triton forward kernel equals the fp64 reference: under Triton's interpreter, and on CUDA where there is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.attention_cases import CASES, VARIANTS, Case, build, case_of, check, check_int8

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels.attention_gluon import CONSUMERS
from dynamicrad_compile.kernels.tiles import (
    CHOICE,
    SHARED_MEMORY,
    Tile,
    architecture,
    choose_tile,
    read_table,
    table,
    variant_in_use,
)
from dynamicrad_compile.kernels.tiles import VARIANTS as CHOICES

pytest.importorskip("triton")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreter_matches_reference(case: Case, interpreter):
    out, lse = interpreter("attention_cases", case.name)
    check(out, lse, build(case), case.dtype)


@pytest.mark.parametrize(
    ("variant", "name"), [(variant, name) for variant, names in VARIANTS.items() for name in names]
)
def test_interpreter_matches_reference_however_launched(variant: str, name: str, interpreter):
    case = case_of(name)
    out, lse = interpreter("attention_cases", name, variant)
    if variant == "int8":
        check_int8(out, lse, build(case), case.dtype)
    else:
        check(out, lse, build(case), case.dtype, variant == "dropped")


GPU_ONLY = [
    Case("gpu_dim_128_bf16", batch=2, heads=4, kv_heads=4, q_len=1013, kv_len=1013, dim=128, block_q=128, block_kv=128,
         dtype=torch.bfloat16, layout="bshd"),
    Case("gpu_dim_64_fp16", batch=2, heads=4, kv_heads=2, q_len=1013, kv_len=777, dim=64, block_q=128, block_kv=64,
         dtype=torch.float16, plan_heads=4, mask="padding"),
    Case("gpu_dim_128_fp32", heads=2, q_len=519, kv_len=519, dim=128, block_q=128, block_kv=128),
    Case("gpu_mean_dim_128_bf16", batch=2, heads=4, kv_heads=2, q_len=1013, kv_len=5000, dim=128, block_q=128,
         block_kv=128, dtype=torch.bfloat16, layout="bshd", compensate=(1.0, 0.3), keep=0.2),
    Case("gpu_mean_dim_64_fp16", heads=2, q_len=519, kv_len=1519, dim=64, block_q=64, block_kv=32, dtype=torch.float16,
         mask="padding", compensate=(1.0,), keep=0.2),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + GPU_ONLY, ids=str)
def test_cuda_matches_reference(case: Case):
    args = build(case)
    on_cuda = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
    out, lse = torch.ops.dynamicrad.block_sparse_attention(*on_cuda)
    assert out.is_contiguous()
    check(out.cpu(), lse.cpu(), args, case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [*VARIANTS, *CONSUMERS])
@pytest.mark.parametrize("case", GPU_ONLY, ids=str)
def test_cuda_matches_reference_however_launched(case: Case, variant: str):
    from dynamicrad_compile.kernels.attention_arguments import Attention
    from dynamicrad_compile.kernels.attention_gluon import launch_gluon
    from dynamicrad_compile.kernels.attention_triton import launch_forward
    from dynamicrad_compile.kernels.means import means_of

    args = build(case)
    a = Attention(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in args))
    capability = torch.cuda.get_device_capability()
    sizes = (capability, case.dtype != torch.float32, case.dim, case.block_q, case.block_kv)
    tile = choose_tile(*sizes, variant=variant if variant in CHOICES["forward"] else None)
    if variant in CHOICES["forward"] and tile.kernel != variant:
        pytest.skip(f"the table has no such tile for {capability} and these blocks")
    means = None if a.compensate is None else means_of(a)
    out, lse = launch_forward(
        a._replace(qk_int8=variant == "int8"), means, tile, splits=3 if variant == "splits" else 1
    )
    if variant in CONSUMERS:
        assert not isinstance(launch_gluon(a, means, tile), str), "the plain kernel ran instead"
    (check_int8 if variant == "int8" else check)(out.cpu(), lse.cpu(), args, case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["triton", *CHOICES["forward"]])
@pytest.mark.parametrize("name", ["permuted", "mask_padding", "fp16", "mean_ragged", "mean_mask_padding"])
def test_cuda_compiles_with_the_kernel_in_the_graph(name: str, choice: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, choice)
    case = case_of(name)
    if "gluon" in choice:  # which need blocks of their tiles
        case = dataclasses.replace(
            case, block_q=128, block_kv=128, dim=64, dtype=torch.float16, kv_len=case.kv_len + 300
        )
    args = build(case)
    on_cuda = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(torch.ops.dynamicrad.block_sparse_attention.default, on_cuda)
    compiled = torch.compile(lambda *x: torch.ops.dynamicrad.block_sparse_attention(*x), fullgraph=True)
    for got, want in zip(compiled(*on_cuda), torch.ops.dynamicrad.block_sparse_attention(*on_cuda), strict=True):
        torch.testing.assert_close(got, want)


def traced(monkeypatch: pytest.MonkeyPatch, compensate: bool, block: int = 32) -> torch.fx.Graph:
    """The graph of the op in fp32, or fp16 with blocks of 128, on a CUDA device of sm_90 that need not be there."""
    from torch._functorch.aot_autograd import aot_export_module
    from torch._subclasses import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(type(driver), "active", property(lambda self: target))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *args: properties)

    class Attention(torch.nn.Module):
        def forward(self, *args):
            return torch.ops.dynamicrad.block_sparse_attention(*args[:5], None, block, block, None, *args[5:])

    with FakeTensorMode():
        dtype = torch.float16 if block == 128 else torch.float32
        length = 4 * block - 27
        q, k, v = (torch.empty(2, length, 4, 64, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
        counts = torch.empty(1, 1, 4, device="cuda", dtype=torch.int32)
        indices = torch.empty(1, 1, 4, 2, device="cuda", dtype=torch.int32)
        weight = [torch.empty(2, device="cuda")] if compensate else []
        graph, _ = aot_export_module(Attention(), (q, k, v, counts, indices, *weight), trace_joint=False)
    assert "local_scalar_dense" not in str(graph.graph)
    return graph.graph


@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "means"])
def test_compiled_graph_holds_the_kernel(compensate: bool, monkeypatch: pytest.MonkeyPatch):
    """On CUDA the op decomposes into the kernel, which is known to write nothing but out and lse."""
    monkeypatch.delenv(CHOICE, raising=False)
    graph = traced(monkeypatch, compensate)
    kernels = [n for n in graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
    *pooling, order, kernel = kernels
    assert [n.kwargs["tensors_to_clone"] for n in pooling] == [["mean"]] * 2 * compensate
    assert order.kwargs["tensors_to_clone"] == ["order"]
    assert kernel.kwargs["grid"] == [(32, 1, 1)]
    assert kernel.kwargs["tensors_to_clone"] == ["out", "lse"]


@pytest.mark.parametrize("choice", CHOICES["forward"])
def test_compiled_graph_holds_an_op_where_a_variant_runs(choice: str, monkeypatch: pytest.MonkeyPatch):
    from torch._inductor.virtualized import V

    kernel = torch.ops.higher_order.triton_kernel_wrapper_functional
    described = torch.ops.dynamicrad.block_sparse_attention_described.default
    monkeypatch.setenv(CHOICE, choice)
    targets = [node.target for node in traced(monkeypatch, True, block=128).nodes]
    assert described in targets
    assert kernel not in targets
    with V.set_aot_compilation(True):
        targets = [node.target for node in traced(monkeypatch, True, block=128).nodes]
    assert described not in targets
    assert kernel in targets


def test_gluon_is_left_alone_where_its_tiles_do_not_fit(monkeypatch: pytest.MonkeyPatch, caplog):
    from dynamicrad_compile.kernels._launch import instead

    monkeypatch.setenv(CHOICE, "gluon")
    instead.cache_clear()
    with caplog.at_level("INFO", "dynamicrad_compile"):
        targets = [node.target for node in traced(monkeypatch, False, block=32).nodes]
    assert (
        caplog.text.count("gluon: the plain kernel runs instead: it has no tile for sm_90, torch.float32, head_dim")
        == 1
    )
    assert torch.ops.dynamicrad.block_sparse_attention_described.default not in targets


@pytest.mark.parametrize(
    ("setting", "kernel", "found"),
    [
        (None, "forward", None),
        ("triton", "forward", None),
        ("gluon", "forward", "gluon"),
        ("gluon", "dq", None),
        ("tma", "dq", "tma"),
        ("tma", "dmeans", None),
    ],
)
def test_the_environment_chooses_a_variant(setting, kernel, found, monkeypatch: pytest.MonkeyPatch):
    if setting is None:
        monkeypatch.delenv(CHOICE, raising=False)
    else:
        monkeypatch.setenv(CHOICE, setting)
    assert variant_in_use((9, 0), True, 128, kernel) == found


def test_a_variant_that_does_not_exist(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "gloun")
    with pytest.raises(PlanError, match="DYNAMICRAD_KERNEL must be triton, tma, gluon, gluon_pingpong, got 'gloun'"):
        variant_in_use((9, 0), True, 128)


@pytest.mark.parametrize(
    ("capability", "blocks", "kernel"),
    [((9, 0), (128, 128), "gluon"), ((9, 0), (64, 128), "triton"), ((9, 0), (128, 64), "gluon"),
     ((9, 0), (128, 32), "triton"), ((8, 0), (128, 128), "triton"),
     ((10, 0), (128, 128), "triton"), ((12, 0), (128, 128), "triton"), ((9, 0), (256, 256), "gluon")],
)  # fmt: skip
def test_gluon_tiles_are_for_sm_90_and_whole_blocks(capability, blocks, kernel):
    tile = choose_tile(capability, True, 128, *blocks, variant="gluon")
    assert tile.kernel == kernel


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("half", [True, False], ids=["half", "float"])
@pytest.mark.parametrize("block", [16, 32, 48, 64, 80, 128, 256])
def test_tile_divides_the_blocks(arch: int, half: bool, block: int):
    for dim in (8, 24, 64, 65, 128, 200, 256):
        tile = choose_tile(arch if isinstance(arch, str) else divmod(arch, 10), half, dim, block, block)
        assert block % tile.block_m == 0
        assert block % tile.block_n == 0


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), 80), ((8, 7), 86), ((9, 0), 90), ((10, 3), 100), ((12, 1), 86)]
)
def test_architecture_falls_back_to_an_older_entry(capability, arch):
    assert architecture(capability) == arch
    assert arch in SHARED_MEMORY


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_tile((7, 5), True, 64, 128, 128), r"compute capability 8\.0 or newer, got 7\.5"),
        (lambda: choose_tile((8, 0), True, 257, 128, 128), "head_dim must be at most 256, got 257"),
        (lambda: choose_tile((8, 0), True, 64, 24, 128), "block_q must be a multiple of 16 up to 256 on CUDA, got 24"),
        (lambda: choose_tile((8, 0), True, 64, 128, 512), "block_kv must be a multiple of 16 up to 256 on CUDA"),
        (lambda: Tile(96, 64, 4, 2), "block_m must be a power of two from 16 to 256, got 96"),
        (lambda: Tile(64, 64, 3, 2), "num_warps must be 1, 2, 4, 8 or 16, got 3"),
        (lambda: Tile(64, 64, 4, 0), "num_stages must be 1 to 8, got 0"),
    ],
    ids=["old_device", "head_dim", "block_q", "block_kv", "block_m", "num_warps", "num_stages"],
)
def test_tile_errors(call, message):
    with pytest.raises(PlanError, match=message):
        call()


def test_every_entry_of_the_table_says_where_it_is_from():
    for arch, dtypes in table().items():
        assert arch in SHARED_MEMORY
        for dims in dtypes.values():
            for section in dims.values():
                assert all(tile.source for tile in section.tiles.values())
                assert all(tile.kernel == "triton" or arch == 90 for tile in section.tiles.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sm_90.half.x]", r"bad.toml: \[sm_90.half.x\] is not \[sm_NUMBER or gfxNUMBER.half or float.HEAD_DIM\]"),
        ("[sm_90.double.64]", r"\[sm_90.double.64\] is not"),
        ("[sm_90.half.64]\nforwards = {tile = [64, 64, 4, 2]}", "forwards: the kernels are forward, dq, dk_dv, dmeans"),
        (
            "[sm_90.half.64]\nforward = {tile = [64, 64, 4]}",
            r"forward needs tile = \[block_m, block_n, ",
        ),
        ("[sm_90.half.64]\nforward = {tile = [60, 64, 4, 2]}", "forward: block_m must be a power of two .*, got 60"),
        ("[sm_90.half.64]\nforward = {tile = [64, 64, 4, 2], tna = true}", "unknown tna; known are tile and source"),
        (
            "[sm_90.half.64]\nuse = ['forward_tma']\nforward_gluon = {tile = [64, 64, 4, 2]}",
            r"use must list variants of this section \(forward_gluon\), got \['forward_tma'\]",
        ),
        ("sm_90 = 3", "bad.toml: "),
        ("= 3", "bad.toml: "),
    ],
)
def test_errors_of_the_table(text: str, message: str, tmp_path: Path):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_table(path)


@pytest.mark.parametrize(
    ("programs", "width", "splits"), [(1000, 50, 1), (66, 50, 2), (10, 50, 8), (10, 9, 2), (10, 3, 1), (0, 9, 2)]
)
def test_splits(programs: int, width: int, splits: int):
    from dynamicrad_compile.kernels.splits_triton import choose_splits

    assert choose_splits(programs, width, 132) == splits
