"""AdaSpa written out in plain PyTorch around dense attention: what the compiled search is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

STEPS = (1, 3)
BLOCK = 16


def by_block(x, dim):
    pieces = x.split(BLOCK, dim)
    return torch.stack([piece.sum(dim) for piece in pieces], dim)


class Searching(TorchFunctionMode):
    """AdaSpa around every attention over `tokens` tokens; `text` of them are before and behind the video."""

    def __init__(self, tokens, text=(0, 0), sparsity=0.6):
        self.tokens, self.text, self.sparsity, self.step, self.fresh, self.layers = tokens, text, sparsity, 0, True, {}
        self.layer, self.recall, self.kept = 0, {}, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention):
            q = kwargs.get("query", args[0] if args else None)
            k = kwargs.get("key", args[1] if len(args) > 1 else None)
            if q.shape[-2] == k.shape[-2] == self.tokens:
                return self.attend(func, q, k, args, kwargs)
        return func(*args, **kwargs)

    def attend(self, func, q, k, args, kwargs):
        number, self.layer = self.layer, self.layer + 1
        scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
        seen = kwargs.get("attn_mask")
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        lse, mask = self.layers.get(number, (None, None))
        if self.step <= STEPS[0]:
            self.kept.append(1.0)
            out = func(*args, **kwargs)
        else:
            allowed = mask.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
            allowed = allowed[..., : self.tokens, : self.tokens]
            kwargs["attn_mask"] = allowed if seen is None else allowed & seen
            self.kept.append(mask.double().mean().item())
            out = func(*args, **kwargs)
        if self.fresh and self.step == STEPS[0]:
            lse = scores.logsumexp(-1)
        if self.fresh and self.step in STEPS:
            mass = by_block(by_block((scores - lse[..., None]).exp(), -1), -2)
            mask = self.choose(mass)
            self.recall.setdefault(number, []).append((mass * mask).sum((-1, -2)) / mass.sum((-1, -2)))
        self.layers[number] = lse, mask
        return out

    def choose(self, mass):
        always = torch.eye(mass.shape[-1], dtype=torch.bool).expand(mass.shape).clone()
        before, behind = -(-self.text[0] // BLOCK), (self.tokens - self.text[1]) // BLOCK
        for blocks in (slice(0, before), slice(behind, None if self.text[1] else behind)):
            always[..., blocks, :] = True
            always[..., :, blocks] = True
        always |= F.one_hot(mass.argmax(-1), mass.shape[-1]).bool()
        number = max(round((1 - self.sparsity) * mass[0, 0].numel()), 0)
        mask = always.clone()
        for b in range(mass.shape[0]):
            for h in range(mass.shape[1]):
                free = max(0, number - int(always[b, h].sum()))
                best = mass[b, h].masked_fill(always[b, h], -1.0).flatten().argsort(descending=True, stable=True)
                mask[b, h].view(-1)[best[:free]] = True
        return mask
