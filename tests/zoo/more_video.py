"""Tiny models that models.py lacks: Cosmos, Sana-WM, Kandinsky; one in two of them is no plain self-attention."""

from __future__ import annotations

import torch

from zoo.models import _K5, _K6, L, _exp, _ltx2_cfg, _m, _r, cosmos2


def cosmos25_transfer(f=5, h=6, w=8, batch=1):
    """Two cross-attentions: to the text and to an image's tokens; residuals of a control net."""
    _, kwargs, _ = cosmos2(f, h, w, batch)
    model = _m(
        "CosmosTransformer3DModel", in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=24,
        num_layers=L, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(16, 32, 32), patch_size=(1, 2, 2),
        rope_scale=(1.0, 4.0, 4.0), concat_padding_mask=False, extra_pos_embed_type=None, img_context_dim_in=12,
        img_context_num_tokens=5, img_context_dim_out=48, controlnet_block_every_n=1,
        use_crossattn_projection=True, crossattn_proj_in_channels=20, encoder_hidden_states_channels=16,
    )  # fmt: skip
    kwargs |= dict(
        encoder_hidden_states=(_r(batch, 7, 20), _r(batch, 5, 12)),
        block_controlnet_hidden_states=[_r(batch, f * h * w, 48) for _ in range(L)],
    )
    return model, kwargs, _exp((f, h, w), L, n_attn=3 * L)


def cosmos3(f=5, h=6, w=8, batch=1):
    """A packed sequence: the video asks, text and video answer; grouped-query attention."""
    model = _m(
        "Cosmos3OmniTransformer", head_dim=24, hidden_size=48, intermediate_size=32, latent_channel=4,
        num_attention_heads=4, num_hidden_layers=L, num_key_value_heads=2, patch_latent_dim=16, vocab_size=50,
        rope_axes_dim=[4, 4, 4],
    )  # fmt: skip
    text, video = 9, f * h * w
    index = torch.arange(text + video)
    grid = torch.cartesian_prod(torch.arange(f), torch.arange(h), torch.arange(w)) + text
    kwargs = dict(
        input_ids=torch.arange(text),
        text_indexes=index[:text],
        position_ids=torch.cat([index[:text, None].expand(-1, 3), grid]).T.contiguous(),
        und_len=text,
        sequence_length=text + video,
        vision_tokens=[_r(1, 4, f, 2 * h, 2 * w)],
        vision_token_shapes=[(f, h, w)],
        vision_sequence_indexes=index[text:],
        vision_mse_loss_indexes=index[text:],
        vision_timesteps=torch.full((video,), 500.0),
        vision_noisy_frame_indexes=[torch.arange(f)],
        return_dict=False,
    )
    return model, kwargs, _exp((f, h, w), L, n_attn=2 * L, kv_before=text)


def _sana_wm(**config):
    return _m(
        "SanaWMTransformer3DModel", in_channels=4, num_layers=L, hidden_size=48, num_attention_heads=2,
        linear_head_dim=24, softmax_every_n=2, caption_channels=16, chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=1, mlp_ratio=2.0, **config,
    )  # fmt: skip


def sana_wm(f=5, h=6, w=8, batch=1):
    """Every second block is softmax attention, cast to bfloat16; the others are a gated recurrence."""
    kwargs = dict(
        hidden_states=_r(batch, 4, f, h, w),
        timestep=torch.full((batch, 1, f), 500),
        encoder_hidden_states=_r(batch, 1, 7, 16),
        encoder_attention_mask=torch.ones(batch, 7, dtype=torch.long),
        return_dict=False,
    )
    return _sana_wm(), kwargs, _exp((f, h, w), 1, n_attn=L + 1)


def sana_wm_cam(f=5, h=6, w=8, batch=1):
    """With a camera branch: a second attention of the same tokens after a 4 x 4 matrix for each token."""
    _, kwargs, _ = sana_wm(f, h, w, batch)
    pose = torch.eye(4).flatten().expand(batch, f, 16)
    intrinsics = torch.tensor([float(w), float(h), w / 2, h / 2]).expand(batch, f, 4)
    kwargs |= dict(camera_conditions=torch.cat([pose, intrinsics], -1))
    return _sana_wm(), kwargs, _exp((f, h, w), 2, n_attn=L + 2)


def sana_wm_refiner(f=5, h=6, w=8, batch=1):
    """Packed latents against cached keys of earlier frames; positions are values only."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    model = _m("SanaWMLTX2RefinerTransformer3DModel", **_ltx2_cfg())
    sink, history = h * w, 2 * h * w
    cache = SanaWMRefinerKVCache(L)
    for layer in cache.layer_caches:
        layer.store_sink(_r(batch, sink, 48), _r(batch, sink, 48))
        layer.store_history(_r(batch, history, 48), _r(batch, history, 48))

    def rope(*frames):
        return model.build_rotary_emb_for_absolute_positions(batch, list(frames), h, w, torch.device("cpu"), 24.0)

    cache.sink_pe = rope(0)
    kwargs = dict(
        hidden_states=_r(batch, f * h * w, 4),
        encoder_hidden_states=_r(batch, 7, 16),
        timestep=torch.full((batch, f * h * w), 500.0),
        video_rotary_emb=rope(*range(3, 3 + f)),
        encoder_attention_mask=torch.ones(batch, 7),
        kv_cache=cache,
        kv_cache_mode="inject",
        return_dict=False,
    )
    return model, kwargs, _exp((f, h, w), L, n_attn=2 * L, kv_before=sink + history)


def kandinsky5_nabla(f=3, h=16, w=16, batch=1):
    """Frames in tiles of 8 x 8, blocks chosen by the model itself, flex attention."""
    model = _m("Kandinsky5Transformer3DModel", **_K5, attention_type="nabla")
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = "flex"
    blocks = f * (h // 8) * (w // 8)
    kwargs = dict(
        hidden_states=_r(batch, f, 2 * h, 2 * w, 4),
        encoder_hidden_states=_r(batch, 7, 16),
        timestep=torch.full((batch,), 500.0),
        pooled_projections=_r(batch, 8),
        visual_rope_pos=[torch.arange(f), torch.arange(h), torch.arange(w)],
        text_rope_pos=torch.arange(7),
        sparse_params=dict(
            sta_mask=torch.ones(1, 1, blocks, blocks, dtype=torch.bool), attention_type="nabla", to_fractal=True, P=0.8,
            wT=3, wW=3, wH=3, add_sta=True, visual_shape=(f, h, w), method="topcdf",
        ),
        return_dict=False,
    )  # fmt: skip
    return model, kwargs, _exp((f, h, w), L, mask="block", order="fractal8")


def kandinsky6(f=5, h=6, w=8, batch=1):
    """Video and audio streams that attend to each other."""
    model = _m("Kandinsky6Transformer3DModel", **{**_K6, "ca_rope": False})
    kwargs = dict(
        hidden_states=_r(batch, f, 2 * h, 2 * w, 9),
        encoder_hidden_states=_r(batch, 7, 16),
        pooled_projections=_r(batch, 8),
        timestep=torch.full((batch,), 500.0),
        audio_hidden_states=_r(batch, 11, 5),
        encoder_attention_mask=(torch.arange(7) < 5).expand(batch, 7),
        return_dict=False,
    )
    return model, kwargs, _exp((f, h, w), L, n_attn=2 + 6 * L, frames={"hidden_states": 1})


def kandinsky6_sr(f=3, h=16, w=16, batch=1):
    model = _m(
        "Kandinsky6SRTransformer3DModel", in_visual_dim=4, out_visual_dim=5, time_dim=16, model_dim=48, ff_dim=32,
        num_visual_blocks=L, axes_dims=(8, 8, 8), nabla_window=(3, 3, 3),
    )  # fmt: skip
    kwargs = dict(
        hidden_states=_r(batch, f, h, w, 9), timestep=torch.full((batch,), 500.0), return_dict=False
    )  # fmt: skip
    return model, kwargs, _exp((f, h, w), L, mask="block", order="fractal8")


VIDEO = {
    f.__name__: f
    for f in (
        cosmos25_transfer, cosmos3, sana_wm, sana_wm_cam, sana_wm_refiner, kandinsky5_nabla, kandinsky6, kandinsky6_sr,
    )
}  # fmt: skip
