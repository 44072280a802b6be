"""Build a TensorRT engine from an ONNX model with plugin nodes, on the GPU that will run it.

    python -m dynamicrad_compile.exporting.tensorrt.build model.onnx model.engine
        [--min=x:1x4x5,... --opt=x:2x4x5,... --max=x:8x4x5,...]        for a model whose batch is open

trtexec can't do this step: the plugins are Python. The engine holds their kernels as PTX, and trtexec or any other
runtime of TensorRT then loads it without Python.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ...errors import DynamicRadError, ExportError
from ...files import write_file


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """'x:1x4x5,t:1' -> {"x": (1, 4, 5), "t": (1,)}. Raises ExportError."""
    shapes = {}
    for part in text.split(",") if text else ():
        name, _, sizes = part.rpartition(":")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            name = ""
        if not name:
            raise ExportError(f"shapes are written as name:1x2x3,name:4, got {part!r}.")
    return shapes


def build_engine(
    model: Path, engine: Path, profile: dict[str, dict[str, tuple[int, ...]]] | None = None, small: bool = False
) -> float:
    """Build `engine` from `model`; returns the seconds it took.

    profile: "min", "opt" and "max" -> shapes of the inputs that are open. small: only the kernel that needs less than
    48 KiB of shared memory. Raises ExportError; then no file is written.
    """
    from .compile import register

    register()
    import tensorrt as trt

    from .plugin import TARGET

    TARGET.small = small
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(model)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ExportError(f"TensorRT can't read {model}: {errors}")
    config = builder.create_builder_config()
    _add_profile(builder, config, network, profile or {})
    start = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ExportError(
            f"TensorRT could not build an engine from {model}; its messages are above. If a kernel could not be "
            "launched, try --small, which needs less shared memory."
        )
    write_file(engine, bytes(serialized))
    return time.perf_counter() - start


def _add_profile(builder: Any, config: Any, network: Any, profile: dict[str, dict[str, tuple[int, ...]]]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    open_inputs = [tensor for tensor in inputs if -1 in tuple(tensor.shape)]
    if not open_inputs:
        return
    made = builder.create_optimization_profile()
    for tensor in open_inputs:
        shapes = [profile.get(kind, {}).get(tensor.name) for kind in ("min", "opt", "max")]
        if None in shapes:
            raise ExportError(
                f"input {tensor.name} {tuple(tensor.shape)} is open: give its shapes with --min, --opt and --max, such "
                f"as --opt={tensor.name}:{'x'.join(str(2 if n < 0 else n) for n in tensor.shape)}."
            )
        made.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(made)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("engine", type=Path)
    for name in ("min", "opt", "max"):
        parser.add_argument(f"--{name}", default="", help="shapes of open inputs: name:1x2x3,name:4")
    parser.add_argument(
        "--small", action="store_true", help="only the kernel that needs less than 48 KiB shared memory"
    )
    args = parser.parse_args(argv)
    try:
        profile = {name: parse_shapes(getattr(args, name)) for name in ("min", "opt", "max")}
        seconds = build_engine(args.model, args.engine, profile, args.small)
    except DynamicRadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.engine}, {args.engine.stat().st_size / 1e6:.1f} MB, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
