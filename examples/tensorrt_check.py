"""Check the TensorRT path on a machine that has a GPU and TensorRT: build, run, compare with eager, print a table.

    python examples/tensorrt_check.py                 attention alone, then a small Wan by every way to TensorRT
    python examples/tensorrt_check.py --attention     attention alone
    python examples/tensorrt_check.py --small         only the kernel that needs less than 48 KiB of shared memory

Exits with 0 if all is well, 1 if something differs or fails, 2 where it can't run. Please send the whole output with a
report: nothing of this could be run when it was written, for want of such a machine.
"""

from __future__ import annotations

import argparse
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dynamicrad_compile as drad

GRID = (8, 20, 32)
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2, torch.float32: 1e-3}
"""Largest relative error of a case; float32 is TF32 in the dense layers of an engine."""
Row = tuple[str, str, str, str, str]


def main(argv: list[str] | None = None) -> int:
    """Run the checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--attention", action="store_true", help="attention alone")
    parser.add_argument("--small", action="store_true", help="only the kernel with less than 48 KiB of shared memory")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("This needs an NVIDIA GPU; torch.cuda finds none. Without one: make test-tensorrt.")
        return 2
    try:
        from dynamicrad_compile.exporting.tensorrt import compile as tensorrt  # noqa: F401
    except drad.ExportError as error:
        print(error)
        return 2
    import tensorrt as trt
    import torch_tensorrt

    from dynamicrad_compile.exporting.tensorrt.plugin import TARGET

    TARGET.small = args.small
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    print(f"{torch.cuda.get_device_name()}, compute capability {capability}, torch {torch.__version__}, "
          f"torch_tensorrt {torch_tensorrt.__version__}, TensorRT {trt.__version__}\n")  # fmt: skip
    rows: list[Row] = []
    checks = attention_cases() if args.attention else [*attention_cases(), *model_cases()]
    for name, check in checks:
        print(f"{name} ...", flush=True)
        rows.append(run(name, check))
    table = [("case", "relative error", "eager ms", "TensorRT ms", "result"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    print()
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return int(any(row[4] != "ok" for row in rows))


Check = Callable[[], tuple[Callable[[], Tensor], Callable[[], Tensor]]]


def run(name: str, check: Check) -> Row:
    """One line of the table. A check returns two functions that should give the same: eager and TensorRT."""
    try:
        with torch.no_grad():
            eager, engine = check()
            expected, actual = eager(), engine()
            error = float((actual.double() - expected.double()).norm() / expected.double().norm())
            times = [milliseconds(function) for function in (eager, engine)]
    except Exception as problem:  # whatever TensorRT raises is the finding
        traceback.print_exc()
        return name, "-", "-", "-", f"FAILED: {type(problem).__name__}"
    good = error <= TOLERANCE[expected.dtype]
    return name, f"{error:.1e}", f"{times[0]:.2f}", f"{times[1]:.2f}", "ok" if good else "DIFFERS"


def milliseconds(function: Callable[[], Any], repeats: int = 10) -> float:
    """Mean time of a call after three calls of warming up."""
    for _ in range(3):
        function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def attention_cases() -> list[tuple[str, Check]]:
    """Attention alone: every plugin, dtype and head_dim, a ragged last block, grouped heads, an open batch."""
    cases = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for masked, means in ((False, False), (True, False), (False, True), (True, True)):
            what = " ".join(["mask"] * masked + ["means"] * means) or "plain"
            for dim in (64, 128):
                name = f"attention {str(dtype).removeprefix('torch.')} {what} {dim}"
                cases.append((name, attention_case(dtype, masked, means, dim)))
    cases.append(
        ("attention float16 means, open batch", attention_case(torch.float16, False, True, 64, open_batch=True))
    )
    return cases


def attention_case(dtype: torch.dtype, masked: bool, means: bool, dim: int, open_batch: bool = False) -> Check:
    """One engine that holds one attention over 5120 + 40 tokens."""

    def check() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        import torch_tensorrt

        plan = drad.make_plan("dynamicrad", GRID, sparsity=0.8, text_after=40).to("cuda")
        generator = torch.Generator("cuda").manual_seed(0)
        q = torch.randn(2, 12, plan.q_len, dim, dtype=dtype, device="cuda", generator=generator)
        k, v = torch.randn(2, 2, 4, plan.q_len, dim, dtype=dtype, device="cuda", generator=generator)
        mask = torch.arange(plan.q_len, device="cuda") < torch.tensor([[plan.q_len - 17], [plan.q_len]], device="cuda")
        weight = torch.full((1,), 0.5, device="cuda") if means else None

        class Attention(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
                out, _ = torch.ops.dynamicrad.block_sparse_attention(
                    q, k, v, plan.kv_counts, plan.kv_indices, None, plan.block_q, plan.block_kv,
                    mask if masked else None, weight,
                )  # fmt: skip
                return out

        model, inputs = Attention(), (q, k, v, mask)
        batch = torch.export.Dim("batch", min=1, max=4)
        shapes = tuple({0: batch} for _ in inputs) if open_batch else None
        program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
        compiled = torch_tensorrt.dynamo.compile(
            program, arg_inputs=inputs, min_block_size=1, require_full_compilation=True
        )
        return lambda: model(*inputs), lambda: compiled(*inputs)

    return check


def small_wan() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Two layers of Wan at random, 16 x 16 x 16 tokens, in bfloat16."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=2, ffn_dim=512, text_dim=64, freq_dim=64
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 16, 32, 32),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 40, 64),
    }
    return model.to("cuda", torch.bfloat16).eval(), {k: x.to("cuda", torch.bfloat16) for k, x in inputs.items()}


def model_cases() -> list[tuple[str, Check]]:
    """A whole small transformer, by each way that leads to TensorRT."""
    options: dict[str, Any] = {"sparsity": 0.7, "compensate": 0.5, "min_tokens": 0}

    def against_eager(
        make: Callable[[torch.nn.Module, dict[str, Tensor], dict[str, Any]], Callable[[], Any]], **more: Any
    ) -> Check:
        def check() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
            model, inputs = small_wan()
            torch._dynamo.reset()
            asked = {**options, **more}
            eager = torch.compile(model, backend="dynamicrad", options={**asked, "inner": "eager"})
            other = make(model, inputs, asked)
            return lambda: first(eager(**inputs)), lambda: first(other())

        return check

    return [
        ('Wan, inner="tensorrt"', against_eager(by_backend)),
        ('Wan, inner="tensorrt", dynamic_threshold', against_eager(by_backend, mode="dynamic_threshold")),
        ('Wan, format="tensorrt", via="torch"', against_eager(by_torch_tensorrt)),
        ('Wan, format="tensorrt", via="plugin"', against_eager(by_onnx("plugin"))),
        ('Wan, format="tensorrt", via="trtexec"', against_eager(by_onnx("trtexec"))),
    ]


def by_backend(model: torch.nn.Module, inputs: dict[str, Tensor], options: dict[str, Any]) -> Callable[[], Any]:
    """torch.compile with TensorRT as the inner compiler."""
    compiled = torch.compile(model, backend="dynamicrad", options={**options, "inner": "tensorrt"})
    compiled(**inputs)
    print("\n".join(note for note in drad.report(compiled).notes if note.startswith("TensorRT")))
    return lambda: compiled(**inputs)


def by_torch_tensorrt(model: torch.nn.Module, inputs: dict[str, Tensor], options: dict[str, Any]) -> Callable[[], Any]:
    """An exported program with engines, written and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        found = drad.export(model, (), inputs, folder, "tensorrt", options, progress=print)
        loaded = torch.export.load(found.path).module()
    return lambda: loaded(**inputs)


def by_onnx(via: str) -> Callable[[torch.nn.Module, dict[str, Tensor], dict[str, Any]], Callable[[], Any]]:
    """An engine built from an ONNX model, run by TensorRT alone."""

    def make(model: torch.nn.Module, inputs: dict[str, Tensor], options: dict[str, Any]) -> Callable[[], Any]:
        from dynamicrad_compile.exporting.tensorrt.build import build_engine
        from dynamicrad_compile.exporting.tensorrt.plugin import TARGET

        with tempfile.TemporaryDirectory() as folder:
            found = drad.export(model, (), inputs, folder, "tensorrt", options, via=via)
            file = Path(folder) / "model.engine"
            build_engine(found.path, file, small=TARGET.small)
            return runner(file.read_bytes(), inputs)

    return make


def runner(engine: bytes, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A function that runs an engine of fixed shapes and returns its first output."""
    import tensorrt as trt

    dtypes = {trt.float32: torch.float32, trt.float16: torch.float16, trt.DataType.BF16: torch.bfloat16}
    loaded = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(engine)
    context = loaded.create_execution_context()
    outputs = []
    for i in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(i)
        if loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            tensor = inputs[name] = inputs[name].contiguous()
        else:
            tensor = torch.empty(
                *loaded.get_tensor_shape(name), dtype=dtypes[loaded.get_tensor_dtype(name)], device="cuda"
            )
            outputs.append(tensor)
        context.set_tensor_address(name, tensor.data_ptr())

    def call() -> Tensor:
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return outputs[0]

    return call


def first(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    return (
        output if isinstance(output, Tensor) else next(iter(output.values())) if isinstance(output, dict) else output[0]
    )


if __name__ == "__main__":
    raise SystemExit(main())
