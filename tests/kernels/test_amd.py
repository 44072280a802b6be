"""The Triton kernels compile for AMD GPUs, without one; none was ever run there.

`pytest -s` prints registers, bytes in memory, LDS and matrix instructions of each build.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.marks import slow

from dynamicrad_compile.cli import doctor
from dynamicrad_compile.errors import ExportError, PlanError
from dynamicrad_compile.kernels.chip import chip_of, name_of
from dynamicrad_compile.kernels.tiles import SHARED_MEMORY, Tile, architecture, choose_tile, table

triton = pytest.importorskip("triton")

from support.builds import build_backward, build_moments, build_select  # noqa: E402

from dynamicrad_compile.kernels.ahead_of_time import build_forward  # noqa: E402


def check(built, arch: str, spills: bool = False) -> None:
    print(f"\n{arch} {built.name}: {built}")
    assert built.shared <= SHARED_MEMORY[arch]
    assert spills or built.spilled == 0


@pytest.mark.parametrize(
    ("arch", "dtype", "dim", "full"),
    [
        ("gfx942", "bf16", 128, True),
        ("gfx1100", "bf16", 64, True),
        slow("gfx942", "fp16", 64, False),
        slow("gfx942", "fp32", 64, True),
        slow("gfx942", "fp32", 128, False),
        slow("gfx942", "bf16", 256, True),
        slow("gfx1100", "bf16", 64, False),
        slow("gfx1100", "bf16", 128, True),
        slow("gfx1100", "fp32", 64, True),
    ],
)
def test_forward(arch: str, dtype: str, dim: int, full: bool):
    built = build_forward(
        arch, dtype, dim, choose_tile(arch, dtype != "fp32", dim, 128, 128), masked=full, compensate=full
    )
    check(built, arch, spills=arch == "gfx1100")  # of which the table says how much, by Triton 3.9
    if dtype != "fp32":
        assert built.instructions["mfma" if arch == "gfx942" else "wmma"] > 0


@pytest.mark.parametrize("kernel", ["dq", slow("dk_dv"), slow("dmeans")])
@pytest.mark.parametrize("arch", ["gfx942", slow("gfx1100")])
def test_backward(kernel: str, arch: str):
    tile = choose_tile(arch, True, 64, 128, 128, kernel)
    check(build_backward(kernel, arch, "bf16", 64, tile, True), arch, spills=arch == "gfx1100")


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_selection(arch: str):
    check(build_select(arch, "bf16", 128, 256, "mass", True, "error"), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_covariances(arch: str):
    for built in build_moments(arch, "bf16", 64):
        check(built, arch, spills=True)


def test_forms_of_nvidia_are_refused():
    with pytest.raises(ExportError, match="gluon is NVIDIA's; gfx942 has the plain one"):
        build_forward("gfx942", "bf16", 128, Tile(128, 128, 8, 2, "gluon"))


@pytest.mark.parametrize(
    ("chip", "arch"),
    [("gfx942", "gfx942"), ("gfx90a", "gfx942"), ("gfx950", "gfx942"), ("gfx1101", "gfx1100"), ("gfx1201", "gfx1100")],
)
def test_chips_take_the_tiles_of_their_kind(chip: str, arch: str):
    assert architecture(chip) == arch
    for dim in (64, 128, 256):
        assert choose_tile(chip, True, dim, 128, 128, variant="gluon") == table()[arch]["half"][dim].tiles["forward"]


def test_older_chips_are_refused():
    with pytest.raises(PlanError, match="need an AMD GPU of gfx9, gfx11, gfx12, got gfx1030"):
        choose_tile("gfx1030", True, 64, 128, 128)


def rocm(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pytest.fail("asked for"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_rocm_is_asked_for_no_compute_capability(monkeypatch: pytest.MonkeyPatch):
    from dynamicrad_compile.kernels import _launch
    from dynamicrad_compile.plans import crossover

    rocm(monkeypatch, "gfx942")
    device = torch.device("cuda", 0)
    assert chip_of(device) == "gfx942"
    assert name_of(chip_of(device)) == "gfx942"
    assert _launch.chip(device) == "gfx942"
    assert {_launch.precision(dtype) for dtype in (torch.float32, torch.bfloat16)} == {"ieee"}
    assert crossover.architecture(device) is None
    findings = [*doctor._devices(), *doctor._kernels()]
    assert [found.status for found in findings] == ["warn", "ok"]
    assert "never run there" in findings[0].advice


def test_the_doctor_says_that_a_chip_has_no_kernel(monkeypatch: pytest.MonkeyPatch):
    rocm(monkeypatch, "gfx1030")
    (found,) = doctor._kernels()
    assert found.status == "fail"
    assert "gfx1030" in found.advice
