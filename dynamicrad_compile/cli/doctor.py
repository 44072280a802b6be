"""What `dynamicrad doctor` looks at: versions, devices, compilers, and whether the package works here."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import PlanError
from ..kernels.chip import chip_of, name_of
from ..kernels.tiles import CHOICE, asked_variant, variant_in_use
from ..optional import DISTRIBUTIONS, install
from .status import status

MIN_TORCH = (2, 11)
MIN_TRITON = (3, 6)
# float32 against float64; GPUs may multiply in TF32.
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. status: "ok", "warn" (works without it) or "fail"; advice: what to do, or ''."""

    status: Literal["ok", "warn", "fail"]
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:4s}  {self.text}" + (f"\n      -> {self.advice}" if self.advice else "")


def diagnose() -> Iterator[Finding]:
    """All findings as they come, in the order in which a user would mend them."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _torch,
        _devices,
        _kernels,
        _triton,
        _compiler,
        _op,
        _backend,
        _profiles,
        _optional,
    )
    for check in checks:
        status(f"looking at {check.__name__.removeprefix('_')} ...")
        for finding in check():
            status("")
            yield finding


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _at_least(version: str, minimum: tuple[int, int]) -> bool:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts[:2]) >= minimum


def _torch() -> Iterator[Finding]:
    text = f"torch {torch.__version__}, Python {platform.python_version()}"
    wanted = ".".join(map(str, MIN_TORCH))
    if _at_least(torch.__version__, MIN_TORCH):
        yield Finding("ok", text)
    else:
        yield Finding("fail", text, f"torch {wanted} or newer is needed: pip install --upgrade 'torch>={wanted}'")


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("ok", f"CPU with {torch.get_num_threads()} threads; no GPU")
    for index in range(torch.cuda.device_count()):
        chip = chip_of(index)
        name = f"GPU {index}: {torch.cuda.get_device_name(index)}, {name_of(chip)}"
        if isinstance(chip, str):
            yield Finding("warn", name, "the kernels compile for AMD and were never run there: compare with `bench`")
        elif chip[0] >= 8:
            yield Finding("ok", name)
        else:
            yield Finding("warn", name, "older than sm_80: bfloat16 is slow there, use float16")


def _kernels() -> Iterator[Finding]:
    """The forms of the forward kernel that run at head_dim 64 and 128, and who chose them."""
    try:
        by = CHOICE if asked_variant() else "the tile table"
    except PlanError as error:
        yield Finding("fail", str(error), f"unset {CHOICE}, or set it to one of these")
        return
    for index in range(torch.cuda.device_count()):
        try:
            forms = {variant_in_use(chip_of(index), True, dim) or "triton" for dim in (64, 128)}
        except PlanError as error:
            yield Finding("fail", f"no attention kernel for GPU {index}", str(error))
        else:
            yield Finding("ok", f"attention kernel on GPU {index}: {' and '.join(sorted(forms))}, chosen by {by}")


def _triton() -> Iterator[Finding]:
    version = _version("triton")
    wanted = ".".join(map(str, MIN_TRITON))
    if version is not None and _at_least(version, MIN_TRITON):
        yield Finding("ok", f"triton {version}")
    elif torch.cuda.is_available():
        advice = f"GPUs need triton {wanted} or newer; it comes with torch's CUDA builds"
        yield Finding("fail", f"triton {version or 'is missing'}", advice)
    else:
        yield Finding("warn", f"triton {version or 'is missing'}", "only GPUs need it")


def _compiler() -> Iterator[Finding]:
    """Inductor generates C++ on the CPU; Triton builds a small launcher in C."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except RuntimeError:
        advice = "Inductor can't compile: install g++ (on Debian `apt install g++`), or use inner='eager'"
        yield Finding("fail", "no C++ compiler", advice)
        return
    if (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        yield Finding("ok", f"C++ compiler {compiler}, Python headers")
    else:
        advice = "Inductor can't compile: install them (on Debian `apt install python3-dev`)"
        yield Finding("fail", "the Python headers are missing", advice)


def _op() -> Iterator[Finding]:
    from .. import block_sparse_attention, make_plan

    # Tokens that fill no whole block; a plan that keeps everything equals dense attention.
    plan = make_plan("dense", grid=(3, 5, 7), block_size=64)
    sample = torch.randn(
        3, 1, 2, plan.q_len, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    dense = torch.nn.functional.scaled_dot_product_attention(*sample.double())
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        name = f"dynamicrad::block_sparse_attention on {device}"
        try:
            q, k, v = sample.to(device)
            out = block_sparse_attention(q, k, v, plan.to(device))
        except Exception as error:  # whatever a driver or a compiler raises is the finding
            yield Finding("fail", f"{name}: {type(error).__name__}: {error}", "please report this with all the output")
            continue
        assert isinstance(out, torch.Tensor)
        difference = float((out.cpu() - dense).abs().max())
        text = f"{name} (differs from dense attention by {difference:.0e})"
        if difference < TOLERANCE[device.split(":")[0]]:
            yield Finding("ok", text)
        else:
            yield Finding("fail", text, "please report this with all the output")


def _backend() -> Iterator[Finding]:
    from torch._dynamo.exc import InvalidBackend

    try:
        torch._dynamo.lookup_backend("dynamicrad")
    except InvalidBackend:
        advice = "install the package instead of only putting it on the path: pip install -e ."
        yield Finding("fail", 'torch.compile does not know backend="dynamicrad"', advice)
    else:
        yield Finding("ok", 'torch.compile finds backend="dynamicrad"')


def _profiles() -> Iterator[Finding]:
    from .. import DynamicRadError, list_profiles, load_profile

    names = list_profiles()
    if not names:
        yield Finding("fail", "no profiles were installed with the package", "install it again")
    for name in names:
        try:
            load_profile(name)
        except DynamicRadError as error:
            yield Finding("fail", f"profile {name}: {error}", "mend the file or install the package again")
    yield Finding("ok", f"profiles: {', '.join(names)}")


def _optional() -> Iterator[Finding]:
    for module, extra, use in (
        ("diffusers", "diffusers", "`dynamicrad explain` and the examples"),
        ("PIL", "plot", "pictures of `dynamicrad plot`"),
    ):
        package = DISTRIBUTIONS.get(module, module)
        if importlib.util.find_spec(module) is None:
            advice = f"{use} need it: {install(extra, module)}"
            yield Finding("warn", f"{package} is missing", advice)
        else:
            yield Finding("ok", f"{package} {_version(package)}")


def add_doctor(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("doctor", help="check the installation and the machine")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    failed = 0
    for finding in diagnose():
        print(finding, flush=True)
        failed += finding.status == "fail"
    print(f"\n{failed} problem{'s' * (failed != 1)}." if failed else "\nEverything needed is there.")
    return 1 if failed else 0
