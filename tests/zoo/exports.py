"""Cases of export: format x model x mode, each written, loaded in a fresh process, and compared."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

import dynamicrad_compile as drad
from dynamicrad_compile.exporting.checking import relative_error
from dynamicrad_compile.exporting.run import load
from dynamicrad_compile.runtime.router import Router
from zoo.models import ZOO, out_tensors

GRID = {"f": 5, "h": 6, "w": 9}
MODELS = {"wan": "wan_t2v", "hunyuan": "hunyuan_video", "cogvideox": "cogvideox_5b", "ltx": "ltx"}
FORMATS = ("torch", "onnx", "aoti")
COMMON = {"min_tokens": 0, "block_size": 16, "compensate": 0.7, "mode": "static_ratio", "covariance": False}
MODES = ("static", "router", "dynamic")
DEPTHS = ("blocks", "transformer_blocks", "single_transformer_blocks")


@dataclass
class Row:
    """One case."""

    format: str
    model: str
    mode: str
    batch: str
    replaced: str = ""
    error: float = 0.0
    moved: float = 0.0
    size: int = 0
    export_s: float = 0.0
    load_s: float = 0.0
    failure: str = ""

    def cells(self) -> list[str]:
        """Cells of the table."""
        case = [self.format, self.model, self.mode, self.batch]
        if self.failure:
            return [*case, self.failure, "", "", "", "", ""]
        numbers = [f"{self.error:.1e}", f"{self.moved:.1e}", f"{self.size / 1e6:.2f} MB"]
        return [*case, self.replaced, *numbers, f"{self.export_s:.0f}", f"{self.load_s:.1f}"]


def make(model: str, batch: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model with one layer of each kind, and its call."""
    module, kwargs, _ = ZOO[MODELS[model]](**GRID, batch=batch)
    for name in DEPTHS:
        layers = getattr(module, name, None)
        if layers is not None:
            setattr(module, name, layers[:1])
    return module, kwargs


def options_of(mode: str) -> tuple[dict[str, Any], Router | None]:
    """Options of a mode, and its router."""
    if mode == "static":
        return {**COMMON, "regime": "high"}, None
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    router = Router(weight - weight.mean(0), torch.zeros(3))
    kind = "dynamic_threshold" if mode == "dynamic" else "static_ratio"
    return {**COMMON, "mode": kind, "router": router}, router


def with_prompts(kwargs: dict[str, Any], router: Router | None) -> dict[str, Any]:
    """The call with prompts that the router sends to low, high, mid, ..."""
    if router is None:
        return kwargs
    prompts = kwargs["encoder_hidden_states"]
    order = torch.tensor([0, 2, 1])[torch.arange(len(prompts)) % 3]
    return {**kwargs, "encoder_hidden_states": (3 * router.weight[order, None]).expand(prompts.shape).contiguous()}


def run_case(row: Row, fresh: bool = True) -> None:
    """Export, check and time one case; `fresh`: in a process of its own too, where nothing is loaded yet."""
    options, router = options_of(row.mode)
    module, kwargs = make(row.model, 2)
    kwargs = with_prompts(kwargs, router)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        start = time.perf_counter()
        result = drad.export(
            module, (), kwargs, folder, row.format, options, dynamic_batch=row.batch == "open", check=fresh
        )
        row.export_s = time.perf_counter() - start - result.seconds.get("check", 0.0)
        if fresh:
            row.load_s, row.error = result.card["check"]["load_seconds"], result.card["check"]["relative_error"]
        row.size = sum(file.stat().st_size for file in result.files)
        row.replaced = f"{len(result.report.replaced)} of {len(result.report.sites)}"
        row.moved = relative_error(out_tensors(result.module(**kwargs))[0], out_tensors(module(**kwargs))[0])
        if row.batch == "open":
            loaded = load(row.format, result.path)
            for batch in (1, 2, 3):
                other = with_prompts(make(row.model, batch)[1], router)
                found, expected = (out_tensors(run(**other))[0] for run in (loaded, result.module))
                row.error = max(row.error, relative_error(found, expected))


def cases(formats: list[str], models: list[str], full: bool = False) -> list[Row]:
    """The cases: a fixed batch for the static mode, an open one for the others; full: all combinations.

    AOTInductor compiles for half a minute: it is spared the mode in between.
    """
    modes = [("static", "2"), ("router", "open"), ("dynamic", "open")]
    if full:
        modes = [(mode, batch) for mode in MODES for batch in ("2", "open")]
    rows = [Row(f, m, *mode) for f in formats for m in models for mode in modes]
    return [row for row in rows if full or row.format != "aoti" or row.mode != "router"]
