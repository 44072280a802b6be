"""The suite's calls of each form of the kernels, as they run on a GPU, by Triton's interpreter; and its candidates."""

from __future__ import annotations

import pytest
import torch
from suite import correctness, variants
from support.interpreter import Interpreter

from dynamicrad_compile.kernels.tiles import SHARED_MEMORY


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    process = Interpreter(tmp_path_factory.mktemp("variants"))
    yield process
    process.close()


@pytest.mark.parametrize(
    ("kernel", "case", "direction", "served"),
    [
        ("triton", "blocks of 128", "forward", True),
        ("triton", "fp32", "forward", True),
        ("triton", "blocks of 64", "backward", True),
        ("tma", "blocks of 128", "forward", True),
        ("tma", "blocks of 64", "forward", True),
        ("tma", "fp32", "forward", False),
        ("gluon", "blocks of 64", "forward", False),
        ("gluon_pingpong", "fp32", "forward", False),
    ],
)
def test_forms_are_right_or_say_that_they_do_not_serve(kernel, case, direction, served: bool, interpreter):
    (error,) = interpreter("variant_cases", kernel, case, direction)
    assert (error >= 0) == served
    assert error <= correctness.BACKWARD_BOUND[torch.bfloat16]


@pytest.mark.parametrize("dim", [64, 128])
def test_candidates_fit_the_chip(dim):
    tiles = variants.candidates(90, dim)
    assert len(set(tiles)) == len(tiles)
    assert [tile.kernel for tile in variants.candidates(80, dim)] == ["triton"] * len(variants.candidates(80, dim))
    for tile in tiles:  # queries once, keys and values for each stage
        rows = tile.block_m + 2 * tile.num_stages * tile.block_n
        assert 2 * dim * rows <= SHARED_MEMORY[90]
    few = variants.candidates(90, dim, few=True)
    assert set(few) < set(tiles)
    assert {tile.kernel for tile in few} == set(variants.FORWARD)
