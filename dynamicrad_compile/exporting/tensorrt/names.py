"""Names of the plugins and of their inputs."""

from __future__ import annotations

NAMESPACE = "dynamicrad"
INPUTS = ("q", "k", "v", "kv_counts", "kv_indices")
MASK_INPUTS = ("kv_mask",)
MEANS_INPUTS = ("mean_k", "mean_v", "n_valid", "weight", "kept")


def input_names(masked: bool, compensate: bool) -> tuple[str, ...]:
    """Names of a plugin's input tensors."""
    return INPUTS + MASK_INPUTS * masked + MEANS_INPUTS * compensate


def plugin_name(masked: bool, compensate: bool) -> str:
    """Name of a plugin, in the namespace NAMESPACE."""
    return "BlockSparseAttention" + "Masked" * masked + "Means" * compensate
