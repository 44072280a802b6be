"""`shard(model, mesh)`: one clip on several processes, for models whose library has no plan for it."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ShardError, nearest
from .exchange import Shards
from .forwards import attend, cut, gather, restore
from .plans import PLANS, ShardPlan

Model = TypeVar("Model", bound=torch.nn.Module)

_REPLACED = "_dynamicrad_shard"


def shard(model: Model, mesh: DeviceMesh, plan: ShardPlan | None = None) -> Model:
    """Each process of `mesh` computes its rows of a model's video tokens; the output is whole on all of them.

    mesh: of one dimension; its size divides the heads. plan: for a class that `PLANS` does not list.
    All processes call the model with the same input. Returns the model, which is changed in place; on one process it is
    not. Raises ShardError.
    """
    target = getattr(model, "_orig_mod", model)
    if not dist.is_available() or not dist.is_initialized():
        raise ShardError("torch.distributed is not initialised: call torch.distributed.init_process_group() first")
    if mesh.ndim != 1:
        raise ShardError(f"the mesh has {mesh.ndim} dimensions, expected one: name it, as in mesh['sequence']")
    if hasattr(target, _REPLACED):
        raise ShardError(f"{type(target).__name__} is sharded already: call drad.unshard(model) first")
    plan = plan or _plan_of(target)
    blocks = [block for name in plan.blocks for block in _module(target, name).children()]
    attentions = [_module(block, plan.attention) for block in blocks]
    out = _module(target, plan.out)
    for attention in attentions:
        heads = getattr(attention, "heads", None)
        if heads is not None and heads % mesh.size():
            raise ShardError(
                f"{type(target).__name__} has {heads} heads, which can't be shared out among {mesh.size()} processes: "
                f"use a mesh whose size divides {heads}"
            )
    if mesh.size() > 1:
        shards = Shards(mesh.get_group(), mesh.get_local_rank(), mesh.size())
        replaced = [cut(block, shards, plan, i == 0) for i, block in enumerate(blocks)]
        replaced += [attend(attention, shards, plan) for attention in attentions]
        replaced.append(gather(out, shards))
        setattr(target, _REPLACED, replaced)
    return model


def unshard(model: Model) -> Model:
    """Undo `shard`; returns the model. Raises ShardError where it is not sharded."""
    target = getattr(model, "_orig_mod", model)
    if not hasattr(target, _REPLACED):
        raise ShardError(f"{type(target).__name__} is not sharded")
    for module, before in getattr(target, _REPLACED):
        restore(module, before)
    delattr(target, _REPLACED)
    return model


def _plan_of(model: torch.nn.Module) -> ShardPlan:
    for cls in type(model).__mro__:
        if cls.__name__ in PLANS:
            return PLANS[cls.__name__]
    name = type(model).__name__
    if getattr(model, "_cp_plan", None):
        raise ShardError(
            f"{name} brings a plan of its own: use "
            "model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=...))"
        )
    raise ShardError(
        f"no plan for {name}; known are {', '.join(PLANS)}.{nearest(name, PLANS)} Give drad.ShardPlan(...) as `plan`"
    )


def _module(model: torch.nn.Module, name: str) -> torch.nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ShardError(f"{type(model).__name__} has no module {name!r}, which its plan names") from error
