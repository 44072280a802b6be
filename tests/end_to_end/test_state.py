"""State belongs to a model and a request, not to a graph: models of equal code, threads, requests, copies."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch
from support.graphs import compile_sparse, drad, first_output, make, relative_error
from support.marks import INNER, slow

from dynamicrad_compile.captured import _captured
from dynamicrad_compile.noting import notes_of
from dynamicrad_compile.runtime.router import Router

STEPS = (900.0, 700.0, 500.0, 300.0)
GATED = [True, True, False, False]  # dense at the first two steps
OPTIONS = dict(block_size=16, inner="eager", sparsity=0.6, regime="mid", min_tokens=0, covariance=False)
LOW, MID, HIGH = range(3)


def net(seed):
    torch.manual_seed(seed)
    return make("wan_t2v")[0]


@pytest.fixture(scope="module")
def models():
    return net(0), net(7)


@pytest.fixture(scope="module")
def inputs():
    return make("wan_t2v")[1]


def fast(model, **options):
    return compile_sparse(model, **{**OPTIONS, **options})


def run(call, inputs, timestep, **changes):
    with torch.no_grad():
        return first_output(call(**{**inputs, "timestep": torch.full_like(inputs["timestep"], timestep), **changes}))


def is_dense(compiled, model, inputs, timestep):
    return relative_error(run(compiled, inputs, timestep), run(model, inputs, timestep)) < 1e-5


@pytest.mark.parametrize("inner", INNER)
def test_models_that_share_a_graph_share_no_clock(models, inputs, inner):
    a, b = (fast(model, dense_steps=2, inner=inner) for model in models)
    found = []
    for timestep in STEPS:
        run(a, inputs, timestep)
        found.append(is_dense(b, models[1], inputs, timestep))
    assert found == GATED
    (one,), (other,) = drad.report(a).graphs, drad.report(b).graphs
    assert one.state is other.state
    for compiled in (a, b):
        assert drad.report(compiled).replaced[0].sparsity == pytest.approx(0.3, abs=0.03)


def test_the_report_counts_the_calls_of_its_own_model(models, inputs):
    a, b = (fast(model, dense_steps=2) for model in models)
    for timestep in STEPS[:2]:
        run(a, inputs, timestep)
    for timestep in STEPS:
        run(b, inputs, timestep)
    assert drad.report(a).replaced[0].sparsity == 0.0
    assert drad.report(b).replaced[0].sparsity == pytest.approx(0.3, abs=0.03)


def interleaved(enter, steps=STEPS):
    """(request, timestep) of two requests, the second a step behind the first, each inside its generation."""
    for i in range(len(steps) + 1):
        for request, at in enumerate((i, i - 1)):
            if 0 <= at < len(steps):
                with enter[request]:
                    yield request, steps[at]


@pytest.mark.parametrize("compiler", [fast, slow("drad.compile")], ids=["torch.compile", "drad.compile"])
def test_requests_in_one_thread(models, inputs, compiler):
    model = models[0]
    compiled = (
        drad.compile(model, **OPTIONS, dense_steps=2) if compiler == "drad.compile" else fast(model, dense_steps=2)
    )
    requests = drad.generation(), drad.generation()
    found = [[], []]
    for request, timestep in interleaved(requests):
        found[request].append(is_dense(compiled, model, inputs, timestep))
    assert found == [GATED, GATED]
    assert "jump back and forth" not in str(drad.report(compiled))


@pytest.mark.parametrize("compiler", ["torch.compile", "drad.compile"])
def test_requests_that_are_mixed_are_said(models, inputs, caplog, compiler):
    options = dict(OPTIONS, dense_steps=2)
    compiled = drad.compile(models[0], **options) if compiler == "drad.compile" else fast(models[0], dense_steps=2)
    one = drad.generation()
    for _, timestep in interleaved((one, one)):
        run(compiled, inputs, timestep)
    assert "jump back and forth" in str(drad.report(compiled))
    assert caplog.text.count("jump back and forth") == 1
    assert "generation()" in caplog.text


@pytest.mark.parametrize("steps", [STEPS, (900.0, 400.0), (300.0,), tuple(range(40))], ids=len)
def test_generations_one_after_another_are_not_mixed(models, inputs, steps):
    compiled = drad.compile(lambda x, timestep: x, **OPTIONS, dense_steps=1)
    for _ in range(4):
        for timestep in steps:
            for _ in range(2):
                compiled(torch.zeros(1), torch.tensor([float(timestep)]))
    assert not notes_of(compiled).mixed


@pytest.fixture(scope="module")
def router():
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    return Router(weight - weight.mean(0), torch.zeros(3))


def prompt(router, regime):
    return 3 * router.weight[regime].expand(1, 7, 16).contiguous()


def test_a_request_keeps_its_own_regime(models, inputs, router):
    model = models[0]
    compiled = compile_sparse(model, block_size=16, inner="eager", min_tokens=0, router=router)
    alone = {r: compile_sparse(model, block_size=16, inner="eager", min_tokens=0, regime=n) for r, n in
             ((LOW, "low"), (HIGH, "high"))}  # fmt: skip
    requests = drad.generation(), drad.generation()
    for request, timestep in interleaved(requests):
        regime = (LOW, HIGH)[request]
        for text in (prompt(router, regime), prompt(router, MID)):  # the negative prompt second
            changes = dict(encoder_hidden_states=text)
            expected = run(alone[regime], inputs, timestep, **changes)
            assert relative_error(run(compiled, inputs, timestep, **changes), expected) < 1e-5


@pytest.mark.slow
def test_mixed_requests_never_get_less_than_their_own_regime(models, inputs, router):
    model = models[0]
    compiled = compile_sparse(model, block_size=16, inner="eager", min_tokens=0, router=router)
    high = compile_sparse(model, block_size=16, inner="eager", min_tokens=0, regime="high")
    one = drad.generation()
    steps = tuple(float(t) for t in range(900, 0, -50))
    for i, (request, timestep) in enumerate(interleaved((one, one), steps)):
        text = dict(encoder_hidden_states=prompt(router, (LOW, HIGH)[request]))
        out = run(compiled, inputs, timestep, **text)
        if request == 1 and i > 4:
            assert relative_error(out, run(high, inputs, timestep, **text)) < 1e-5


@pytest.mark.slow
def test_a_model_of_one_step_soon_gives_each_prompt_at_least_its_own_regime(models, inputs, router):
    model = models[0]
    compiled = compile_sparse(model, block_size=16, inner="eager", min_tokens=0, router=router)
    high = compile_sparse(model, block_size=16, inner="eager", min_tokens=0, regime="high")
    with drad.generation():
        for _ in range(5):
            run(compiled, inputs, 900.0, encoder_hidden_states=prompt(router, LOW))
        text = dict(encoder_hidden_states=prompt(router, HIGH))
        assert relative_error(run(compiled, inputs, 900.0, **text), run(high, inputs, 900.0, **text)) < 1e-5


def test_threads(models, inputs):
    model = models[0]
    compiled = fast(model, dense_steps=2)
    run(compiled, inputs, STEPS[0])
    barrier, found = threading.Barrier(3, timeout=60), [[], [], []]

    def work(number):
        for i in range(len(STEPS) + 2):
            barrier.wait()
            if 0 <= i - number < len(STEPS):
                found[number].append(is_dense(compiled, model, inputs, STEPS[i - number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [GATED] * 3
    assert len(drad.report(compiled).graphs) == 1


def test_asyncio_tasks(models, inputs):
    model = models[0]
    compiled = fast(model, dense_steps=2)

    async def request(in_thread):
        found = []
        with drad.generation():
            for timestep in STEPS:
                if in_thread:
                    found.append(await asyncio.to_thread(is_dense, compiled, model, inputs, timestep))
                else:
                    found.append(is_dense(compiled, model, inputs, timestep))
                await asyncio.sleep(0)
        return found

    async def serve():
        return await asyncio.gather(request(False), request(True), request(False))

    assert asyncio.run(serve()) == [GATED] * 3


def test_generations_nest_and_survive_errors(models, inputs):
    model = models[0]
    compiled = fast(model, dense_steps=1)
    outer = drad.generation()
    with outer:
        assert is_dense(compiled, model, inputs, 900.0)
        with pytest.raises(Exception, match="no_such_argument"), drad.generation():
            run(compiled, inputs, 900.0, no_such_argument=1)
        assert not is_dense(compiled, model, inputs, 800.0)
    with outer:
        assert not is_dense(compiled, model, inputs, 700.0)


def states(compiled):
    (graph,) = drad.report(compiled).graphs
    return [state for owner in graph.state.owners() for state in graph.state.pool_of(owner).states]


@pytest.mark.parametrize("options", [dict(), slow(dict(mode="dynamic_threshold", refresh_steps=2))], ids=str)
def test_a_later_generation_reuses_the_tensors_of_one_that_is_over(models, inputs, options):
    compiled = fast(models[0], dense_steps=1, **options)
    addresses = set()
    for _ in range(3):
        with drad.generation():
            run(compiled, inputs, 900.0)
            assert not drad.report(compiled).replaced[0].sparsity
            (state,) = states(compiled)
            addresses.add(tuple(tensor.data_ptr() for tensor in state.tensors))
    assert len(addresses) == 1


def test_state_goes_with_its_model(inputs):
    model = net(3)
    compiled = fast(model, dense_steps=1)
    run(compiled, inputs, 900.0)
    (state,) = states(compiled)
    kept = weakref.ref(state)
    del model, compiled, state
    torch._dynamo.reset()
    gc.collect()
    assert kept() is None


def test_what_is_handed_to_a_graph_is_static_for_cuda_graphs(models, inputs, monkeypatch):
    from torch._inductor import compile_fx

    seen = []

    def spy(gm, example_inputs, **kwargs):
        seen.append((len(example_inputs), set(kwargs.get("static_input_idxs", ()))))
        raise RuntimeError("seen")

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", spy)
    with pytest.raises(Exception, match="seen"):
        run(fast(models[0], dense_steps=1, mode="dynamic_threshold", refresh_steps=2, inner="inductor",
                 inner_options={"fx_graph_cache": False}), inputs, 900.0)  # fmt: skip
    ((number, static),) = seen
    added = 1 + 2 * 3  # clock; kept counts, kept indices and stats of two sites
    assert set(range(number - added, number)) <= static


@pytest.mark.gpu
def test_cuda_graphs_replay_for_each_request_without_a_host_sync(inputs):
    model = net(0).cuda()
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    compiled = fast(model, dense_steps=2, inner="inductor", inner_options={"triton.cudagraphs": True})
    requests = drad.generation(), drad.generation()
    for _ in range(2):  # a graph is recorded once for each request
        for _, timestep in interleaved(requests):
            run(compiled, inputs, timestep)
    expected = {timestep: run(model, inputs, timestep).clone() for timestep in STEPS}
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for request, timestep in interleaved(requests):
            found.append((request, timestep, run(compiled, inputs, timestep).clone()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gated = [[], []]
    for request, timestep, out in found:
        gated[request].append(relative_error(out, expected[timestep]) < 1e-3)
    assert gated == [GATED, GATED]


class Late(torch.nn.Module):
    """Everything lies behind a graph break, in a function that Dynamo makes, which is given no module."""

    def __init__(self):
        super().__init__()
        self.time = torch.nn.Linear(2, 32)

    def forward(self, hidden_states, timestep):
        weight, bias = self.time.weight, self.time.bias
        hidden_states = hidden_states * 1.0
        torch._dynamo.graph_break()
        time = torch.nn.functional.linear(torch.stack([timestep.sin(), timestep.cos()], 1), weight, bias)
        q = (hidden_states.flatten(2).transpose(1, 2) + time[:, None]).unflatten(2, (2, -1)).transpose(1, 2)
        return (torch.nn.functional.scaled_dot_product_attention(q, q, q),)


def test_behind_a_graph_break(models):
    models = Late(), Late()
    inputs = dict(hidden_states=torch.randn(1, 32, 5, 6, 8), timestep=torch.tensor([0.0]))
    a, b = (torch.compile(m, backend="dynamicrad", options=dict(OPTIONS, dense_steps=2)) for m in models)
    found = []
    for timestep in STEPS:
        run(a, inputs, timestep)
        found.append(is_dense(b, models[1], inputs, timestep))
    assert found == GATED
    assert len(drad.report(a).replaced) == len(drad.report(b).replaced) == 1


class TwoOfAKind(torch.nn.Module):
    """Two experts of equal code, one for the noisy steps, as in Wan 2.2."""

    def __init__(self, models):
        super().__init__()
        self.experts = torch.nn.ModuleList(models)


@pytest.mark.slow
def test_experts_compiled_in_place(models, inputs):
    pair = TwoOfAKind([net(1), net(2)])
    for expert in pair.experts:
        expert.compile(backend="dynamicrad", options=dict(OPTIONS, dense_steps=1))
    plain = [net(1), net(2)]
    for number, timestep in ((0, 900.0), (0, 800.0), (1, 700.0), (1, 600.0)):
        found = is_dense(pair.experts[number], plain[number], inputs, timestep)
        assert found == (timestep in (900.0, 700.0))  # each counts its own steps
    assert len(drad.report(pair).replaced) == 2
    assert drad.report(pair.experts[1]).replaced[0].sparsity == pytest.approx(0.3, abs=0.03)


def test_a_function_and_a_method(models, inputs):
    model = models[0]

    @dataclass  # compared by value, so that it has no hash
    class Pipe:
        transformer: torch.nn.Module

        def step(self, **kwargs):
            return self.transformer(**kwargs)

    def step(**kwargs):
        return model(**kwargs)

    options = dict(OPTIONS, dense_steps=1)
    for function in (step, Pipe(model).step):
        compiled = torch.compile(function, backend="dynamicrad", options=options, fullgraph=True)
        assert "call the compiled model first" in drad.report(compiled).summary()
        assert [is_dense(compiled, model, inputs, t) for t in STEPS[:2]] == [True, False]
        assert len(drad.report(compiled).replaced) == 2
        torch._dynamo.reset()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda compiled: pickle.loads(pickle.dumps(compiled)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("compiler", ["drad.compile", slow("torch.compile")])
def test_copies_have_a_state_of_their_own(inputs, how, compiler, router):
    model = net(5)
    options = dict(OPTIONS, regime="auto", router=router, dense_steps=2)
    compiled = drad.compile(model, **options) if compiler == "drad.compile" else fast(model, **options)
    for timestep in STEPS[:3]:
        run(compiled, inputs, timestep)
    twin = COPIES[how](compiled)
    assert type(twin) is type(compiled)
    assert [is_dense(twin, model, inputs, timestep) for timestep in STEPS] == GATED
    assert not is_dense(compiled, model, inputs, STEPS[3])
    assert len(drad.report(twin).replaced) == 2
    assert drad.report(twin).replaced[0].sparsity == pytest.approx(drad.report(compiled).replaced[0].sparsity)


def test_nothing_is_kept_of_graphs_that_are_gone(models, inputs):
    compiled = fast(models[0], sparsity=0.5)
    run(compiled, inputs, 900.0)
    kept = len(_captured)
    torch._dynamo.reset()
    gc.collect()
    assert len(_captured) < kept
    assert len(drad.report(compiled).graphs) == 0
