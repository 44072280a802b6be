"""Builds of kernels without a GPU, for one architecture or another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import triton

from dynamicrad_compile.kernels import ahead_of_time
from dynamicrad_compile.kernels import moments_triton as launchers
from dynamicrad_compile.kernels import moments_triton_kernels as kernels
from dynamicrad_compile.kernels.attention_backward_triton import MEANS_TILE
from dynamicrad_compile.kernels.attention_backward_triton_kernels import _dk_dv, _dq
from dynamicrad_compile.kernels.means_backward_triton import _dmeans
from dynamicrad_compile.kernels.select_criteria import CRITERIA
from dynamicrad_compile.kernels.select_triton import _select_blocks, shape_of_program
from dynamicrad_compile.kernels.tiles import Tile, choose_tile

KERNELS = {"dq": _dq, "dk_dv": _dk_dv, "dmeans": _dmeans}
POINTERS = dict.fromkeys(("counts", "indices", "n_valid", "kept"), "*i32") | dict.fromkeys(
    ("lse2", "delta", "weight", "dmean_k", "dmean_v"), "*fp32"
)
OPERANDS = ("q", "k", "v", "grad_out", "mean_k", "mean_v", "dq", "dk", "dv")


def build_backward(kernel: str, arch: int | str, dtype: str, dim: int, tile: Tile, full: bool) -> Any:
    """Compile with 128 x 128 blocks; `full` adds ragged tails, a key mask, compensation and shared key heads."""
    function = KERNELS[kernel]
    names = function.arg_names
    constants = {
        "D": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
        "BLOCK_Q": 128,
        "BLOCK_KV": 128,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_J": min(MEANS_TILE, tile.block_n),
        "RAGGED": full,
        "HAS_MASK": full,
        "COMPENSATE": full,
        "TMA": tile.kernel == "tma",
        "WIDEN": False,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        # What the launcher specialises because it is 1.
        "stride_cm": 1,
        **({} if full else {"KV_GROUP": 1}),
    }
    constants = {name: value for name, value in constants.items() if name in names}
    pointers = POINTERS | {"key_mask": "*i1"} | dict.fromkeys(OPERANDS, f"*{dtype}")
    types = pointers | {"scale": "fp32"}
    if tile.kernel == "tma":
        described, rows = {"dq": ("kv", tile.block_n), "dk_dv": (("q", "grad_out"), tile.block_m)}[kernel]
        types |= dict.fromkeys(described, f"tensordesc<{dtype}[1, 1, {rows}, {constants['BLOCK_D']}]>")
    signature = {name: types.get(name, "i32") for name in names}
    # As at run time: pointers and the strides of q, k, v, grad_out divide by 16, or loads would be scalar.
    aligned = [n for n in names if signature[n].startswith("*") or re.match("stride_[qkvg]", n)]
    return ahead_of_time.build(function, signature, constants, aligned, arch, ahead_of_time.options_of(tile))


def build_select(arch: int | str, dtype: str, dim: int, width: int, criterion: str, refresh: bool, rank: str) -> Any:
    """Compile the selection; blocks and heads do not matter."""
    block_w, block_d, warps = shape_of_program(width, dim, rank)
    constants = {"D": dim, "BLOCK_D": block_d, "BLOCK_W": block_w, "CRITERION": CRITERIA.index(criterion)}
    # What the launcher specialises because it is 1.
    constants |= {"BY_ERROR": rank == "error", "HAS_REFRESH": refresh, "KV_GROUP": 1}
    constants |= dict.fromkeys(("stride_cm", "stride_fm", "stride_em"), 1)
    pointers = dict.fromkeys(("q_mean", "k_mean"), f"*{dtype}") | {"refresh": "*i1"}
    pointers |= dict.fromkeys(("q_square", "k_variance", "thresholds"), "*fp32")
    tables = ("n_keys", "counts", "indices", "forced", "near", "out_counts", "out_indices")
    pointers |= dict.fromkeys(tables, "*i32")
    types = {name: pointers.get(name, "fp32" if name == "scale" else "i32") for name in _select_blocks.arg_names}
    return ahead_of_time.build(_select_blocks, types, constants, list(pointers), arch, {"num_warps": warps})


def types_of(kernel, dtype: str) -> dict[str, str]:
    operands = dict.fromkeys(("q", "k", "v", "kept", "dropped", "out"), f"*{dtype}")
    operands |= dict.fromkeys(("both", "products"), "*fp32" if dtype == "fp32" else "*bf16")
    operands |= dict.fromkeys(("variance", "weights", "squares", "kept_lse", "dropped_lse", "lse"), "*fp32")
    operands |= {"n_valid": "*i32", "wanted": "*i32", "key_mask": "*i1", "scale": "fp32"}
    return {name: operands.get(name, "i32") for name in kernel.arg_names}


def build_moments(arch: int | str, dtype: str, dim: int) -> Iterator[Any]:
    """Each kernel of the covariances for blocks of 128 tokens with a key mask."""
    half = dtype != "fp32"
    precision = {"PRECISION": "tf32" if half else "tf32x3"}
    sizes = {"D": dim, "BLOCK_D": dim, **precision}
    for kernel, constants in (
        (kernels._block_moments, {**sizes, **launchers.block_sizes(dim, half), "BLOCK_KV": 128, "HAS_MASK": True}),
        (kernels._weigh_moments, {**launchers.weigh_sizes(half), **precision}),
        (kernels._second_order, {**sizes, **launchers.query_sizes(dim, half), "BLOCK_Q": 128, "BLOCK_M": 64}),
    ):
        types = types_of(kernel, dtype)
        aligned = [n for n in kernel.arg_names if types[n].startswith("*") or re.match("stride_[qkv]", n)]
        options = {"num_warps": constants.pop("num_warps"), "num_stages": constants.pop("num_stages", 3)}
        yield ahead_of_time.build(kernel, types, constants, aligned, arch, options)


def build_mass(arch: int | str, dtype: str, dim: int, block_kv: int) -> Any:
    """Compile `block_mass` for blocks of 128 queries, ragged, with a key mask and a flag."""
    from dynamicrad_compile.kernels.mass_triton import EACH_TILE, _block_mass

    half = dtype != "fp32"
    tile = choose_tile(divmod(int(arch), 10), half, dim, 128, EACH_TILE if block_kv == 1 else block_kv)
    constants = {"D": dim, "BLOCK_D": dim, "BLOCK_KV": block_kv, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants |= dict.fromkeys(("RAGGED", "HAS_MASK", "HAS_REFRESH"), True)
    constants |= {"WIDEN": False, "PRECISION": "tf32" if half else "tf32x3"}
    pointers = dict.fromkeys(("q", "k"), f"*{dtype}") | dict.fromkeys(("lse", "mass"), "*fp32")
    pointers |= dict.fromkeys(("key_mask", "refresh"), "*i1")
    types = {name: pointers.get(name, "fp32" if name == "scale" else "i32") for name in _block_mass.arg_names}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return ahead_of_time.build(_block_mass, types, constants, list(pointers), arch, options)


def build_search(arch: int | str) -> Iterator[Any]:
    """Compile each kernel of `search_blocks` behind the masses, with a flag."""
    from dynamicrad_compile.kernels import search_triton as launch
    from dynamicrad_compile.kernels import search_triton_kernels as search

    pointers = dict.fromkeys(("mass", "held", "recall"), "*fp32") | {"refresh": "*i1", "threshold": "fp32"}
    tables = ("n_keys", "counts", "indices", "keys", "budgets", "limits", "places", "out_counts", "out_indices")
    pointers |= dict.fromkeys(tables, "*i32")
    row = {"BLOCK_C": launch.ROW["BLOCK_C"], "HAS_REFRESH": True}
    head = {"BLOCK_C": launch.HEAD["BLOCK_C"], "HAS_REFRESH": True, "HAS_BUDGETS": True}
    for kernel, constants, warps in (
        (search._rank_blocks, {**row, "BLOCK_W": launch.LISTED, "BY_ERROR": True}, launch.ROW["num_warps"]),
        (search._cut_heads, head, launch.HEAD["num_warps"]),
        (search._share_budgets, {"BLOCK_H": 64, "HAS_REFRESH": True}, 4),
        (search._list_blocks, row, launch.ROW["num_warps"]),
    ):
        types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
        aligned = [name for name in kernel.arg_names if types[name].startswith("*")]
        yield ahead_of_time.build(kernel, types, constants, aligned, arch, {"num_warps": warps})
