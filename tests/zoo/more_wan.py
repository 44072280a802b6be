"""Tiny models of the Wan family that models.py lacks: variants, histories, caches and fused projections."""

from __future__ import annotations

import torch

from zoo.models import _WAN, L, _exp, _m, _r


def _wan_kwargs(batch, f, h, w, channels=4, text=7):
    return dict(
        hidden_states=_r(batch, channels, f, 2 * h, 2 * w),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=_r(batch, text, 16),
        return_dict=False,
    )


def wan_flf2v(f=5, h=6, w=8, batch=1):
    """First and last frame: two images' tokens, with a learnt position each, feed the image cross-attention."""
    config = {**_WAN, "in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 48, "pos_embed_seq_len": 18}
    kwargs = _wan_kwargs(batch, f, h, w, 12, 512) | dict(encoder_hidden_states_image=_r(2 * batch, 9, 16))
    return _m("WanTransformer3DModel", **config), kwargs, _exp((f, h, w), L, n_attn=3 * L, frames={"hidden_states": 2})


def lucy_edit(f=5, h=6, w=8, batch=1):
    """Editing: the source video's latents are more channels; one timestep a token."""
    model = _m("WanTransformer3DModel", **{**_WAN, "in_channels": 8})
    kwargs = _wan_kwargs(batch, f, h, w, 8) | dict(timestep=torch.full((batch, f * h * w), 500.0))
    return model, kwargs, _exp((f, h, w), L, n_attn=2 * L, frames={"hidden_states": 2, "timestep": 1})


def wan_fused_qkv(f=5, h=6, w=8, batch=1):
    model = _m("WanTransformer3DModel", **_WAN)
    model.fuse_qkv_projections()
    return model, _wan_kwargs(batch, f, h, w), _exp((f, h, w), L, n_attn=2 * L, frames={"hidden_states": 2})


def chronoedit(f=5, h=6, w=8, batch=1):
    config = {**_WAN, "in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 48, "rope_temporal_skip_len": 8}
    kwargs = _wan_kwargs(batch, f, h, w, 12, 512) | dict(encoder_hidden_states_image=_r(batch, 9, 16))
    model = _m("ChronoEditTransformer3DModel", **config)
    return model, kwargs, _exp((f, h, w), L, n_attn=3 * L, frames={"hidden_states": 2})


def chronoedit_two_frames(f=2, h=6, w=8, batch=1):
    """Image editing as a video of two frames: there is no motion for a plan to follow."""
    model, kwargs, _ = chronoedit(f, h, w, batch)
    return model, kwargs, _exp((f, h, w), 0, n_attn=3 * L)


def skyreels_v2_df(f=6, h=6, w=8, batch=1):
    """Diffusion forcing: a timestep a frame, and a block-causal mask bool [1, 1, S, S]."""
    model = _m("SkyReelsV2Transformer3DModel", **{**_WAN, "num_frame_per_block": 2}, inject_sample_info=True)
    kwargs = _wan_kwargs(batch, f, h, w) | dict(
        timestep=torch.full((batch, f), 500), enable_diffusion_forcing=True, fps=torch.zeros(batch, dtype=torch.long)
    )
    return model, kwargs, _exp((f, h, w), L, n_attn=2 * L, mask="dense", frames={"hidden_states": 2, "timestep": 1})


_FLOW = {k: v for k, v in _WAN.items() if k != "num_layers"} | {"num_layers": L}


def _flow_kwargs(batch, f, h, w):
    return dict(
        hidden_states=_r(batch, f, 4, 2 * h, 2 * w),
        timestep=torch.full((batch, f), 500.0),
        r_timestep=torch.full((batch, f), 400.0),
        encoder_hidden_states=_r(batch, 7, 16),
        return_dict=False,
    )


def anyflow(f=5, h=6, w=8, batch=1):
    """Latents are [B, F, C, H, W]; RoPE with complex numbers."""
    model = _m("AnyFlowTransformer3DModel", **_FLOW)
    frames = {"hidden_states": 1, "timestep": 1, "r_timestep": 1}
    return model, _flow_kwargs(batch, f, h, w), _exp((f, h, w), L, n_attn=2 * L, frames=frames)


def _far(**config):
    from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCausalAttnProcessor

    model = _m("AnyFlowFARTransformer3DModel", **_FLOW, compressed_patch_size=(1, 4, 4), **config)
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, AnyFlowCausalAttnProcessor):
            processor._attention_backend = "flex"
    return model


def anyflow_far_train(f=5, h=8, w=8, batch=1):
    """Chunks: the first are compressed; flex attention with a block mask over tokens padded to 128."""
    model = _far(full_chunk_limit=2)
    chunks = [1, 2, 2]
    mask = model.build_attention_mask(chunk_partition=chunks, height=2 * h, width=2 * w)
    kwargs = _flow_kwargs(batch, f, h, w) | dict(chunk_partition=chunks, attention_mask=mask)
    return model, kwargs, _exp((4, h, w), L, n_attn=2 * L, mask="block", before=16, after=112)


def anyflow_far_infer(f=2, h=8, w=8, batch=1):
    """One chunk of frames against a cache of three earlier ones, all rotated as one video; flex without a mask."""
    model = _far(full_chunk_limit=3)
    cache = [
        {"compressed_cache": _r(2, batch, 2, 64, 24), "full_cache": _r(2, batch, 2, 3 * h * w, 24)} for _ in range(L)
    ]
    flag = {"is_cache_step": False, "num_cached_chunks": 2}
    kwargs = _flow_kwargs(batch, f, h, w) | dict(chunk_partition=[1, 2, f], kv_cache=cache, kv_cache_flag=flag)
    return model, kwargs, _exp((3 + f, h, w), L, n_attn=2 * L, after=-f * h * w % 128, in_cache=3 * h * w)


_HELIOS = {k: v for k, v in _FLOW.items() if k != "rope_max_seq_len"} | {"rope_dim": (8, 8, 8)}


def helios_nohist(f=5, h=8, w=8, batch=1):
    model = _m("HeliosTransformer3DModel", **_HELIOS)
    return model, _wan_kwargs(batch, f, h, w), _exp((f, h, w), L, n_attn=2 * L, frames={"hidden_states": 2})


def helios(f=5, h=8, w=8, batch=1):
    """Three histories of coarser patches before the video that is denoised; cross-attention for the latter only."""
    model, kwargs, _ = helios_nohist(f, h, w, batch)

    def frames(start, stop):
        return torch.arange(start, stop).float().expand(batch, -1)

    kwargs |= dict(
        indices_hidden_states=frames(7, 7 + f),
        indices_latents_history_long=frames(0, 4),
        indices_latents_history_mid=frames(4, 6),
        indices_latents_history_short=frames(6, 8),
        latents_history_long=_r(batch, 4, 4, 2 * h, 2 * w),
        latents_history_mid=_r(batch, 4, 2, 2 * h, 2 * w),
        latents_history_short=_r(batch, 4, 2, 2 * h, 2 * w),
    )
    before = (h // 4) * (w // 4) + (h // 2) * (w // 2) + 2 * h * w
    return model, kwargs, _exp((f, h, w), L, n_attn=2 * L, before=before, frames={"hidden_states": 2})


def _animate2():
    return _m(
        "WanAnimate2Transformer3DModel", in_dim=8, dim=48, ffn_dim=32, freq_dim=16, text_dim=16, out_dim=4,
        num_heads=2, num_layers=L, text_len=7, use_img_emb=False,
    )  # fmt: skip


def wan_animate2_extract(f=5, h=6, w=8, batch=1):
    """The reference pass: lists of latents, complex RoPE in a loop over grid_sizes.tolist(); many graphs."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    grid = torch.tensor([[f, h, w]])
    kwargs = dict(
        hidden_states=[_r(4, f, 2 * h, 2 * w)],
        condition_latents=[_r(4, f, 2 * h, 2 * w)],
        timestep=torch.full((1,), 500.0),
        encoder_hidden_states=[_r(7, 16)],
        kv_cache=WanAnimate2KVCache(L),
        kv_cache_mode="extract",
        seq_len=f * h * w,
        offset_grid_sizes=grid,
        return_dict=False,
    )
    return _animate2(), kwargs, _exp((f, h, w), L, n_attn=2 * L, note="the grid is lost at a graph break")


def wan_animate2_cached(f=6, h=6, w=8, batch=1):
    """The denoising pass: video scattered into a buffer padded to 128, keys of a reference video behind it."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
    from torch.nn.attention.flex_attention import create_block_mask

    model, kwargs, _ = wan_animate2_extract(f, h, w, batch)
    cache = WanAnimate2KVCache(L)
    for layer in cache.layer_caches:
        layer.store(_r(1, (f - 1) * h * w, 2, 24), _r(1, (f - 1) * h * w, 2, 24))
    q_len, kv_len = -(-f * h * w // 128) * 128, -(-(f - 1) * h * w // 128) * 128
    model.block_masks[(f - 1, h * w)] = create_block_mask(  # made here without a compiler; forward would compile it
        lambda b, n, q, k: (q < f * h * w) & (k < f * h * w), None, None, q_len, q_len + kv_len, device="cpu"
    )
    kwargs |= dict(
        kv_cache=cache, kv_cache_mode="cached", reference_grid_sizes=torch.tensor([[f - 1, h, w]]),
        origin_len=4 * (f - 2), origin_area=[16 * h, 16 * w],
    )  # fmt: skip
    return model, kwargs, _exp((f, h, w), L, n_attn=2 * L, after=q_len - f * h * w, mask="block", kv_before=kv_len)


WAN = {
    f.__name__: f
    for f in (
        wan_flf2v, lucy_edit, wan_fused_qkv, chronoedit, chronoedit_two_frames, skyreels_v2_df, anyflow,
        anyflow_far_train, anyflow_far_infer, helios_nohist, helios, wan_animate2_extract,
        wan_animate2_cached,
    )
}  # fmt: skip
