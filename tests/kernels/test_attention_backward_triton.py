"""The Triton backward kernels equal the fp64 reference: under Triton's interpreter, and on CUDA where there is one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.attention_cases import CASES, Case, build, case_of
from support.backward_cases import INTERPRETED_CASES, VARIANTS, build_backward, check_gradients, tiles_of

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels.tiles import CHOICE, SHARED_MEMORY, choose_backward_tiles

pytest.importorskip("triton")

OP = torch.ops.dynamicrad.block_sparse_attention_backward


@pytest.mark.parametrize("case", INTERPRETED_CASES, ids=str)
def test_interpreter_matches_reference(case: Case, interpreter):
    check_gradients(interpreter("backward_cases", case.name), build_backward(case))


@pytest.mark.parametrize(
    ("variant", "name"), [(variant, name) for variant, names in VARIANTS.items() for name in names]
)
def test_interpreter_matches_reference_however_launched(variant: str, name: str, interpreter):
    check_gradients(interpreter("backward_cases", name, variant), build_backward(case_of(name)))


def on_cuda(args: tuple) -> list:
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]


GPU_ONLY = [
    Case("gpu_dim_128_bf16", batch=2, heads=4, kv_heads=4, q_len=1013, kv_len=1013, dim=128, block_q=128, block_kv=128,
         dtype=torch.bfloat16, layout="bshd"),
    Case("gpu_dim_64_fp16", batch=2, heads=4, kv_heads=2, q_len=1013, kv_len=777, dim=64, block_q=128, block_kv=64,
         dtype=torch.float16, plan_heads=4, mask="padding", compensate=(1.0, 0.3)),
    Case("gpu_mean_bf16", heads=4, kv_heads=2, q_len=9000, kv_len=1000, dim=128, block_q=128, block_kv=128,
         dtype=torch.bfloat16, compensate=(1.0,), keep=0.2),
    Case("gpu_dim_128_fp32", heads=2, q_len=519, kv_len=519, dim=128, block_q=128, block_kv=128),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + GPU_ONLY, ids=str)
def test_cuda_matches_reference_and_itself(case: Case):
    args = build_backward(case)
    there = on_cuda(args)
    grads = OP(*there)
    check_gradients(tuple(grad.cpu() for grad in grads), args)
    assert all(torch.equal(a, b) for a, b in zip(OP(*there), grads, strict=True))


def needs_the_copy_engine():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the copy engine needs sm_90")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + GPU_ONLY, ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_cuda_matches_reference_however_launched(case: Case, variant: str):
    from dynamicrad_compile.kernels.attention_backward_op import split
    from dynamicrad_compile.kernels.attention_backward_triton import launch_backward
    from dynamicrad_compile.kernels.means import means_of

    needs_the_copy_engine()
    args = build_backward(case)
    a, results = split(tuple(on_cuda(args)))
    means = None if a.compensate is None else means_of(a)
    grads = launch_backward(a, results, means, tiles_of(a, variant))
    check_gradients(tuple(grad.cpu() for grad in grads), args)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in GPU_ONLY if case.dtype != torch.float32], ids=str)
def test_cuda_matches_reference_with_the_variant_of_the_table(case: Case, monkeypatch: pytest.MonkeyPatch):
    needs_the_copy_engine()
    monkeypatch.setenv(CHOICE, "tma")
    args = build_backward(case)
    there = on_cuda(args)
    check_gradients(tuple(grad.cpu() for grad in OP(*there)), args)
    torch.library.opcheck(torch.ops.dynamicrad.block_sparse_attention_backward_described.default, there)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["triton", "tma"])
@pytest.mark.parametrize("name", ["permuted", "mean_mask_padding", "fp16"])
def test_cuda_compiles(name: str, choice: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, choice)
    forward = on_cuda(build(case_of(name)))
    forward[:3] = [x.detach().requires_grad_() for x in forward[:3]]
    torch.library.opcheck(torch.ops.dynamicrad.block_sparse_attention.default, forward)

    def loss(*args):
        out, lse = torch.ops.dynamicrad.block_sparse_attention(*args)
        return out.square().sum() + lse.clamp(min=-1e3).sum()

    expected = torch.autograd.grad(loss(*forward), forward[:3])
    for got, want in zip(
        torch.autograd.grad(torch.compile(loss, fullgraph=True)(*forward), forward[:3]), expected, strict=True
    ):
        torch.testing.assert_close(got, want)


def traced(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, compensate: bool) -> torch.fx.Graph:
    """The graph of the op on a CUDA device of sm_90 that need not be there."""
    from torch._functorch.aot_autograd import aot_export_module
    from torch._subclasses import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(type(driver), "active", property(lambda self: target))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))

    class Backward(torch.nn.Module):
        def forward(self, *args):
            return OP(*args[:9], None, 32, 32, None, *args[9:])

    with FakeTensorMode():
        q, k, v, grad = (torch.empty(2, 101, 4, 64, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(4))
        out = torch.empty(2, 4, 101, 64, device="cuda", dtype=dtype)
        lse = torch.empty(2, 4, 101, device="cuda")
        counts = torch.empty(1, 1, 4, device="cuda", dtype=torch.int32)
        indices = torch.empty(1, 1, 4, 2, device="cuda", dtype=torch.int32)
        weight = [torch.empty(1, device="cuda")] if compensate else []
        args = (q, k, v, out, lse, grad, lse, counts, indices, *weight)
        graph, _ = aot_export_module(Backward(), args, trace_joint=False)
    return graph.graph


def written(graph: torch.fx.Graph) -> list:
    kernels = [n for n in graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
    return [node.kwargs["tensors_to_clone"] for node in kernels]


@pytest.mark.parametrize("compensate", [False, True])
def test_compiled_graph_holds_the_kernels(compensate: bool, monkeypatch: pytest.MonkeyPatch):
    """On CUDA the op decomposes into kernels that are known to write nothing but their results."""
    graph = traced(monkeypatch, torch.float32, compensate)
    for names in (["lse2", "delta"], ["dq"], ["dk", "dv"], *([["dmean_k", "dmean_v"]] * compensate)):
        assert names in written(graph)


def test_compiled_graph_holds_an_op_where_descriptors_are_used(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor.virtualized import V

    from dynamicrad_compile.kernels._launch import variants_allowed

    monkeypatch.setenv(CHOICE, "tma")
    graph = traced(monkeypatch, torch.bfloat16, False)
    described = torch.ops.dynamicrad.block_sparse_attention_backward_described.default
    assert [node.target for node in graph.nodes if node.op == "call_function"].count(described) == 1
    assert not written(graph)
    with V.set_aot_compilation(True):
        assert not variants_allowed()
        assert ["dk", "dv"] in written(traced(monkeypatch, torch.bfloat16, False))
    assert variants_allowed()


def test_what_the_copy_engine_can_read():
    from torch._subclasses import FakeTensorMode

    from dynamicrad_compile.kernels._launch import descriptor

    def check(make):
        wide = make(2, 3, 64, 48)
        assert descriptor(wide, 16, 64).block_shape == [1, 1, 16, 64]
        assert descriptor(wide[..., 8:], 16, 64) is not None
        assert descriptor(wide[..., 4:], 16, 64) is None  # an address of 8 bytes
        assert descriptor(wide[..., ::2], 16, 64) is None
        assert descriptor(make(2, 3, 64, 44), 16, 64) is None  # strides of 88 bytes
        assert descriptor(wide[:, :1].expand(2, 3, 64, 48), 16, 64) is None  # strides of 0

    def make(*shape):
        return torch.empty(shape, dtype=torch.float16)

    check(make)
    with FakeTensorMode():
        check(make)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("half", [True, False], ids=["half", "float"])
@pytest.mark.parametrize("block", [16, 32, 48, 64, 80, 128, 256])
def test_tiles_divide_the_blocks(arch: int | str, half: bool, block: int):
    chip = arch if isinstance(arch, str) else divmod(arch, 10)
    for dim in (8, 24, 64, 65, 128, 200, 256):
        for tile in choose_backward_tiles(chip, half, dim, block, block):
            assert block % tile.block_m == 0
            assert block % tile.block_n == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((7, 5), True, 64, 128, 128), r"compute capability 8\.0 or newer, got 7\.5"),
        (((8, 0), True, 257, 128, 128), "head_dim must be at most 256, got 257"),
        (((8, 0), True, 64, 24, 128), "block_q must be a multiple of 16 up to 256 on CUDA, got 24"),
        (((8, 0), True, 64, 128, 512), "block_kv must be a multiple of 16 up to 256 on CUDA"),
    ],
    ids=["old_device", "head_dim", "block_q", "block_kv"],
)
def test_tile_errors(arguments, message):
    with pytest.raises(PlanError, match=message):
        choose_backward_tiles(*arguments)
