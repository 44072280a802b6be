"""What sparse attention does to videos: metrics, methods to compare with, and the harness of `dynamicrad eval`.

    subject = Subject("mine", model, generate, grid=(16, 8, 8), prompts=[...])
    results = evaluate(subject, [method("static_ratio", subject, 0.8, block_size=16)], subject.prompts, "outputs/eval")
    print(results.table())

Metrics take clips, float [N, F, C, H, W] in 0..1, and give one number a clip.
"""

from __future__ import annotations

from ..models.hook import Place, attention_hook
from .features import feature_distance, frechet_distance
from .frame_features import clip_features, coarse_features, consistency
from .harness import Results, Row, evaluate
from .loops import LoopScore, loop_score
from .making import make_clips
from .methods import METHODS, Compiled, Dense, Hooked, method
from .metrics import flicker, motion, motion_ratio, psnr, rmse, ssim
from .pictures import save_gif, save_pareto
from .subject import Subject, from_pipeline, load_subject
from .vqeval import VQevalLoop, vqeval_loop

__all__ = [
    "METHODS",
    "Compiled",
    "Dense",
    "Hooked",
    "LoopScore",
    "Place",
    "Results",
    "Row",
    "Subject",
    "VQevalLoop",
    "attention_hook",
    "clip_features",
    "coarse_features",
    "consistency",
    "evaluate",
    "feature_distance",
    "flicker",
    "frechet_distance",
    "from_pipeline",
    "load_subject",
    "loop_score",
    "make_clips",
    "method",
    "motion",
    "motion_ratio",
    "psnr",
    "rmse",
    "save_gif",
    "save_pareto",
    "ssim",
    "vqeval_loop",
]
