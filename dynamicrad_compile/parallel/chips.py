"""Rates of the devices that a step is estimated for: data sheets, and shares of them that are taken to be reached."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionsError, nearest

MATMUL = 0.75
"""Share of the peak that the large products outside of attention are taken to reach: an assumption."""


@dataclass(frozen=True)
class Chip:
    """A GPU.

    name    as the vendor has it
    arch    of the crossover table, see `plans.crossover`
    tensor  dense 16-bit matrix TFLOP/s with fp32 sums, by the data sheet
    dense   share of it that dense attention is taken to reach at head_dim 128, and at 64: what the crossover table's
            estimates go by (benchmarks/suite/estimate.py)
    link    GB/s to other GPUs, each way; link_name: over what
    """

    name: str
    arch: str
    tensor: float
    dense: tuple[float, float]
    link: float
    link_name: str

    def attention_rate(self, head_dim: int) -> float:
        """FLOP/s of dense attention."""
        return self.dense[head_dim <= 64] * self.tensor * 1e12

    @property
    def matmul_rate(self) -> float:
        """FLOP/s of other products."""
        return MATMUL * self.tensor * 1e12


# NVIDIA's data sheets: `tensor` as in benchmarks/suite/machine.py; NVLink is given there for both ways together, 600,
# 900 and 1800 GB/s. PCIe 4.0 x16 has 32 GB/s each way, of which copies get about 25; PCIe 5.0 twice that.
CHIPS: dict[str, Chip] = {
    "a100": Chip("A100 SXM", "sm_80", 312, (0.65, 0.60), 300, "NVLink of A100 SXM"),
    "h100": Chip("H100 SXM", "sm_90", 989, (0.57, 0.42), 450, "NVLink of H100 SXM"),
    "h200": Chip("H200 SXM", "sm_90", 989, (0.57, 0.42), 450, "NVLink of H200 SXM"),
    "b200": Chip("B200", "sm_100", 2250, (0.55, 0.45), 900, "NVLink of B200"),
    "3090": Chip("RTX 3090", "sm_86", 71, (0.75, 0.70), 25, "PCIe 4.0 x16"),
    "4090": Chip("RTX 4090", "sm_89", 165, (0.85, 0.80), 25, "PCIe 4.0 x16"),
    "5090": Chip("RTX 5090", "sm_120", 209, (0.85, 0.80), 50, "PCIe 5.0 x16"),
}

CPU = Chip("this CPU", "cpu", 1, (MATMUL, MATMUL), 0, "")
"""Of its times only ratios mean anything: attention and other products have as many FLOPs a second, so that shares of
time are shares of FLOPs. So they are within 1 % at the width of Wan 1.3B (benchmarks/results/cpu_step_epyc_2cores.md:
37, 53 and 70 % of the FLOPs at 8k, 16k and 32k tokens, 37, 53 and 71 % of the time)."""


def chip(name: str) -> Chip:
    """The chip of a name. Raises OptionsError for one that is not known here."""
    if name not in CHIPS:
        raise OptionsError(f"no device {name!r}: known here are {', '.join(CHIPS)}.{nearest(name, CHIPS)}")
    return CHIPS[name]
