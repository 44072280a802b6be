"""Tiny models that models.py lacks in which video shares its sequence with text, history or audio."""

from __future__ import annotations

import torch

from zoo.models import _COG, _HY, L, _cog_rope, _exp, _hy_kw, _ltx2_cfg, _m, _r, ltx, ltx2


def hunyuan_framepack(f=5, h=8, w=8, batch=1):
    """Three histories before the video, image and text after it; with one prompt the text is cut to its length."""
    model = _m(
        "HunyuanVideoFramepackTransformer3DModel", **_HY, guidance_embeds=True, has_image_proj=True,
        image_proj_dim=10, has_clean_x_embedder=True,
    )  # fmt: skip

    def frames(start, stop):
        return torch.arange(start, stop)

    kwargs = _hy_kw(batch, f, h, w) | dict(
        guidance=torch.full((batch,), 6000.0),
        image_embeds=_r(batch, 5, 10),
        indices_latents=frames(8, 8 + f),
        latents_clean=_r(batch, 4, 2, 2 * h, 2 * w),
        indices_latents_clean=frames(6, 8),
        latents_history_2x=_r(batch, 4, 2, 2 * h, 2 * w),
        indices_latents_history_2x=frames(4, 6),
        latents_history_4x=_r(batch, 4, 4, 2 * h, 2 * w),
        indices_latents_history_4x=frames(0, 4),
    )
    before = (h // 4) * (w // 4) + (h // 2) * (w // 2) + 2 * h * w
    after = 5 + (6 if batch == 1 else 9)
    mask = "none" if batch == 1 else "key_padding"
    expected = _exp((f, h, w), 2 * L, before=before, after=after, n_attn=2 * L + 1, mask=mask)
    return model, kwargs, expected


def hunyuan_framepack_b2(f=5, h=8, w=8, batch=2):
    return hunyuan_framepack(f, h, w, 2)


def cogvideox_15(f=6, h=6, w=8, batch=1):
    """Time patches: two latent frames a token; patches by reshape and a linear layer."""
    model = _m(
        "CogVideoXTransformer3DModel", **_COG, sample_width=2 * w, sample_height=2 * h, sample_frames=8 * f - 7,
        patch_size=2, patch_size_t=2, use_rotary_positional_embeddings=True, ofs_embed_dim=16, patch_bias=False,
    )  # fmt: skip
    kwargs = dict(
        hidden_states=_r(batch, 2 * f, 4, 2 * h, 2 * w),
        encoder_hidden_states=_r(batch, 7, 16),
        timestep=torch.full((batch,), 500),
        ofs=torch.full((1,), 2.0),
        image_rotary_emb=_cog_rope(f, h, w),
        return_dict=False,
    )
    frames = {"hidden_states": 1, "image_rotary_emb": 0}
    return model, kwargs, _exp((f, h, w), L, before=7, n_attn=L, pt=2, frames=frames)


def consisid(f=5, h=6, w=8, batch=1):
    """CogVideoX with a face branch: unfused cross-attention (softmax of a product) from the video to face tokens."""
    config = dict(_COG.items())
    model = _m(
        "ConsisIDTransformer3DModel", **config, sample_width=2 * w, sample_height=2 * h, sample_frames=4 * f - 3,
        patch_size=2, use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_interval=1,
        cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=12, LFE_vit_dim=16, LFE_depth=5, LFE_dim_head=8,
        LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=4, LFE_output_dim=32, LFE_ff_mult=2, LFE_num_scale=5,
    )  # fmt: skip
    kwargs = dict(
        hidden_states=_r(batch, f, 4, 2 * h, 2 * w),
        encoder_hidden_states=_r(batch, 7, 16),
        timestep=torch.full((batch,), 500),
        image_rotary_emb=_cog_rope(f, h, w),
        id_cond=_r(batch, 12),
        id_vit_hidden=[_r(batch, 6, 16) for _ in range(5)],
        return_dict=False,
    )
    return model, kwargs, _exp((f, h, w), L, before=7, n_attn=None, frames={"hidden_states": 1, "image_rotary_emb": 0})


def ltx_coords(f=5, h=6, w=8, batch=1):
    """Packed latents; the grid is in the values of video_coords only."""
    model, kwargs, expected = ltx(f, h, w, batch)
    grid = torch.stack(torch.meshgrid(torch.arange(f), torch.arange(h), torch.arange(w), indexing="ij")).float()
    coords = (grid.flatten(1) * torch.tensor([8.0, 32.0, 32.0])[:, None]).expand(batch, 3, -1).contiguous()
    kwargs |= dict(num_frames=None, height=None, width=None, video_coords=coords, rope_interpolation_scale=None)
    return model, kwargs, expected


def ltx2_pipeline(f=5, h=6, w=8, batch=1):
    """As the pipelines call it: coordinates as values, split RoPE, sigma."""
    _, kwargs, expected = ltx2(f, h, w, batch)
    model = _m("LTX2VideoTransformer3DModel", **_ltx2_cfg(), rope_type="split")
    coords = model.rope.prepare_video_coords(batch, f, h, w, device="cpu", fps=25.0)
    audio = model.audio_rope.prepare_audio_coords(batch, 11, device="cpu")
    kwargs |= dict(video_coords=coords, audio_coords=audio, sigma=torch.full((batch,), 500.0))
    return model, kwargs, expected


_MOTIF = {k: v for k, v in _HY.items() if k not in ("pooled_projection_dim", "num_refiner_layers")}


def motif_video(f=5, h=6, w=8, batch=1):
    """Image and text after the video, and cross-attention of the attention's output to the text."""
    model = _m(
        "MotifVideoTransformer3DModel", **_MOTIF, image_embed_dim=10, enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )  # fmt: skip
    kwargs = dict(
        hidden_states=_r(batch, 4, f, 2 * h, 2 * w),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=_r(batch, 7, 16),
        encoder_attention_mask=(torch.arange(7) < 5).expand(batch, 7).long(),
        image_embeds=_r(batch, 4, 10),
        return_dict=False,
    )
    expected = _exp((f, h, w), 2 * L, after=11, n_attn=4 * L, mask="key_padding", frames={"hidden_states": 2})
    return model, kwargs, expected


def motif_video_decoder(f=5, h=6, w=8, batch=1):
    """The last block's sequence holds the video twice: as denoised so far, and as encoded."""
    _, kwargs, _ = motif_video(f, h, w, batch)
    model = _m(
        "MotifVideoTransformer3DModel", **_MOTIF, image_embed_dim=10, enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True, num_decoder_layers=1,
    )  # fmt: skip
    expected = _exp((f, h, w), 2 * L - 1, after=11, n_attn=4 * L - 1, mask="key_padding", frames={"hidden_states": 2})
    return model, kwargs, expected


def minimax_h3(f=5, h=6, w=8, batch=1):
    """One packed sequence of text, audio and video, filled by index_copy with indices that are inputs."""
    model = _m(
        "MiniMaxH3Transformer3DModel", num_attention_heads=2, attention_head_dim=32, hidden_size=48, num_layers=L,
        num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=5, text_dim=16, freq_dim=16,
        time_embed_hidden_dim=16, time_embed_dim=16, rope_freq_dim=4,
    )  # fmt: skip
    text, audio, video = 7, 11, f * h * w
    total = text + audio + video
    grid = torch.cartesian_prod(torch.arange(f), torch.arange(h), torch.arange(w)) + text + audio
    index = torch.arange(total)
    kwargs = dict(
        hidden_states=_r(batch, video, 16),
        audio_hidden_states=_r(batch, audio, 5),
        encoder_hidden_states=_r(batch, text, 16),
        timestep=torch.tensor([0.5]),
        timestep_indices=torch.zeros(total, dtype=torch.long),
        token_tags=torch.cat([torch.full((n,), tag) for n, tag in ((text, 1), (audio, 2), (video, 0))]),
        position_ids=torch.cat([index[: text + audio, None].expand(-1, 3), grid]),
        video_indices=index[text + audio :],
        audio_indices=index[text : text + audio],
        text_indices=index[:text],
        return_dict=False,
    )
    return model, kwargs, _exp((f, h, w), L, before=text + audio, n_attn=L + 1, order="packed")


_JOY = dict(
    patch_size=[1, 2, 2], in_channels=4, out_channels=4, hidden_size=48, num_attention_heads=2, text_dim=16,
    mlp_width_ratio=2.0, num_layers=L, rope_dim_list=[8, 8, 8],
)  # fmt: skip


def joyimage_edit(f=3, h=6, w=8, batch=1):
    """Image editing: the edited image and its references are put on the frame axis, the last one first."""
    model = _m("JoyImageEditTransformer3DModel", **_JOY)
    kwargs = dict(
        hidden_states=_r(batch, f, 4, 1, 2 * h, 2 * w),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=_r(batch, 7, 16),
        return_dict=False,
    )
    return model, kwargs, _exp((f, h, w), 0, after=7, n_attn=L, note="frames are images, in another order")


def joyimage_edit_video(f=5, h=6, w=8, batch=1):
    """One item of many frames, text behind it."""
    model, kwargs, _ = joyimage_edit(f, h, w, batch)
    kwargs |= dict(hidden_states=_r(batch, 4, f, 2 * h, 2 * w))
    return model, kwargs, _exp((f, h, w), L, after=7, n_attn=L, frames={"hidden_states": 2})


def joyimage_edit_plus(f=2, h=6, w=7, batch=1):
    """Images of any size, cut to patches outside the model."""
    model = _m("JoyImageEditPlusTransformer3DModel", **_JOY)
    shapes = [[(1, h, w), (1, h, w)]] * batch
    kwargs = dict(
        hidden_states=_r(batch, 2 * h * w, 4, 1, 2, 2),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=_r(batch, 7, 16),
        encoder_hidden_states_mask=torch.ones(batch, 7),
        shape_list=shapes,
        return_dict=False,
    )
    return model, kwargs, _exp((f, h, w), 0, after=7, n_attn=L, mask="key_padding")


JOINT = {
    f.__name__: f
    for f in (
        hunyuan_framepack, hunyuan_framepack_b2, cogvideox_15, consisid, ltx_coords, ltx2_pipeline, motif_video,
        motif_video_decoder, minimax_h3, joyimage_edit, joyimage_edit_video,
        joyimage_edit_plus,
    )
}  # fmt: skip
