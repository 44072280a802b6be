"""Stand-ins for the parts of ComfyUI that a compiled model meets, which is on no package index.

They have the interface of its ModelPatcher, BaseModel, compile helper and Wan model as its source has them in autumn
2026 (comfy/model_patcher.py, comfy/model_base.py, comfy/patcher_extension.py, comfy_api/torch_helpers/,
comfy/ldm/wan/model.py, comfy/ldm/flux/math.py, comfy/ops.py), written anew and with nothing else in them.
"""

from __future__ import annotations

import copy
import math
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, WIDTH, TEXT = 2, 32, 6
PRIORITY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours turned: x [batch, tokens, heads, d], table [1, tokens, 1, d / 2, 2, 2]."""
    pairs = x.to(table.dtype).unflatten(-1, (-1, 1, 2))
    return (table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).reshape(x.shape).type_as(x)


def _register(name, fake, run):
    """An operator of its kernel library, into which nothing can look; the library's own where it is installed."""
    if not hasattr(torch.ops.comfy_kitchen, name):
        torch.library.custom_op(f"comfy_kitchen::{name}", run, mutates_args=()).register_fake(fake)


def _turn_one(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    return rotated(x, freqs_cis)


def _turn_both(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rotated(xq, freqs_cis), rotated(xk, freqs_cis)


for layout in ("", "_split_half"):
    _register(f"apply_rope{layout}1", lambda x, _: torch.empty_like(x), _turn_one)
    _register(f"apply_rope{layout}", lambda q, k, _: (torch.empty_like(q), torch.empty_like(k)), _turn_both)

ROPES = {
    "plain": lambda q, k, table: (rotated(q, table), rotated(k, table)),
    "kernel, one by one": lambda q, k, table: tuple(torch.ops.comfy_kitchen.apply_rope1(x, table) for x in (q, k)),
    "kernel, both": lambda q, k, table: torch.ops.comfy_kitchen.apply_rope(q, k, table),
}


def optimized_attention(q, k, v, heads, transformer_options=None):
    """Attention over [batch, tokens, heads x d]; a function among the options takes its place."""
    override = (transformer_options or {}).get("optimized_attention_override")
    if override is not None:
        return override(optimized_attention, q, k, v, heads)
    batch, _, width = q.shape
    q, k, v = (x.view(batch, -1, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(PRIORITY, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
    return out.transpose(1, 2).reshape(batch, -1, width)


class Attention(nn.Module):
    """Self-attention with RoPE, or attention to a text."""

    def __init__(self, rope):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k, self.rope = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH), rope

    def forward(self, x, context, freqs=None, transformer_options={}):  # noqa: B006
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        if freqs is not None:
            split = (t.view(*t.shape[:2], HEADS, WIDTH // HEADS) for t in (q, k))
            q, k = (t.reshape(*t.shape[:2], WIDTH) for t in self.rope(*split, freqs))
        return self.o(optimized_attention(q, k, v, HEADS, transformer_options=transformer_options))


class Block(nn.Module):
    def __init__(self, rope):
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.LayerNorm(WIDTH)
        self.self_attn, self.cross_attn = Attention(rope), Attention(rope)
        self.modulation = nn.Parameter(torch.randn(1, 3, WIDTH) / 6)

    def forward(self, x, e, freqs, context, transformer_options={}):  # noqa: B006
        shift, scale, gate = (self.modulation.to(x.dtype) + e).chunk(3, dim=1)
        normed = torch.addcmul(shift, self.norm1(x), 1 + scale)
        x = torch.addcmul(x, self.self_attn(normed, normed, freqs, transformer_options), gate)
        return x + self.cross_attn(self.norm3(x), context, None, transformer_options)


class WanLike(nn.Module):
    """Latents [batch, 4, frames, height, width] in patches of 1x2x2; the table is made of coordinates, by einsum."""

    dtype = torch.float32

    def __init__(self, rope="plain", layers=2):
        super().__init__()
        self.patch_embedding = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.time_projection, self.text_embedding = nn.Linear(8, 3 * WIDTH), nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(Block(ROPES[rope]) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 16)

    def table(self, frames, height, width, x):
        ids = torch.zeros(frames, height, width, 3, dtype=x.dtype, device=x.device)
        for axis, steps in enumerate((frames, height, width)):
            shape = [1, 1, 1]
            shape[axis] = -1
            ids[..., axis] = ids[..., axis] + torch.linspace(0, steps - 1, steps=steps, dtype=x.dtype).reshape(shape)
        ids = ids.reshape(1, -1, 3)
        parts = []
        for axis, dim in enumerate((8, 4, 4)):
            omega = 1.0 / 10000 ** torch.linspace(0, (dim - 2) / dim, steps=dim // 2, dtype=torch.float64)
            angles = torch.einsum("...n,d->...nd", ids[..., axis].float(), omega)
            turned = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1)
            parts.append(turned.unflatten(-1, (2, 2)).float())
        return torch.cat(parts, dim=-3).unsqueeze(1).movedim(1, 2)

    def forward(self, x, timestep, context=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        batch, _, frames, height, width = x.shape
        freqs = self.table(frames, height // 2, width // 2, x)
        x = self.patch_embedding(x.float()).to(x.dtype)
        grid = x.shape[2:]
        transformer_options["grid_sizes"] = grid
        x = x.flatten(2).transpose(1, 2)
        waves = timestep[:, None] * torch.arange(1, 5) / 1000
        e = self.time_projection(torch.cat([waves.cos(), waves.sin()], dim=1)).unflatten(1, (3, WIDTH))
        context = self.text_embedding(context)
        for i, block in enumerate(self.blocks):
            transformer_options["block_index"] = i
            x = block(x, e, freqs, context, transformer_options)
        x = self.head(x)[:, : math.prod(grid)].view(batch, *grid, 1, 2, 2, 4)
        x = torch.einsum("bfhwpqrc->bcfphqwr", x)
        return x.reshape(batch, 4, *(n * p for n, p in zip(grid, (1, 2, 2), strict=True)))


class Executor:
    """Calls wrappers from the outside in, the function itself last."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class BaseModel(nn.Module):
    """The model of a patcher: holds `diffusion_model`, and calls it inside the wrappers that the options name."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model

    def apply_model(self, x, t, c_crossattn=None, transformer_options={}):  # noqa: B006
        named = transformer_options.get("wrappers", {}).get("apply_model", {})
        run = Executor(self._apply_model, self, [w for wrappers in named.values() for w in wrappers])
        return run(x, t, c_crossattn, transformer_options)

    def _apply_model(self, x, t, context, transformer_options):
        options = transformer_options.copy()
        return self.diffusion_model(x, t, context=context, control=None, transformer_options=options)


class ModelPatcher:
    """What nodes hand each other: a model that all clones share, and what a clone changes about it."""

    def __init__(self, model):
        self.model, self.model_options, self.wrappers, self.object_patches = model, {"transformer_options": {}}, {}, {}

    def clone(self):
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(w) for key, w in keys.items()} for kind, keys in self.wrappers.items()}
        other.object_patches = dict(self.object_patches)
        return other

    def get_model_object(self, name):
        return self.object_patches.get(name) or self.model.get_submodule(name)

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def sample(self, latents, timesteps, context):
        """Denoise as a sampler does: options that differ at every step, wrappers and sigmas among them."""
        sigmas = torch.tensor([*timesteps, 0.0]) / 1000
        for step, timestep in enumerate(timesteps):
            options = {
                **self.model_options["transformer_options"],
                "wrappers": self.wrappers,
                "sigmas": sigmas[step : step + 1],
                "sample_sigmas": sigmas,
                "cond_or_uncond": [1, 0] if step % 2 else [0, 1],
                "uuids": [object(), object()],
                "step": step,
            }
            t = torch.full((len(latents),), timestep)
            latents = latents - 0.2 * self.model.apply_model(latents, t, context, options)
        return latents


def set_torch_compile_wrapper(
    model, backend, options=None, mode=None, fullgraph=False, dynamic=None, keys=("diffusion_model",)
):
    """The helper of comfy_api.torch_helpers: the compiled parts stand in the model's place while it is applied."""
    model.remove_wrappers_with_key("apply_model", "torch.compile")
    arguments = {"backend": backend, "options": options, "mode": mode, "fullgraph": fullgraph, "dynamic": dynamic}
    compiled = {key: torch.compile(model=model.get_model_object(key), **arguments) for key in keys}

    def wrapper(executor, *args, **kwargs):
        before = {key: getattr(executor.class_obj, key) for key in compiled}
        try:
            for key, part in compiled.items():
                setattr(executor.class_obj, key, part)
            return executor(*args, **kwargs)
        finally:
            for key, part in before.items():
                setattr(executor.class_obj, key, part)

    model.add_wrapper_with_key("apply_model", "torch.compile", wrapper)
    model.model_options["torch_compile_kwargs"] = arguments


def install(monkeypatch):
    """Make `comfy_api.torch_helpers` importable."""
    helpers = ModuleType("comfy_api.torch_helpers")
    helpers.set_torch_compile_wrapper = set_torch_compile_wrapper
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.torch_helpers", helpers)
