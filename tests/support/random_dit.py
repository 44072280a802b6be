"""Small random video DiTs for the property tests: a configuration, the model it makes, and the truth about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

DIM, CHANNELS, TEXT_DIM = 16, 3, 5


@dataclass(frozen=True)
class DitConfig:
    """One random DiT.

    grid      (frames, height, width) in tokens
    layout    of the latent: "bcfhw", "bfchw", "bfhwc", "bcfhw-list", "frames-in-batch" ([B F, C, H, W]) or "packed"
    patch     how patches are made: "conv3d", "conv2d", "linear" (view, permute, linear), "loop" (frame by frame)
    time      frames in a patch
    order     order of the tokens: "fhw" is right; "hwf", "fwh", "whf", "hfw", "tiles" or "reversed" are not
    flatten   how tokens are put in a row: "flatten", "two-stage", "reshape", "einops"
    text      tokens before and after the video
    join      how text joins: "cat" before the projections, "dual" after them, "buffer" slice writes into zeros,
              "index" index_copy by arange
    history   frames of another video in front (0: none)
    rope      "none", "meshgrid", "table", "inplace", "ones" (learnt per position), "matrix" (2 x 2 rotations)
    qkv       "separate", "chunk", "unbind", "heads-first"
    attend    "sdpa", "softmax", "mha", "cache" (four more keys in front), or, for what is no plain self-attention,
              "cross" (keys of a second video), "causal"
    steps     names of steps that change nothing, in between
    """

    grid: tuple[int, int, int]
    batch: int = 1
    heads: int = 2
    layers: int = 1
    layout: str = "bcfhw"
    patch: str = "conv3d"
    time: int = 1
    order: str = "fhw"
    flatten: str = "flatten"
    text: tuple[int, int] = (0, 0)
    join: str = "cat"
    history: int = 0
    rope: str = "none"
    qkv: str = "chunk"
    attend: str = "sdpa"
    steps: tuple[str, ...] = ()
    unpatchify: bool = True

    def truth(self) -> tuple[tuple[int, int, int], int, int] | None:
        """(grid, keys before, keys after) of each attention; None where there is no such thing."""
        _, h, w = self.grid
        in_order = self.order == "fhw" or (self.order == "tiles" and w == 2)  # one column of tiles is in order
        if not in_order or self.attend in ("cross", "causal"):
            return None
        more = 4 if self.attend == "cache" else 0
        return self.grid, more + self.text[0] + self.history * h * w, self.text[1]

    def plain(self) -> bool:
        """Whether it must be understood: enough frames, nothing that hides where tokens come from."""
        known = self.layout != "packed" or self.rope in ("meshgrid", "table", "inplace", "matrix") or self.unpatchify
        opaque = {"shift", "select"} & set(self.steps)
        return self.truth() is not None and self.grid[0] >= 3 and known and not self.history and not opaque


ORDERS = {
    "fhw": (0, 1, 2), "hwf": (1, 2, 0), "fwh": (0, 2, 1), "whf": (2, 1, 0), "hfw": (1, 0, 2),
    "reversed": (0, 1, 2),
}  # fmt: skip


class RandomDit(nn.Module):
    """The model of a configuration."""

    def __init__(self, config: DitConfig):
        super().__init__()
        self.config = config
        pt, patch = config.time, 2
        self.conv3d = nn.Conv3d(CHANNELS, DIM, (pt, patch, patch), (pt, patch, patch))
        self.conv2d = nn.Conv2d(CHANNELS, DIM, patch, patch)
        self.linear = nn.Linear(CHANNELS * pt * patch * patch, DIM)
        self.packed = nn.Linear(CHANNELS, DIM)
        self.text = nn.Linear(TEXT_DIM, DIM)
        self.layers = nn.ModuleList(nn.ModuleDict({
            **{name: nn.Linear(DIM, DIM) for name in "qkv"}, "qkv": nn.Linear(DIM, 3 * DIM),
            "text_qkv": nn.Linear(DIM, 3 * DIM), "out": nn.Linear(DIM, DIM), "norm": nn.LayerNorm(DIM),
            "mha": nn.MultiheadAttention(DIM, config.heads, batch_first=True),
        }) for _ in range(config.layers))  # fmt: skip
        self.final = nn.Linear(DIM, CHANNELS * pt * patch * patch)
        tokens = sum(config.text) + (config.grid[0] + config.history) * config.grid[1] * config.grid[2]
        self.learnt = nn.Parameter(torch.randn(1, tokens, DIM))
        self.register_buffer("table", torch.randn(16, DIM // config.heads // 2))
        self.register_buffer("indices", torch.arange(tokens))

    def inputs(self) -> dict[str, object]:
        """Arguments of `forward`."""
        c = self.config
        f, h, w = c.grid

        def latent(frames):
            shape = {
                "bcfhw": (c.batch, CHANNELS, frames * c.time, 2 * h, 2 * w),
                "bfchw": (c.batch, frames * c.time, CHANNELS, 2 * h, 2 * w),
                "bfhwc": (c.batch, frames * c.time, 2 * h, 2 * w, CHANNELS),
                "frames-in-batch": (c.batch * frames * c.time, CHANNELS, 2 * h, 2 * w),
                "packed": (c.batch, frames * h * w, CHANNELS),
            }
            if c.layout == "bcfhw-list":
                return [torch.randn(CHANNELS, frames * c.time, 2 * h, 2 * w) for _ in range(c.batch)]
            return torch.randn(shape[c.layout])

        values: dict[str, object] = dict(x=latent(f), sizes=c.grid)
        if c.text[0]:
            values["before"] = torch.randn(c.batch, c.text[0], TEXT_DIM)
        if c.text[1]:
            values["after"] = torch.randn(c.batch, c.text[1], TEXT_DIM)
        if c.history:
            values["history"] = latent(c.history)
        if c.attend == "cross":
            values["other"] = latent(f)
        return values

    def forward(self, x, sizes, before=None, after=None, history=None, other=None):
        c = self.config
        video = self._tokens(x, sizes)
        pieces = [self.text(before)] if before is not None else []
        if history is not None:
            pieces.append(self._tokens(history, (c.history, *sizes[1:])))
        at = len(pieces)
        pieces.append(video)
        if after is not None:
            pieces.append(self.text(after))
        start = sum(piece.shape[1] for piece in pieces[:at])
        lengths = [piece.shape[1] for piece in pieces]
        x = self._joined(pieces) if c.join != "dual" else None
        keys = self._tokens(other, sizes) if other is not None else None
        for layer in self.layers:
            if x is None:
                pieces = self._dual_layer(layer, pieces, at, sizes)
                continue
            x = x + self._layer(layer, self._noise(layer["norm"](x)), keys, start, lengths[at], sizes)
        x = pieces[at] if x is None else x[:, start : start + lengths[at]]
        return self._image(self.final(x), sizes) if c.unpatchify else x

    def _tokens(self, x, sizes):
        """[B, S, DIM] of a latent."""
        c = self.config
        f, h, w = sizes
        if c.layout == "packed":
            return self._noise(self.packed(x))
        if c.layout == "bcfhw-list":
            x = torch.stack(x)
        elif c.layout == "bfchw":
            x = x.transpose(1, 2)
        elif c.layout == "bfhwc":
            x = x.permute(0, 4, 1, 2, 3)
        elif c.layout == "frames-in-batch":
            x = x.unflatten(0, (-1, f * c.time)).transpose(1, 2)
        x = self._patches(x, f, h, w)  # [B, f, h, w, DIM]
        if c.order == "tiles":
            x = x.reshape(-1, f, h // 2, 2, w // 2, 2, DIM).permute(0, 1, 2, 4, 3, 5, 6)
            return x.reshape(x.shape[0], -1, DIM)
        x = x.permute(0, *(1 + d for d in ORDERS[c.order]), 4)
        if c.order == "reversed":
            x = x.flip(1, 2, 3)
        if c.flatten == "two-stage":
            x = x.flatten(2, 3)
            return self._noise(x.flatten(1, 2))
        if c.flatten == "einops":
            from einops import rearrange

            return self._noise(rearrange(x, "b f h w c -> b (f h w) c"))
        return self._noise(x.flatten(1, 3) if c.flatten == "flatten" else x.reshape(x.shape[0], -1, DIM))

    def _patches(self, x, f, h, w):
        c = self.config
        if c.patch == "conv3d":
            return self.conv3d(x).permute(0, 2, 3, 4, 1)
        if c.patch == "conv2d" and c.time == 1:
            frames = x.transpose(1, 2).flatten(0, 1)
            return self.conv2d(frames).unflatten(0, (-1, f)).permute(0, 1, 3, 4, 2)
        if c.patch == "loop" and c.time == 1:
            frames = [self.conv3d(x[:, :, i : i + 1]).flatten(2).transpose(1, 2) for i in range(f)]
            return torch.cat(frames, 1).unflatten(1, (f, h, w))
        x = x.reshape(x.shape[0], CHANNELS, f, c.time, h, 2, w, 2).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return self.linear(x.flatten(4))

    def _joined(self, pieces):
        c = self.config
        if c.join == "cat" or len(pieces) == 1:
            return torch.cat(pieces, 1)
        total = sum(piece.shape[1] for piece in pieces)
        x, start = pieces[0].new_zeros(pieces[0].shape[0], total, DIM), 0
        for piece in pieces:
            stop = start + piece.shape[1]
            if c.join == "buffer":
                x[:, start:stop] = piece
            else:
                x = x.index_copy(1, torch.arange(start, stop), piece)
            start = stop
        return x

    def _noise(self, x):
        """Steps that change nothing."""
        n = x.shape[1]
        for step in self.config.steps:
            if step == "view":
                x = x.reshape(x.shape[0], n, 2, -1).flatten(2)
            elif step == "permute":
                x = x.permute(2, 0, 1).permute(1, 2, 0)
            elif step == "cut":
                x = torch.cat([x[:, : n // 3], x[:, n // 3 :]], 1)
            elif step == "pad":
                x = F.pad(x, (0, 0, 2, 1))[:, 2:-1]
            elif step == "select":
                x = x.index_select(1, self.indices[:n])
            elif step == "write":
                out = torch.empty_like(x)
                out[:, : n // 2], out[:, n // 2 :] = x[:, : n // 2], x[:, n // 2 :]
                x = out
            elif step == "halves":
                x = torch.stack([x, -x]).unbind(0)[0]
            elif step == "batch":
                x = torch.cat([x[i : i + 1] for i in range(x.shape[0])])
            elif step == "shift":
                x = x.roll(1, 1).roll(-1, 1)
            elif step == "flip":
                x = x.flip(1).flip(1)
            elif step == "modulate":
                x = x * (1 + x.mean((1, 2), keepdim=True))
        return x

    def _layer(self, layer, x, keys, start, n, sizes):
        c = self.config
        if c.attend == "mha":
            return layer["mha"](x, x, x, need_weights=False)[0]
        q, k, v = self._qkv(layer, x, "qkv")
        if keys is not None:
            k, v = self._qkv(layer, keys, "qkv")[1:]
        q, k = (self._rope(z, start if z.shape[2] > n else 0, n, sizes) for z in (q, k))
        return layer["out"](self._attention(q, k, v))

    def _dual_layer(self, layer, pieces, at, sizes):
        each = [self._qkv(layer, piece, "qkv" if i == at else "text_qkv") for i, piece in enumerate(pieces)]
        n = pieces[at].shape[1]
        each[at] = (*(self._rope(z, 0, n, sizes) for z in each[at][:2]), each[at][2])
        q, k, v = (torch.cat([one[i] for one in each], 2) for i in range(3))
        out = layer["out"](self._attention(q, k, v)).split([piece.shape[1] for piece in pieces], 1)
        return [piece + one for piece, one in zip(pieces, out, strict=True)]

    def _qkv(self, layer, x, name):
        """Three of [B, H, S, D]."""
        c = self.config
        if c.qkv == "separate" and name == "qkv":
            return [layer[i](x).unflatten(-1, (c.heads, -1)).transpose(1, 2) for i in "qkv"]
        mixed = layer[name](x)
        if c.qkv == "unbind":
            return list(mixed.reshape(*x.shape[:2], 3, c.heads, -1).permute(2, 0, 3, 1, 4).unbind(0))
        if c.qkv == "heads-first":
            q, k, v = mixed.view(*x.shape[:2], c.heads, -1).transpose(1, 2).chunk(3, -1)
            return [q, k, v]
        return [z.unflatten(-1, (c.heads, -1)).transpose(1, 2) for z in mixed.chunk(3, -1)]

    def _rope(self, x, start, n, sizes):
        """Rotate rows start .. start + n of [B, H, S, D]."""
        c = self.config
        if c.rope == "none":
            return x
        if c.rope == "ones":
            return x + self.learnt[:, None, : x.shape[2], : x.shape[3]]
        angles = self._angles(sizes, x.shape[3] // 2)
        if c.rope == "inplace":
            out = torch.empty_like(x)
            out[:, :, :start], out[:, :, start + n :] = x[:, :, :start], x[:, :, start + n :]
            even, odd = x[:, :, start : start + n, 0::2], x[:, :, start : start + n, 1::2]
            out[:, :, start : start + n, 0::2] = even * angles.cos() - odd * angles.sin()
            out[:, :, start : start + n, 1::2] = even * angles.sin() + odd * angles.cos()
            return out
        rows = x[:, :, start : start + n]
        if c.rope == "matrix":
            matrix = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
            rows = (matrix @ rows.unflatten(-1, (-1, 2)).unsqueeze(-1)).squeeze(-1).flatten(-2)
        else:
            pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())
            rows = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        return torch.cat([x[:, :, :start], rows, x[:, :, start + n :]], 2)

    def _angles(self, sizes, dim):
        """[S, dim] in the order of the tokens."""
        c = self.config
        f, h, w = (sizes[d] for d in ORDERS.get(c.order, (0, 1, 2)))
        if c.rope == "table":
            table = [self.table[:n] for n in (f, h, w)]
            total = table[0].view(f, 1, 1, -1) + table[1].view(1, h, 1, -1) * 2 + table[2].view(1, 1, w, -1) * 3
            angles = total.expand(f, h, w, -1)[..., :dim]
        else:
            grid = torch.stack(torch.meshgrid(torch.arange(f), torch.arange(h), torch.arange(w), indexing="ij"), -1)
            angles = grid.float() @ torch.linspace(0.1, 1, 3 * dim).view(3, dim)
        return angles.reshape(-1, dim)

    def _attention(self, q, k, v):
        c = self.config
        if c.attend == "cache":
            k, v = (torch.cat([z[:, :, :1].expand(-1, -1, 4, -1), z], 2) for z in (k, v))
        if c.attend == "softmax":
            out = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=c.attend == "causal")
        return out.transpose(1, 2).flatten(2)

    def _image(self, x, sizes):
        """[B, C, F, H, W] of [B, S, C p p]."""
        c = self.config
        if c.order == "tiles":
            return x
        if c.order == "reversed":
            x = x.flip(1)
        f, h, w = (sizes[d] for d in ORDERS[c.order])
        x = x.reshape(x.shape[0], f, h, w, CHANNELS, c.time, 2, 2)
        x = x.permute(0, *(1 + ORDERS[c.order].index(d) for d in range(3)), 4, 5, 6, 7)
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
