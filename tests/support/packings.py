"""Packed sequences of text, audio, pictures and videos, and the positions (time, row, column) of their tokens.

As the pipeline of MiniMax-H3 numbers them, in plain loops: a clock runs through the sequence. Text and audio take one
unit a token, a picture one unit; the frames of a video 5/3, 20/3, 20/3, 20/3, 20/3 and so on. Rows and columns are
spread over 32 units whatever the size. The audio of two channels lies at the left and the right end.
"""

from __future__ import annotations

import torch

TAGS = {"video": 0, "picture": 0, "text": 1, "audio": 2}


def spread(n, share):
    left = (1 - share) / 2
    return [32 * (left + i * share / n) for i in range(n)]


def places(h, w):
    area = (h * w) ** 0.5
    return [(y, x) for y in spread(h, h / area) for x in spread(w, w / area)]


def frame_times(frames, origin):
    times = [origin]
    for i in range(frames - 1):
        times.append(times[-1] + 5 / 3 * (1 if i % 5 == 0 else 4))
    return times


def positions_of(piece, clock):
    """[(time, row, column)] of a piece, and the clock behind it; a fourth number of a picture is its time."""
    kind, *sizes = piece
    if kind == "text":
        return [(clock + i, 0.0, 0.0) for i in range(sizes[0])], clock + sizes[0]
    if kind == "audio":
        return [(clock + i, 0.0, x) for x in (4.0, 27.0) for i in range(sizes[0])], clock
    if kind == "picture":
        h, w, *at = sizes
        return [(at[0] if at else clock, y, x) for y, x in places(h, w)], clock + (not at)
    frames, h, w = sizes
    times = frame_times(frames, clock)
    return [(t, y, x) for t in times for y, x in places(h, w)], times[-1] + 20 / 3


def packed(pieces):
    """Positions fp64 [tokens, 3], tags [tokens], and the first token of each piece."""
    positions, tags, starts, clock = [], [], [], 0.0
    for piece in pieces:
        found, clock = positions_of(piece, clock)
        starts.append(len(positions))
        positions += found
        tags += [TAGS[piece[0]]] * len(found)
    return torch.tensor(positions, dtype=torch.float64), torch.tensor(tags), starts


def inputs(pieces, seed=0, batch=1, shuffle=False):
    """Arguments of `zoo.more_joint.minimax_h3`; `shuffle`: rows are handed over in any order."""
    generator = torch.Generator().manual_seed(seed)
    positions, tags, _ = packed(pieces)
    rows = {tag: (tags == tag).nonzero().flatten() for tag in (0, 1, 2)}
    if shuffle:
        rows = {tag: index[torch.randperm(len(index), generator=generator)] for tag, index in rows.items()}

    def values(tag, channels):
        return torch.randn(batch, len(rows[tag]), channels, generator=generator)

    return dict(
        hidden_states=values(0, 16),
        audio_hidden_states=values(2, 5),
        encoder_hidden_states=values(1, 16),
        timestep=torch.tensor([0.5]),
        timestep_indices=torch.zeros_like(tags),
        token_tags=tags,
        position_ids=positions,
        video_indices=rows[0],
        audio_indices=rows[2],
        text_indices=rows[1],
        return_dict=False,
    )


def tables(positions, frequencies=8):
    """Positions as they are, and their cosines and sines as a RoPE has them, [tokens, 2 x 3 x frequencies]."""
    angles = (positions.float()[:, :, None] * 10000.0 ** -(torch.arange(frequencies) / frequencies)).flatten(1)
    both = torch.cat([angles, angles], 1)
    return {"numbers": positions, "cosines": both.cos(), "sines": both.sin()}
