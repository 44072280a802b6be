"""Training through torch.compile(backend="dynamicrad"): a tiny Wan transformer with LoRA adapters, and whole."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, drad, first_output, make, masked_dense, relative_error

TRAINING = {**OPTIONS, "inner": "aot_eager"}


class LoRA(torch.nn.Module):
    """A frozen linear layer and a trained low-rank update, as peft's."""

    def __init__(self, base: torch.nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.lora_a = torch.nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x))


def model_to_train(kind: str):
    """(model, its inputs, a target for its output)"""
    torch.manual_seed(0)
    model, kwargs, _ = make("wan_t2v")
    if kind == "lora":
        model.requires_grad_(False)
        for block in model.blocks:
            for name in ("to_q", "to_k", "to_v"):
                setattr(block.attn1, name, LoRA(getattr(block.attn1, name)))
    with torch.no_grad():
        return model.train(), kwargs, torch.randn_like(first_output(model(**kwargs)))


def gradients(model, run, kwargs, target) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (first_output(run(**kwargs)) - target).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(got, expected):
    assert got.keys() == expected.keys()
    largest = max(float(grad.norm()) for grad in expected.values())
    for name, want in expected.items():
        # Some are zero but for rounding, such as those of the biases of keys.
        assert relative_error(got[name], want) < 1e-4 or (got[name] - want).norm() < 1e-6 * largest, name


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_gradients_at_sparsity_zero_are_those_of_dense_attention(kind: str):
    model, kwargs, target = model_to_train(kind)
    compiled = torch.compile(model, backend="dynamicrad", options={**TRAINING, "sparsity": 0.0}, fullgraph=True)
    expected = gradients(model, model, kwargs, target)
    assert any("attn1.to_k" in name and grad.any() for name, grad in expected.items())
    check_gradients(gradients(model, compiled, kwargs, target), expected)
    assert len(drad.report(compiled).replaced) == 2


def test_gradients_of_a_sparse_plan_are_those_of_masked_attention():
    model, kwargs, target = model_to_train("whole")
    compiled = torch.compile(model, backend="dynamicrad", options={**TRAINING, "sparsity": 0.6}, fullgraph=True)
    got = gradients(model, compiled, kwargs, target)
    with masked_dense(drad.report(compiled).replaced[0].plan), torch.enable_grad():
        expected = gradients(model, model, kwargs, target)
    check_gradients(got, expected)


@pytest.mark.slow
def test_loss_falls():
    model, kwargs, target = model_to_train("lora")
    compiled = torch.compile(model, backend="dynamicrad", options={**TRAINING, "sparsity": 0.6}, fullgraph=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(4):
        loss = (first_output(compiled(**kwargs)) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(drad.report(compiled).replaced) == 2
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
