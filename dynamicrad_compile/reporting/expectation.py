"""What a model is expected to gain on a device, by tables and arithmetic: never measured on this model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Expectation:
    """Expected speed-up of one call of a model over the same model dense; what is not known is None.

    device     where: "H100 SXM", "this CPU"
    attention  dense time / sparse time of all attention
    step       dense time / sparse time of the whole call
    share      of the dense call's time that attention takes, 0..1
    measured   whether the table's figures of attention alone were measured; else a cost model gave them
    basis      where the figures are from; empty where nothing is known
    unknown    why what is None is not known; empty where all is known
    """

    device: str
    attention: float | None = None
    step: float | None = None
    share: float | None = None
    measured: bool = False
    basis: str = ""
    unknown: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"expected on {self.device}"
        if self.attention is None:
            return f"{head}: not known, {self.unknown}"
        if self.attention == self.step == 1.0:
            return f"{head}: no gain, {self.basis}"
        step = f"step not known, {self.unknown}"
        if self.step is not None and self.share is not None:
            step = f"step {self.step:.1f}x (attention is {self.share:.0%} of a dense step)"
        return f"{head}: attention {self.attention:.1f}x, {step}; {self.basis}"
