"""The Gluon kernels compile for sm_90 without a GPU: registers, no local memory, and what overlaps in the machine code.

`pytest -s` prints registers, spilled bytes, shared memory and the number of wgmma instructions of each build.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from support.attention_cases import Case
from support.marks import slow

pytest.importorskip("triton.experimental.gluon")

from support.gluon_cases import of_case, work_of

from dynamicrad_compile.errors import ExportError
from dynamicrad_compile.kernels.ahead_of_time import Build, build_forward
from dynamicrad_compile.kernels.attention_gluon import (
    CONSUMERS,
    REGISTERS,
    arguments,
    descriptor,
)
from dynamicrad_compile.kernels.means import means_of
from dynamicrad_compile.kernels.tiles import SHARED_MEMORY, Tile, choose_tile

CASES = [  # kernel, head_dim, masked and with mean keys
    ("gluon", 128, False),
    ("gluon_pingpong", 128, False),
    ("gluon", 128, True),
    slow("gluon_pingpong", 128, True),
    ("gluon", 64, False),
    slow("gluon_pingpong", 64, False),
    slow("gluon", 64, True),
    slow("gluon_pingpong", 64, True),
    slow("gluon", 96, True),
]
EVENT = re.compile(r"HGMMA|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]|MUFU\.EX2|BAR\.SYNC|SYNCS\.ARRIVE\.TRANS64\.A1T0|LDL|STL")
SHORT = {"WARPGROUP.DEPBAR.LE gsb0, 0x0": "wait 0", "WARPGROUP.DEPBAR.LE gsb0, 0x1": "wait 1"}


def events(built: Build) -> list[str]:
    """What happens in the machine code, in its order: products, waits, exponentials, barriers, local memory."""
    found = [SHORT.get(event, event.split(".")[0]) for event in EVENT.findall(built.sass)]
    return ["exp" if event == "MUFU" else event for event in found]


@pytest.mark.parametrize(("kernel", "dim", "full"), CASES)
def test_products_overlap_with_the_softmax(kernel: str, dim: int, full: bool):
    tile = choose_tile((9, 0), True, dim, 128, 128, variant=kernel)
    assert tile.kernel == kernel
    built = build_forward(90, "bf16", dim, tile, masked=full, compensate=full)
    print(f"\n{kernel} {dim} {'masked, means' if full else 'plain'} {built}")
    # With masks and two consumers some numbers of a row lie in local memory: none in loops over keys that all count.
    assert built.spilled <= (128 if full and kernel == "gluon_pingpong" else 0)
    assert "serialized" not in built.log
    assert built.shared <= SHARED_MEMORY[90]
    assert built.instructions["wgmma"] > 0
    assert built.instructions["tma"] > 0
    assert built.instructions["cp_async"] == 0

    happened = events(built)
    spilled = [i for i, event in enumerate(happened) if event in ("LDL", "STL")]
    if kernel == "gluon" or not full:
        assert not spilled
    loops = [i for i, event in enumerate(happened) if event == "wait 1"]  # S is there, O is still being multiplied
    assert len(loops) == CONSUMERS[kernel]
    products = dim // 16 + tile.block_n // 16  # of S and of O
    exponentials = 2 * tile.block_m * tile.block_n // (2 * 32 * tile.num_warps)
    for i in loops:
        before, after = happened[:i], happened[i + 1 : happened.index("wait 0", i)]
        assert [e for e in before if e not in ("BAR", "SYNCS", "LDL", "STL")][-products:] == ["HGMMA"] * products
        assert after.count("exp") >= exponentials
    # A tile is given back by one thread, after all of its group have come to a barrier behind the wait.
    for i, event in enumerate(happened):
        if event == "SYNCS":
            assert "BAR" in happened[max(0, i - exponentials - 8) : i]


def test_there_are_no_int8_scores():
    with pytest.raises(ExportError, match="the kernel gluon has no int8 scores"):
        build_forward(90, "bf16", 128, Tile(128, 128, 8, 2, "gluon"), qk_int8=True)


@pytest.mark.parametrize(
    ("kernel", "compensate", "length"), [("gluon", True, 451), ("gluon", False, 1), slow("gluon_pingpong", True, 451)]
)
def test_triton_takes_what_the_launcher_passes(kernel, compensate, length, monkeypatch: pytest.MonkeyPatch):
    """Descriptors, constants and options as of a launch, compiled as a launch would."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from dynamicrad_compile.kernels.attention_gluon_kernels import _block_sparse_forward_gluon

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(type(driver), "active", property(lambda self: target))
    heads = {"batch": 2, "heads": 4, "kv_heads": 2} if length > 1 else {"heads": 1, "kv_heads": 1}  # Triton knows a 1
    case = Case("launch", **heads, q_len=length, kv_len=length, dim=64, block_q=128, block_kv=128,
                dtype=torch.bfloat16, layout="bshd", compensate=(1.0,) if compensate else None)  # fmt: skip
    a = of_case(case)
    tile = choose_tile((9, 0), True, 64, 128, 128, variant=kernel)
    results = torch.empty(a.q.shape, dtype=a.q.dtype), torch.empty(a.q.shape[:3])
    means = means_of(a) if compensate else None
    work = work_of(a, means, tile)
    assert len(work) == (4 * 2 * 4 if length > 1 else 1)
    given = arguments(a, means, tile, results, work, descriptor)
    assert given is not None
    built = _block_sparse_forward_gluon.warmup(**given, grid=(len(work),), maxnreg=REGISTERS)
    assert built.metadata.num_warps == 12  # 8 that multiply, and the producer's 4
    assert built.metadata.maxnreg == REGISTERS


def test_a_tensor_that_can_not_be_described():
    a = of_case(Case("wide", dim=60, block_q=128, block_kv=128, dtype=torch.float16))
    tile = Tile(128, 128, 8, 2, "gluon")
    results = torch.empty(a.q.shape, dtype=a.q.dtype), torch.empty(a.q.shape[:3])
    assert arguments(a, None, tile, results, work_of(a, None, tile), descriptor) is None


def test_a_kernel_that_triton_can_not_build_gives_way(monkeypatch: pytest.MonkeyPatch, caplog):
    from dynamicrad_compile.kernels import _launch

    monkeypatch.setattr(_launch, "BROKEN", {})
    _launch.instead.cache_clear()
    tries = []

    def broken() -> None:
        tries.append(1)
        raise AttributeError("module 'tma' has no attribute 'async_load'")

    tile, ran = Tile(128, 128, 8, 2, "tma"), []

    def launch(tile: Tile, *tensors: object) -> None:
        ran.append(tile.kernel)
        if tile.kernel != "triton":
            broken()

    x = torch.empty(1, 1, 64, 64, dtype=torch.float16)
    for _ in range(2):
        _launch.launch_described("dq", tile, Tile(64, 64, 4, 2), 64, (x, x), launch)
    assert ran == ["tma", "triton", "triton"]
    assert len(tries) == 1
    assert caplog.text.count("can't build it (AttributeError: module 'tma' has no attribute 'async_load')") == 1
    assert "WARNING" in caplog.text
    assert _launch.attempt("forward", tile, lambda: None) is None

    def cuda() -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        _launch.attempt("forward", tile, cuda)
