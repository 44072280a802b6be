"""Patterns and schedules that go by the step of a run: exported programs keep their clock, stateless formats refuse."""

from __future__ import annotations

import pytest
import torch
from support.graphs import compile_sparse, drad, first_output, make, relative_error

from dynamicrad_compile.errors import ExportError

CASES = {
    "adaspa": dict(pattern="adaspa", sparsity=0.6, search_steps=(1, 3)),
    "lvsa": dict(pattern="lvsa", reference_frames=3, window=0),
    "schedule": dict(
        sparsity=[(0.0, 0.0), (0.5, 0.6)], steps=4, regime="mid", mode="static_ratio", compensate=0.0, profile="default"
    ),
}
SMALL = dict(block_size=16, min_tokens=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_program_follows_the_steps(name, tmp_path):
    torch.manual_seed(0)
    model, inputs, _ = make("wan_t2v")
    exported = drad.export(model, (), inputs, tmp_path, format="torch", options={**CASES[name], **SMALL})
    program = torch.export.load(exported.path).module()
    compiled = compile_sparse(model, **{"profile": "default", **CASES[name], **SMALL})
    for _ in range(2):
        for timestep in (1000.0, 900.0, 700.0, 500.0, 300.0):
            given = {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}
            with torch.no_grad():
                out, expected = (first_output(call(**given)) for call in (program, compiled))
            assert relative_error(out, expected) < 1e-6, timestep


@pytest.mark.parametrize("name", CASES)
def test_onnx_has_no_memory(name, tmp_path):
    model, inputs, _ = make("wan_t2v")
    with pytest.raises(ExportError, match="needs a memory from step to step"):
        drad.export(model, (), inputs, tmp_path, format="onnx", options={**CASES[name], **SMALL})
