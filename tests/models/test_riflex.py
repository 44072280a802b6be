"""One frequency of a RoPE lowered: against tables made anew; compiled models follow; all is put back."""

from __future__ import annotations

import math

import pytest
import torch
from support.graphs import compile_sparse, drad, first_output, make, masked_dense, relative_error

from dynamicrad_compile.errors import DynamicRadError
from dynamicrad_compile.models.riflex import lowered, riflex


def freqs_of(dim, theta=10000.0):
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@pytest.mark.parametrize(
    ("dim", "theta", "trained", "k"),
    [(16, 256.0, 33, 3), (16, 10000.0, 13, 1), (44, 10000.0, 21, 3), (12, 10000.0, 16, 1)],
)
def test_the_first_that_never_came_back_in_training_is_lowered(dim, theta, trained, k):
    freqs = freqs_of(dim, theta)
    found = lowered(freqs, 2 * trained, trained)
    assert (found != freqs).nonzero().flatten().tolist() == [k]
    assert float(found[k]) == pytest.approx(0.9 * 2 * math.pi / (2 * trained))
    assert float(lowered(freqs, 4 * trained, trained, share=1.0)[k]) == pytest.approx(2 * math.pi / (4 * trained))
    assert torch.equal(lowered(freqs, trained, trained), freqs)
    assert torch.equal(lowered(freqs, 2 * trained, trained, component=len(freqs) - 1), freqs)  # slower already


def test_wrong_numbers_are_said():
    freqs = freqs_of(12)
    for arguments, said in (
        ((0, 4), "at least 1, got 0 and 4"),
        ((8, 4, 6), "one of 0 to 5, got 6"),
        ((8, 4, None, 0.0), "share must be above 0"),
        ((2 * 10**6, 10**6), "no component has a period of 1000000 frames"),
    ):
        with pytest.raises(DynamicRadError, match=said):
            lowered(freqs, *arguments)
    with pytest.raises(DynamicRadError, match="Linear has no RoPE table"), riflex(torch.nn.Linear(2, 2), 8, 4):
        pass
    model = make("wan_t2v")[0]
    before = model.rope.freqs_cos.clone()
    too_many = len(before) + 1
    with pytest.raises(DynamicRadError, match=f"fewer than the {too_many} frames"), riflex(model, too_many, 4):
        pass
    with pytest.raises(ZeroDivisionError), riflex(model, 8, 4):
        _ = 1 / 0
    assert torch.equal(model.rope.freqs_cos, before)


def test_the_table_is_one_of_the_lowered_frequency():
    model = make("wan_t2v")[0]
    rope, cos, sin = model.rope, model.rope.freqs_cos.clone(), model.rope.freqs_sin.clone()
    freqs = lowered(freqs_of(rope.t_dim), 24, 6)
    angles = torch.outer(torch.arange(len(cos), dtype=torch.float64), freqs).repeat_interleave(2, dim=1)
    with riflex(model, 24, 6):
        torch.testing.assert_close(rope.freqs_cos[:, : rope.t_dim].double(), angles.cos(), atol=1e-6, rtol=0)
        torch.testing.assert_close(rope.freqs_sin[:, : rope.t_dim].double(), angles.sin(), atol=1e-6, rtol=0)
        assert torch.equal(rope.freqs_cos[:, rope.t_dim :], cos[:, rope.t_dim :])
    assert torch.equal(rope.freqs_cos, cos)
    assert torch.equal(rope.freqs_sin, sin)


def test_a_compiled_model_follows():
    torch.manual_seed(0)
    model, inputs, _ = make("wan_t2v", f=9)
    compiled = compile_sparse(model, pattern="radial", block_size=16, min_tokens=0, inner="eager")

    def both():
        with torch.no_grad():
            found = first_output(compiled(**inputs))
            plan = drad.report(compiled).replaced[0].plan
            with masked_dense(plan):
                return found, first_output(model(**inputs))

    plain, expected = both()
    assert relative_error(plain, expected) < 1e-5
    with riflex(model, 9, 3):
        changed, expected = both()
        assert relative_error(changed, expected) < 1e-5
        assert relative_error(changed, plain) > 1e-4
    assert torch.equal(both()[0], plain)
    assert len(drad.report(compiled).graphs) == 1
