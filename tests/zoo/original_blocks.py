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


BLOCKS = {f.__name__: f for f in (hunyuan_single_blocks, rows_rotated_in_place)}
