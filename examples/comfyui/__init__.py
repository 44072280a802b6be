"""ComfyUI nodes: compile the diffusion model of a MODEL with block-sparse attention, and show what was replaced.

Copy or link this folder into ComfyUI/custom_nodes; docs/comfyui.md says more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import dynamicrad_compile as drad
from dynamicrad_compile.cli.values import key_value
from dynamicrad_compile.errors import DynamicRadError

PART = "diffusion_model"
KWARGS = "torch_compile_kwargs"  # where ComfyUI's helper notes in `model_options` what a model is compiled with


def not_of_transformer_options(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards count. ComfyUI hands the model a dict that differs at every step: none on that."""
    return ["transformer_options" not in guard.name for guard in guards]


class DynamicRadCompile:
    """MODEL -> MODEL whose diffusion model is compiled when it is first sampled; the first MODEL stays as it is."""

    CATEGORY = "advanced/model"
    DESCRIPTION = "Compiles a video model with block-sparse attention (torch.compile backend dynamicrad)."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as ComfyUI wants them."""
        share = {"default": 0.8, "min": 0.0, "max": 0.95, "step": 0.05, "tooltip": "share of dense attention to skip"}
        steps = {"default": 2, "min": 0, "max": 100, "tooltip": "the first denoising steps, which stay dense"}
        more = {"default": "", "multiline": True, "tooltip": "other options, KEY=VALUE, one a line"}
        return {
            "required": {"model": ("MODEL",), "sparsity": ("FLOAT", share), "dense_steps": ("INT", steps)},
            "optional": {"options": ("STRING", more)},
        }

    def run(self, model: Any, sparsity: float, dense_steps: int, options: str = "") -> tuple[Any]:
        """Compile. Raises DynamicRadError for a wrong option, or for a ComfyUI that is too old."""
        wanted = {"sparsity": sparsity, "dense_steps": dense_steps}
        wanted |= dict(key_value(line.strip(), "an option") for line in options.splitlines() if line.strip())
        drad.Options(**wanted)
        try:
            from comfy_api.torch_helpers import set_torch_compile_wrapper
        except ImportError:
            raise DynamicRadError("this ComfyUI has no comfy_api.torch_helpers: it has to be newer.") from None
        compiled = model.clone()
        with_guards = {**wanted, "guard_filter_fn": not_of_transformer_options}
        set_torch_compile_wrapper(model=compiled, backend="dynamicrad", options=with_guards, keys=[PART])
        return (compiled,)


class DynamicRadReport:
    """What was replaced in a MODEL of the other node, as text; LATENT goes through, so that it comes after sampling."""

    CATEGORY = "advanced/model"
    DESCRIPTION = "Says which attentions became block-sparse, why others did not, and the sparsity that was executed."
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as ComfyUI wants them."""
        return {"required": {"model": ("MODEL",), "latent": ("LATENT", {"tooltip": "what was sampled with the MODEL"})}}

    def run(self, model: Any, latent: Any) -> dict[str, Any]:
        """The report. Raises DynamicRadError for a MODEL that the other node has not compiled."""
        kwargs = model.model_options.get(KWARGS) or {}
        if kwargs.get("backend") != "dynamicrad":
            raise DynamicRadError("this MODEL is not compiled by DynamicRad Compile: connect that node's output.")
        # Compiles nothing: it names the model and the options that the graphs were made with.
        same = torch.compile(model.get_model_object(PART), backend="dynamicrad", options=dict(kwargs["options"]))
        text = str(drad.report(same))
        return {"ui": {"text": [text]}, "result": (latent, text)}


NODE_CLASS_MAPPINGS = {"DynamicRadCompile": DynamicRadCompile, "DynamicRadReport": DynamicRadReport}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DynamicRadCompile": "DynamicRad Compile (block-sparse attention)",
    "DynamicRadReport": "DynamicRad Report",
}
