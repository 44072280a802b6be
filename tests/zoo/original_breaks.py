"""Models whose RoPE reads the grid out of a tensor, in a Python loop, as the original repositories write them: BREAKS.

Where the compiler knows what the tensor holds, or sees the loop at all, they are one graph. Else queries and keys come
out of the loop as two inputs of the next graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.models import L, _exp, _r
from zoo.original_parts import DIM, HEADS, Attention, Mlp, apply_rope_complex, modulate, rope_angles, seeded


def rope_apply(x, grid_sizes, freqs):
    """The grid of each sample is read from a tensor: Dynamo breaks the graph at `tolist` where it does not know it."""
    return apply_rope_complex(x, grid_sizes.tolist(), freqs, batched=False)


def rope_apply_items(x, grid_sizes, freqs):
    """The same, number by number."""
    sizes = [tuple(int(n) for n in sample) for sample in grid_sizes]
    assert max(int(sample.prod()) for sample in grid_sizes) <= x.shape[1]
    return apply_rope_complex(x, sizes, freqs, batched=False)


@torch.compiler.disable
def rope_apply_outside(x, grid_sizes, freqs):
    return apply_rope_complex(x, grid_sizes.tolist(), freqs, batched=False)


class Block(nn.Module):
    def __init__(self, rope):
        super().__init__()
        self.rope = rope
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, elementwise_affine=False) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.cross = Attention(DIM, HEADS)
        self.mlp = Mlp(DIM)
        self.modulation = nn.Parameter(torch.randn(1, 6, DIM) / DIM**0.5)

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context):
        e = (self.modulation + e).chunk(6, dim=1)
        y = modulate(self.norm1(x), e[0], e[1])
        b, s, n = *y.shape[:2], HEADS
        q = self.norm_q(self.q(y)).view(b, s, n, -1)
        k = self.norm_k(self.k(y)).view(b, s, n, -1)
        v = self.v(y).view(b, s, n, -1)
        out = self.attention(self.rope(q, grid_sizes, freqs), self.rope(k, grid_sizes, freqs), v)
        x = x + self.o(out.flatten(2)) * e[2]
        x = x + self.cross(x, context)
        return x + self.mlp(modulate(self.norm2(x), e[3], e[4])) * e[5]

    def attention(self, q, k, v):
        """What runs where flash-attn is not installed."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@torch.compiler.disable
def log_of(x):
    """Something of the wrapper around a model that Dynamo must not see."""
    return x


class BlockBetween(Block):
    """The attention is between two breaks: its graph has no parameters."""

    def attention(self, q, k, v):
        return log_of(super().attention(q, k, v))


class Wan(nn.Module):
    """Lists of latents of one size, padded to a length; their grids as a tensor."""

    def __init__(self, rope=rope_apply, block=Block):
        super().__init__()
        self.patch_embedding = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.text, self.time = nn.Linear(16, DIM), nn.Linear(1, 6 * DIM)
        self.blocks = nn.ModuleList(block(rope) for _ in range(L))
        self.head = nn.Linear(DIM, 16)
        d = DIM // HEADS
        self.freqs = torch.cat(
            [rope_angles(32, d - 4 * (d // 6)), rope_angles(32, 2 * (d // 6)), rope_angles(32, 2 * (d // 6))], 1
        )

    def forward(self, x, t, context, seq_len):
        x = [self.patch_embedding(u.unsqueeze(0)) for u in x]
        grid_sizes = torch.stack([torch.tensor(u.shape[2:], dtype=torch.long) for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.size(1) for u in x], dtype=torch.long)
        assert seq_lens.max() <= seq_len
        x = torch.cat([torch.cat([u, u.new_zeros(1, seq_len - u.size(1), u.size(2))], dim=1) for u in x])
        e = self.time(t[:, None]).unflatten(1, (6, DIM))
        context = self.text(context)
        for block in self.blocks:
            x = block(x, e, seq_lens, grid_sizes, self.freqs, context)
        return self.unpatchify(self.head(x), grid_sizes)

    def unpatchify(self, x, grid_sizes):
        out = []
        for u, (f, h, w) in zip(x, grid_sizes.tolist(), strict=True):
            u = u[: f * h * w].view(f, h, w, 1, 2, 2, 4)
            out.append(torch.einsum("fhwpqrc->cfphqwr", u).reshape(4, f, 2 * h, 2 * w))
        return out


def _wan(batch, f, h, w, pad=0, **how):
    kwargs = dict(
        x=[_r(4, f, 2 * h, 2 * w) for _ in range(batch)], t=torch.full((batch,), 0.5), context=_r(batch, 7, 16),
        seq_len=f * h * w + pad,
    )  # fmt: skip
    return seeded(Wan, **how), kwargs, _exp((f, h, w), L, after=pad, n_attn=2 * L)


def wan_tolist(f=5, h=6, w=8, batch=1):
    return _wan(batch, f, h, w)


def wan_tolist_padded(f=5, h=6, w=8, batch=1):
    return _wan(batch, f, h, w, pad=16)


def wan_items(f=5, h=6, w=8, batch=1):
    return _wan(batch, f, h, w, rope=rope_apply_items)


def wan_disabled(f=5, h=6, w=8, batch=1):
    return _wan(batch, f, h, w, rope=rope_apply_outside)


def wan_disabled_padded(f=5, h=6, w=8, batch=1):
    return _wan(batch, f, h, w, pad=16, rope=rope_apply_outside)


def wan_wrapper(f=5, h=6, w=8, batch=1):
    return _wan(batch, f, h, w, rope=rope_apply_outside, block=BlockBetween)


BREAKS = {
    f.__name__: f for f in (wan_tolist, wan_tolist_padded, wan_items, wan_disabled, wan_disabled_padded, wan_wrapper)
}
