"""The CPU needs no Triton: attention and selection work where it can't be imported."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None
import torch
import dynamicrad_compile as drad
from dynamicrad_compile.kernels import select_op

q = torch.randn(1, 2, 64, 16)
plan = drad.BlockPlan.from_mask(torch.ones(2, 2, dtype=torch.bool), block_q=32, block_kv=32, q_len=64, kv_len=64)
out = drad.block_sparse_attention(q, q, q, plan)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))

table = torch.ones(1, 1, 2, dtype=torch.int32)
indices = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
counts, _ = torch.ops.dynamicrad.select_blocks(
    q, q, table, indices, table, table, torch.zeros(1, 2), None, 32, 32, "mass"
)
assert counts.tolist() == [[[1, 1], [1, 1]]]
assert not torch.cuda.is_initialized()
"""


def test_attention_and_selection():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
