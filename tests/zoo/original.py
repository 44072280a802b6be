"""Tiny transformers as the original repositories write them, from knowledge of the architectures.

ZOO_ORIGINAL: dict name -> function giving (model, kwargs, expected), as in models.py. What they have that diffusers has
not: RoPE with complex numbers in a loop over grid sizes, padding to a fixed length, einops, attention helpers on
[B, S, H * D], frames folded into the batch and out again, attention modules of vision transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.models import L, _exp, _r
from zoo.original_parts import (
    Attention,
    Mlp,
    apply_rope_complex,
    modulate,
    optimized_attention,
    patch_rows,
    rope_angles,
    rope_table_3d,
    seeded,
    sincos_3d,
    unpatchify,
)

DIM, HEADS = 48, 2


def _latents(batch, f, h, w, channels=4):
    return _r(batch, channels, f, 2 * h, 2 * w)


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


class DoubleBlock(nn.Module):
    """Image and text streams with weights of their own, one attention on [B, S, H, D]."""

    def __init__(self):
        super().__init__()
        self.img_qkv, self.txt_qkv = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 3 * DIM)
        self.norms = nn.ModuleList(nn.RMSNorm(DIM // HEADS) for _ in range(4))
        self.img_out, self.txt_out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.img_mlp, self.txt_mlp = Mlp(DIM), Mlp(DIM)
        self.mod = nn.Linear(DIM, 4 * DIM)

    def forward(self, img, txt, vec, freqs):
        shift, scale, shift2, scale2 = self.mod(F.silu(vec)).chunk(4, -1)
        qkv = self.img_qkv(modulate(F.layer_norm(img, (DIM,)), shift[:, None], scale[:, None]))
        q, k, v = qkv.view(*qkv.shape[:2], 3, HEADS, -1).permute(2, 0, 1, 3, 4).unbind(0)
        q, k = _rotate_half_pairs(self.norms[0](q), freqs), _rotate_half_pairs(self.norms[1](k), freqs)
        qkv = self.txt_qkv(modulate(F.layer_norm(txt, (DIM,)), shift2[:, None], scale2[:, None]))
        tq, tk, tv = qkv.view(*qkv.shape[:2], 3, HEADS, -1).permute(2, 0, 1, 3, 4).unbind(0)
        q, k, v = (torch.cat(pair, 1) for pair in ((q, self.norms[2](tq)), (k, self.norms[3](tk)), (v, tv)))
        out = _bshd_attention(q, k, v)
        img_out, txt_out = out[:, : img.shape[1]], out[:, img.shape[1] :]
        img = img + self.img_out(img_out)
        txt = txt + self.txt_out(txt_out)
        return img + self.img_mlp(img), txt + self.txt_mlp(txt)


class SingleBlock(nn.Module):
    """One stream: query, key, value and the hidden layer of the MLP come from one linear layer."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(DIM, 3 * DIM + 32), nn.Linear(DIM + 32, DIM)
        self.norm_q, self.norm_k = nn.RMSNorm(DIM // HEADS), nn.RMSNorm(DIM // HEADS)

    def forward(self, x, text_len, freqs):
        qkv, mlp = torch.split(self.linear1(F.layer_norm(x, (DIM,))), [3 * DIM, 32], dim=-1)
        q, k, v = qkv.view(*qkv.shape[:2], 3, HEADS, -1).permute(2, 0, 1, 3, 4).unbind(0)
        q, k = self.norm_q(q), self.norm_k(k)
        q = torch.cat((_rotate_half_pairs(q[:, :-text_len], freqs), q[:, -text_len:]), 1)
        k = torch.cat((_rotate_half_pairs(k[:, :-text_len], freqs), k[:, -text_len:]), 1)
        return x + self.linear2(torch.cat((_bshd_attention(q, k, v), F.gelu(mlp, approximate="tanh")), 2))


def _rotate_half_pairs(x, freqs):
    cos, sin = (t[None, :, None] for t in freqs)
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (x.float() * cos + torch.stack([-odd, even], -1).flatten(3) * sin).type_as(x)


def _bshd_attention(q, k, v):
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).reshape(*q.shape[:2], -1)


class Hunyuan(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_in = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.txt_in, self.vector_in = nn.Linear(16, DIM), nn.Linear(8, DIM)
        self.double_blocks = nn.ModuleList(DoubleBlock() for _ in range(L))
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(L))
        self.final = nn.Linear(DIM, 16)

    def forward(self, x, text_states, text_states_2, freqs_cos, freqs_sin):
        _, _, f, oh, ow = x.shape
        h, w = oh // 2, ow // 2
        img, txt, vec = (
            self.img_in(x).flatten(2).transpose(1, 2),
            self.txt_in(text_states),
            self.vector_in(text_states_2),
        )
        freqs = (freqs_cos, freqs_sin)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, freqs)
        x, text_len = torch.cat((img, txt), 1), txt.shape[1]
        for block in self.single_blocks:
            x = block(x, text_len, freqs)
        return unpatchify(self.final(x[:, : img.shape[1]]), f, h, w)


def hunyuan(f=5, h=6, w=8, batch=1):
    cos, sin = rope_table_3d(f, h, w, (8, 8, 8))
    kwargs = dict(
        x=_latents(batch, f, h, w), text_states=_r(batch, 9, 16), text_states_2=_r(batch, 8), freqs_cos=cos,
        freqs_sin=sin,
    )  # fmt: skip
    return seeded(Hunyuan), kwargs, _exp((f, h, w), 2 * L, after=9, n_attn=2 * L)


class Mochi(nn.Module):
    """Frames patchified one by one; RoPE of learnt frequencies at positions made in the graph; text after."""

    def __init__(self):
        super().__init__()
        self.x_embedder, self.t5 = nn.Conv2d(4, DIM, 2, 2), nn.Linear(16, DIM)
        self.qkv_x, self.qkv_y, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.frequencies = nn.Parameter(torch.randn(3, HEADS, DIM // HEADS // 2))
        self.final = nn.Linear(DIM, 16)

    def forward(self, x, y):
        b, _, t, oh, ow = x.shape
        h, w = oh // 2, ow // 2
        x = self.x_embedder(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        x, y = x.reshape(b, t * h * w, DIM), self.t5(y)
        grid = torch.stack(torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij"), -1)
        angles = torch.einsum("nd,dhf->nhf", grid.reshape(-1, 3).float(), self.frequencies)
        for _ in range(L):
            q, k, v = self.qkv_x(x).unflatten(2, (3, HEADS, -1)).unbind(2)
            q, k = (_rotate_angles(z, angles) for z in (q, k))
            tq, tk, tv = self.qkv_y(y).unflatten(2, (3, HEADS, -1)).unbind(2)
            joint = _bshd_attention(*(torch.cat(z, 1) for z in ((q, tq), (k, tk), (v, tv))))
            x, y = x + self.out(joint[:, : t * h * w]), y + self.out(joint[:, t * h * w :])
        return unpatchify(self.final(x), t, h, w)


def _rotate_angles(x, angles):
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def mochi_like(f=5, h=6, w=8, batch=1):
    kwargs = dict(x=_latents(batch, f, h, w), y=_r(batch, 7, 16))
    return seeded(Mochi), kwargs, _exp((f, h, w), L, after=7, n_attn=L)


class CogVideo(nn.Module):
    """Text before; learnt or sine positions added to the tokens; qkv from one layer, heads split by view."""

    def __init__(self, f, h, w):
        super().__init__()
        self.proj, self.text_proj = nn.Conv2d(4, DIM, 2, 2), nn.Linear(16, DIM)
        self.register_buffer("pos_embedding", sincos_3d(f, h, w, DIM)[None])
        self.query_key_value = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(L))
        self.dense = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(L))
        self.final = nn.Linear(DIM, 16)

    def forward(self, images, text):
        b, t, c, oh, ow = images.shape
        h, w = oh // 2, ow // 2
        emb = self.proj(images.view(-1, c, oh, ow)).view(b, t, DIM, h, w).permute(0, 1, 3, 4, 2).reshape(b, -1, DIM)
        x = torch.cat((self.text_proj(text), emb), 1).contiguous()
        position = x.new_zeros(1, x.shape[1], DIM)
        position[:, text.shape[1] :] = self.pos_embedding
        x = x + position
        for qkv, dense in zip(self.query_key_value, self.dense, strict=True):
            mixed = qkv(F.layer_norm(x, (DIM,)))
            q, k, v = (z.view(b, -1, HEADS, DIM // HEADS).permute(0, 2, 1, 3) for z in mixed.chunk(3, -1))
            out = F.scaled_dot_product_attention(q, k, v)
            x = x + dense(out.permute(0, 2, 1, 3).contiguous().view(b, -1, DIM))
        x = self.final(x[:, text.shape[1] :])
        return unpatchify(x, t, h, w)


def cogvideo_sat(f=5, h=6, w=8, batch=1):
    kwargs = dict(images=_r(batch, f, 4, 2 * h, 2 * w), text=_r(batch, 7, 16))
    return seeded(CogVideo, f=f, h=h, w=w), kwargs, _exp((f, h, w), L, before=7, n_attn=L)


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
    kwargs = dict(x=_latents(batch, f, h, w), context=_r(batch, 7, 16))
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
    kwargs = dict(x=_latents(batch, f, h, w), y=_r(batch, 7, 16))
    return seeded(Stdit), kwargs, _exp((f, h, w), 0, n_attn=3 * L)


def opensora_full(f=5, h=6, w=8, batch=1):
    kwargs = dict(x=_latents(batch, f, h, w), y=_r(batch, 7, 16))
    return seeded(Stdit, full=True), kwargs, _exp((f, h, w), L, n_attn=2 * L)


class OpenSora2(nn.Module):
    """Open-Sora 2.0 and Flux-like video: packed patches and their ids come in; text before."""

    def __init__(self):
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(16, DIM), nn.Linear(16, DIM)
        self.qkv, self.out, self.final = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 16)

    def forward(self, img, img_ids, txt, txt_ids):
        ids = torch.cat((txt_ids, img_ids), dim=1)
        angles = torch.einsum("bnc,d->bncd", ids, 0.1 ** torch.arange(4).float()).flatten(2)[:, :, None]
        x, n = torch.cat((self.txt_in(txt), self.img_in(img)), 1), txt.shape[1]
        for _ in range(L):
            q, k, v = self.qkv(F.layer_norm(x, (DIM,))).unflatten(-1, (3, HEADS, -1)).unbind(2)
            x = x + self.out(_bshd_attention(_rotate_angles(q, angles), _rotate_angles(k, angles), v))
        return self.final(x[:, n:])


def opensora_v2(f=5, h=6, w=8, batch=1):
    grid = torch.stack(torch.meshgrid(torch.arange(f), torch.arange(h), torch.arange(w), indexing="ij"), -1)
    kwargs = dict(
        img=_r(batch, f * h * w, 16), img_ids=grid.reshape(1, -1, 3).float().expand(batch, -1, -1).contiguous(),
        txt=_r(batch, 7, 16), txt_ids=torch.zeros(batch, 7, 3),
    )  # fmt: skip
    return seeded(OpenSora2), kwargs, _exp((f, h, w), L, before=7, n_attn=L)


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


ZOO_ORIGINAL = {
    f.__name__: f
    for f in (
        wan_loop, wan_loop_b2, wan_batched, wan_padded, hunyuan, mochi_like, cogvideo_sat, comfy_video,
        opensora_stdit, opensora_full, opensora_v2, plain_dit,
    )
}  # fmt: skip
