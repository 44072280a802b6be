"""Proxies of the tuner: as published, deterministic, as sharp and as lively as stated."""

from __future__ import annotations

import pytest
import torch
from support.tuning import GRID

from dynamicrad_compile.errors import DynamicRadError
from dynamicrad_compile.profiles import REGIMES
from dynamicrad_compile.tuning.proxy import MASS, PROXIES, PUBLISHED_NOISE, published_proxy, video_proxy


@pytest.mark.parametrize("motion", REGIMES)
def test_published_proxy_is_the_published_recursion(motion):
    q, k, v = published_proxy(GRID, motion, 3, 16, seed=4)
    assert q is k is v
    noise = PUBLISHED_NOISE[motion]
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 42, 16, generator=generator)
    for frame in range(5):
        if frame:
            x = (1 - noise) * x + noise * torch.randn(3, 42, 16, generator=generator)
        expected = x / x.norm(dim=-1, keepdim=True) * 4.0
        torch.testing.assert_close(q[:, 42 * frame : 42 * (frame + 1)], expected)


@pytest.mark.parametrize("name", PROXIES)
def test_proxies_are_deterministic_and_have_text(name):
    one, same, other = (PROXIES[name](GRID, "mid", 4, 24, seed, 3, 8) for seed in (1, 1, 2))
    for a, b, c in zip(one, same, other, strict=True):
        assert a.shape == (4, 3 + 210 + 8, 24)
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert a.isfinite().all()


def test_video_proxy_attention_is_as_sharp_as_stated():
    q, k, _ = video_proxy((8, 12, 12), "mid", 4, 64, seed=0)
    weights = (q @ k.transpose(1, 2) / 8.0).softmax(dim=-1)
    tenth = weights.sort(dim=-1, descending=True).values[..., :115].sum(dim=-1).mean(dim=1)
    assert tenth[:3].tolist() == pytest.approx(list(MASS.values())[:3], abs=0.05)
    # The sink head gives the first frame its share.
    assert float(weights[3, :, :144].sum(-1).mean()) > 0.3


def test_video_proxy_moves_more_in_high_motion():
    """The same place in the next frame gets less of a temporal head's attention when content moves."""
    shares = []
    for motion in REGIMES:
        q, k, _ = video_proxy((6, 16, 16), motion, 2, 64, seed=1)
        weights = (q[1] @ k[1].T / 8.0).softmax(dim=-1)
        shares.append(float(weights.diagonal(offset=256).mean()))
    assert shares[0] > shares[1] > shares[2]


def test_unknown_motion():
    with pytest.raises(DynamicRadError, match="Did you mean 'high'"):
        published_proxy(GRID, "hihg", 1, 8, 0)
