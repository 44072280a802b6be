"""PyTorch's compile caches take our graphs: a warm start traces and generates nothing."""

from __future__ import annotations

import pytest
import torch
from support.graphs import compile_sparse, make
from support.marks import slow
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

from dynamicrad_compile.inner import _key
from dynamicrad_compile.kernels.tiles import CHOICE
from dynamicrad_compile.runtime.router import Router

CASES = [
    ("wan_t2v", dict(mode="dynamic_threshold", dense_steps=1, refresh_steps=2)),
    slow("hunyuan_video", dict(covariance=True, compensate=0.5)),
    slow("wan_t2v", dict(router=Router(torch.randn(3, 16), torch.zeros(3)))),
    slow("cogvideox_5b", dict(pattern="radial")),
    slow("hunyuan_video", dict(qk_dtype="int8")),
]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_the_cache_of_traced_graphs_is_not_bypassed(name, options, monkeypatch):
    def stop(*args, **kwargs):
        raise RuntimeError("before code generation")

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", stop)
    counters.clear()
    model, kwargs, _ = make(name)
    options = {"block_size": 16, "inner": "inductor", **options}
    with pytest.raises(Exception, match="before code generation"), torch.no_grad():
        compile_sparse(model, **options)(**kwargs)
    assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
    assert counters["aot_autograd"]["autograd_cache_miss"] + counters["aot_autograd"]["autograd_cache_hit"] == 1


@pytest.mark.slow
def test_a_second_compilation_comes_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, kwargs, _ = make("wan_t2v")
    options = dict(block_size=16, inner="inductor", sparsity=0.6, dense_steps=1)
    outputs = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            outputs.append([compile_sparse(model, **options)(**kwargs)[0].clone() for _ in range(2)])
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    for first, again in zip(*outputs, strict=True):
        assert torch.equal(first, again)


def test_the_caches_know_which_variant_of_the_kernels_was_traced(monkeypatch):
    monkeypatch.delenv(CHOICE, raising=False)
    usual = _key()
    monkeypatch.setenv(CHOICE, "tma")
    assert _key() != usual
