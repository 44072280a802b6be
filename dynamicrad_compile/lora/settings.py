"""Settings of a LoRA training: one TOML file, every key checked.

output = "outputs/lora"        folder of the adapter, the journal, the curve and the state to resume from

[model]                        path, dtype
[data]                         clips, held_out
[adapter]                      rank, alpha, targets
[sparse]                       options of the backend, the same as at inference
[regimes]                      source, jitter
[loss]                         flow, distill, shift, timestep_scale, timestep_rises
[train]                        steps, batch_size, accumulate, learning_rate, ...
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import LoraError, OptionsError
from ..files import tomllib
from ..options import Options
from ..plans.patterns import PATTERNS
from ..problems import problems
from ..profiles import load_profile

SELF_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
NO_STEPS = "which timesteps the steps have is known only to the scheduler of a run; give timesteps"
NOT_IN_TRAINING = {
    "dense_steps": "which timesteps the first steps have is known only to the scheduler of a run; give dense_timestep",
    "refresh_steps": "in training every call chooses its blocks; leave it out, and set it at inference",
    "call_state": "the training sets it",
}


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(_Table):
    """The [model] table: a transformer of diffusers.

    path   its folder (config.json and weights), or a pipeline's folder with a folder `transformer`
    dtype  of the frozen weights; the adapter is float32
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class Data(_Table):
    """The [data] table: folders of clips, see `ClipFolder`.

    clips     to train on
    held_out  on which the loss is measured, none of them trained on
    workers   processes that read clips ahead
    """

    clips: str
    held_out: str | None = None
    workers: Annotated[int, Field(ge=0)] = 0


class Adapter(_Table):
    """The [adapter] table.

    rank, alpha  of every matrix; the update is scaled by alpha / rank
    targets      ends of the names of the linear layers that get one
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: Annotated[list[str], Field(min_length=1)] = SELF_ATTENTION


class Regimes(_Table):
    """The [regimes] table: in which regime of motion the mask of each clip is.

    source  "label": the clip's own; "router": the router of [sparse] from the prompt, as at inference;
            "random": any of the three; "low", "mid", "high": always that one
    jitter  share of clips that get any of the three instead
    """

    source: Literal["label", "router", "random", "low", "mid", "high"] = "label"
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.0


class Loss(_Table):
    """The [loss] table: flow * mean |v - (noise - clip)|^2 + distill * mean |v - v of the dense model|^2.

    shift           of the noise levels, as the scheduler's: s u / (1 + (s - 1) u) of uniform u in 0..1
    timestep_scale  the model's timestep at noise level 1
    timestep_rises  the model counts clean parts, not noise: its timestep is scale * (1 - level), v is clip - noise
    """

    flow: Annotated[float, Field(ge=0)] = 1.0
    distill: Annotated[float, Field(ge=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 3.0
    timestep_scale: Annotated[float, Field(gt=0)] = 1000.0
    timestep_rises: bool = False


class Train(_Table):
    """The [train] table.

    steps                   of the optimizer (AdamW)
    batch_size, accumulate  clips of a call, and calls of a step, for each process
    learning_rate           after `warmup` steps; it falls to a tenth along a cosine
    clip_norm               gradients are scaled down to this norm
    save_every, eval_every  steps; 0 is only at the end
    eval_clips              held-out clips, each at one noise level, of a measurement on the way
    mixed_precision         accelerate's
    """

    steps: Annotated[int, Field(ge=1)] = 1000
    batch_size: Annotated[int, Field(ge=1, le=64)] = 1
    accumulate: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[int, Field(ge=0)] = 20
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    save_every: Annotated[int, Field(ge=0)] = 100
    eval_every: Annotated[int, Field(ge=0)] = 0
    eval_clips: Annotated[int, Field(ge=1)] = 16
    seed: Annotated[int, Field(ge=0)] = 0


class Settings(_Table):
    """All settings. `model` and `data` may be left out where both are given in Python.

    Raises LoraError: key, value, what was expected.
    """

    output: str
    model: Model | None = None
    data: Data | None = None
    adapter: Adapter = Adapter()
    sparse: dict[str, Any] = {}
    regimes: Regimes = Regimes()
    loss: Loss = Loss()
    train: Train = Train()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise LoraError("\n".join(problems(error, Settings))) from None
        if not self.loss.flow and not self.loss.distill:
            raise LoraError("loss.flow and loss.distill are both 0: give one of them a weight.")
        if self.regimes.source == "router" and not self.sparse.get("router"):
            raise LoraError("regimes.source = 'router', and [sparse] has no router: give the path of one.")

    @field_validator("sparse")
    @classmethod
    def _options(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, why in NOT_IN_TRAINING.items():
            if name in value:
                raise ValueError(f"{name} can't be used in training: {why}")
        try:
            options = Options.from_mapping(value)
        except OptionsError as error:
            raise ValueError(str(error)) from None
        profile = None if options.profile == "auto" else load_profile(options.profile)
        scheduled = options.sparsity is None and profile is not None and profile.is_scheduled
        if scheduled or (isinstance(options.sparsity, tuple) and options.schedule_by == "step"):
            raise ValueError(
                f"sparsity can't be a schedule by steps in training: {NO_STEPS}, and schedule_by='timestep'"
            )
        pattern = options.pattern or (profile.pattern if profile is not None else "")
        if pattern and PATTERNS[pattern].by_step:
            raise ValueError(f"pattern {pattern!r} can't be used in training: its blocks are those of a step of a run")
        return value

    @property
    def dense(self) -> bool:
        """Whether nothing is to be sparse: LoRA as everyone trains it, to compare with."""
        return self.sparse.get("pattern") == "dense"


def load_settings(path: str | os.PathLike[str]) -> Settings:
    """Read a TOML file; paths in it are relative to the working directory. Raises LoraError."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoraError(f"there is no settings file {path}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LoraError(f"{path} is not valid TOML: {error}.") from None
    try:
        settings = Settings(**values)
    except LoraError as error:
        raise LoraError(f"{path}:\n{error}") from None
    for table in ("model", "data"):
        if getattr(settings, table) is None:
            raise LoraError(f"{path}: the table [{table}] is missing.")
    return settings
