"""Fit the motion router to a text encoder: encode labelled prompts, cross-validate, fold everything into a few tensors.

Features are what `route` computes, the mean over tokens normalised to length 1, standardised. Heads:
    kernel  least squares on a Gaussian kernel (regularised by a ridge), of the first `KERNEL_DIM` principal components;
            its width is the median distance. Better by 2 to 3 points than linear, see docs/router.md.
    linear  multinomial logistic regression (scikit-learn), on features scaled by 1 / sqrt(C) so that regularisation
            means the same for every encoder.
Abstention: a prompt farther from the nearest one of the fit than nearly all held-out prompts are (see `space`), or
nearest to one in a language that the encoder can't read, is called high.
Decision: mid's score gets an offset, the one of least cost on out-of-fold scores, where a neighbouring regime costs 1
and a confusion of low and high costs `EXTREME_COST`. Languages that the encoder can't read don't count in that choice.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import RouterError
from ..optional import optional
from ..runtime.router import CLASSES, SAFE_REGIME, Router, pooled
from .corpus import Prompt, PromptSource, load_prompts
from .encoders import Encode, as_encoder
from .space import BLANK, Array, Space, distances, reach_of, standard

REGULARISATIONS = {"kernel": (0.1, 0.3, 1.0), "linear": (0.3, 1.0, 3.0, 10.0)}
MID_OFFSETS = tuple(round(0.02 * step, 2) for step in range(16))  # times the spread of the scores
EXTREME_COST = 5.0
READABLE = 0.75  # accuracy below which a language counts as one that the encoder can't read
TIE_TO_SAFE = 1e-3  # where no prompt is near, scores are equal, and this picks the safe regime


def fit_router(
    pipe_or_encoder: Any,
    prompts: PromptSource | None = None,
    *,
    head: str = "kernel",
    batch_size: int = 16,
    folds: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Router:
    """Fit a router to the text encoder of a video model.

    pipe_or_encoder  a diffusers pipeline (only its encode_prompt is used, with the arguments of its own __call__),
                     or a callable list[str] -> embeds [N, T, C] or [N, C], or (embeds, mask [N, T])
    prompts          None = ours; else a .jsonl or .csv file or a list of (text, label), see `load_prompts`
    head             "kernel" or "linear"
    folds            of the cross-validation, which splits by group and keeps the shares of the labels

    The accuracy, confusion matrix and regularisation in the Router come from the cross-validation; composed prompts
    are fitted but not counted. Raises RouterError for unusable prompts or encoders.
    """
    if batch_size < 1 or folds < 2:
        raise RouterError(f"batch_size must be >= 1 and folds >= 2, got {batch_size} and {folds}.")
    if head not in HEADS:
        raise RouterError(f"head must be kernel or linear, got {head!r}.")
    _, model_selection = _sklearn()
    corpus = load_prompts(prompts)
    _check_corpus(corpus, folds)
    encode, name = as_encoder(pipe_or_encoder)
    features, masked = encode_prompts(encode, [prompt.text for prompt in corpus], batch_size, progress)

    labels = np.array([prompt.label for prompt in corpus])
    written = np.array([index for index, prompt in enumerate(corpus) if not prompt.composed])
    composed = np.array([index for index, prompt in enumerate(corpus) if prompt.composed], dtype=int)
    groups = np.array([prompt.group or f"prompt {index}" for index, prompt in enumerate(corpus)])
    space = Space(features)
    classifier = HEADS[head](features, labels, space)
    splitter = model_selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    splits = list(splitter.split(features[written], labels[written], groups[written]))
    if any(len(np.unique(labels[written[train]])) < len(CLASSES) for train, _ in splits):
        raise RouterError("a fold has no prompt of some label to train on: use more groups, or fewer folds.")
    truth = labels[written]
    kept = [corpus[index] for index in written]
    scored: dict[float, Array] = {}
    for strength in _bar(REGULARISATIONS[head], "cross-validation", progress):
        margins = scored[strength] = np.zeros((len(written), len(CLASSES)))
        for train, test in splits:
            margins[test] = classifier.margins(np.concatenate([written[train], composed]), written[test], strength)
    right = np.mean([truth == margins.argmax(1) for margins in scored.values()], axis=0)
    languages = _readable(kept, right)
    readable = np.array([prompt.language in languages for prompt in corpus])
    counts = readable[written]
    candidates = [(strength, step * float(scored[strength].std())) for strength in scored for step in MID_OFFSETS]
    costs = [_cost(truth[counts], decide(scored[strength], offset)[counts]) for strength, offset in candidates]
    strength, offset = candidates[int(np.argmin(np.round(costs, 9)))]
    novelty, near_readable = np.zeros(len(written)), np.zeros(len(written), bool)
    for train, test in splits:
        rows = np.concatenate([written[train], composed])
        novelty[test], near_readable[test] = space.novelty(rows, written[test], readable)
    limit = reach_of(novelty, near_readable, counts)
    abstains = (novelty >= limit) | ~near_readable
    called = np.where(abstains, SAFE_REGIME, decide(scored[strength], offset))

    blank = blank_features(encode, features.shape[1])
    tensors = space.with_reach(classifier.tensors(strength), limit, readable, blank)
    tensors["bias"] = tensors["bias"] + offset * MID + TIE_TO_SAFE * (np.arange(len(CLASSES)) == SAFE_REGIME)
    confusion = [[int(((truth == i) & (called == j)).sum()) for j in range(3)] for i in range(3)]
    return Router(
        **{key: torch.from_numpy(value).float() for key, value in tensors.items()},
        encoder=name,
        accuracy=round(float((truth == called).mean()), 4),
        confusion=confusion,
        accuracy_by={kind: _accuracy_by(kept, truth == called, kind) for kind in ("language", "style")},
        prompts=len(corpus),
        regularisation=strength,
        mid_offset=round(offset, 4),
        abstained=round(float(abstains[counts].mean()), 4),
        unreadable=sorted({prompt.language for prompt in corpus} - languages),
        masked=masked,
        date=datetime.date.today().isoformat(),
        packages=_versions(),
    )


def check_fit(prompts: PromptSource | None = None, folds: int = 5) -> None:
    """Raises RouterError if a router can't be fitted to these prompts, or a library is missing. Encodes nothing."""
    _sklearn()
    optional("safetensors.torch", "saving routers needs", "router", RouterError)
    _check_corpus(load_prompts(prompts), folds)


class _Linear:
    """Multinomial logistic regression on standardised features [N, C]."""

    def __init__(self, features: Array, labels: Array, space: Space | None = None) -> None:
        self.center, self.scale = standard(features)
        self.scale = self.scale * np.sqrt(features.shape[1])
        self.inputs, self.labels = (features - self.center) / self.scale, labels

    def _fit(self, rows: Array, strength: float) -> Any:
        model = _sklearn()[0].LogisticRegression(C=strength, max_iter=1000, tol=1e-3)
        return model.fit(self.inputs[rows], self.labels[rows])

    def margins(self, rows: Array, test: Array, strength: float) -> Array:
        """Scores [len(test), 3] of a model fitted to `rows`."""
        return np.asarray(self._fit(rows, strength).decision_function(self.inputs[test]))

    def tensors(self, strength: float) -> dict[str, Array]:
        model = self._fit(np.arange(len(self.labels)), strength)
        weight = model.coef_ / self.scale
        return {"weight": weight, "bias": model.intercept_ - weight @ self.center}


class _Kernel:
    """Kernel ridge regression on one-hot labels: solve (K + strength I) weight = labels - 1/3."""

    def __init__(self, features: Array, labels: Array, space: Space | None = None) -> None:
        self.space = space or Space(features)
        points = self.space.points
        self.kernel = np.exp(-distances(points, points)).astype(np.float32)
        self.targets = (np.eye(len(CLASSES))[labels] - 1 / len(CLASSES)).astype(np.float32)

    def _fit(self, rows: Array, strength: float) -> Array:
        system = self.kernel[np.ix_(rows, rows)] + strength * np.eye(len(rows), dtype=np.float32)
        return np.asarray(np.linalg.solve(system, self.targets[rows]))

    def margins(self, rows: Array, test: Array, strength: float) -> Array:
        """Scores [len(test), 3] of a model fitted to `rows`."""
        return np.asarray(self.kernel[np.ix_(test, rows)] @ self._fit(rows, strength))

    def tensors(self, strength: float) -> dict[str, Array]:
        weight = self._fit(np.arange(len(self.targets)), strength).T
        bias = np.zeros(len(CLASSES))
        return {"weight": np.ascontiguousarray(weight), "bias": bias, **self.space.tensors()}


HEADS: dict[str, Any] = {"kernel": _Kernel, "linear": _Linear}
MID = np.array([0.0, 1.0, 0.0])


def _readable(prompts: list[Prompt], right: Array) -> set[str]:
    """Languages that the encoder can read, all if none; those with few prompts are taken together."""
    names = np.array([prompt.language for prompt in prompts])
    values, counts = np.unique(names, return_counts=True)
    rare = values[counts < 20]
    merged = np.where(np.isin(names, rare), "other", names)
    read = [name for name in np.unique(merged) if right[merged == name].mean() >= READABLE]
    return set(names[np.isin(merged, read)].tolist()) or set(names.tolist())


def encode_prompts(encode: Encode, texts: Sequence[str], batch_size: int, progress: bool) -> tuple[Array, bool]:
    """Features fp64 [N, C] as `route` computes them, and whether the encoder gave masks."""
    found: list[torch.Tensor] = []
    masked = False
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding in a batch
    starts = range(0, len(texts), batch_size)
    for start in _bar(starts, "encoding prompts", progress):
        embeds, mask = encode([texts[index] for index in order[start : start + batch_size]])
        found.append(pooled(embeds, mask).cpu())
        masked = masked or mask is not None
    if len({part.shape[-1] for part in found}) != 1:
        raise RouterError("the encoder gave embeddings of different widths for different prompts.")
    features = torch.cat(found).double().numpy()[np.argsort(order)]
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise RouterError(f"the encoder gave no usable embedding (empty or not finite) for {texts[int(bad[0])]!r}.")
    if len(features) > 1 and (np.ptp(features, axis=0) < 1e-9).all():
        raise RouterError("the encoder gives the same embedding for every prompt.")
    return features, masked


def blank_features(encode: Encode, channels: int) -> Array:
    """Features [n, C] of texts that say nothing, as far as the encoder takes them."""
    found = []
    for text in BLANK:
        try:
            embeds, mask = encode([text])
        except Exception:  # of an encoder of the user's own: then it never meets such a prompt
            continue
        found.append(pooled(embeds, mask)[:1].double().cpu().numpy())
    features = np.concatenate([np.empty((0, channels)), *found])
    return features[np.isfinite(features).all(1)]


def decide(margins: Array, mid_offset: float) -> Array:
    """Regimes of scores [N, 3] when `mid_offset` is added to mid's."""
    return np.asarray((margins + mid_offset * MID).argmax(1))


def _cost(truth: Array, called: Array) -> float:
    apart = np.abs(truth - called)
    return float(np.where(apart == 2, EXTREME_COST, apart).mean())


def _accuracy_by(prompts: list[Prompt], right: Array, kind: str) -> dict[str, float]:
    values = np.array([getattr(prompt, kind) for prompt in prompts])
    return {str(value): round(float(right[values == value].mean()), 4) for value in sorted(set(values) - {""})}


def _check_corpus(corpus: list[Prompt], folds: int) -> None:
    for index, name in enumerate(CLASSES):
        groups = {prompt.group or prompt.text for prompt in corpus if prompt.label == index and not prompt.composed}
        if len(groups) < folds:
            raise RouterError(
                f"{folds} folds need prompts of label {name!r} in at least {folds} groups, there are {len(groups)}."
            )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("dynamicrad-compile", "torch", "scikit-learn", "transformers", "diffusers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _bar(items: Any, text: str, progress: bool) -> Any:
    if not progress:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=text, leave=False)


def _sklearn() -> tuple[Any, Any]:
    parts = ("sklearn.linear_model", "sklearn.model_selection")
    linear_model, model_selection = (optional(part, "fitting a router needs", "router", RouterError) for part in parts)
    return linear_model, model_selection
