"""Causal models as the original repositories write them, against a cache of keys or under a mask: CAUSAL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.models import L, _exp, _r
from zoo.original_parts import DIM, HEADS, Attention, Mlp, latents, rope_angles, seeded, unpatchify


class CausalBlock(nn.Module):
    """Self-attention of a chunk against a buffer of keys and values, which it writes into; cross-attention, MLP."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, elementwise_affine=False) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.cross, self.mlp = Attention(DIM, HEADS), Mlp(DIM)

    def forward(self, x, freqs, context, cache, start, sink):
        y = self.norm1(x)
        q, k, v = (linear(y).unflatten(-1, (HEADS, -1)) for linear in (self.q, self.k, self.v))
        q, k = _rotated(q, freqs), _rotated(k, freqs)
        end, size = start + k.shape[1], cache["k"].shape[1]
        if end > size:  # the oldest frames behind the sink make room
            out, kept = end - size, size - k.shape[1] - sink
            for name in ("k", "v"):
                cache[name][:, sink : sink + kept] = cache[name][:, sink + out : sink + out + kept].clone()
            start, end = size - k.shape[1], size
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        q, k, v = (t.transpose(1, 2) for t in (q, cache["k"][:, :end], cache["v"][:, :end]))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.cross(x, context)
        return x + self.mlp(self.norm2(x))


def _rotated(x, freqs):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)


class Causal(nn.Module):
    """Denoises the frames of one chunk; keys of earlier chunks come in a buffer for each layer."""

    def __init__(self):
        super().__init__()
        self.patch_embedding = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.text, self.time = nn.Linear(16, DIM), nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(CausalBlock() for _ in range(L))
        self.head = nn.Linear(DIM, 16)
        d = DIM // HEADS
        self.freqs = [rope_angles(64, d - 4 * (d // 6)), rope_angles(64, 2 * (d // 6)), rope_angles(64, 2 * (d // 6))]

    def forward(self, x, t, context, kv_cache, current_start=0, sink=0):
        x = self.patch_embedding(x)
        f, h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self.time(t[:, None, None] / 1000.0)
        first = current_start // (h * w)
        tables = (self.freqs[0][first : first + f], self.freqs[1][:h], self.freqs[2][:w])
        shapes = ((f, 1, 1, -1), (1, h, 1, -1), (1, 1, w, -1))
        freqs = torch.cat([table.view(*s).expand(f, h, w, -1) for table, s in zip(tables, shapes, strict=True)], -1)
        freqs, context = freqs.reshape(1, f * h * w, 1, -1), self.text(context)
        for block, cache in zip(self.blocks, kv_cache, strict=True):
            x = block(x, freqs, context, cache, current_start, sink)
        return unpatchify(self.head(x), f, h, w)


class MaskedBlock(CausalBlock):
    """Self-attention of all frames under a mask; cross-attention, MLP."""

    def forward(self, x, freqs, context, mask):
        y = self.norm1(x)
        q, k, v = (linear(y).unflatten(-1, (HEADS, -1)) for linear in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (_rotated(q, freqs), _rotated(k, freqs), v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        x = x + self.cross(x, context)
        return x + self.mlp(self.norm2(x))


class CausalTraining(nn.Module):
    """All chunks at once, each reading itself and `local` chunks before it, all of them where that is None."""

    def __init__(self, chunk=3, local=None, loop=False):
        super().__init__()
        self.chunk, self.local, self.loop = chunk, local, loop
        self.patch_embedding = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.text = nn.Linear(16, DIM)
        self.blocks = nn.ModuleList(MaskedBlock() for _ in range(L))
        self.head = nn.Linear(DIM, 16)
        d = DIM // HEADS
        self.freqs = [rope_angles(64, d - 4 * (d // 6)), rope_angles(64, 2 * (d // 6)), rope_angles(64, 2 * (d // 6))]

    def mask(self, f, frame, like):
        if self.loop:
            mask = torch.full((f * frame, f * frame), float("-inf"), dtype=like.dtype, device=like.device)
            for start in range(0, f * frame, self.chunk * frame):
                stop = start + self.chunk * frame
                first = 0 if self.local is None else max(0, start - self.local * self.chunk * frame)
                mask[start:stop, first:stop] = 0
            return mask
        chunk = torch.arange(f * frame, device=like.device) // frame // self.chunk
        before = chunk[:, None] - chunk[None, :]
        return (before >= 0) if self.local is None else (before >= 0) & (before <= self.local)

    def forward(self, x, context):
        x = self.patch_embedding(x)
        f, h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        shapes = ((f, 1, 1, -1), (1, h, 1, -1), (1, 1, w, -1))
        sizes = zip(self.freqs, (f, h, w), shapes, strict=True)
        freqs = torch.cat([table[:n].view(*s).expand(f, h, w, -1) for table, n, s in sizes], -1)
        freqs, context, mask = freqs.reshape(1, f * h * w, 1, -1), self.text(context), self.mask(f, h * w, x)
        for block in self.blocks:
            x = block(x, freqs, context, mask)
        return unpatchify(self.head(x), f, h, w)


def causal_mask(f=7, h=6, w=8, batch=1, **how):
    """A block-causal mask over chunks of three frames, the last of one."""
    kwargs = dict(x=latents(batch, f, h, w), context=_r(batch, 7, 16))
    return seeded(CausalTraining, **how), kwargs, _exp((f, h, w), L, n_attn=2 * L)


def causal_local_mask(f=9, h=6, w=8, batch=1):
    """The same as a float mask that a loop fills, and no further back than one chunk."""
    return causal_mask(f, h, w, batch, local=1, loop=True)


def _case(f, h, w, batch, size, start, sink=0):
    """size, start, sink: of the buffer, of the chunk and of the frames that are never dropped, in frames."""
    frame = h * w
    caches = [{n: _r(batch, size * frame, HEADS, DIM // HEADS) for n in ("k", "v")} for _ in range(L)]
    kwargs = dict(
        x=latents(batch, f, h, w),
        t=torch.full((batch,), 500.0),
        context=_r(batch, 7, 16),
        kv_cache=caches,
        current_start=start * frame,
        sink=sink * frame,
    )
    before = min(start, size - f) * frame
    return seeded(Causal), kwargs, _exp((f, h, w), L, n_attn=2 * L, kv_before=before)


def causal_cache(f=3, h=6, w=8, batch=1):
    """The third chunk of a buffer that holds seven."""
    return _case(f, h, w, batch, size=7 * f, start=2 * f)


def causal_rolling_cache(f=3, h=6, w=8, batch=1):
    """A buffer that is full: its frames move up, but for those of the sink."""
    return _case(f, h, w, batch, size=3 * f, start=3 * f, sink=1)


CAUSAL = {case.__name__: case for case in (causal_cache, causal_rolling_cache, causal_mask, causal_local_mask)}
