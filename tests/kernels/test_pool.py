"""The op dynamicrad::pool_blocks on CPU: means and counts, gradient, tracing, errors."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels.attention_reference import block_means
from dynamicrad_compile.kernels.pool_op import pool_blocks

OP = torch.ops.dynamicrad.pool_blocks


def tensor(length: int = 101, dim: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[2, 3, length, dim], permuted from [B, S, H, D]."""
    return torch.randn(2, length, 3, dim).to(dtype).transpose(1, 2)


def random_mask(batch: int, length: int = 101) -> torch.Tensor:
    mask = torch.rand(batch, length) < 0.5
    mask[0, 32:64] = False
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 32, 48, 101, 200])
@pytest.mark.parametrize("masks", [0, 1, 2], ids=["all", "shared_mask", "mask"])
def test_matches_reference(dtype: torch.dtype, block: int, masks: int):
    x = tensor(dtype=dtype)
    mask = random_mask(masks) if masks else None
    mean, count = pool_blocks(x, block, mask)
    valid = torch.ones(1, 101, dtype=torch.bool) if mask is None else mask
    expected, n = block_means(x, block, valid.expand(2, -1))
    assert (mean.dtype, count.dtype) == (dtype, torch.int32)
    assert mean.is_contiguous()
    assert torch.equal(count.expand(2, -1), n.int())
    assert count.shape[0] == max(1, masks)
    # One rounding to dtype, of a sum in fp32.
    torch.testing.assert_close(mean.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("masks", [0, 1, 2], ids=["all", "shared_mask", "mask"])
def test_gradient_is_that_of_a_mean(masks: int):
    x, mask = tensor(length=50).requires_grad_(), random_mask(masks, 50) if masks else None
    weights = torch.randn(2, 3, 4, 24)
    (pool_blocks(x, 16, mask)[0] * weights).sum().backward()
    y = x.detach().double().requires_grad_()
    valid = torch.ones(1, 50, dtype=torch.bool) if mask is None else mask
    (block_means(y, 16, valid.expand(2, -1))[0] * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("op", [OP.default, torch.ops.dynamicrad.pool_blocks_cpu.default], ids=["op", "cpu"])
def test_opcheck(op):
    torch.library.opcheck(op, (tensor().requires_grad_(), 32))
    torch.library.opcheck(op, (tensor(), 32, random_mask(2)))


def test_hidden_tokens_are_not_read():
    x, mask = tensor(), random_mask(2)
    expected = pool_blocks(x, 32, mask)[0]
    x = x.masked_fill(~mask[:, None, :, None], float("nan"))
    assert torch.equal(pool_blocks(x, 32, mask)[0], expected)


def test_compiles_with_a_dynamic_length():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: pool_blocks(x, 32), backend=counter, fullgraph=True, dynamic=True)
    for length in (101, 77, 64):
        x = tensor(length)
        for got, want in zip(compiled(x), pool_blocks(x, 32), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_flops_are_the_additions():
    with FlopCounterMode(display=False) as counter:
        pool_blocks(tensor(), 32)
    assert counter.get_total_flops() == 2 * 3 * 101 * 24


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3, 4), 2), r"expected x \[B, H, S, D\]"),
        ((torch.ones(1, 1, 4, 4).double(), 2), "float64"),
        ((torch.ones(1, 1, 4, 4), 0), "block must be at least 1, got 0"),
        ((torch.ones(1, 1, 4, 4), 2, torch.ones(1, 4)), r"expected kv_mask bool \[B or 1, S\]"),
        ((torch.ones(1, 1, 4, 4), 2, torch.ones(2, 4, dtype=torch.bool)), "a batch of 1 or x's"),
        ((torch.ones(1, 1, 4, 4), 2, torch.ones(1, 5, dtype=torch.bool)), "must have x's length"),
        ((torch.ones(1, 1, 4, 4), 2, torch.ones(1, 4, dtype=torch.bool, device="meta")), "kv_mask is on meta"),
    ],
    ids=["dims", "dtype", "block", "mask_dtype", "mask_batch", "mask_length", "mask_device"],
)
def test_errors(args, message):
    with pytest.raises(PlanError, match=message):
        pool_blocks(*args)
