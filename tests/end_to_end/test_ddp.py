"""DistributedDataParallel: its buckets are graphs of their own, with fake inputs, and yet one model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.graphs import OPTIONS, first_output, make, masked_dense, relative_error
from support.marks import slow
from support.plain import PLAIN
from torch.nn.parallel import DistributedDataParallel

import dynamicrad_compile as drad

SPARSE = {**OPTIONS, "sparsity": 0.6, "regime": "mid", "compensate": 0.0, "strict": True}
PLAN = drad.make_plan("dynamicrad", (5, 6, 8), 16, sparsity=0.6, regime="mid", profile=PLAIN)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """One process, and buckets so small that queries and keys are projected in different ones."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(how, model):
    if how == "regional":
        model.compile_repeated_blocks(backend="dynamicrad", options=SPARSE)
        return DistributedDataParallel(model, bucket_cap_mb=0.01)
    if how == "inside":
        return DistributedDataParallel(torch.compile(model, backend="dynamicrad", options=SPARSE), bucket_cap_mb=0.01)
    return torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.01), backend="dynamicrad", options=SPARSE)


@pytest.mark.parametrize("how", ["outside", slow("inside"), "regional"])
def test_all_buckets_are_sparse(how):
    (model, kwargs, _), (eager, _, _) = make("wan_t2v"), make("wan_t2v")
    compiled = wrapped(how, model.train())
    out = first_output(compiled(**kwargs))
    out.square().mean().backward()
    report = drad.report(compiled)
    assert len(report.graphs) > 2
    assert len(report.replaced) == (1 if how == "regional" else 2)
    assert {site.grid for site in report.replaced} == {(5, 6, 8)}
    with masked_dense(PLAN):
        assert relative_error(out.detach(), first_output(eager(**kwargs))) < 1e-5
