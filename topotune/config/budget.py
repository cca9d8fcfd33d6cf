"""How much a search may spend, what one trial may take before it is ended, and what it holds."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from topotune.config.space import Frozen, no_flag, one_given

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = r"([0-9]*\.?[0-9]+)\s*([smhd])"


def _seconds(value: object) -> object:
    """Seconds from a number or from text such as "90s", "20m", "1.5h", "2d"."""
    if isinstance(value, str):
        found = re.fullmatch(_DURATION, value.strip())
        if found is None:
            raise ValueError(
                f"expected seconds or a number with s, m, h or d, such as 20m (got {value!r})"
            )
        return float(found[1]) * _UNITS[found[2]]
    return value


def _text(pattern: str) -> object:
    """The type of a text of this form, spaces around it apart, for the JSON schema."""
    return Annotated[str, Field(pattern=rf"^\s*{pattern}\s*$")]


_Positive = Annotated[float, Field(gt=0)]
_Patience = Annotated[float, Field(ge=1)]
Seconds: TypeAlias = Annotated[
    _Positive,
    BeforeValidator(_seconds, json_schema_input_type=_Positive | _text(_DURATION)),
]


class Budget(Frozen):
    """When the search ends: at the first limit that is reached.

    Attributes:
        trials: trials that are started at most.
        epochs: epochs of a trial that nothing stops.
        wall_clock: time of the search, all sessions together.
        device_seconds: the ledger: time that trials held a device (a GPU, or their CPU slot),
            summed over all trials, failed, pruned and repeated work included.
        max_failures: how often a trial is restarted, from its last epoch, after its worker crashed
            or was killed. An exception in the trial's code is never retried.
        max_node_failures: the same after the loss of a whole node, which is no fault of the trial.
        max_out_of_memory: the same after Ray ended the worker because its node ran out of memory.
    """

    model_config = ConfigDict(json_schema_extra=one_given("trials", "wall_clock", "device_seconds"))

    trials: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=5, ge=1)
    wall_clock: Seconds | None = None
    device_seconds: Seconds | None = None
    max_failures: int = Field(default=2, ge=0)
    max_node_failures: int = Field(default=20, ge=0)
    max_out_of_memory: int = Field(default=2, ge=0)

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.trials is None and self.wall_clock is None and self.device_seconds is None:
            raise ValueError("a search needs an end: give trials, wall_clock or device_seconds")
        return self


_BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_BYTES |= {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
_SIZE = r"([0-9]*\.?[0-9]+)\s*([kKmMgGtT][iI]?[bB])"


def _bytes(value: object) -> object:
    """Bytes from a number or from text such as "800MB", "1.5GB", "2GiB"."""
    if isinstance(value, str) and value != "auto":
        found = re.fullmatch(_SIZE, value.strip())
        if found is None:
            raise ValueError(
                f"expected bytes, a number with MB, GB, MiB or GiB, such as 4GB, or auto "
                f"(got {value!r})"
            )
        return float(found[1]) * _BYTES[found[2].lower()]
    return value


_Memory = Annotated[float, Field(ge=2.0**20)] | Literal["auto"]


class Limits(Frozen):
    """What a running trial may take; one that takes more ends as FAILED and is not retried.

    Attributes:
        stall: longest time without progress, such as 30m: opening the trial (libraries, data), a
            training step, a block of validation or of the overhead measurement. null for no limit.
        memory: resident memory of the trial's process and its children, such as 4GB; "auto": 90 %
            of the memory of the machine (or of its container). null for no limit.
    """

    stall: (
        Annotated[
            _Patience,
            BeforeValidator(_seconds, json_schema_input_type=_Patience | _text(_DURATION)),
        ]
        | None
    ) = 1800.0
    memory: (
        Annotated[_Memory, BeforeValidator(_bytes, json_schema_input_type=_Memory | _text(_SIZE))]
        | None
    ) = "auto"


_RAYS_OWN = ("cpu", "gpu", "memory", "object_store_memory")
"""Names that Ray gives a meaning to, whatever their case."""


class Resources(Frozen):
    """What one trial holds, and how many run at once.

    Attributes:
        cpus: CPU cores (and torch threads) a trial.
        gpus: GPUs a trial: a whole number, or a fraction below 1 for trials that share one;
            "auto": 1 if the cluster has or can get any, else 0.
        gpu_memory: the largest part of a GPU's memory that the trial's process may take, above 0
            and at most 1; "auto": the fraction of a GPU that it holds, and all of a whole one.
        custom: amounts of the cluster's custom resources, by name, that a trial holds.
        concurrency: trials at once; "auto": as many as the resources hold, nodes that an
            autoscaler may add included.
        priority: share of a cluster that several searches use at once: one of priority 2 gets
            twice as many trials at once as one of priority 1.
    """

    cpus: int = Field(default=1, ge=1)
    gpus: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = "auto"
    gpu_memory: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = "auto"
    custom: dict[
        str, Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(no_flag)]
    ] = Field(default_factory=dict)
    concurrency: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    priority: int = Field(default=1, ge=1, le=100)

    @field_validator("gpus")
    @classmethod
    def _whole_or_shared(cls, gpus: Literal["auto"] | float) -> Literal["auto"] | float:
        if gpus != "auto" and gpus > 1 and not float(gpus).is_integer():
            raise ValueError(
                f"a trial shares one GPU (a fraction below 1) or holds whole ones (got {gpus:g}); "
                f"write {math.floor(gpus)} or {math.ceil(gpus)}"
            )
        return gpus

    @field_validator("custom")
    @classmethod
    def _not_rays_own(cls, custom: dict[str, float]) -> dict[str, float]:
        for name in custom:
            if not name or name.lower() in _RAYS_OWN or name.startswith("node:"):
                raise ValueError(
                    f"{name!r} is a name of Ray's own; write cpus or gpus, or the name of a custom "
                    "resource that its nodes were started with (ray start --resources)"
                )
        return custom
