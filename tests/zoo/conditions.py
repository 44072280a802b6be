"""What models call their timestep, their prompt and their prompt's mask (None: there is no mask)."""

from __future__ import annotations

_PROMPT = "encoder_hidden_states"

CONDITIONS = {
    "wan_t2v": ("timestep", _PROMPT, None),
    "wan_i2v": ("timestep", _PROMPT, None),  # beside image tokens
    "wan22_ti2v": ("timestep", _PROMPT, None),  # a timestep for each token
    "hunyuan_video": ("timestep", _PROMPT, "encoder_attention_mask"),  # beside guidance
    "cogvideox_5b": ("timestep", _PROMPT, None),
    "cogvideox_15": ("timestep", _PROMPT, None),  # beside ofs
    "ltx": ("timestep", _PROMPT, "encoder_attention_mask"),
    "allegro": ("timestep", _PROMPT, "encoder_attention_mask"),
    "cosmos1": ("timestep", _PROMPT, "attention_mask"),
    "cosmos2": ("timestep", _PROMPT, None),  # [B, 1, frames, 1, 1]
    "kandinsky5": ("timestep", _PROMPT, None),
    "skyreels_v2_df": ("timestep", _PROMPT, None),  # a timestep for each frame, beside fps
    "anyflow": ("timestep", _PROMPT, None),  # beside r_timestep
}
