"""What to expect on a device: the figures by hand, and what is not known."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import dynamicrad_compile as drad
from dynamicrad_compile.parallel.chips import CHIPS, CPU
from dynamicrad_compile.parallel.expected import expected_on
from dynamicrad_compile.plans.crossover import expected_gain, load
from dynamicrad_compile.reporting.report import GraphReport, Report, SiteReport, TextTokens

TOKENS, HEADS, DIM = 8192, 2, 64
FLOPS = 4 * HEADS * TOKENS**2 * DIM


def site(path="blocks.0.attn1", **values):
    """A video self-attention, sparse unless it is said otherwise."""
    known = dict(
        role="video_self_attention",
        replaced=True,
        reason="",
        grid=(8, 32, 32),
        text_tokens=TextTokens(0, 0),
        shape=(1, HEADS, TOKENS, DIM),
        kv_length=TOKENS,
        sparsity=0.8,
        dtype="float32",
    )
    return SiteReport(path=path, **{**known, **values})


def report(*sites):
    return Report([GraphReport(list(sites), [], {})])


def test_figures_by_hand():
    """Two sparse layers of which fifteen stand behind each, and a dense one, on a GPU and on a CPU."""
    found = report(site(), site(), site("refiner", replaced=False, sparsity=0.0))
    rest = 10 * FLOPS
    times = lambda one: 15 if one.replaced else 1  # noqa: E731
    for chip, rate in ((CHIPS["h100"], 0.42), (CPU, 0.75)):
        gain = expected_gain(chip.arch, TOKENS, 0.8, DIM, half=chip is not CPU).ratio
        dense, sparse, other = 31 / rate, (30 / gain + 1) / rate, 10 / 0.75
        one = expected_on(chip, found, rest_flops=rest, times=times)
        assert one.attention == pytest.approx(dense / sparse)
        assert one.step == pytest.approx((dense + other) / (sparse + other))
        assert one.share == pytest.approx(dense / (dense + other))
        assert one.measured == (chip is CPU)


def test_source_is_said():
    gpu, cpu = (expected_on(one, report(site()), rest_flops=0) for one in (CHIPS["h100"], torch.device("cpu")))
    assert "estimated, nothing measured: cost model, H100, 2026" in str(gpu)
    assert "attention alone measured on AMD EPYC" in str(cpu)
    assert cpu.device == "this CPU"


def test_numbers_of_the_dtype():
    one, two = (
        expected_on(CPU, report(site(dtype=dtype)), rest_flops=0).attention for dtype in ("float32", "bfloat16")
    )
    assert one == pytest.approx(expected_gain("cpu", TOKENS, 0.8, DIM, half=False).ratio)
    assert two == pytest.approx(expected_gain("cpu", TOKENS, 0.8, DIM, half=True).ratio)


def test_dense_where_it_does_not_pay():
    short = report(site(shape=(1, HEADS, 1024, DIM), kv_length=1024))
    found = expected_on(CHIPS["h100"], short, rest_flops=FLOPS)
    assert (found.attention, found.step) == (1.0, 1.0)
    assert "no gain, attention stays dense there" in str(found)
    assert expected_on(CHIPS["h100"], short, rest_flops=FLOPS, forced=True).attention < 1.0


def test_what_is_not_known_is_said():
    cases = {
        "dense_layers": (report(site(), site(replaced=False, code="dense_layers")), "--layers 0"),
        "size": (report(site(shape=None, kv_length=None)), "depends on data"),
    }
    for name, (found, text) in cases.items():
        one = expected_on(CPU, found, rest_flops=1.0, times=lambda one: 15)
        assert one.attention is None, name
        assert f"not known, {one.unknown}" in str(one)
        assert text in one.unknown
    one = expected_on(torch.device("meta"), report(site()), rest_flops=1.0)
    assert str(one) == "expected on meta: not known, no table has figures for this device"
    one = expected_on(CPU, report(site()), rest_flops=None, unknown="its FLOPs can't be counted")
    assert one.attention > 1
    assert one.step is None
    assert "step not known, its FLOPs can't be counted" in str(one)
    one = expected_on(CPU, report(site(replaced=False, sparsity=0.0)), rest_flops=1.0)
    assert str(one) == "expected on this CPU: no gain, no attention is sparse"


def test_every_table_has_rates():
    assert {table.arch for table in load()} == {CPU.arch, *(chip.arch for chip in CHIPS.values())}


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv3d(4, 64, (1, 2, 2), (1, 2, 2))
        self.qkv, self.out = torch.nn.Linear(64, 192), torch.nn.Linear(64, 64)

    def forward(self, video):
        x = self.patch(video)
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 1, 64)).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return tokens + self.out(y.transpose(1, 2).flatten(2))


def test_explain_counts_the_flops_of_its_graphs():
    torch.manual_seed(0)
    options = {"sparsity": 0.8, "mode": "static_ratio", "min_tokens": 0, "covariance": False}
    found = drad.explain(Layer(), torch.randn(1, 4, 5, 32, 32), options=options)
    tokens = 5 * 16 * 16
    attention, rest = 4 * tokens**2 * 64, 2 * tokens * 64 * (4 * 4 + 192 + 64)
    (one,) = found.expected
    assert one.share == pytest.approx(attention / (attention + rest), rel=0.01)
    assert str(one) in str(found)
    assert f'"step": {one.step}' in found.to_json()
    assert dataclasses.asdict(one) == one.to_dict()


def test_a_graph_without_products_is_explained():
    """Nothing is counted there, not even a total."""
    report = drad.explain(lambda x: x * 2, torch.randn(2, 3))
    assert [one.basis for one in report.expected] == ["no attention is sparse"]
