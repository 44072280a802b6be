"""What `dynamicrad explain` expects of the speed, alone and with --ranks; mistakes are told before a model is built."""

from __future__ import annotations

import json

import pytest

from dynamicrad_compile import cli
from dynamicrad_compile.models.fake import build, other_flops

SMALL = ["explain", "--model", "wan-1.3b", "--frames", "17", "--height", "256", "--width", "256"]
SMALL += ["--set", "min_tokens=0", "--set", "pattern=radial"]


def run(capsys, *argv):
    """Exit code, stdout and stderr of a command."""
    code = cli.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_table(capsys):
    code, out, err = run(capsys, *SMALL, "--layers", "1", "--ranks", "4", "--link", "25", "--device", "4090")
    assert code == 0, err
    assert "1 layers of each kind, 4 x RTX 4090 on paper, 25 GB/s each way between GPUs (PCIe 4.0 x16)" in out
    for name in ("ulysses 4", "ulysses 2 x ring 2", "ring 4"):
        assert f"\n{name} " in out
    assert out.count("<- fastest") == 1


def test_json_of_all_layers(capsys, tmp_path):
    from diffusers import WanTransformer3DModel

    sizes = dict(num_attention_heads=4, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=3)
    WanTransformer3DModel(**sizes, text_dim=16, ffn_dim=32).save_config(tmp_path)
    code, out, err = run(capsys, *SMALL, "--model", str(tmp_path), "--ranks", "8", "--json")
    assert code == 0, err
    values = json.loads(out)
    assert sum(site["replaced"] for site in values["sites"]) == 3
    ranks = values["ranks"]
    assert (ranks["ranks"], ranks["device"], ranks["link"], ranks["layers"]) == (8, "H100 SXM", 450.0, "all layers")
    assert ranks["measured"] is False
    assert [(one["ulysses"], one["ring"]) for one in ranks["layouts"] if not one["dealt"]] == [(4, 2), (2, 4), (1, 8)]
    assert sum(one["best"] for one in ranks["layouts"]) == 1
    # q, k, v, output: 3 layers of 1280 tokens, 4 heads of 24, 2 bytes; 3/4 of an eighth, and half of the gathered
    assert ranks["layouts"][0]["moved_bytes"] == 3 * 1280 * 4 * 24 * 2 * (4 / 8 * 3 / 4 + 2 / 4 / 2)


def test_expectation_is_that_of_all_layers(capsys, tmp_path):
    """With one layer captured it is what it is with all of them, and what the simulation says of one GPU."""
    page = tmp_path / "page.html"
    one = run(capsys, *SMALL, "--layers", "1", "--device", "h100", "--html", str(page))
    code, out, err = run(capsys, *SMALL, "--layers", "0", "--ranks", "1", "--device", "h100", "--json")
    assert (one[0], code) == (0, 0), err
    values = json.loads(out)
    cpu, gpu = values["expected"][-2:]
    assert (cpu["device"], cpu["measured"], gpu["device"], gpu["measured"]) == ("this CPU", True, "H100 SXM", False)
    assert gpu["step"] == pytest.approx(values["ranks"]["dense_ms"] / values["ranks"]["sparse_ms"])
    lines = [line for line in one[1].splitlines() if line.startswith("expected on")]
    for line, expected in zip(lines[-2:], (cpu, gpu), strict=True):
        assert f"attention {expected['attention']:.1f}x, step {expected['step']:.1f}x" in line
        assert f"attention is {expected['share']:.0%} of a dense step" in line
        assert line in page.read_text()


def test_flops_of_all_but_attention():
    one, two = (other_flops(*build("wan-1.3b", frames=17, height=256, width=256, layers=n)) for n in (1, 2))
    tokens, width, text, ffn = 1280, 1536, 512, 8960
    # four projections and two of the feed-forward; queries and output, keys and values of the prompt
    layer = 2 * tokens * width * (4 * width + 2 * width + 2 * ffn) + 2 * text * width * 2 * width
    assert two - one == layer


MISTAKES = {
    "too many": (["--ranks", "65"], "ranks must be an integer in 1..64, got 65"),
    "device": (["--ranks", "2", "--device", "h20o"], "Did you mean 'h200'"),
    "link": (["--ranks", "2", "--link", "-1"], "positive number of GB/s"),
    "device alone": (["--device", "h20o"], "Did you mean 'h200'"),
    "link alone": (["--link", "25"], "--link needs --ranks"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(capsys, monkeypatch, name):
    monkeypatch.setattr("dynamicrad_compile.models.fake.build", None)
    arguments, text = MISTAKES[name]
    code, _, err = run(capsys, *SMALL, *arguments)
    assert code == 2
    assert text in err
