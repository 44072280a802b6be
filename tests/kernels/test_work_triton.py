"""The list of a launch's work equals what is looked up item by item."""

from __future__ import annotations

import pytest
import torch
from support.attention_cases import CASES, Case
from support.marks import fast

pytest.importorskip("triton")

from support.gluon_cases import of_case, tile_of, unit_last_strides, work_of

from dynamicrad_compile.kernels.means import means_of
from dynamicrad_compile.kernels.work_triton import FIELDS

QUICK = {"ragged_both", "sub_tiles", "gqa_per_head", "per_batch_and_head", "sliced", "mask_padding", "mean_per_sample",
         "mean_many_blocks", "mean_mask_random", "mean_wrong", "one_block"}  # fmt: skip


@pytest.mark.parametrize("name", fast([case.name for case in CASES], QUICK))
def test_interpreter(name: str, interpreter):
    case: Case = next(case for case in CASES if case.name == name)
    a = unit_last_strides(of_case(case))
    means = None if a.compensate is None else means_of(a)
    (work,) = interpreter("work_cases", name, "gluon")
    expected = work_of(a, means, tile_of(case, "gluon"))
    for i, field in enumerate(FIELDS):
        assert work[:, i].tolist() == expected[:, i].tolist(), field


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged_both", "mean_per_sample", "mean_mask_random"])
def test_cuda(name: str):
    from dynamicrad_compile.kernels.work_triton import list_work

    case: Case = next(case for case in CASES if case.name == name)
    a = unit_last_strides(of_case(case))
    there = a._replace(**{k: x.cuda() for k, x in a._asdict().items() if isinstance(x, torch.Tensor)})
    means = None if a.compensate is None else means_of(there)
    work = list_work(there, means, tile_of(case, "gluon")).cpu()
    expected = work_of(a, None if a.compensate is None else means_of(a), tile_of(case, "gluon"))
    assert torch.equal(work[:, : len(FIELDS)], expected[:, : len(FIELDS)])
