"""The Triton backward kernels equal the fp64 reference: under Triton's interpreter, and on CUDA where there is one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.attention_cases import CASES, Case, build, case_of
from support.backward_cases import INTERPRETED_CASES, build_backward, check_gradients

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels.tiles import SHARED_MEMORY, choose_backward_tiles

pytest.importorskip("triton")

OP = torch.ops.dynamicrad.block_sparse_attention_backward


@pytest.mark.parametrize("case", INTERPRETED_CASES, ids=str)
def test_interpreter_matches_reference(case: Case, interpreter):
    check_gradients(interpreter("backward_cases", case.name), build_backward(case))


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["permuted", "mean_mask_padding", "fp16"])
def test_cuda_compiles_with_the_kernels_in_the_graph(name: str):
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


@pytest.mark.parametrize("compensate", [False, True])
def test_compiled_graph_holds_the_kernels(compensate: bool, monkeypatch: pytest.MonkeyPatch):
    """On CUDA the op decomposes into kernels that are known to write nothing but their results."""
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
        q, k, v, grad = (torch.empty(2, 101, 4, 64, device="cuda").transpose(1, 2) for _ in range(4))
        out = torch.empty(2, 4, 101, 64, device="cuda")
        lse = torch.empty(2, 4, 101, device="cuda")
        counts = torch.empty(1, 1, 4, device="cuda", dtype=torch.int32)
        indices = torch.empty(1, 1, 4, 2, device="cuda", dtype=torch.int32)
        weight = [torch.empty(1, device="cuda")] if compensate else []
        args = (q, k, v, out, lse, grad, lse, counts, indices, *weight)
        graph, _ = aot_export_module(Backward(), args, trace_joint=False)
    kernels = [n for n in graph.graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
    written = [node.kwargs["tensors_to_clone"] for node in kernels]
    for names in (["lse2", "delta"], ["dq"], ["dk", "dv"], *([["dmean_k", "dmean_v"]] * compensate)):
        assert names in written


@pytest.mark.parametrize("arch", sorted(SHARED_MEMORY))
@pytest.mark.parametrize("half", [True, False], ids=["half", "float"])
@pytest.mark.parametrize("block", [16, 32, 48, 64, 80, 128, 256])
def test_tiles_divide_the_blocks(arch: int, half: bool, block: int):
    assert arch in SHARED_MEMORY
    for dim in (8, 24, 64, 65, 128, 200, 256):
        for tile in choose_backward_tiles(divmod(arch, 10), half, dim, block, block):
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
