"""Stacks of blocks that original repositories compile one by one: tokens and tables come in, no latents: BLOCKS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.models import L, _exp, _r
from zoo.original_joint import SingleBlock
from zoo.original_parts import DIM, rope_table_3d, seeded


class SingleBlocks(nn.Module):
    """HunyuanVideo's single blocks: text behind the video is cut off before RoPE and put back."""

    def __init__(self):
        super().__init__()
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(L))

    def forward(self, x, txt_len, freqs_cos, freqs_sin):
        for block in self.single_blocks:
            x = block(x, txt_len, (freqs_cos, freqs_sin))
        return x


def hunyuan_single_blocks(f=5, h=6, w=8, batch=1):
    cos, sin = rope_table_3d(f, h, w, (8, 8, 8))
    kwargs = dict(x=_r(batch, f * h * w + 9, DIM), txt_len=9, freqs_cos=cos, freqs_sin=sin)
    return seeded(SingleBlocks), kwargs, _exp((f, h, w), L, after=9, n_attn=L)


class StepBlocks(nn.Module):
    """Text in front, rotation written into the rows of the video, the table in front of the query."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x, freqs_cos, freqs_sin):
        for _ in range(L):
            q, k, v = self.qkv(F.layer_norm(x, (DIM,))).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            q, k = (self._rotated(z.clone(), freqs_cos, freqs_sin) for z in (q, k))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x

    @staticmethod
    def _rotated(x, cos, sin):
        video = x[:, :, -len(cos) :]
        even, odd = video.unflatten(-1, (-1, 2)).unbind(-1)
        x[:, :, -len(cos) :] = cos * video + sin * torch.stack([-odd, even], -1).flatten(-2)
        return x


def rows_rotated_in_place(f=5, h=6, w=8, batch=1):
    cos, sin = rope_table_3d(f, h, w, (8, 8, 8))
    kwargs = dict(x=_r(batch, f * h * w + 7, DIM), freqs_cos=cos, freqs_sin=sin)
    return seeded(StepBlocks), kwargs, _exp((f, h, w), L, before=7, n_attn=L)


def table_over_text_and_video(f, h, w, text, before):
    """Flux's rotation [1, S, 1, D / 2, 2, 2] of text at place 0 and of a video behind it, or in front of it."""
    cos, sin = (t[:, ::2] for t in rope_table_3d(f, h, w, (8, 8, 8)))
    cos, sin = (F.pad(t, (0, 0, *((text, 0) if before else (0, text))), value=x) for t, x in ((cos, 1.0), (sin, 0.0)))
    return torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))[None, :, None]


def flux_rope(x, pe):
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).reshape(x.shape)


class FluxBlocks(nn.Module):
    """Flux-like video blocks: one table over text and video; two streams that meet in attention, then one stream."""

    def __init__(self, before):
        super().__init__()
        self.before = before
        self.img, self.txt, self.both = (nn.Linear(DIM, 3 * DIM) for _ in range(3))
        self.out = nn.Linear(DIM, DIM)

    def forward(self, img, txt, pe):
        n = txt.shape[1]
        pairs = zip(self._qkv(self.txt, txt), self._qkv(self.img, img), strict=True)
        out = self._attend(*(self._joined(*pair) for pair in pairs), pe)
        if self.before:
            txt, img = txt + out[:, :n], img + out[:, n:]
        else:
            txt, img = txt + out[:, -n:], img + out[:, :-n]
        x = self._joined(txt, img)
        return x + self._attend(*self._qkv(self.both, x), pe)

    def _joined(self, txt, img):
        return torch.cat((txt, img) if self.before else (img, txt), 1)

    @staticmethod
    def _qkv(linear, x):
        return linear(F.layer_norm(x, (DIM,))).unflatten(-1, (3, 2, -1)).unbind(2)

    def _attend(self, q, k, v, pe):
        q, k = flux_rope(q, pe), flux_rope(k, pe)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(out.transpose(1, 2).flatten(2))


def _flux_blocks(f, h, w, batch, before):
    kwargs = dict(img=_r(batch, f * h * w, DIM), txt=_r(batch, 9, DIM))
    kwargs["pe"] = table_over_text_and_video(f, h, w, 9, before)
    text = dict(before=9) if before else dict(after=9)
    return seeded(FluxBlocks, before=before), kwargs, _exp((f, h, w), 2, n_attn=2, **text)


def flux_blocks(f=5, h=6, w=8, batch=1):
    return _flux_blocks(f, h, w, batch, before=True)


def flux_blocks_text_behind(f=5, h=6, w=8, batch=1):
    return _flux_blocks(f, h, w, batch, before=False)


class AudioBlocks(nn.Module):
    """Each frame attends to its own audio before the video does; RoPE is applied segment by segment."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.audio_q, self.audio_kv = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)

    def forward(self, x, audio, freqs_cos, freqs_sin):
        for _ in range(L):
            frames = F.layer_norm(x, (DIM,)).reshape(x.shape[0] * audio.shape[1], -1, DIM)
            k, v = self.audio_kv(audio.flatten(0, 1)).chunk(2, -1)
            heads = [z.unflatten(-1, (2, -1)).transpose(1, 2) for z in (self.audio_q(frames), k, v)]
            x = x + F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape)
            q, k, v = self.qkv(F.layer_norm(x, (DIM,))).unflatten(-1, (3, 2, -1)).unbind(2)
            q, k = (self._rotated(z, freqs_cos, freqs_sin) for z in (q, k))
            out = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))
            x = x + self.out(out.transpose(1, 2).flatten(2))
        return x

    @staticmethod
    def _rotated(x, cos, sin):
        half = x.shape[1] // 2
        pieces = []
        for rows in (slice(0, half), slice(half, None)):
            even, odd = x[:, rows].unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([-odd, even], -1).flatten(-2)
            pieces.append(cos[rows, None] * x[:, rows] + sin[rows, None] * turned)
        return torch.cat(pieces, 1)


def audio_blocks(f=6, h=6, w=8, batch=1):
    cos, sin = rope_table_3d(f, h, w, (8, 8, 8))
    kwargs = dict(x=_r(batch, f * h * w, DIM), audio=_r(batch, f, 3, DIM), freqs_cos=cos, freqs_sin=sin)
    return seeded(AudioBlocks), kwargs, _exp((f, h, w), L, n_attn=2 * L)


CASES = (hunyuan_single_blocks, rows_rotated_in_place, flux_blocks, flux_blocks_text_behind, audio_blocks)
BLOCKS = {f.__name__: f for f in CASES}
