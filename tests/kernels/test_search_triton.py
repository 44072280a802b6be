"""The Triton kernels of block_mass and search_blocks: equal to the reference, interpreted and on CUDA; no spills."""

from __future__ import annotations

import pytest
import torch
from support import mass_cases, search_cases

from dynamicrad_compile.kernels.mass_arguments import BlockMass
from dynamicrad_compile.kernels.mass_reference import block_mass_reference

pytest.importorskip("triton")

from support.builds import build_mass, build_search

from dynamicrad_compile.kernels.tiles import SHARED_MEMORY


@pytest.mark.parametrize("case", mass_cases.CASES, ids=str)
def test_interpreted_masses(case, interpreter):
    args = mass_cases.build(case)
    (mass,) = interpreter("mass_cases", case.name)
    mass_cases.check_close(mass, block_mass_reference(*args).float().double(), BlockMass(*args))


@pytest.mark.parametrize("rank", search_cases.RANKS)
@pytest.mark.parametrize("case", search_cases.SHORT_LIST, ids=str)
def test_interpreted_choices(case, rank, interpreter):
    *out, mass, score = interpreter("search_cases", case.name, rank)
    search_cases.check(tuple(out), search_cases.build(case, rank), (mass, score))


@pytest.mark.parametrize("block_kv", [128, 64, 1])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90])
def test_masses_compile(arch, dtype, block_kv):
    built = build_mass(arch, dtype, 128, block_kv)
    assert built.spilled == 0 or dtype == "fp32"  # three products of TF32 need more registers than there are
    assert built.shared <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("arch", [80, 90])
def test_choices_compile_without_spills(arch):
    for built in build_search(arch):
        assert built.spilled == 0
        assert built.shared <= SHARED_MEMORY[arch]


@pytest.mark.gpu
@pytest.mark.parametrize("rank", search_cases.RANKS)
@pytest.mark.parametrize("case", search_cases.CASES, ids=str)
def test_cuda(case, rank):
    args = search_cases.build(case, rank)
    moved = tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in args)
    *out, mass, score = (x.cpu() for x in search_cases.launched(moved))
    search_cases.check(tuple(out), args, (mass, score))
    for got, expected in zip(torch.ops.dynamicrad.search_blocks(*moved), out, strict=True):
        torch.testing.assert_close(got.cpu(), expected)
