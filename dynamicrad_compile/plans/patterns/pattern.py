"""What every pattern is: a name, parameters that check themselves, and the blocks that they give for a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from ...errors import PlanError, nearest
from ...profiles.parameters import StaticRatio, Table, limits
from ..layout import Layout
from ..plan import BlockPlan, Candidates

Parameters = TypeVar("Parameters", bound=Table)
Need = Literal["nothing", "selection", "step", "search"]


@dataclass(frozen=True)
class Pattern(Generic[Parameters]):
    """One way to choose blocks.

    name        as in the option `pattern` and in `make_plan`
    parameters  frozen type with a range and a default for each (`profiles.parameters`)
    plan        (layout, parameters) -> the static plan, P = 1 and H' = 1, int32 on the CPU
    classes     (layout, parameters) -> the same blocks in classes, for a choice at run time; None: all are forced
    needs       the most that a graph has to give it when it runs: "nothing", "selection" (`select_blocks`, by the
                queries and keys at hand), "step" (the number of the denoising step) or "search" (`search_blocks`,
                by the queries and keys of some steps, whose choice is kept)
    cycle       of a pattern that needs the step, (frames, parameters) -> after how many steps its plans are the same
                again; its parameters have a field `step`
    block_size  (grid, text before, text after, block size, parameters, queries) -> the block size that suits the
                pattern, of at most as many tokens; None: any does
    """

    name: str
    parameters: type[Parameters]
    plan: Callable[[Layout, Parameters], BlockPlan]
    classes: Callable[[Layout, Parameters], Candidates] | None = None
    needs: Need = "nothing"
    cycle: Callable[[int, Parameters], int] | None = None
    block_size: Callable[..., int] | None = None

    @property
    def by_regime(self) -> bool:
        """Whether its parameters are those that a profile has for each regime."""
        return issubclass(self.parameters, StaticRatio)

    @property
    def by_step(self) -> bool:
        """Whether its blocks depend on the step of a run."""
        return self.needs in ("step", "search")

    def candidates(self, layout: Layout, parameters: Parameters) -> Candidates:
        """The blocks that may be read; those of a pattern without classes are all forced."""
        if self.classes is not None:
            return self.classes(layout, parameters)
        return Candidates.forced(self.plan(layout, parameters))

    def checked(self, values: Mapping[str, Any]) -> Parameters:
        """The parameters that hold these values. Raises PlanError, which names value and range."""
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        try:
            return self.parameters(**plain)
        except ValidationError as error:
            raise PlanError("\n".join(_problem(self.parameters, problem) for problem in error.errors())) from None

    def check_names(self, given: Mapping[str, Any], more: tuple[str, ...] = ()) -> None:
        """Raises PlanError for a name that is neither a parameter nor among `more`."""
        known = [*self.parameters.model_fields, *more]
        unknown = [name for name in given if name not in known]
        if unknown:
            accepted = f"it takes {known}" if known else "it takes none"
            raise PlanError(
                f"unknown parameter {unknown[0]!r} of pattern {self.name!r}; {accepted}.{nearest(unknown[0], known)}"
            )


def plan_of_mask(mask: np.ndarray, layout: Layout, compensate: float = 0.0, covariance: bool = False) -> BlockPlan:
    """Plan of a block mask, bool [m, n] or [H', m, n] with m = layout.num_rows and n = layout.num_blocks."""
    plan = BlockPlan.from_mask(
        torch.from_numpy(mask),
        block_q=layout.block_size,
        block_kv=layout.block_size,
        q_len=layout.q_len,
        kv_len=layout.seq_len,
        compensate=compensate,
    )
    return replace(plan, **orders_of(layout), covariance=covariance, check_values=False)


def orders_of(layout: Layout) -> dict[str, Any]:
    """`order` and `q_order` of a `BlockPlan`, int64 [1, S]; None in raster order, and for queries that are all keys."""
    order, asked = layout.order(), None if layout.queries is None else layout.query_order()
    names = {"order": order, "q_order": asked}
    return {name: None if x is None else torch.from_numpy(x)[None] for name, x in names.items()}


def _problem(parameters: type[Table], problem: Any) -> str:
    """One problem of pydantic in our words."""
    name, kind = str(problem["loc"][0]), problem["type"]
    if kind == "missing":
        return f"parameter {name} is missing: give a value."
    if kind == "value_error":
        return f"{name} = {problem['input']!r}: {problem['ctx']['error']}."
    low, high = limits(parameters, name)
    if low is None and high is None:
        return f"{name} = {problem['input']!r}: {problem['msg']}."
    if high is None:
        return f"{name} must be an integer of at least {low}, got {problem['input']!r}."
    inside = kind in ("greater_than_equal", "less_than_equal")
    return f"{name} must be {'' if inside else 'a number '}in {low:g}..{high:g}, got {problem['input']!r}."
