"""Ids of Hugging Face: the configuration in its local cache, presets of the same sizes, and what is said of others."""

from __future__ import annotations

import json

import pytest

from dynamicrad_compile import DynamicRadError
from dynamicrad_compile.models.fake import build, specify
from dynamicrad_compile.models.presets import HUB_IDS, PRESETS

SIZES = {"frames": 17, "height": 256, "width": 256, "layers": 1}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with the configuration of the pipeline me/video; no network can be asked."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", None)
    repo = tmp_path / "models--me--video"
    snapshot = repo / "snapshots" / "abc"
    sizes = {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 3, "text_dim": 16, "ffn_dim": 32}
    write(snapshot / "transformer" / "config.json", {"_class_name": "WanTransformer3DModel", **sizes})
    write(snapshot / "vae" / "config.json", {"scale_factor_temporal": 4, "scale_factor_spatial": 16})
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    return snapshot


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("place", ["pipeline", "transformer"])
def test_configuration_of_the_cache(cache, place):
    if place == "transformer":
        (cache / "transformer" / "config.json").rename(cache / "config.json")
    model, inputs = build("me/video", **SIZES)
    assert (model.config.num_attention_heads, model.config.num_layers) == (4, 1)
    assert inputs["hidden_states"].shape[-2:] == (16, 16)  # 16 pixels a latent, as its VAE says


def test_cache_comes_before_presets(cache):
    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert specify(name, **SIZES)[1]["num_attention_heads"] == 12
    (cache.parents[1]).rename(cache.parents[2] / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers")
    assert specify(name, **SIZES)[1]["num_attention_heads"] == 4


def test_ids_of_presets_are_presets():
    assert set(HUB_IDS.values()) <= set(PRESETS)


def test_others_are_told_where_to_get_it(cache):
    with pytest.raises(DynamicRadError, match=r"hf download you/else transformer/config.json`\.$") as error:
        build("you/else")
    assert str(cache.parents[2]) in str(error.value)
    with pytest.raises(DynamicRadError, match="or take the preset 'wan-14b', which is Wan-AI/"):
        build("Wan-AI/Wan2.1-T2V-14B")
    with pytest.raises(DynamicRadError, match="no such path"):
        build("./no/such/folder")
