"""What the figures of a run depend on: chip, driver, versions, commit; and what the chip can do at most."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dynamicrad_compile as drad
from dynamicrad_compile.bench.clock import processor
from dynamicrad_compile.plans import crossover

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Peak:
    """Data-sheet rates of a chip: dense 16-bit matrix TFLOP/s with fp32 sums, memory TB/s, and for the exponentials
    the multiprocessors, their clock in GHz (boost), and results of the special-function units a clock each.

    l2: TB/s out of the second-level cache as micro-benchmarks of others found it, not a data-sheet figure; 0: unknown.
    """

    tensor: float
    memory: float
    sms: int
    clock: float
    exps: int = 16
    l2: float = 0.0

    @property
    def exp_rate(self) -> float:
        """10^12 exponentials a second."""
        return self.sms * self.exps * self.clock / 1e3


# The first name that is part of the device's name counts, so longer ones come first. From the vendor's data sheets.
PEAKS: dict[str, Peak] = {
    "H100 PCIe": Peak(756, 2.0, 114, 1.755, l2=4.4),
    "H100 NVL": Peak(835, 3.9, 132, 1.785, l2=5.5),
    "GH200": Peak(989, 4.0, 132, 1.83, l2=5.5),
    "H200": Peak(989, 4.8, 132, 1.83, l2=5.5),
    "H100": Peak(989, 3.35, 132, 1.83, l2=5.5),
    "H800": Peak(989, 3.35, 132, 1.83, l2=5.5),
    "H20": Peak(148, 4.0, 78, 1.83),
    "B300": Peak(2250, 8.0, 148, 1.92, exps=32),
    "GB200": Peak(2500, 8.0, 148, 1.92),
    "B200": Peak(2250, 8.0, 148, 1.92),
    "A100-SXM4-80GB": Peak(312, 2.04, 108, 1.41, l2=4.0),
    "A100 80GB": Peak(312, 1.94, 108, 1.41, l2=4.0),
    "A100": Peak(312, 1.56, 108, 1.41, l2=4.0),
    "A10G": Peak(70, 0.6, 80, 1.71),
    "A10": Peak(125, 0.6, 72, 1.695),
    "L40S": Peak(362, 0.864, 142, 2.52),
    "L40": Peak(181, 0.864, 142, 2.49),
    "L4": Peak(121, 0.3, 58, 2.04),
    "RTX 3090": Peak(71, 0.936, 82, 1.695),
    "RTX 4090": Peak(165, 1.008, 128, 2.52),
    "RTX 5090": Peak(209, 1.79, 170, 2.41),
    "RTX PRO 6000": Peak(252, 1.79, 188, 2.6),
}


def peak_of(name: str) -> Peak | None:
    """The entry of a device's name, None if it has none."""
    return next((peak for part, peak in PEAKS.items() if part.lower() in name.lower()), None)


def describe(device: str) -> dict[str, Any]:
    """Facts about the machine, the versions and the code; nothing that tells whose machine it is."""
    about: dict[str, Any] = {
        "device": device,
        "chip": processor(),
        "arch": crossover.architecture(torch.device(device)) or device,
        "driver": None,
    }
    if device == "cpu":
        about |= {"threads": torch.get_num_threads(), "simd": torch.backends.cpu.get_cpu_capability()}
    else:
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "chip": properties.name,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": getattr(properties, "L2_cache_size", 0) >> 20,
            "cudnn": torch.backends.cudnn.version(),
        }
    return about | {
        "host": processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "dynamicrad": drad.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def file_name(script: str, about: dict[str, Any], kinds: list[str]) -> str:
    """Name of a run's files: script, chip, date and what kind of run it was."""
    chip = "".join(c if c.isalnum() else "_" for c in about["chip"].lower().removeprefix("nvidia ")).strip("_")
    return "-".join([script, chip, about["date"], *kinds])


def short(about: dict[str, Any]) -> str:
    """One line: chip and what its speed depends on."""
    if about["device"] == "cpu":
        return f"{about['chip']}, {about['threads']} of {about['cores']} cores, {about['simd']}"
    return f"{about['chip']}, driver {about['driver'] or 'unknown'}"


def versions(about: dict[str, Any]) -> str:
    """One line: the software."""
    parts = [f"{name} {about[name]}" for name in ("torch", "triton", "dynamicrad") if about[name]]
    return ", ".join([*parts, f"commit {about['commit']}"] if about["commit"] else parts)


def commit() -> str | None:
    """Short id of the checked-out commit, with "+" where files differ from it; None outside a repository."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if head is None:
        return None
    return head + ("+" if _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
