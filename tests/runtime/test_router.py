"""The router's function and class: against a slow reference, its edge cases, files, graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dynamicrad_compile.errors import RouterError
from dynamicrad_compile.runtime.router import CLASSES, SAFE_REGIME, Router, motion_scores, route

HIGH = CLASSES.index("high")


def reference(embeds, mask, weight, bias):
    """Row by row, in fp64."""
    regimes = []
    for row in range(embeds.shape[0]):
        tokens = embeds[row].double()
        if tokens.dim() == 1:
            tokens = tokens[None]
        if mask is None:
            keep = [t for t in range(len(tokens)) if bool((tokens[t] != 0).any())]
        else:
            line = mask[row % mask.shape[0]].flatten()
            keep = [t for t in range(len(tokens)) if bool(line[t] != 0)]
        if not keep:
            regimes.append(HIGH)
            continue
        mean = sum(tokens[t] for t in keep) / len(keep)
        if not bool(torch.isfinite(mean).all()) or float(mean.norm()) == 0:
            regimes.append(HIGH)
            continue
        scores = weight.double() @ (mean / mean.norm()) + bias.double()
        regimes.append(int(scores.argmax()))
    return torch.tensor(regimes)


def layer(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, channels, generator=generator), 0.1 * torch.randn(3, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masking", ["none", "bool", "int", "float", "shared", "4d"])
@pytest.mark.parametrize(("batch", "tokens", "channels"), [(1, 1, 8), (5, 7, 16), (16, 33, 40)])
def test_route_is_the_reference(dtype, masking, batch, tokens, channels):
    generator = torch.Generator().manual_seed(batch)
    embeds = torch.randn(batch, tokens, channels, generator=generator).to(dtype)
    mask = None
    if masking == "none":
        embeds[:, tokens // 2 + 1 :] = 0  # padding
    else:
        keep = torch.rand(1 if masking == "shared" else batch, tokens, generator=generator) < 0.6
        mask = {"int": keep.long(), "float": keep.float(), "4d": keep[:, None, None]}.get(masking, keep)
    weight, bias = layer(channels)
    regimes = route(embeds, mask, weight, bias)
    assert regimes.dtype == torch.int64
    assert regimes.tolist() == reference(embeds, mask, weight, bias).tolist()


def test_pooled_embeddings_and_one_token_agree():
    embeds = torch.randn(6, 12)
    weight, bias = layer(12)
    assert torch.equal(route(embeds, None, weight, bias), route(embeds[:, None], None, weight, bias))


def test_scale_and_padding_do_not_matter():
    embeds = torch.randn(4, 5, 12)
    weight, bias = layer(12)
    padded = torch.cat([embeds, torch.zeros(4, 9, 12)], dim=1)
    expected = motion_scores(embeds, None, weight, bias)
    torch.testing.assert_close(motion_scores(padded, None, weight, bias), expected)
    torch.testing.assert_close(motion_scores(1e-20 * embeds, None, weight, bias), expected)
    torch.testing.assert_close(motion_scores(1e20 * embeds, None, weight, bias), expected)


def test_unusable_prompts_take_the_safe_regime():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-9.0, -9.0]])
    bias = torch.tensor([5.0, 0.0, -5.0])  # low wins wherever the prompt can be read
    assert SAFE_REGIME == HIGH
    embeds = torch.ones(6, 3, 2)
    embeds[1, 1, 0] = float("nan")
    embeds[2, 2, 1] = float("inf")
    embeds[3] = 0
    assert route(embeds, None, weight, bias).tolist() == [0, 2, 2, 2, 0, 0]
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[1, 1] = mask[2, 2] = False  # not a number, but only in padding
    mask[4] = False
    assert route(embeds, mask, weight, bias).tolist() == [0, 0, 0, 2, 2, 0]
    assert route(torch.zeros(2, 0, 2), None, weight, bias).tolist() == [2, 2]


def test_batch_rows_are_routed_separately():
    weight = torch.eye(3)
    embeds = torch.eye(3)[torch.tensor([2, 0, 1, 0])][:, None].expand(4, 6, 3)
    assert route(embeds, None, weight, torch.zeros(3)).tolist() == [2, 0, 1, 0]


class Routed(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        weight, bias = layer(channels)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, embeds, mask=None):
        return route(embeds, mask, self.weight, self.bias)


@pytest.mark.parametrize("masked", [False, True])
def test_export_and_symbolic_trace(masked):
    model = Routed(16)
    arguments = (torch.randn(3, 9, 16),) + ((torch.rand(3, 9) < 0.7,) if masked else ())
    expected = model(*arguments)
    program = torch.export.export(model, arguments)
    assert torch.equal(program.module()(*arguments), expected)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert len(called) < 20
    assert not {name for name in called if not name.startswith("aten.")}
    assert not {name for name in called if "item" in name or "nonzero" in name or "_local_scalar" in name}


def test_dynamic_batch_and_length():
    model = Routed(16)
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=512)
    shapes = ({0: batch, 1: tokens},)
    program = torch.export.export(model, (torch.randn(3, 9, 16),), dynamic_shapes=shapes)
    embeds = torch.randn(7, 20, 16)
    assert torch.equal(program.module()(embeds), model(embeds))


def test_compiled_without_graph_breaks():
    model = Routed(16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    embeds = torch.randn(4, 6, 16).to(torch.bfloat16)
    assert torch.equal(compiled(embeds), model(embeds))


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Routed(16).eval()
    embeds = torch.randn(5, 6, 16)
    embeds[1] = 0
    embeds[2, 0, 0] = float("nan")
    file = tmp_path / "route.onnx"
    torch.onnx.export(model, (embeds,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file))
    (regimes,) = session.run(None, {session.get_inputs()[0].name: embeds.numpy()})
    assert regimes.tolist() == model(embeds).tolist()


@pytest.fixture
def router():
    weight, bias = layer(16)
    return Router(
        weight,
        bias,
        encoder='UMT5 "tiny" \\ 文字',
        accuracy=0.95,
        confusion=[[9, 1, 0], [0, 10, 0], [0, 1, 9]],
        accuracy_by={"language": {"en": 0.97, "zh": 0.9}},
        prompts=30,
        regularisation=1.0,
        mid_offset=0.2,
        masked=True,
        date="2025-01-01",
        packages={"torch": "2.11"},
    )


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".toml"])
def test_save_and_load(router, tmp_path, suffix):
    written = router.save(tmp_path / "deep" / f"wan2.1{suffix or '.safetensors'}")
    assert sorted(file.name for file in written.parent.iterdir()) == ["wan2.1.safetensors", "wan2.1.toml"]
    loaded = Router.load(written.with_name(f"wan2.1{suffix or '.toml'}"))
    for item in dataclasses.fields(Router):
        ours, theirs = getattr(router, item.name), getattr(loaded, item.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    embeds = torch.randn(4, 3, 16)
    assert torch.equal(loaded.predict(embeds), router.predict(embeds))
    assert loaded.embedding_dim == 16
    assert "95.0%" in loaded.report()


def with_reach(head):
    """A router of 5 centers in 6 channels, the last of which nothing is in reach of."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    reach = torch.tensor([4.0, 4.0, 4.0, 4.0, -9.0])
    weight = draw(3, 5 if head == "kernel" else 6)
    return Router(weight, draw(3), draw(4, 6), draw(4), draw(5, 4), reach, draw(2, 6), abstained=0.01)


@pytest.mark.parametrize("head", ["kernel", "linear"])
def test_reach_is_the_distance_from_the_nearest_center(head):
    router = with_reach(head)
    assert router.head == head
    assert router.embedding_dim == 6
    embeds = torch.randn(400, 6)
    unit = (embeds / embeds.norm(dim=1, keepdim=True)).double()
    z = unit @ router.projection.double().T + router.shift.double()
    apart = torch.cdist(z, router.centers.double()).square()
    beside = (unit * router.spread[0] + router.spread[1]).square().sum(1) - z.square().sum(1)
    known = apart.amin(1) + beside < router.reach.double()[apart.argmin(1)]
    assert 0 < int(known.sum()) < 400
    assert torch.equal(router.knows(embeds), known)
    assert torch.equal(router.predict(embeds), torch.where(known, router.scores(embeds).argmax(-1), SAFE_REGIME))


@pytest.mark.parametrize("head", ["kernel", "linear"])
def test_a_router_with_a_reach_saves_exports_and_compiles(head, tmp_path):
    router = with_reach(head)
    loaded = Router.load(router.save(tmp_path / "r"))
    embeds = torch.randn(200, 3, 6)
    assert "schema = 2" in (tmp_path / "r.toml").read_text()
    assert loaded.abstained == 0.01
    assert torch.equal(loaded.predict(embeds), router.predict(embeds))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for index, tensor in enumerate(router.tensors()):
                self.register_buffer(f"part{index}", tensor)

        def forward(self, embeds):
            return route(embeds, None, *self.buffers())

    program = torch.export.export(Model(), (embeds,))
    assert torch.equal(program.module()(embeds), router.predict(embeds))
    assert not {n for n in map(str, (node.target for node in program.graph.nodes)) if "item" in n or "nonzero" in n}
    assert torch.equal(torch.compile(Model(), backend="aot_eager", fullgraph=True)(embeds), router.predict(embeds))
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(Model().eval(), (embeds,), tmp_path / "r.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "r.onnx"))
    (regimes,) = session.run(None, {session.get_inputs()[0].name: embeds.numpy()})
    assert regimes.tolist() == router.predict(embeds).tolist()


def test_a_router_saved_before_there_was_a_reach_still_loads(router, tmp_path):
    file = router.save(tmp_path / "old")
    assert "schema = 1" in file.with_suffix(".toml").read_text()
    loaded = Router.load(file)
    assert loaded.knows(torch.randn(4, 3, 16)).tolist() == [True] * 4
    assert "fitted anew" in loaded.report()


def test_broken_files(router, tmp_path):
    file = router.save(tmp_path / "r")
    notes = file.with_suffix(".toml")
    text = notes.read_text(encoding="utf-8")
    blob = file.read_bytes()

    def fails(match, toml=text, weights=blob):
        notes.write_text(toml, encoding="utf-8")
        file.write_bytes(weights)
        with pytest.raises(RouterError, match=match):
            Router.load(file)

    fails("not the file that", weights=blob[:-1] + b"\0")
    fails("not valid TOML", toml="= 3")
    fails("classes must be", toml=text.replace('["low", "mid", "high"]', '["slow", "fast"]'))
    fails("schema must be", toml=text.replace("schema = 1", "schema = 99"))
    fails("embedding_dim is 17", toml=text.replace("embedding_dim = 16", "embedding_dim = 17"))
    fails("unknown keys", toml="colour = 3\n" + text)
    notes.unlink()
    with pytest.raises(RouterError, match="there is no router"):
        Router.load(file)


def test_wrong_inputs(router):
    with pytest.raises(RouterError, match="fitted to UMT5"):
        router.predict(torch.randn(2, 5, 15))
    with pytest.raises(RouterError, match="floating point"):
        router.predict(torch.ones(2, 5, 16, dtype=torch.long))
    with pytest.raises(RouterError, match="mask must be"):
        router.scores(torch.randn(2, 5, 16), torch.ones(2, 6))
    with pytest.raises(RouterError, match="pooled already"):
        router.predict(torch.randn(2, 16), torch.ones(2, 1))
    with pytest.raises(RouterError, match="weight must be"):
        Router(torch.zeros(4, 16), torch.zeros(3))
    with pytest.raises(RouterError, match="reach and spread come together"):
        Router(torch.zeros(3, 4), torch.zeros(3), reach=torch.zeros(1), spread=torch.zeros(2, 4))
    with pytest.raises(RouterError, match="don't fit together"):
        dataclasses.replace(with_reach("kernel"), reach=torch.zeros(4))
    with pytest.raises(RouterError, match="aren't finite"):
        Router(torch.full((3, 4), float("nan")), torch.zeros(3))
