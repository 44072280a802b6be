"""The Triton kernel of means and second moments: equal to fp64 under the interpreter and on CUDA; no spills."""

from __future__ import annotations

import pytest
import torch
from support.pool_cases import CASES, LENGTH, MOMENTS, build, close

from dynamicrad_compile.kernels.attention_reference import block_means
from dynamicrad_compile.kernels.blocks import valid_counts

pytest.importorskip("triton")

from dynamicrad_compile.kernels import ahead_of_time
from dynamicrad_compile.kernels.pool_triton import MOMENTS as ALL_MOMENTS
from dynamicrad_compile.kernels.pool_triton import _pool_blocks, launch_moments, tile_rows


def check(mean: torch.Tensor, second: torch.Tensor, case: tuple, moment: str) -> None:
    """Compare means and moments with the references."""
    dtype, block, masks, offset = case
    x, mask = build(dtype, masks, offset)
    close(second, x, block, mask, moment)
    valid = torch.ones(1, LENGTH, dtype=torch.bool) if mask is None else mask
    expected, _ = block_means(x, block, valid.expand(2, -1))
    # One rounding to dtype, of a sum in fp32 whose terms are up to 30 larger than the mean.
    rtol = max(torch.finfo(x.dtype).eps, 1e-6)
    torch.testing.assert_close(mean.double(), expected, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreter_matches_reference(case: tuple, moment: str, interpreter):
    check(*interpreter("pool_cases", *case, moment), case, moment)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("moment", ALL_MOMENTS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_compiles_without_spills(dim: int, moment: str, arch: int):
    constants = {"D": dim, "BLOCK_D": dim, "BLOCK": 128, "BLOCK_S": tile_rows(dim, moment), "HAS_MASK": True}
    constants |= {"HAS_WANTED": True, "SECOND": ALL_MOMENTS.index(moment)}
    pointers = {"x": "*bf16", "counts": "*i32", "mask": "*i1", "wanted": "*i1", "mean": "*bf16", "second": "*fp32"}
    names = _pool_blocks.arg_names
    aligned = [n for n in names if n in pointers or n.startswith("stride_x")]
    types = {n: pointers.get(n, "i32") for n in names}
    assert ahead_of_time.build(_pool_blocks, types, constants, aligned, arch, {}).spilled == 0


@pytest.mark.gpu
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_matches_reference(case: tuple, moment: str):
    dtype, block, masks, offset = case
    x, mask = (None if x is None else x.cuda() for x in build(dtype, masks, offset))
    count = valid_counts(LENGTH, block, mask, x.device)
    check(*(y.cpu() for y in launch_moments(x, count, block, mask, None, moment)), case, moment)
