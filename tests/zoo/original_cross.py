"""Models as the original repositories write them, whose text comes by cross-attention or not at all: CROSS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.models import L, _exp, _r
from zoo.original_parts import (
    DIM,
    HEADS,
    Attention,
    Mlp,
    apply_rope_complex,
    latents,
    modulate,
    optimized_attention,
    patch_rows,
    rope_angles,
    seeded,
    sincos_3d,
    unpatchify,
)


class WanBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, elementwise_affine=False) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.cross = Attention(DIM, HEADS)
        self.mlp = Mlp(DIM)
        self.modulation = nn.Parameter(torch.randn(1, 6, DIM) / DIM**0.5)

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, batched):
        e = (self.modulation + e).chunk(6, dim=1)
        y = self.norm1(x).float() * (1 + e[1]) + e[0]
        b, s, n = *y.shape[:2], HEADS
        q = self.norm_q(self.q(y)).view(b, s, n, -1)
        k = self.norm_k(self.k(y)).view(b, s, n, -1)
        v = self.v(y).view(b, s, n, -1)
        q, k = (apply_rope_complex(t, grid_sizes, freqs, batched) for t in (q, k))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.o(out.transpose(1, 2).flatten(2)) * e[2]
        x = x + self.cross(x, context)
        return x + self.mlp(modulate(self.norm2(x), e[3], e[4])) * e[5]


class Wan(nn.Module):
    """Lists of latents, padded to a length; grid sizes as Python numbers or as a tensor read with tolist()."""

    def __init__(self, batched=False, sizes_as_tensor=False):
        super().__init__()
        self.batched, self.sizes_as_tensor = batched, sizes_as_tensor
        self.patch_embedding = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.text, self.time = nn.Linear(16, DIM), nn.Linear(1, 6 * DIM)
        self.blocks = nn.ModuleList(WanBlock() for _ in range(L))
        self.head = nn.Linear(DIM, 16)
        d = DIM // HEADS
        self.freqs = torch.cat(
            [rope_angles(32, d - 4 * (d // 6)), rope_angles(32, 2 * (d // 6)), rope_angles(32, 2 * (d // 6))], 1
        )

    def forward(self, x, t, context, seq_len):
        x = [self.patch_embedding(u.unsqueeze(0)) for u in x]
        grid_sizes = [tuple(u.shape[2:]) for u in x]
        if self.sizes_as_tensor:
            grid_sizes = torch.stack([torch.tensor(u.shape[2:], dtype=torch.long) for u in x]).tolist()
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = [u.size(1) for u in x]
        x = torch.cat([torch.cat([u, u.new_zeros(1, seq_len - u.size(1), u.size(2))], dim=1) for u in x])
        e = self.time(t[:, None]).unflatten(1, (6, DIM))
        context = self.text(context)
        for block in self.blocks:
            x = block(x, e, seq_lens, grid_sizes, self.freqs, context, self.batched)
        x = self.head(x)
        return [
            torch.einsum("fhwpqrc->cfphqwr", u[: f * h * w].view(f, h, w, 1, 2, 2, 4)).reshape(4, f, 2 * h, 2 * w)
            for u, (f, h, w) in zip(x, grid_sizes, strict=True)
        ]


def _wan(batch, f, h, w, pad=0, **how):
    kwargs = dict(
        x=[_r(4, f, 2 * h, 2 * w) for _ in range(batch)], t=torch.full((batch,), 0.5), context=_r(batch, 7, 16),
        seq_len=f * h * w + pad,
    )  # fmt: skip
    return seeded(Wan, **how), kwargs, _exp((f, h, w), L, after=pad, n_attn=2 * L)


def wan_loop(f=5, h=6, w=8, batch=1):
    return _wan(batch, f, h, w)


def wan_loop_b2(f=5, h=6, w=8, batch=2):
    return _wan(2, f, h, w)


def wan_batched(f=5, h=6, w=8, batch=2):
    return _wan(batch, f, h, w, batched=True)


def wan_padded(f=5, h=6, w=8, batch=1):
    """A fixed length behind the video, as for several cards: its tokens are zeros that are attended."""
    return _wan(batch, f, h, w, pad=16)


class ComfyVideo(nn.Module):
    """ComfyUI's habits: optimized_attention on [B, S, H * D], einops for patches, rotation by 2 x 2 matrices."""

    def __init__(self):
        super().__init__()
        self.patch, self.text = nn.Linear(16, DIM), nn.Linear(16, DIM)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.cross = Attention(DIM, HEADS)
        self.final = nn.Linear(DIM, 16)

    def forward(self, x, context):
        from einops import rearrange

        _b, _, f, oh, ow = x.shape
        h, w = oh // 2, ow // 2
        x = self.patch(rearrange(x, "b c f (h p) (w q) -> b (f h w) (c p q)", p=2, q=2))
        ids = torch.zeros(f, h, w, 3)
        ids[..., 0] = ids[..., 0] + torch.arange(f).reshape(-1, 1, 1)
        ids[..., 1] = ids[..., 1] + torch.arange(h).reshape(1, -1, 1)
        ids[..., 2] = ids[..., 2] + torch.arange(w).reshape(1, 1, -1)
        angles = rearrange(ids, "f h w c -> (f h w) c") @ torch.ones(3, DIM // HEADS // 2)
        matrix = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1)
        matrix = rearrange(matrix, "n d (i j) -> 1 n 1 d i j", i=2, j=2)
        context = self.text(context)
        for _ in range(L):
            q, k = (self._rotate(z, matrix) for z in (self.to_q(x), self.to_k(x)))
            x = x + self.to_out(optimized_attention(q, k, self.to_v(x), heads=HEADS))
            x = x + self.cross(x, context)
        return rearrange(self.final(x), "b (f h w) (p q c) -> b c f (h p) (w q)", f=f, h=h, w=w, p=2, q=2)

    def _rotate(self, x, matrix):
        pairs = x.unflatten(-1, (HEADS, -1)).unflatten(-1, (-1, 1, 2))
        return (matrix[..., 0] * pairs[..., 0] + matrix[..., 1] * pairs[..., 1]).flatten(2)


def comfy_video(f=5, h=6, w=8, batch=1):
    kwargs = dict(x=latents(batch, f, h, w), context=_r(batch, 7, 16))
    return seeded(ComfyVideo), kwargs, _exp((f, h, w), L, n_attn=2 * L)


class Stdit(nn.Module):
    """Open-Sora and Latte: spatial attention with frames in the batch, temporal with positions; or full attention."""

    def __init__(self, full=False):
        super().__init__()
        self.full = full
        self.x_embedder, self.y = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2)), nn.Linear(16, DIM)
        self.attn, self.temporal, self.cross = (Attention(DIM, HEADS) for _ in range(3))
        self.mlp, self.final = Mlp(DIM), nn.Linear(DIM, 16)

    def forward(self, x, y):
        from einops import rearrange

        _b, _, t, oh, ow = x.shape
        h, w = oh // 2, ow // 2
        x = self.x_embedder(x)
        x = rearrange(x.flatten(2).transpose(1, 2), "b (t s) d -> b t s d", t=t, s=h * w)
        x = rearrange(x + sincos_3d(1, h, w, DIM), "b t s d -> b (t s) d")
        y = self.y(y)
        for _ in range(L):
            if self.full:
                x = x + self.attn(x)
            else:
                m = self.attn(rearrange(x, "b (t s) d -> (b t) s d", t=t))
                x = x + rearrange(m, "(b t) s d -> b (t s) d", t=t)
                m = self.temporal(rearrange(x, "b (t s) d -> (b s) t d", t=t))
                x = x + rearrange(m, "(b s) t d -> b (t s) d", s=h * w)
            x = x + self.cross(x, y)
            x = x + self.mlp(x)
        return unpatchify(self.final(x), t, h, w)


def opensora_stdit(f=5, h=6, w=8, batch=2):
    kwargs = dict(x=latents(batch, f, h, w), y=_r(batch, 7, 16))
    return seeded(Stdit), kwargs, _exp((f, h, w), 0, n_attn=3 * L)


def opensora_full(f=5, h=6, w=8, batch=1):
    kwargs = dict(x=latents(batch, f, h, w), y=_r(batch, 7, 16))
    return seeded(Stdit, full=True), kwargs, _exp((f, h, w), L, n_attn=2 * L)


class PackedPatches(nn.Module):
    """Patches cut by view and permute, unfused attention, output by view and permute (a plain DiT for video)."""

    def __init__(self):
        super().__init__()
        self.embed, self.attn, self.mlp, self.final = (
            nn.Linear(32, DIM),
            Attention(DIM, HEADS),
            Mlp(DIM),
            nn.Linear(DIM, 32),
        )
        self.attn.fused = False

    def forward(self, x):
        rows, (f, h, w) = patch_rows(x)
        x = self.embed(rows)
        for _ in range(L):
            x = x + self.attn(x)
            x = x + self.mlp(x)
        x = self.final(x).view(x.shape[0], f, h, w, 2, 2, 2, 4)
        return torch.einsum("nthwopqc->nctohpwq", x).reshape(x.shape[0], 4, 2 * f, 2 * h, 2 * w)


def plain_dit(f=4, h=6, w=8, batch=2):
    kwargs = dict(x=_r(batch, 4, 2 * f, 2 * h, 2 * w))
    return seeded(PackedPatches), kwargs, _exp((f, h, w), L, n_attn=L)


CROSS = {
    f.__name__: f
    for f in (wan_loop, wan_loop_b2, wan_batched, wan_padded, comfy_video, opensora_stdit, opensora_full, plain_dit)
}
