"""Stand-ins for the attention of a video model: q, k and v by motion regime, without any model.

Both are made with a CPU generator in float32, so a seed gives the same draw on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import DynamicRadError, nearest

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Grid = tuple[int, int, int]

# Share of a token that is new in each frame of the published proxy.
PUBLISHED_NOISE = {"low": 0.02, "mid": 0.15, "high": 0.40}


@dataclass(frozen=True)
class Motion:
    """Motion of the video proxy.

    speed  tokens that the camera and objects move from one latent frame to the next, over sqrt(height * width)
    fresh  share of the texture's variance that is new in each latent frame
    """

    speed: float
    fresh: float


MOTIONS = {"low": Motion(0.002, 0.01), "mid": Motion(0.02, 0.05), "high": Motion(0.08, 0.20)}
# Kinds of heads, and the share of attention that the heaviest tenth of a row's keys holds.
MASS = {"local": 0.9, "temporal": 0.9, "global": 0.7, "sink": 0.5}
HEAD_KINDS = tuple(MASS)
# Share of a row's attention that sinks take in a sink head.
SINK_MASS = 0.4
# About so many keys, evenly spread, are looked at to scale the logits.
SHARPNESS_KEYS = 4096


def published_proxy(
    grid: Grid, motion: str, heads: int, head_dim: int, seed: int, text_before: int = 0, text_after: int = 0
) -> Tensors:
    """The proxy task of DynamicRad's published search: q = k = v, each float32 [heads, tokens, head_dim].

    Tokens of the first frame are independent normal vectors; from frame to frame x becomes (1 - d) x + d n
    with n normal and d = 0.02, 0.15 or 0.40. Every token is scaled to length sqrt(head_dim), after the
    recursion. Text tokens, which the published task lacks, are independent vectors of that length.
    Raises DynamicRadError for another motion than low, mid or high.
    """
    noise = PUBLISHED_NOISE[_known_motion(motion)]
    frames, height, width = grid
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, height * width, head_dim)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    video = torch.empty(heads, frames, height * width, head_dim, dtype=torch.float32, device="cpu")
    for frame in range(frames):
        if frame:
            x = (1.0 - noise) * x + noise * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        video[:, frame] = x
    text = torch.randn(
        heads, text_before + text_after, head_dim, generator=generator, dtype=torch.float32, device="cpu"
    )
    tokens = torch.cat([text[:, :text_before], video.flatten(1, 2), text[:, text_before:]], dim=1)
    tokens = F.normalize(tokens, dim=-1) * math.sqrt(head_dim)
    return tokens, tokens, tokens


def video_proxy(
    grid: Grid, motion: str, heads: int, head_dim: int, seed: int, text_before: int = 0, text_after: int = 0
) -> Tensors:
    """A truer proxy: textures that move, heads of four kinds; q, k, v float32 [heads, tokens, head_dim].

    A background and three objects in front of it carry random textures, move at constant speed (so objects
    cover and uncover what is behind them) and change slowly. Heads come in turn as
        local     nearby tokens of the same and the adjacent frames
        temporal  the same material point in all frames, wherever it has moved
        global    tokens of similar coarse content, anywhere
        sink      as global but flatter, and text tokens (without text, the first frame) take SINK_MASS
    q and k differ by noise. Logits are scaled so that the heaviest tenth of a row's keys holds the share MASS of
    its attention, on average over rows (before sinks).
    Raises DynamicRadError for another motion than low, mid or high.
    """
    scene = _Scene(grid, MOTIONS[_known_motion(motion)], seed)
    video = slice(text_before, text_before + grid[0] * grid[1] * grid[2])
    total = video.stop + text_after
    q, k, v = (
        torch.randn(heads, total, head_dim, generator=scene.generator, dtype=torch.float32, device="cpu")
        for _ in range(3)
    )
    sinks = torch.tensor(
        [*range(video.start), *range(video.stop, total)] or [*range(grid[1] * grid[2])], dtype=torch.int64, device="cpu"
    )
    for head in range(heads):
        kind = HEAD_KINDS[head % len(HEAD_KINDS)]
        features = scene.features(kind, head_dim - 1)
        for x in (q, k):
            mixed = F.normalize(x[head, :, 1:], dim=-1)
            mixed[video] = features + 0.35 * mixed[video]
            x[head, :, 1:] = F.normalize(mixed, dim=-1)
        rows = torch.randint(video.start, video.stop, (64,), generator=scene.generator, device="cpu")
        some_keys = k[head, :: 1 + total // SHARPNESS_KEYS, 1:]
        sharp, norm = _sharpness(q[head, rows, 1:] @ some_keys.T, MASS[kind])
        for x in (q, k):
            x[head, :, 1:] *= math.sqrt(sharp * math.sqrt(head_dim))
        q[head, :, 0] = 1.0
        k[head, :, 0] = 0.0
        if kind == "sink":
            every = math.log(total / len(some_keys))
            logit = math.log(SINK_MASS / (1.0 - SINK_MASS) / len(sinks)) + norm + every
            k[head, sinks, 0] = logit * math.sqrt(head_dim)
        v[head, video] = 0.3 * v[head, video] + scene.values(head_dim)
    return q, k, v


PROXIES: dict[str, Callable[..., Tensors]] = {"published": published_proxy, "video": video_proxy}


class _Scene:
    """Where every token's content comes from: its layer, its place on that layer, its texture."""

    LAYERS = 4  # the background and three objects
    FINE, COARSE = 16, 8  # channels of texture

    def __init__(self, grid: Grid, motion: Motion, seed: int) -> None:
        self.grid = grid
        self.generator = torch.Generator().manual_seed(seed)
        frames, height, width = grid
        self.size = math.sqrt(height * width)
        t, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device="cpu") for n in grid), indexing="ij")
        self.position = torch.stack([t, y, x], dim=-1).flatten(0, 2)
        layer = torch.zeros(grid, dtype=torch.long, device="cpu")
        place = torch.stack([y, x], dim=-1)
        for index in range(self.LAYERS):
            angle, fast, cy, cx, radius = self._uniform(5).tolist()
            speed = motion.speed * self.size * (0.5 + fast)
            moved = torch.arange(frames, device="cpu")[:, None, None] * speed
            here = torch.stack([y - moved * math.sin(math.tau * angle), x - moved * math.cos(math.tau * angle)], dim=-1)
            if index == 0:
                place = here
                continue
            center = torch.tensor([cy * height, cx * width], dtype=torch.float32, device="cpu")
            # An object that leaves on one side comes back on the other.
            extent = torch.tensor([float(height), float(width)], dtype=torch.float32, device="cpu")
            offset = (here - center + extent / 2) % extent - extent / 2
            inside = offset.square().sum(-1).sqrt() < (0.1 + 0.15 * radius) * self.size
            layer[inside] = index
            place = torch.where(inside[..., None], offset, place)
        self.layer = layer.flatten()
        self.place = place.flatten(0, 2)
        self.fine = self._texture(self.FINE, motion.fresh, cell=2.0)
        self.coarse = self._texture(self.COARSE, motion.fresh, cell=self.size / 3)

    def features(self, kind: str, dim: int) -> torch.Tensor:
        """Unit vectors [tokens, dim] whose products say how much two tokens attend."""
        if kind == "local":
            reach = max(1.0, 0.06 * self.size)
            return self._fourier(
                self.position / torch.tensor([0.8, reach, reach], dtype=torch.float32, device="cpu"), dim
            )
        if kind == "temporal":
            reach = max(0.8, 0.03 * self.size)
            time = self.position[:, :1] / max(1.0, 0.5 * self.grid[0])
            apart = 10.0 * self.layer[:, None].float()
            return self._fourier(torch.cat([time, self.place / reach, apart], dim=1), dim)
        mixing = torch.randn(self.COARSE, dim, generator=self.generator, dtype=torch.float32, device="cpu")
        return F.normalize(self.coarse @ mixing, dim=-1)

    def values(self, dim: int) -> torch.Tensor:
        """What a token gives, [tokens, dim]: a mixture of its fine and coarse texture, variance 1."""
        content = torch.cat([self.fine, self.coarse], dim=1)
        mixing = torch.randn(content.shape[1], dim, generator=self.generator, dtype=torch.float32, device="cpu")
        return content @ mixing / math.sqrt(content.shape[1])

    def _uniform(self, count: int) -> torch.Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float32, device="cpu")

    def _fourier(self, scaled: torch.Tensor, dim: int) -> torch.Tensor:
        """Random Fourier features: <f(a), f(b)> is about exp(-|a - b|^2 / 2)."""
        frequency = torch.randn(scaled.shape[1], dim, generator=self.generator, dtype=torch.float32, device="cpu")
        phase = math.tau * self._uniform(dim)
        return torch.cos(scaled @ frequency + phase) * math.sqrt(2.0 / dim)

    def _texture(self, channels: int, fresh: float, cell: float) -> torch.Tensor:
        """[tokens, channels]: smooth random fields with features of `cell` tokens, one for each layer.

        Fields repeat after twice the frame. They change in time as an autoregressive process of variance 1.
        """
        frames, height, width = self.grid
        rows, columns = (max(2, round(2 * n / cell)) for n in (height, width))
        shape = (self.LAYERS, rows, columns, channels)
        field = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        per_frame = height * width
        result = torch.empty(frames * per_frame, channels, dtype=torch.float32, device="cpu")
        for frame in range(frames):
            if frame:
                news = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
                field = math.sqrt(1.0 - fresh) * field + math.sqrt(fresh) * news
            span = slice(frame * per_frame, (frame + 1) * per_frame)
            result[span] = _bilinear(field, self.layer[span], self.place[span] / cell)
        return result


def _bilinear(field: torch.Tensor, layer: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Values [n, C] of periodic fields [L, Y, X, C] at fractional places [n, 2]."""
    low = place.floor()
    fraction = place - low
    rows, columns = field.shape[1:3]
    y, x = low.long().unbind(-1)
    total = torch.zeros(len(place), field.shape[-1], dtype=torch.float32, device="cpu")
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (fraction[:, 0] if dy else 1 - fraction[:, 0]) * (fraction[:, 1] if dx else 1 - fraction[:, 1])
            total += weight[:, None] * field[layer, (y + dy) % rows, (x + dx) % columns]
    return total


def _sharpness(products: torch.Tensor, mass: float) -> tuple[float, float]:
    """Factor for `products` [R, N] at which the largest tenth of a row holds `mass` of its softmax on average.

    Also the mean logarithm of the row's sum of exponentials at that factor.
    """
    ordered = products.sort(dim=1, descending=True).values
    tenth = max(1, ordered.shape[1] // 10)
    low, high = 0.0, 64.0
    for _ in range(20):
        factor = (low + high) / 2
        share = (factor * ordered).softmax(dim=1)[:, :tenth].sum(dim=1).mean()
        low, high = (factor, high) if share < mass else (low, factor)
    return high, float((high * ordered).logsumexp(dim=1).mean())


def _known_motion(motion: str) -> str:
    if motion not in PUBLISHED_NOISE:
        known = list(PUBLISHED_NOISE)
        raise DynamicRadError(f"motion must be one of {known}, got {motion!r}.{nearest(str(motion), known)}")
    return motion
