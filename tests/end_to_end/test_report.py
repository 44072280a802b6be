"""drad.report: of whatever was compiled, in whatever way, what has run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from support.graphs import OPTIONS, call, compile_sparse, drad, make

NOT_OURS = "not compiled with this backend"
NOT_CALLED = "call the compiled model first"
GIVEN = dict(backend="dynamicrad", options=dict(OPTIONS, block_size=16, sparsity=0.6, inner="eager"))


@pytest.fixture
def wan():
    return make("wan_t2v")[:2]


def replaced(compiled):
    return [site.path for site in drad.report(compiled).replaced]


class Pipe:
    """As a pipeline of diffusers: models as attributes, and in a table of components."""

    def __init__(self, **components):
        self.components = components
        self.name = "a pipe"

    def __getattr__(self, name):
        if name == "components":
            raise AttributeError(name)
        return self.components[name]

    def __call__(self, prompt):
        return prompt


def test_a_pipeline_reports_each_compiled_part(wan):
    model, kwargs = wan
    other = make("cogvideox_5b")
    pipe = Pipe(
        transformer=torch.compile(model, **GIVEN), other=torch.compile(other[0], **GIVEN), plain=torch.nn.ReLU()
    )
    assert NOT_CALLED in drad.report(pipe).summary()
    call(pipe.transformer, kwargs)
    assert replaced(pipe) == ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"]
    call(pipe.other, other[1])
    assert {path.split(".")[0] for path in replaced(pipe)} == {"transformer", "other"}
    assert "plain" not in str(drad.report(pipe))


def test_what_is_not_compiled_with_this_backend(wan):
    model, kwargs = wan
    call(model, kwargs)
    for thing in (model, Pipe(transformer=model), torch.compile(model, backend="eager"), call, Pipe()):
        assert NOT_OURS in drad.report(thing).summary()
    assert NOT_CALLED in drad.report(torch.compile(model, **GIVEN)).summary()


@pytest.mark.parametrize("compiled", [3, None, "transformer", [torch.nn.ReLU()]], ids=str)
def test_what_is_no_model_at_all(compiled):
    with pytest.raises(TypeError, match="expected a compiled model"):
        drad.report(compiled)


def test_compiled_in_place(wan):
    model, kwargs = wan
    model.compile(**GIVEN)
    assert NOT_CALLED in drad.report(model).summary()
    call(model, kwargs)
    assert len(replaced(model)) == 2


def test_a_compiled_forward(wan):
    model, kwargs = wan
    model.forward = torch.compile(model.forward, **GIVEN)
    call(model, kwargs)
    assert len(replaced(model)) == len(replaced(model.forward)) == 2


def test_a_copy_and_its_original(wan):
    model, kwargs = wan
    compiled = compile_sparse(model, sparsity=0.6)
    call(compiled, kwargs)
    twin = copy.deepcopy(compiled)
    assert NOT_CALLED in drad.report(twin).summary()
    call(twin, kwargs)
    assert len(replaced(twin)) == len(replaced(compiled)) == 2


def test_a_model_inside_another(wan):
    model, kwargs = wan

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.compile(model, **GIVEN)

        def forward(self, **kwargs):
            return self.inner(**kwargs)

    wrapper = Wrapper()
    call(wrapper, kwargs)
    assert len(replaced(wrapper)) == 2


def test_weights_that_are_replaced_at_every_call(wan):
    """As sequential offloading and FSDP do."""
    model, kwargs = wan
    compiled = compile_sparse(model, sparsity=0.6, dense_steps=1)
    for timestep in (900.0, 700.0):
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.detach().clone())
        call(compiled, {**kwargs, "timestep": torch.full_like(kwargs["timestep"], timestep)})
    assert len(drad.report(compiled).graphs) == 1
    assert drad.report(compiled).replaced[0].sparsity == pytest.approx(0.3, abs=0.03)


def test_weights_may_be_swapped_after_a_call(wan):
    """`torch.utils.swap_tensors`, which quantised models are moved by, refuses tensors with weak references."""
    model, kwargs = wan
    call(compile_sparse(model, sparsity=0.6), kwargs)
    torch._dynamo.reset()
    weight = next(model.parameters())
    torch.utils.swap_tensors(weight, torch.nn.Parameter(torch.zeros_like(weight)))
    assert not weight.any()


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(wan, one_process):
    model, kwargs = wan
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    compiled = torch.compile(wrapped, **GIVEN)
    call(compiled, kwargs)
    assert replaced(compiled)
    assert replaced(wrapped) == replaced(model) == replaced(compiled)
    del compiled, wrapped
    inside = torch.nn.parallel.DistributedDataParallel(torch.compile(make("wan_t2v")[0], **GIVEN))
    call(inside, kwargs)
    assert len(replaced(inside)) == 2


def test_fsdp2(wan, one_process):
    from torch.distributed.fsdp import fully_shard

    model, kwargs = wan
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    compiled = torch.compile(model, **GIVEN)
    call(compiled, kwargs)
    assert replaced(compiled) == replaced(model)
    assert replaced(compiled)
