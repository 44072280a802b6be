"""Models as the original repositories write them, with the text in the video's sequence: JOINT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.models import L, _exp, _r
from zoo.original_parts import (
    DIM,
    HEADS,
    Mlp,
    latents,
    modulate,
    rope_table_3d,
    seeded,
    sincos_3d,
    unpatchify,
)


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
        x=latents(batch, f, h, w), text_states=_r(batch, 9, 16), text_states_2=_r(batch, 8), freqs_cos=cos,
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
    kwargs = dict(x=latents(batch, f, h, w), y=_r(batch, 7, 16))
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


JOINT = {f.__name__: f for f in (hunyuan, mochi_like, cogvideo_sat, opensora_v2)}
