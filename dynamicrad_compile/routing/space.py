"""Where prompts lie: distances between pooled embeddings, and how far is too far to call a prompt's motion."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

KERNEL_DIM = 256
KNOWN_SHARE = 0.98  # of held-out prompts in languages that the encoder can read, which are to be within reach
BLANK = ("", " ", ".", "...")  # they say nothing, so what is nearest to them is out of reach


class Space:
    """Features [N, C] standardised, in units in which the median squared distance of two prompts is 2.

    center, scale  mean and spread of the channels
    axes           first `KERNEL_DIM` principal axes, [C, K]
    points         the prompts along the axes, [N, K]
    left_out       squared distance of each prompt from the subspace of the axes, [N]
    """

    def __init__(self, features: Array) -> None:
        self.center, self.scale = standard(features)
        inputs = (features - self.center) / self.scale
        _, axes = np.linalg.eigh(inputs.T @ inputs)
        self.axes = axes[:, ::-1][:, : min(KERNEL_DIM, len(features))]
        points = inputs @ self.axes
        width = np.median(distances(points[::4], points[::4])) / 2
        self.scale = self.scale * np.sqrt(width)
        self.points = points / np.sqrt(width)
        whole = ((features - self.center) / self.scale) ** 2
        self.left_out = np.maximum(whole.sum(1) - (self.points**2).sum(1), 0)

    def novelty(self, rows: Array, test: Array, readable: Array) -> tuple[Array, Array]:
        """Of each of the prompts `test`: squared distance from the nearest of `rows`, and whether that is readable."""
        apart = distances(self.points[test], self.points[rows])
        nearest = apart.argmin(1)
        return apart.min(1) + self.left_out[test], readable[rows][nearest]

    def tensors(self) -> dict[str, Array]:
        """projection, shift and centers of a `Router`."""
        projection = (self.axes / self.scale[:, None]).T
        return {"projection": projection, "shift": -projection @ self.center, "centers": self.points}

    def with_reach(self, tensors: dict[str, Array], limit: float, readable: Array, blank: Array) -> dict[str, Array]:
        """A `Router`'s tensors with reach and spread, of a head that has weight and bias, or a kernel's.

        Nothing is within the reach of prompts that the encoder can't read, and of `blank` features [n, C], which become
        further centers.
        """
        head = {**self.tensors(), **tensors}
        centers = np.concatenate([self.points, ((blank - self.center) / self.scale) @ self.axes])
        if len(centers) == len(self.center):  # else the shape of the weight would not tell the heads apart
            centers = np.concatenate([centers, np.full_like(centers[:1], 1e3)])
        more = len(centers) - len(self.points)
        return {
            **head,
            "weight": np.pad(head["weight"], ((0, 0), (0, more if "centers" in tensors else 0))),
            "centers": centers,
            "reach": np.append(np.where(readable, limit, -1.0), np.full(more, -1.0)),
            "spread": np.stack([1 / self.scale, -self.center / self.scale]),
        }


def reach_of(novelty: Array, near_readable: Array, counts: Array) -> float:
    """The squared distance within which nearly all held-out prompts that count lie; more where they are few."""
    passing = novelty[counts & near_readable]
    passing = passing if len(passing) else novelty
    return float(np.quantile(passing, KNOWN_SHARE)) * (1 + 2 / np.sqrt(len(passing)))


def standard(features: Array) -> tuple[Array, Array]:
    """Mean and spread of the channels; dead channels stay small."""
    spread = features.std(0)
    return features.mean(0), np.maximum(spread, 0.01 * spread.mean())


def distances(a: Array, b: Array) -> Array:
    """Squared distances [len(a), len(b)]."""
    return np.asarray(np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T, 0))
