"""Tiny image models and frame-wise models: nothing in them is video self-attention."""

from __future__ import annotations

import torch

from zoo.models import L, _exp, _m, _r, neg_flux


def _ids(h, w, channels=3):
    ids = torch.zeros(h, w, channels)
    ids[..., 1] = torch.arange(h)[:, None]
    ids[..., 2] = torch.arange(w)[None]
    return ids.reshape(-1, channels)


def neg_chroma(f=1, h=12, w=10, batch=1):
    model = _m(
        "ChromaTransformer2DModel", in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=24,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 8, 8), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    kwargs = dict(
        hidden_states=_r(batch, h * w, 4),
        encoder_hidden_states=_r(batch, 7, 16),
        timestep=torch.full((batch,), 0.5),
        img_ids=_ids(h, w),
        txt_ids=torch.zeros(7, 3),
        return_dict=False,
    )
    return model, kwargs, _exp((1, h, w), 0, before=7, n_attn=2)


def neg_bria(f=1, h=12, w=10, batch=1):
    _, kwargs, expected = neg_flux(f, h, w, batch)
    model = _m(
        "BriaTransformer2DModel", in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=24,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=[8, 8, 8],
    )  # fmt: skip
    del kwargs["pooled_projections"]
    return model, kwargs, expected


def neg_flux3(f=1, h=12, w=10, batch=1):
    model = _m(
        "Flux3Transformer2DModel", in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=24, num_attention_heads=2, joint_attention_dim=16, timestep_channels=16,
        axes_dims_rope=(6, 6, 6, 6),
    )  # fmt: skip
    kwargs = dict(
        hidden_states=_r(batch, h * w, 4),
        encoder_hidden_states=_r(batch, 7, 16),
        timestep=torch.full((batch,), 0.5),
        img_ids=_ids(h, w, 4),
        txt_ids=torch.zeros(7, 4),
        return_dict=False,
    )
    return model, kwargs, _exp((1, h, w), 0, before=7, n_attn=3)


def neg_sd3(f=1, h=12, w=10, batch=1):
    model = _m(
        "SD3Transformer2DModel", sample_size=32, patch_size=2, in_channels=4, num_layers=L, attention_head_dim=24,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=48, pooled_projection_dim=8,
        out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    kwargs = dict(
        hidden_states=_r(batch, 4, 2 * h, 2 * w),
        encoder_hidden_states=_r(batch, 7, 16),
        pooled_projections=_r(batch, 8),
        timestep=torch.full((batch,), 500.0),
        return_dict=False,
    )
    return model, kwargs, _exp((1, h, w), 0, after=7, n_attn=2)


def neg_hunyuan_image(f=1, h=12, w=10, batch=1):
    """The refiner of HunyuanImage: a 5-D latent with one frame."""
    model = _m(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, patch_size=(1, 1, 1),
        text_embed_dim=16, rope_axes_dim=(8, 8, 8),
    )  # fmt: skip
    kwargs = dict(
        hidden_states=_r(batch, 4, 1, h, w),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=_r(batch, 9, 16),
        encoder_attention_mask=(torch.arange(9) < 6).expand(batch, 9).long(),
        return_dict=False,
    )
    return model, kwargs, _exp((1, h, w), 0, after=9, n_attn=3, mask="key_padding")


def neg_spatiotemporal(f=5, h=6, w=8, batch=1):
    """Stable Video Diffusion: attention inside frames, then along time."""
    from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

    torch.manual_seed(0)
    model = TransformerSpatioTemporalModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=32, cross_attention_dim=16
    ).eval()
    kwargs = dict(
        hidden_states=_r(batch * f, 32, h, w),
        encoder_hidden_states=_r(batch * f, 1, 16),
        image_only_indicator=torch.zeros(batch, f),
        return_dict=False,
    )
    return model, kwargs, _exp((f, h, w), 0, n_attn=4)


IMAGES = {
    f.__name__: f
    for f in (neg_chroma, neg_bria, neg_flux3, neg_sd3, neg_hunyuan_image, neg_spatiotemporal)
}  # fmt: skip
