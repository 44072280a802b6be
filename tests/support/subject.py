"""A subject that makes clips in a moment; importable in spawned processes."""

from __future__ import annotations

import torch

from dynamicrad_compile import quality
from support.clips import moving

GRID = (6, 4, 4)


def tiny(seed=0, name="tiny"):
    """A subject: a random Wan of two layers on 6 x 16 x 16 pixels, two steps."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3,
        text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip

    def generate(used, prompts, seeds):
        drawn = [torch.randn(3, 6, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x, text = torch.stack(drawn), torch.ones(len(prompts), 5, 8)
        for t in (900.0, 450.0):
            when = torch.full((len(x),), t)
            x = x - 0.5 * used(x, timestep=when, encoder_hidden_states=text, return_dict=False)[0]
        return (0.5 + 0.2 * x).clamp(0, 1).transpose(1, 2)

    def real(count):
        return torch.cat([moving(6, 0.1 * n, size=16) for n in range(count)])

    return quality.Subject(name, model, generate, GRID, ["a", "b"], real)
