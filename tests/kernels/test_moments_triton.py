"""The Triton kernels of second_order_attention: equal to the reference under the interpreter, no spills, one graph.

`pytest -s` prints registers, spilled bytes and shared memory of each build.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.attention_cases import BF16, CASES, HALF, Case, build
from support.marks import slow
from support.moments_cases import arguments

pytest.importorskip("triton")

from support.builds import build_moments

from dynamicrad_compile.kernels.moments_reference import second_order_attention_reference as reference
from dynamicrad_compile.kernels.tiles import SHARED_MEMORY

OP = torch.ops.dynamicrad.second_order_attention
COMPENSATED = [case for case in CASES if case.compensate is not None]
TOLERANCE = {torch.float32: (2e-5, 5e-6), HALF: (2e-3, 1e-3), BF16: (1.6e-2, 8e-3)}  # as attention_cases.check


@pytest.mark.parametrize("case", COMPENSATED, ids=str)
def test_interpreter_matches_reference(case: Case, interpreter):
    out, lse = interpreter("moments_cases", case.name)
    expected, expected_lse = reference(*build(case))
    rtol, atol = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
    exact = case.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5 if exact else 2e-3, atol=1e-5 if exact else 2e-3)


@pytest.mark.parametrize("name", ["mean_gqa", "mean_per_batch_and_head"])
def test_a_head_that_drops_nothing_reads_no_moments(name: str, interpreter):
    """Its programs end at once, and what they would have written stays NaN here."""
    out, lse = interpreter("moments_cases", name, "dense_head")
    expected, expected_lse = reference(*arguments(name, "dense_head"))
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=5e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


SIZES = [("bf16", 128), ("bf16", 64), ("fp32", 128), ("bf16", 256), ("fp32", 256)]


@pytest.mark.parametrize(
    ("arch", "dtype", "dim"),
    [(90, "bf16", 128), *(slow(arch, *size) for arch in (80, 90, 100, 120) for size in SIZES)],
)
def test_compiles_without_spills(arch: int, dtype: str, dim: int):
    for built in build_moments(arch, dtype, dim):
        print(f"\nsm_{arch} {dtype} {dim} {built.name}: {built}")
        assert built.spilled == 0
        assert built.shared <= SHARED_MEMORY[arch]


def test_compiled_graph_holds_the_kernels(monkeypatch: pytest.MonkeyPatch):
    """On CUDA the op, and its gradient, decompose into kernels, and nothing asks the device for a value."""
    from torch._functorch.aot_autograd import aot_export_module
    from torch._subclasses import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(type(driver), "active", property(lambda self: target))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *args: properties)

    class Forward(torch.nn.Module):
        def forward(self, q, k, v, counts, indices, mask, weight):
            return OP(q, k, v, counts, indices, None, 32, 32, mask, weight)

    class Backward(torch.nn.Module):
        def forward(self, q, k, v, counts, indices, mask, weight):
            lse = q.new_empty(q.shape[:3])
            given = (q, k, v, q, lse, q, lse, counts, indices, None, 32, 32, mask, weight)
            return torch.ops.dynamicrad.second_order_attention_backward(*given)

    with FakeTensorMode():
        q, k, v = (torch.empty(2, 101, 4, 64, device="cuda").transpose(1, 2) for _ in range(3))
        counts = torch.empty(1, 1, 4, device="cuda", dtype=torch.int32)
        indices = torch.empty(1, 1, 4, 2, device="cuda", dtype=torch.int32)
        mask, weight = torch.empty(2, 101, device="cuda", dtype=torch.bool), torch.empty(2, device="cuda")
        given = (q, k, v, counts, indices, mask, weight)
        graphs = [aot_export_module(module(), given, trace_joint=False)[0].graph for module in (Forward, Backward)]
    wrapped = torch.ops.higher_order.triton_kernel_wrapper_functional
    found = [n.kwargs["tensors_to_clone"] for n in graphs[0].nodes if n.target is wrapped]
    assert [x for x in found if x[0] in ("both", "products")] == [["both", "variance"], ["products"]]
    assert found[-1] == ["out", "lse"]
    for graph in graphs:
        assert "local_scalar_dense" not in str(graph)
        assert "second_order_attention" not in str(graph)
