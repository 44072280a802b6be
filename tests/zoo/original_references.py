"""Models with reference pictures beside the frames, as the original repositories write them: REFERENCES."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.models import L, _exp, _r
from zoo.original_parts import DIM, HEADS, Attention, Mlp, latents, modulate, rope_angles, seeded, unpatchify


class Block(nn.Module):
    """Self-attention rotated by a table of complex numbers [1, S, 1, D / 2] from outside, cross-attention, MLP."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, elementwise_affine=False) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.cross, self.mlp = Attention(DIM, HEADS), Mlp(DIM)
        self.modulation = nn.Parameter(torch.randn(1, 6, DIM) / DIM**0.5)

    def forward(self, x, e, freqs, context):
        e = (self.modulation + e).chunk(6, dim=1)
        y = modulate(self.norm1(x), e[0], e[1])
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (self.norm_q(self.q(y)), self.norm_k(self.k(y)), self.v(y)))
        q, k = (_rotated(t, freqs) for t in (q, k))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.o(out.transpose(1, 2).flatten(2)) * e[2]
        x = x + self.cross(x, context)
        return x + self.mlp(modulate(self.norm2(x), e[3], e[4])) * e[5]


def _rotated(x, freqs):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)


class Referenced(nn.Module):
    """Tokens of the frames, those of references behind them (or in front), at their own times or as more frames."""

    def __init__(self, times=(30,), in_front=False, one_table=False):
        super().__init__()
        self.times, self.in_front, self.one_table = times, in_front, one_table
        self.patch_embedding = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.text, self.time = nn.Linear(16, DIM), nn.Linear(1, 6 * DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.head = nn.Linear(DIM, 16)
        d = DIM // HEADS
        self.freqs = [rope_angles(64, d - 4 * (d // 6)), rope_angles(64, 2 * (d // 6)), rope_angles(64, 2 * (d // 6))]

    def forward(self, x, references, t, context):
        x, pictures = self.patch_embedding(x), self.patch_embedding(references)
        f, h, w = x.shape[2:]
        x, pictures = x.flatten(2).transpose(1, 2), pictures.flatten(2).transpose(1, 2)
        times = list(range(f)), list(self.times)
        tokens = [x, pictures]
        if self.in_front:
            times, tokens = times[::-1], tokens[::-1]
        if self.one_table:
            times = (range(len(self.times) + f),)
        freqs = torch.cat([self._table(each, h, w) for each in times])[None, :, None]
        x = torch.cat(tokens, 1)
        e, context = self.time(t[:, None]).unflatten(1, (6, DIM)), self.text(context)
        for block in self.blocks:
            x = block(x, e, freqs, context)
        x = self.head(x)
        x = x[:, -f * h * w :] if self.in_front else x[:, : f * h * w]
        return unpatchify(x, f, h, w)

    def _table(self, times, h, w):
        f = len(times)
        along = self.freqs[0][:f] if self.one_table else torch.stack([self.freqs[0][time] for time in times])
        along = along.view(f, 1, 1, -1)
        down, across = self.freqs[1][:h].view(1, h, 1, -1), self.freqs[2][:w].view(1, 1, w, -1)
        return torch.cat([each.expand(f, h, w, -1) for each in (along, down, across)], -1).reshape(f * h * w, -1)


def _referenced(batch, f, h, w, **how):
    model = seeded(Referenced, **how)
    extra = len(model.times) * h * w
    kwargs = dict(
        x=latents(batch, f, h, w), references=latents(batch, len(model.times), h, w), t=torch.full((batch,), 0.5),
        context=_r(batch, 7, 16),
    )  # fmt: skip
    around = dict(before=extra) if model.in_front else dict(after=extra)
    return model, kwargs, _exp((f, h, w), L, **around, n_attn=2 * L)


def reference_behind(f=5, h=6, w=8, batch=1):
    """Speech to video: the picture of a face behind the frames, at time 30."""
    return _referenced(batch, f, h, w)


def references_in_front(f=5, h=6, w=8, batch=2):
    return _referenced(batch, f, h, w, times=(40, 50), in_front=True)


def reference_as_first_frame(f=5, h=6, w=8, batch=1):
    """Control: the tokens of a picture in front, rotated as one more frame."""
    return _referenced(batch, f, h, w, times=(0,), in_front=True, one_table=True)


REFERENCES = {f.__name__: f for f in (reference_behind, references_in_front, reference_as_first_frame)}
