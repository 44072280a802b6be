"""What keeps a row of the day from running: the build or the check that failed before it."""

from __future__ import annotations

from .runner import Row, Values
from .tile_rows import FIELDS
from .variants import entry_of

MEASURED = ("forward", "backward", "overhead", "graphs", "steps")


def bar(row: Row, content: Values, step_dim: int) -> str | None:
    """Why a row must not run, None if it may; `step_dim`: head_dim of the rows that name none."""
    rows, facts = content["rows"], row.facts
    if row.group in ("tiles", "tries"):
        return _tile_bar(row, rows)
    if row.group == "correctness" and "dtype" in facts:  # of a form
        return _form_bar(facts["kernel"], None, rows) or _not_built(facts["kernel"], rows)
    dim = facts.get("head_dim", step_dim)
    if row.group == "backward" and (why := _form_bar(f"backward {facts.get('kernel', 'triton')}", dim, rows)):
        return why
    return _form_bar(f"forward {kernel_in_use(content, dim)}", dim, rows) if row.group in MEASURED else None


def _not_built(form: str, rows: list[Values]) -> str | None:
    built = [other for other in rows if other["group"] == "builds" and f"forward {other['kernel']}" == form]
    return f"no tile of it was built: {built[0]['why']}" if built and not any(map(_may_be, built)) else None


def kernel_in_use(content: Values, dim: int) -> str:
    """The form of the forward that the op takes at a head_dim."""
    for item in content.get("tile_proposal", []):
        if item["head_dim"] == dim:
            return str(item["kernel"])
    return "triton"


def _tile_bar(row: Row, rows: list[Values]) -> str | None:
    same = {name: row.facts[name] for name in ("head_dim", *FIELDS)}
    for other in rows:
        before = other["group"] == "builds" or (other["group"] == "tries" and row.group == "tiles")
        if not before or any(other[name] != value for name, value in same.items()):
            continue
        if not _may_be(other):
            return f"{other['name']}: {other['status']}, {other['why']}"
    return _form_bar(f"forward {same['kernel']}", same["head_dim"] if row.group == "tiles" else None, rows)


def _form_bar(form: str, dim: int | None, rows: list[Values]) -> str | None:
    """A check of this form that failed: in half precision at such a head_dim, or anywhere if it took its process.

    dim None: one that took its process only; what is itself a check runs after a wrong result, but not after a hang.
    """
    for other in rows:
        if other["group"] != "correctness" or other.get("kernel") != form or other["status"] != "failed":
            continue
        near = dim is not None and entry_of(other["head_dim"]) == entry_of(dim) and other["dtype"] != "float32"
        if near or other.get("lost_its_process"):
            return f"{other['name']} failed: {other['why']}"
    return None


def _may_be(before: Values) -> bool:
    """What there was no time for says nothing against a tile."""
    return before["status"] in ("ok", "skipped")
